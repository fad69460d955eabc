"""Recording runs and models in MLflow."""
