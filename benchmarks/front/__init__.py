"""The front: accuracy against cost of every way to save computation, and what a plan ships for an allowance.

python -m benchmarks.front --glue GLUE
"""
