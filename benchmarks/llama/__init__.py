"""A pretrained LLaMA (SmolLM2-135M-Instruct) on GLUE."""
