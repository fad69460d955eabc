"""Every system of the paper on every family of backbone: weights, cost, throughput and accuracy.

python -m benchmarks.systems
"""
