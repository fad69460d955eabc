"""The model alone, groups, early exits and training in bfloat16 on a GPU, with random weights."""
