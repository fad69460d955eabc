"""Estimates of a model's operations and memory, and measurement of its throughput."""
