"""Every system of the paper on every backbone family: weights, cost, throughput and accuracy.

python -m benchmarks.systems
"""
