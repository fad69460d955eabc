"""The Ray Serve application: one :class:`serve_app.service.Service` per replica.

``serve run serve_app.app:build model=FOLDER adapters=FOLDER,FOLDER`` and ``serve deploy serve_app/serve.yaml`` both use
:func:`build`. Serve calls it in a process of its own, so this module imports what only a replica needs when a replica starts.
"""

# No postponed annotations in this module: Serve reads the type of build's argument.
import asyncio
import logging
from typing import TYPE_CHECKING, Any

import ray
from prometheus_client.core import Metric
from ray import serve
from ray.serve import Application

from revmux.errors import UserError
from revmux.utils.environment import replica_environment
from serve_app.config import AppConfig, LiveConfig, live_tasks
from serve_app.errors import RETRY_AFTER_SECONDS
from serve_app.held_tasks import report_held_tasks

if TYPE_CHECKING:
    from serve_app.web import HttpApplication

PEER_SECONDS = 2.0
"""Time limit for collecting the metrics of the other replicas."""

logger = logging.getLogger(__name__)


@serve.deployment(name="classifier")
@serve.ingress()
class Classifier:
    """One replica.

    Args:
        config: the configuration. Its tasks are loaded by :meth:`reconfigure`, which Serve also calls at the start.
    """

    def __init__(self, config: AppConfig) -> None:
        import torch

        from serve_app.ray_metrics import RayMetrics
        from serve_app.service import Service

        if config.num_gpus and not torch.cuda.is_available():
            raise UserError(f"num_gpus is {config.num_gpus}, but torch sees no GPU on this node; choose 0")
        # Serve drops this output if RAY_SERVE_LOG_TO_STDERR is 0, so the program that starts Ray with it asks memory_lines.
        logging.basicConfig(format="%(levelname)s: %(message)s")
        logging.getLogger("serve_app.tasks").setLevel(logging.INFO)
        self.service = Service(config, serve.get_replica_context().replica_tag)
        self.service.peers = self._peers
        self.service.tasks.on_loaded = report_held_tasks
        self._ray_metrics = RayMetrics(self.service.metrics.families)
        self._ray_metrics.start()
        self._ready = False

    def __serve_build_asgi_app__(self) -> "HttpApplication":
        """Build the HTTP application. Serve calls this once, after the constructor."""
        from serve_app.web import create_app

        return create_app(self.service)

    def __del__(self) -> None:
        # Serve calls this when a stopping replica has answered its requests.
        if hasattr(self, "_ray_metrics"):
            self._ray_metrics.close()
        if hasattr(self, "service"):
            self.service.close()

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Load new tasks and adapters and remove old ones. Serve calls this at the start and after each change."""
        # Runs in a thread, because the event loop answers requests meanwhile. Serve stops a replica that raises here,
        # so only the first call, before the replica serves anything, may raise.
        if self._ready:
            await asyncio.to_thread(self.service.update, user_config)
        else:
            await asyncio.to_thread(self.service.serve, live_tasks(user_config))
        self._ready = True

    async def check_health(self) -> None:
        """Raise if the model does not answer. Serve calls this, and replaces the replica if it raises."""
        await self.service.probe()

    def memory_lines(self) -> list[str]:
        """Return a line per task about what this replica keeps in memory."""
        return self.service.tasks.memory_lines()

    def metric_families(self) -> tuple[str, list[Metric]]:
        """Return this replica's name and metrics. The replica that was scraped calls this on all others."""
        return self.service.replica, self.service.metrics.families()

    async def _peers(self) -> dict[str, list[Metric]]:
        context = serve.get_replica_context()
        handle = serve.get_deployment_handle(context.deployment, context.app_name)
        try:
            results = await handle.broadcast("metric_families").results_async(
                timeout_s=PEER_SECONDS, return_exceptions=True
            )
        except Exception as error:
            logger.warning("cannot collect the metrics of the other replicas: %s", error)
            return {}
        return dict(result for result in results if isinstance(result, tuple))


def build(args: AppConfig) -> Application:
    """Build the application from a configuration, which Serve reads from its command line or YAML.

    Args:
        args: see :class:`serve_app.config.AppConfig`; an unknown key is an error.
    """
    scale: dict[str, Any] = (
        {"autoscaling_config": args.autoscaling.model_dump()}
        if args.autoscaling
        else {"num_replicas": args.num_replicas}
    )
    application: Application = Classifier.options(  # type: ignore[attr-defined]
        **scale,
        user_config=LiveConfig(tasks=args.served).model_dump(),
        # A busy replica refuses requests, so that Serve asks another one. If all are busy, as many may wait once more.
        max_ongoing_requests=args.ongoing_requests,
        max_queued_requests=args.ongoing_requests,
        backpressure_config={"status_code": 429, "retry_after_s": RETRY_AFTER_SECONDS},
        graceful_shutdown_timeout_s=args.drain_seconds,
        ray_actor_options={"num_cpus": args.num_cpus, "num_gpus": args.num_gpus, "runtime_env": _runtime_env()},
        # A log line per request would cost more than a small model. Serve writes it, with level INFO, before it drops it.
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
    ).bind(args)
    return application


def _runtime_env() -> dict[str, Any]:
    """Return the deploying job's runtime environment, with the variables for computation added if they are not set."""
    job: dict[str, Any] = dict(ray.get_runtime_context().runtime_env) if ray.is_initialized() else {}
    return job | {"env_vars": replica_environment() | job.get("env_vars", {})}
