"""The time that frozen weights and the feature store save in training, measured in pairs.

python -m benchmarks.training
"""
