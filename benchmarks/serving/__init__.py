"""What groups gain in serving: the model alone, over HTTP under load and when quiet, and against other servers.

python -m benchmarks.serving
"""
