"""Training and evaluation of adapters, and of task models."""
