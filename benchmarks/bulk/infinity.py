"""Classify texts with Infinity's engine, without its server. It runs in an environment of its own.

INFINITY/bin/python infinity.py MODEL TEXTS.json BATCH THREADS
"""

import asyncio
import json
import sys
import time

import torch
from infinity_emb import AsyncEmbeddingEngine, EngineArgs


async def main(model: str, file: str, batch: int, threads: int) -> None:
    """Print the seconds that all texts take once the model is loaded and warm."""
    torch.set_num_threads(threads)
    with open(file) as stream:
        texts = json.load(stream)
    arguments = EngineArgs(model_name_or_path=model, engine="torch", device="cpu", batch_size=batch, model_warmup=False)
    engine = AsyncEmbeddingEngine.from_args(arguments)
    async with engine:
        await engine.classify(sentences=texts[:batch])
        started = time.perf_counter()
        answers, _ = await engine.classify(sentences=texts)
        assert len(answers) == len(texts)
        print("seconds", time.perf_counter() - started)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
