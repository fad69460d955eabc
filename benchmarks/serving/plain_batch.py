"""A plain Ray Serve deployment of a classifier: ``@serve.batch`` around the model, as in Serve's guide."""

# No postponed annotations here, because Serve reads the annotations of the deployment.
from typing import Any

import torch
from ray import serve
from ray.serve import Application
from starlette.requests import Request
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from revmux.utils.environment import replica_environment

Ranking = list[dict[str, Any]]


@serve.deployment(name="plain")
class PlainClassifier:
    """A replica of the classifier.

    Args:
        model: folder of the task model.
        max_length: tokens to which a text is truncated.
        max_batch: maximum number of inputs per forward pass.
        threads: CPU threads of the model.
    """

    def __init__(self, model: str, max_length: int, max_batch: int, threads: int) -> None:
        torch.set_num_threads(threads)
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model = AutoModelForSequenceClassification.from_pretrained(model).eval()
        self.max_length = max_length
        self.classify.set_max_batch_size(max_batch)  # type: ignore[attr-defined]

    @serve.batch(batch_wait_timeout_s=0.01)
    async def classify(self, texts: list[str]) -> list[Ranking]:
        """Return each text's labels with their scores, best first."""
        tokens = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        )  # each (B, S)
        with torch.inference_mode():
            scores, order = self.model(**tokens).logits.softmax(-1).sort(descending=True)  # (B, C) both
        names = self.model.config.id2label
        return [
            [{"label": names[index], "score": score} for index, score in zip(labels, values)]
            for labels, values in zip(order.tolist(), scores.tolist())
        ]

    async def __call__(self, request: Request) -> Ranking:
        body = await request.json()
        return await self.classify(body["inputs"])


def build(model: str, max_length: int, max_batch: int, threads: int, max_ongoing: int) -> Application:
    """Return the application with our environment; Serve's default of five concurrent requests is raised."""
    actor = {"num_cpus": 1, "runtime_env": {"env_vars": replica_environment()}}
    options = {"ray_actor_options": actor, "max_ongoing_requests": max_ongoing}
    deployment = PlainClassifier.options(**options, logging_config={"enable_access_log": False})  # type: ignore[attr-defined]
    application: Application = deployment.bind(model, max_length, max_batch, threads)
    return application
