"""Systems that are trained on one frozen model and compared: shared by the benchmarks of encoders and of LLaMAs."""
