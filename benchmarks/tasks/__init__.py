"""Benchmarks of many tasks on one base model."""
