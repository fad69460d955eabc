"""The Ray Serve application: HTTP around :class:`revmux.serving.Engine`.

``serve run serve_app.app:build model=FOLDER adapters=FOLDER,FOLDER`` and ``serve deploy serve_app/serve.yaml``
both come here.
"""

# No postponed annotations here: Serve reads the type of build's argument, FastAPI those of the endpoints.
import asyncio
from importlib.metadata import version
from time import perf_counter
from typing import Any

import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from ray import serve
from ray.serve import Application

import revmux
from revmux.errors import UserError
from revmux.pretrained import BackboneConfig, load_pretrained
from revmux.serving import Engine
from serve_app import failures
from serve_app.config import AppConfig
from serve_app.failures import TooLarge, Unhealthy
from serve_app.protocol import PredictRequest, parse_request, timing_headers
from serve_app.sources import adapter_folder

PROBE_SECONDS = 15.0
"""How long the model may take to answer a question about its health; it finishes its batch first."""

app = FastAPI(title="RevMUX", version=revmux.__version__, description="Text classification in groups")
failures.install(app)

_PREDICT_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": PredictRequest.model_json_schema()}},
    }
}


@serve.deployment(name="classifier")
@serve.ingress(app)
class Classifier:
    """One replica: a frozen task model with its adapters.

    Args:
        config: checked by :func:`build`.
    """

    def __init__(self, config: AppConfig) -> None:
        if config.num_gpus and not torch.cuda.is_available():
            raise UserError(f"num_gpus is {config.num_gpus}, but torch sees no GPU on this node; choose 0")
        self.config = config
        backbone = BackboneConfig(config.model, config.revision, config.max_length or 2, config.dtype)
        pretrained = load_pretrained(backbone)
        pretrained.backbone.to("cuda" if config.num_gpus else "cpu")
        self.engine = Engine(
            pretrained,
            [adapter_folder(adapter) for adapter in config.adapters],
            config.limits(),
            config.max_length,
            config.threads or max(1, int(config.num_cpus)),
        )
        self.engine.start()

    def __del__(self) -> None:
        # Serve calls this once the requests of a stopping replica are answered.
        if hasattr(self, "engine"):
            self.engine.close()

    async def check_health(self) -> None:
        """Asked by Serve, which replaces a replica whose model does not answer."""
        await self._probe()

    async def _probe(self) -> None:
        answer = asyncio.wrap_future(self.engine.probe())
        try:
            # Shielded, for others may wait for the same answer.
            await asyncio.wait_for(asyncio.shield(answer), PROBE_SECONDS)
        except TimeoutError:
            raise Unhealthy(f"the model did not answer within {PROBE_SECONDS:g} s") from None
        except Exception as error:
            raise Unhealthy(f"the model does not answer: {error}") from error

    @app.post("/predict", openapi_extra=_PREDICT_BODY)
    @app.post("/", openapi_extra=_PREDICT_BODY)
    async def predict(self, request: Request) -> JSONResponse:
        """Classify one text, one sentence pair, or a batch."""
        started = perf_counter()
        asked = parse_request(await self._body(request))
        texts = asked.texts
        if len(texts) > self.config.max_texts:
            raise TooLarge(
                f"{len(texts)} texts in one request, at most {self.config.max_texts} are allowed; send fewer"
            )
        answers = await self.engine.answer(texts, bool(asked.truncate), asked.max_multiplex)
        content = asked.reply(answers, self.engine.task().label_names)
        return JSONResponse(content, headers=timing_headers(answers, perf_counter() - started))

    async def _body(self, request: Request) -> bytes:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self.config.max_body_bytes:
                raise TooLarge(
                    f"the body has more than {self.config.max_body_bytes} bytes; send fewer or shorter texts"
                )
        return bytes(body)

    @app.get("/health")
    async def health(self) -> JSONResponse:
        """200 if the model has just answered a text, else 503."""
        await self._probe()
        return JSONResponse({"status": "ok"})

    @app.get("/info")
    async def info(self) -> JSONResponse:
        """What is served, with every limit."""
        return JSONResponse(self._info())

    def _info(self) -> dict[str, Any]:
        engine, config = self.engine, self.config
        task = engine.task()
        identity = task.pretrained.identity
        used = {route.width for route in task.lineup.routes}
        return {
            "model_id": identity["name"],
            "model_revision": identity["revision"],
            "model_sha256": identity["sha256"],
            "model_dtype": str(task.backbone.dtype).removeprefix("torch."),
            "model_type": {"classifier": {"id2label": dict(enumerate(task.label_names))}},
            "num_layers": task.backbone.num_layers,
            "device": str(task.backbone.device),
            "adapters": [
                {
                    "source": adapter.folder,
                    "method": adapter.config.method,
                    "num_inputs": adapter.config.num_inputs,
                    "prefill_layers": adapter.config.prefill_layers,
                    "relative_cost": round(adapter.route.per_input, 4),
                    "used": adapter.config.num_inputs in used,
                    "metrics": adapter.config.metrics,
                }
                for adapter in task.lineup.adapters
            ],
            "group_widths": sorted(used),
            "max_multiplex": max(used),
            "max_input_length": task.max_length,
            "max_queue": config.max_queue,
            "max_batch": config.max_batch,
            "max_batch_tokens": config.max_batch_tokens,
            "plain_load": config.plain_load,
            "max_client_batch_size": config.max_texts,
            "max_body_bytes": config.max_body_bytes,
            "num_replicas": config.num_replicas,
            "threads": engine.threads,
            "replica": engine.stats(),
            "version": revmux.__version__,
            "versions": {package: version(package) for package in ("torch", "transformers", "ray")},
        }


def build(args: AppConfig) -> Application:
    """The application of a configuration; Serve's command line and YAML fill it in.

    Args:
        args: see :class:`serve_app.config.AppConfig`; an unknown key is an error.
    """
    # The replica's own queue refuses with 429, so Serve must let requests through to it, and health questions too.
    ongoing = 2 * (args.max_queue + args.max_batch) + 100
    return Classifier.options(  # type: ignore[attr-defined]
        num_replicas=args.num_replicas,
        max_ongoing_requests=ongoing,
        ray_actor_options={"num_cpus": args.num_cpus, "num_gpus": args.num_gpus},
        logging_config={"enable_access_log": False},  # a line a request would cost more than a small model
    ).bind(args)
