"""Does the plan keep its promise, and is its sweep worth it? Three allowances on a task's same adapters; the time of
``quick``.

python -m benchmarks.plan [--glue GLUE]
"""
