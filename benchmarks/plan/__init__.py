"""Whether a plan keeps its promise, and what its sweep costs: three allowances on the same adapters of a task,
and the time of the search space ``quick``.

python -m benchmarks.plan [--glue GLUE]
"""
