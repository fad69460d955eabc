"""Endpoints for classification, as in text-embeddings-inference, in vLLM and in the Open Inference Protocol."""

# No postponed annotations in this module: FastAPI reads those of the endpoints.
from collections.abc import Awaitable, Callable, Sequence
from time import perf_counter, time

import orjson
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from revmux.errors import TextError
from revmux.serving import Answer
from revmux.text import Text
from serve_app import examples
from serve_app.backend import Backend, TaskAnswers, TaskNames
from serve_app.body import read_body
from serve_app.classify import ClassifyRequest, model_list
from serve_app.errors import TooLarge
from serve_app.headers import reply_headers
from serve_app.open_inference import InferRequest, model_metadata, server_metadata
from serve_app.protocol import PredictRequest, RequestOptions, parse

_FAILURES = examples.failures(400, 404, 408, 413, 422, 424, 429, 504)

Endpoint = Callable[[Request, str | None], Awaitable[Response]]


class Endpoints:
    """The endpoints for classification.

    Args:
        backend: classifies.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    async def predict(self, request: Request, task: str | None) -> Response:
        """Answer a request of text-embeddings-inference. The path may name the task."""
        started = perf_counter()
        parsed = parse(await self._body(request), PredictRequest)
        if task is not None and parsed.task not in (None, task):
            raise TextError(f"the path names task {task!r} and the body names {parsed.task!r}; name only one of them")
        if parsed.tasks is not None:
            return await self._predict_several(self._several(parsed, task), parsed, started)
        texts = parsed.texts
        [found] = await self._classify([task or parsed.task], texts, parsed)
        return self._reply(parsed.reply(found.answers, found.label_names), texts, found.answers, started)

    @staticmethod
    def _several(parsed: PredictRequest, task: str | None) -> TaskNames:
        """The tasks of a request that names several.

        Args:
            parsed: the request.
            task: the task that the path names.
        """
        if (named := task or parsed.task) is not None:
            raise TextError(
                f"the request names the task {named!r} and also tasks; send tasks to /predict, without a task"
            )
        assert parsed.tasks is not None
        return parsed.tasks

    async def _predict_several(self, tasks: TaskNames, parsed: PredictRequest, started: float) -> Response:
        texts = parsed.texts
        found = await self._classify(tasks, texts, parsed)
        content = {one.task: parsed.reply(one.answers, one.label_names) for one in found}
        return self._reply(content, texts, [answer for one in found for answer in one.answers], started)

    async def infer(self, request: Request, task: str | None) -> Response:
        """Answer a request of the Open Inference Protocol."""
        started = perf_counter()
        parsed = parse(await self._body(request), InferRequest)
        texts = parsed.inputs[0].texts
        [found] = await self._classify([task], texts, parsed.parameters)
        return self._reply(parsed.reply(found.task, found.answers, found.label_names), texts, found.answers, started)

    async def classify(self, request: Request, task: str | None) -> Response:
        """Answer a request of vLLM's classification API, whose body names the task as its model."""
        started = perf_counter()
        parsed = parse(await self._body(request), ClassifyRequest)
        texts = parsed.texts
        [found] = await self._classify([task or parsed.model], texts, parsed)
        return self._reply(parsed.reply(found.task, found.answers, found.label_names), texts, found.answers, started)

    async def _classify(self, tasks: TaskNames, texts: list[Text], options: RequestOptions) -> list[TaskAnswers]:
        """Classify all texts of a request. A request that is refused loads no task.

        Raises:
            TooLarge: the request has more texts than allowed. Other errors: see
                :meth:`revmux.serving.Engine.answer_tasks`.
        """
        limit = self.backend.config.max_texts
        if len(texts) > limit:
            raise TooLarge(
                f"the request has {len(texts)} texts, at most {limit} are allowed; send fewer texts per request"
            )
        return await self.backend.classify(tasks, texts, options)

    async def _body(self, request: Request) -> bytes:
        return await read_body(request, self.backend.config.max_body_bytes, self.backend.config.body_seconds)

    def _reply(self, content: object, texts: list[Text], answers: list[Answer], started: float) -> Response:
        device = "gpu" if self.backend.config.num_gpus else "cpu"
        headers = reply_headers(texts, answers, perf_counter() - started, device)
        return JsonReply(orjson.dumps(content), headers, answers)


class JsonReply(Response):
    """A reply with status 200 whose body and headers are encoded already.

    Args:
        body: JSON.
        headers: names in lower case, and values in latin-1.
        answers: the answers in the body, for traces.
    """

    media_type = "application/json"

    def __init__(self, body: bytes, headers: list[tuple[bytes, bytes]], answers: Sequence[Answer]) -> None:
        self.answers = answers
        self.status_code = 200
        self.background = None
        self.body = body
        length = (b"content-length", str(len(body)).encode())
        self.raw_headers = [length, (b"content-type", b"application/json"), *headers]


def predict_routes(endpoints: Endpoints) -> APIRouter:
    """Return the routes ``/predict``, ``POST /`` and ``/tasks/{task}/predict``."""
    router = APIRouter(tags=["classification"])
    description = "labels and scores, best first"

    @router.post(
        "/predict",
        openapi_extra=examples.body(PredictRequest, examples.SEVERAL_TASKS),
        responses={**examples.reply(examples.RANKINGS_BY_TASK, description), **_FAILURES},
    )
    async def predict(request: Request) -> Response:
        """Classify one text, one sentence pair, or a batch, with one task or several."""
        return await endpoints.predict(request, None)

    @router.post("/", include_in_schema=False)
    async def predict_at_root(request: Request) -> Response:
        return await endpoints.predict(request, None)

    @router.post(
        "/tasks/{task}/predict",
        openapi_extra=examples.body(PredictRequest),
        responses={**examples.reply(examples.RANKINGS, description), **_FAILURES},
    )
    async def predict_task(task: str, request: Request) -> Response:
        """Classify one text, one sentence pair, or a batch, with one of several tasks."""
        return await endpoints.predict(request, task)

    return router


def classify_routes(endpoints: Endpoints) -> APIRouter:
    """Return vLLM's routes ``/classify`` and ``/v1/models``. Each task is a model."""
    router = APIRouter(tags=["vLLM"])
    started = time()

    @router.post(
        "/classify",
        openapi_extra=examples.body(ClassifyRequest),
        responses={**examples.reply(examples.CLASSES, "label and probabilities per input"), **_FAILURES},
    )
    async def classify(request: Request) -> Response:
        """Classify one text or a list of texts."""
        return await endpoints.classify(request, None)

    @router.get("/v1/models", responses=examples.failures())
    async def models() -> JSONResponse:
        """Return the served tasks."""
        return JSONResponse(model_list(endpoints.backend.task_names, started))

    return router


def open_inference_routes(endpoints: Endpoints) -> APIRouter:
    """Return the routes under ``/v2``: health, metadata and inference. Each task is a model of the protocol."""
    backend = endpoints.backend
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
        """Check that the model of one task answers a test input, each time another task. Otherwise return 503."""
        await backend.probe()
        return JSONResponse({"ready": True})

    @router.get("/models/{task}", responses=examples.failures(404))
    async def model(task: str) -> JSONResponse:
        """Return the input and output tensors of a task."""
        return JSONResponse(model_metadata(task, len(await backend.label_names(task))))

    @router.get("/models/{task}/ready", responses=examples.failures(404))
    async def model_ready(task: str) -> JSONResponse:
        """Check that the model of this task answers a test input. Return 200 if it does, otherwise 503."""
        await backend.probe(task)
        return JSONResponse({"name": task, "ready": True})

    @router.post(
        "/models/{task}/infer",
        openapi_extra=examples.body(InferRequest),
        responses={**examples.reply(examples.TENSORS, "labels and scores, best first"), **_FAILURES},
    )
    async def infer(task: str, request: Request) -> Response:
        """Classify a tensor of texts or sentence pairs."""
        return await endpoints.infer(request, task)

    return router
