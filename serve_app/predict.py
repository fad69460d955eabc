"""Classification: the endpoints of text-embeddings-inference and of the Open Inference Protocol."""

# No postponed annotations here: FastAPI reads those of the endpoints.
from time import perf_counter
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from revmux.errors import TextError
from revmux.pretrained.encoder import Text
from revmux.serving import Answer, Task
from serve_app import examples
from serve_app.body import read_body
from serve_app.errors import TooLarge
from serve_app.headers import reply_headers
from serve_app.open_inference import InferRequest, model_metadata, server_metadata
from serve_app.protocol import Asked, PredictRequest, parse
from serve_app.service import Service

_FAILURES = examples.failures(400, 404, 408, 413, 422, 424, 429, 504)


def predict_routes(service: Service) -> APIRouter:
    """``/predict``, ``/`` and ``/tasks/{task}/predict``."""
    router = APIRouter(tags=["classification"])
    described: dict[str, Any] = {
        "openapi_extra": examples.body(PredictRequest),
        "responses": {**examples.reply(examples.RANKINGS, "labels with their scores, best first"), **_FAILURES},
    }

    async def answer(request: Request, task: str | None) -> JSONResponse:
        started = perf_counter()
        asked = parse(await _body(service, request), PredictRequest)
        if task is not None and asked.task not in (None, task):
            raise TextError(f"the path names task {task!r} and the body {asked.task!r}; name one task")
        # Resolved once: tasks may come, go and change their names before the answer.
        resolved = service.engine.task(task or asked.task)
        texts = asked.texts
        answers = await classify(service, resolved, texts, asked)
        content = asked.reply(answers, resolved.label_names)
        return _reply(service, content, texts, answers, started)

    @router.post("/predict", **described)
    async def predict(request: Request) -> JSONResponse:
        """Classify one text, one sentence pair, or a batch."""
        return await answer(request, None)

    @router.post("/", include_in_schema=False)
    async def predict_at_root(request: Request) -> JSONResponse:
        return await answer(request, None)

    @router.post("/tasks/{task}/predict", **described)
    async def predict_task(task: str, request: Request) -> JSONResponse:
        """The same for one of several tasks."""
        return await answer(request, task)

    return router


def open_inference_routes(service: Service) -> APIRouter:
    """``/v2``: health, metadata, and inference; a model of the protocol is a task."""
    router = APIRouter(prefix="/v2", tags=["Open Inference Protocol"])

    @router.get("", responses=examples.failures())
    async def metadata() -> JSONResponse:
        """The server."""
        return JSONResponse(server_metadata())

    @router.get("/health/live")
    async def live() -> JSONResponse:
        """200 while the process answers."""
        return JSONResponse({"live": True})

    @router.get("/health/ready", responses=examples.failures())
    async def ready() -> JSONResponse:
        """200 if every model has just answered a text."""
        await service.probe()
        return JSONResponse({"ready": True})

    @router.get("/models/{task}", responses=examples.failures(404))
    async def model(task: str) -> JSONResponse:
        """The tensors of a task."""
        return JSONResponse(model_metadata(task, len(service.engine.task(task).label_names)))

    @router.get("/models/{task}/ready", responses=examples.failures(404))
    async def model_ready(task: str) -> JSONResponse:
        """200 if the model of this task has just answered a text."""
        service.engine.task(task)
        await service.probe(task)
        return JSONResponse({"name": task, "ready": True})

    @router.post(
        "/models/{task}/infer",
        openapi_extra=examples.body(InferRequest),
        responses={**examples.reply(examples.TENSORS, "labels and scores, best first"), **_FAILURES},
    )
    async def infer(task: str, request: Request) -> JSONResponse:
        """Classify a tensor of texts, or of sentence pairs."""
        started = perf_counter()
        resolved = service.engine.task(task)
        asked = parse(await _body(service, request), InferRequest)
        texts = asked.inputs[0].texts
        answers = await classify(service, resolved, texts, asked.parameters)
        return _reply(service, asked.reply(task, answers, resolved.label_names), texts, answers, started)

    return router


async def classify(service: Service, task: Task, texts: list[Text], asked: Asked) -> list[Answer]:
    """The answers of one task to all texts.

    Raises:
        TooLarge: more texts than one request may hold; and as :meth:`revmux.serving.Engine.answer`.
    """
    most = service.config.max_texts
    if len(texts) > most:
        raise TooLarge(f"{len(texts)} texts in one request, at most {most} are allowed; send fewer")
    return await service.engine.answer(
        texts,
        bool(asked.truncate),
        asked.max_multiplex,
        task=task,
        priority=asked.priority or 0,
        timeout=None if asked.timeout_ms is None else asked.timeout_ms / 1000,
    )


async def _body(service: Service, request: Request) -> bytes:
    return await read_body(request, service.config.max_body_bytes, service.config.body_seconds)


def _reply(service: Service, content: object, texts: list[Text], answers: list[Answer], started: float) -> JSONResponse:
    device = "gpu" if service.config.num_gpus else "cpu"
    return JSONResponse(content, headers=reply_headers(texts, answers, perf_counter() - started, device))
