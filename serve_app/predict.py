"""Endpoints for classification, as in text-embeddings-inference and in the Open Inference Protocol."""

# No postponed annotations in this module: FastAPI reads those of the endpoints.
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
from serve_app.protocol import PredictRequest, RequestOptions, parse
from serve_app.service import Service

_FAILURES = examples.failures(400, 404, 408, 413, 422, 424, 429, 504)


def predict_routes(service: Service) -> APIRouter:
    """Return the routes ``/predict``, ``POST /`` and ``/tasks/{task}/predict``."""
    router = APIRouter(tags=["classification"])
    described: dict[str, Any] = {
        "openapi_extra": examples.body(PredictRequest),
        "responses": {**examples.reply(examples.RANKINGS, "labels and scores, best first"), **_FAILURES},
    }

    async def answer(request: Request, task: str | None) -> JSONResponse:
        started = perf_counter()
        parsed = parse(await _body(service, request), PredictRequest)
        if task is not None and parsed.task not in (None, task):
            raise TextError(f"the path names task {task!r} and the body names {parsed.task!r}; name only one of them")
        # Looked up once, because tasks can be added, removed and replaced before the answer is ready.
        resolved = service.engine.task(task or parsed.task)
        texts = parsed.texts
        answers = await classify(service, resolved, texts, parsed)
        content = parsed.reply(answers, resolved.label_names)
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
        """Classify one text, one sentence pair, or a batch, with one of several tasks."""
        return await answer(request, task)

    return router


def open_inference_routes(service: Service) -> APIRouter:
    """Return the routes under ``/v2``: health, metadata and inference. Each task is a model of the protocol."""
    router = APIRouter(prefix="/v2", tags=["Open Inference Protocol"])

    @router.get("", responses=examples.failures())
    async def metadata() -> JSONResponse:
        """Return the name and version of the server."""
        return JSONResponse(server_metadata())

    @router.get("/health/live")
    async def live() -> JSONResponse:
        """Return 200 while the process answers."""
        return JSONResponse({"live": True})

    @router.get("/health/ready", responses=examples.failures())
    async def ready() -> JSONResponse:
        """Check that every model answers a test input. Return 200 if all do, otherwise 503."""
        await service.probe()
        return JSONResponse({"ready": True})

    @router.get("/models/{task}", responses=examples.failures(404))
    async def model(task: str) -> JSONResponse:
        """Return the input and output tensors of a task."""
        return JSONResponse(model_metadata(task, len(service.engine.task(task).label_names)))

    @router.get("/models/{task}/ready", responses=examples.failures(404))
    async def model_ready(task: str) -> JSONResponse:
        """Check that the model of this task answers a test input. Return 200 if it does, otherwise 503."""
        service.engine.task(task)
        await service.probe(task)
        return JSONResponse({"name": task, "ready": True})

    @router.post(
        "/models/{task}/infer",
        openapi_extra=examples.body(InferRequest),
        responses={**examples.reply(examples.TENSORS, "labels and scores, best first"), **_FAILURES},
    )
    async def infer(task: str, request: Request) -> JSONResponse:
        """Classify a tensor of texts or sentence pairs."""
        started = perf_counter()
        resolved = service.engine.task(task)
        parsed = parse(await _body(service, request), InferRequest)
        texts = parsed.inputs[0].texts
        answers = await classify(service, resolved, texts, parsed.parameters)
        return _reply(service, parsed.reply(task, answers, resolved.label_names), texts, answers, started)

    return router


async def classify(service: Service, task: Task, texts: list[Text], options: RequestOptions) -> list[Answer]:
    """Classify all texts of a request with one task.

    Raises:
        TooLarge: the request has more texts than allowed. Other errors: see :meth:`revmux.serving.Engine.answer`.
    """
    limit = service.config.max_texts
    if len(texts) > limit:
        raise TooLarge(f"the request has {len(texts)} texts, at most {limit} are allowed; send fewer texts per request")
    return await service.engine.answer(
        texts,
        bool(options.truncate),
        options.max_multiplex,
        task=task,
        priority=options.priority or 0,
        timeout=None if options.timeout_ms is None else options.timeout_ms / 1000,
    )


async def _body(service: Service, request: Request) -> bytes:
    return await read_body(request, service.config.max_body_bytes, service.config.body_seconds)


def _reply(service: Service, content: object, texts: list[Text], answers: list[Answer], started: float) -> JSONResponse:
    device = "gpu" if service.config.num_gpus else "cpu"
    return JSONResponse(content, headers=reply_headers(texts, answers, perf_counter() - started, device))
