"""A training run on Ray Train and the feature pass before it."""
