"""What is recorded in MLflow."""
