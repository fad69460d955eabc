"""Operations, memory and throughput of a model."""
