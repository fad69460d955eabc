"""The Ray Serve application: one :class:`serve_app.service.Service` a replica.

``serve run serve_app.app:build model=FOLDER adapters=FOLDER,FOLDER`` and ``serve deploy serve_app/serve.yaml``
both come here.
"""

# No postponed annotations here: Serve reads the type of build's argument.
import asyncio
import logging
from typing import Any

import ray
import torch
from fastapi import FastAPI
from prometheus_client.core import Metric
from ray import serve
from ray.serve import Application

from revmux.errors import UserError
from revmux.utils.environment import compute_environment
from serve_app.config import AppConfig, LiveConfig, live_tasks
from serve_app.service import Service
from serve_app.web import create_app

PEER_SECONDS = 2.0
"""How long the other replicas may take to tell their figures."""

TASKS_AT_LEAST = 100
"""For so many tasks' queues Serve lets requests through; tasks may be added while replicas run."""

logger = logging.getLogger(__name__)


@serve.deployment(name="classifier")
@serve.ingress()
class Classifier:
    """One replica.

    Args:
        config: checked by :func:`build`. Its tasks come by :meth:`reconfigure`, at the start too.
    """

    def __init__(self, config: AppConfig) -> None:
        if config.num_gpus and not torch.cuda.is_available():
            raise UserError(f"num_gpus is {config.num_gpus}, but torch sees no GPU on this node; choose 0")
        self.service = Service(config, serve.get_replica_context().replica_tag)
        self.service.peers = self._peers
        self._ready = False

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve asks for it once, after the constructor."""
        return create_app(self.service)

    def __del__(self) -> None:
        # Serve calls this once the requests of a stopping replica are answered.
        if hasattr(self, "service"):
            self.service.close()

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Load what is new and retire what is gone, at the start and whenever ``user_config`` changes."""
        # Off the event loop, for requests are answered meanwhile. Serve would stop a replica that raises, so only the
        # first time, when there is nothing to lose, may a mistake do so.
        if self._ready:
            await asyncio.to_thread(self.service.update, user_config)
        else:
            await asyncio.to_thread(self.service.serve, live_tasks(user_config))
        self._ready = True

    async def check_health(self) -> None:
        """Asked by Serve, which replaces a replica whose model does not answer."""
        await self.service.probe()

    def figures(self) -> tuple[str, list[Metric]]:
        """This replica's name and metrics, for the one that was asked for all."""
        return self.service.replica, self.service.metrics.families()

    async def _peers(self) -> dict[str, list[Metric]]:
        context = serve.get_replica_context()
        handle = serve.get_deployment_handle(context.deployment, context.app_name)
        try:
            found = await handle.broadcast("figures").results_async(timeout_s=PEER_SECONDS, return_exceptions=True)
        except Exception as error:
            logger.warning("the other replicas did not tell their figures: %s", error)
            return {}
        return dict(each for each in found if isinstance(each, tuple))


def build(args: AppConfig) -> Application:
    """The application of a configuration; Serve's command line and YAML fill it in.

    Args:
        args: see :class:`serve_app.config.AppConfig`; an unknown key is an error.
    """
    # The replica's own queues refuse with 429, so Serve must let requests through to them, and health questions too.
    ongoing = max(TASKS_AT_LEAST, 2 * len(args.served)) * (args.max_queue + args.max_batch)
    scale: dict[str, Any] = (
        {"autoscaling_config": args.autoscaling.model_dump()}
        if args.autoscaling
        else {"num_replicas": args.num_replicas}
    )
    application: Application = Classifier.options(  # type: ignore[attr-defined]
        **scale,
        user_config=LiveConfig(tasks=args.served).model_dump(),
        max_ongoing_requests=ongoing,
        graceful_shutdown_timeout_s=args.drain_seconds,
        ray_actor_options={"num_cpus": args.num_cpus, "num_gpus": args.num_gpus, "runtime_env": _runtime_env()},
        logging_config={"enable_access_log": False},  # a line a request would cost more than a small model
    ).bind(args)
    return application


def _runtime_env() -> dict[str, Any]:
    """That of the job which deploys, and with it the environment of a process that computes; the job's own wins."""
    job: dict[str, Any] = dict(ray.get_runtime_context().runtime_env) if ray.is_initialized() else {}
    return job | {"env_vars": compute_environment() | job.get("env_vars", {})}
