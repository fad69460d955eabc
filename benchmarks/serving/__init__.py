"""What groups gain in serving: the model alone, over HTTP with and without load, and against other servers.

python -m benchmarks.serving
"""
