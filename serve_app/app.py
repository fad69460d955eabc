"""The Ray Serve application: one :class:`serve_app.service.Service` per replica, or engines with front ends.

``serve run serve_app.app:build model=FOLDER adapters=FOLDER,FOLDER`` and ``serve deploy serve_app/serve.yaml`` both use
:func:`build`. Serve calls it in a process of its own, so this module imports what only a replica needs when a replica starts.
"""

# No postponed annotations in this module: Serve reads the type of build's argument.
import asyncio
import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import ray
from prometheus_client.core import Metric
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from revmux.errors import UserError
from revmux.utils.environment import replica_environment
from serve_app.config import FRONT_END_CPUS, AppConfig, LiveConfig, live_tasks
from serve_app.errors import RETRY_AFTER_SECONDS
from serve_app.held_tasks import report_held_tasks

if TYPE_CHECKING:
    from serve_app.web import HttpApplication
    from serve_app.wire import Address

PEER_SECONDS = 2.0
"""Time limit for asking all other replicas, for their metrics or addresses."""

ENGINE = "engine"
"""Name of the deployment of engines, which have front ends."""

_STOP_SECONDS = 4.0
"""Time of ``drain_seconds`` that an engine leaves to Serve, which stops it when they are over."""

logger = logging.getLogger(__name__)


class _Loaded:
    """A replica that has a model.

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
        self._ray_metrics = RayMetrics(self.service.metrics.families)
        self._ray_metrics.start()
        self._ready = False

    def close(self) -> None:
        """Answer the waiting requests and end all threads."""
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


@serve.deployment(name="classifier")
@serve.ingress()
class Classifier(_Loaded):
    """A replica that answers HTTP in the process of its model."""

    def __init__(self, config: AppConfig) -> None:
        super().__init__(config)
        self.service.peers = lambda: _metrics(_own_handle())
        self.service.tasks.on_loaded = report_held_tasks

    def __serve_build_asgi_app__(self) -> "HttpApplication":
        """Build the HTTP application. Serve calls this once, after the constructor."""
        from serve_app.web import create_app

        return create_app(self.service)

    def __del__(self) -> None:
        # Serve calls this when a stopping replica has answered its requests.
        self.close()


@serve.deployment(name=ENGINE)
class Engine(_Loaded):
    """A replica with a model, which answers its front ends."""

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Load new tasks and adapters and remove old ones, and then listen."""
        is_first = not self._ready
        await super().reconfigure(user_config)
        if is_first:
            from serve_app.engine_server import EngineServer
            from serve_app.interface import replica_interface

            listens = await asyncio.to_thread(replica_interface)
            self._server = EngineServer(self.service, *listens, _node())
            self.service.tasks.on_loaded = self._server.announce_tasks
            await self._server.start()

    async def address(self) -> "Address":
        """Return where this engine listens. Front ends call this on all engines."""
        return self._server.address()

    async def __del__(self) -> None:
        if hasattr(self, "_server"):
            await self._server.drain(max(0.0, self.service.config.drain_seconds - _STOP_SECONDS))
        await asyncio.to_thread(self.close)


@serve.deployment(name="classifier")
@serve.ingress()
class FrontEndReplica:
    """A replica that answers HTTP and asks an engine.

    Args:
        config: the configuration.
        engines: the deployment of the engines.
    """

    def __init__(self, config: AppConfig, engines: "DeploymentHandle[Any]") -> None:
        from serve_app.front_end import FrontEnd
        from serve_app.ray_metrics import RayMetrics

        async def addresses() -> "Sequence[Address]":
            return await _ask_all(engines, "address")

        async def peers() -> dict[str, list[Metric]]:
            own, theirs = await asyncio.gather(_metrics(_own_handle()), _metrics(engines))
            return own | theirs

        def report(names: list[str]) -> None:  # in a thread, because it waits for Serve's controller
            asyncio.get_running_loop().run_in_executor(None, report_held_tasks, names)

        name = serve.get_replica_context().replica_tag
        self.front_end = FrontEnd(config, name, addresses, _node(), report)
        self.front_end.peers = peers
        self._ray_metrics = RayMetrics(self.front_end.metrics.families)
        self._ray_metrics.start()
        self._ready = False

    def __serve_build_asgi_app__(self) -> "HttpApplication":
        """Build the HTTP application. Serve calls this once, after the constructor."""
        from serve_app.web import create_app

        return create_app(self.front_end)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Find an engine. Serve calls this at the start, and if the operator changes tasks in the wrong place."""
        if user_config:
            error = UserError(
                f"with front_ends above 1, user_config belongs to the deployment {ENGINE!r}; move it there"
            )
            if not self._ready:
                raise error
            logger.error("%s", error)
        if not self._ready:
            # Ready only with an engine. An update then replaces no front end before there is an engine for the new one.
            await self.front_end.start()
            self._ready = True

    async def __del__(self) -> None:
        if hasattr(self, "_ray_metrics"):
            await asyncio.to_thread(self._ray_metrics.close)
            await self.front_end.close()

    def metric_families(self) -> tuple[str, list[Metric]]:
        """Return this replica's name and metrics. The replica that was scraped calls this on all others."""
        return self.front_end.replica, self.front_end.metrics.families()


def _own_handle() -> "DeploymentHandle[Any]":
    context = serve.get_replica_context()
    return serve.get_deployment_handle(context.deployment, context.app_name)


def _node() -> str:
    return str(ray.get_runtime_context().get_node_id())


async def _metrics(handle: "DeploymentHandle[Any]") -> dict[str, list[Metric]]:
    """The metrics of all replicas of a deployment that answer, by replica."""
    return dict(await _ask_all(handle, "metric_families"))


async def _ask_all(handle: "DeploymentHandle[Any]", method: str) -> list[Any]:
    """Call a method on all replicas of a deployment, and return the results of those that answer."""
    try:
        results = await handle.broadcast(method).results_async(timeout_s=PEER_SECONDS, return_exceptions=True)
    except Exception as error:
        logger.warning("cannot ask the replicas of %s for %s: %s", handle.deployment_name, method, error)
        return []
    return [result for result in results if isinstance(result, tuple)]


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
    common: dict[str, Any] = {
        "graceful_shutdown_timeout_s": args.drain_seconds,
        # A log line per request would cost more than a small model. Serve writes it, with level INFO, before it drops it.
        "logging_config": {"enable_access_log": False, "log_level": "WARNING"},
    }
    loaded: dict[str, Any] = {
        **common,
        **scale,
        "user_config": LiveConfig(tasks=args.served).model_dump(),
        "ray_actor_options": _resources(args.num_cpus, args.num_gpus),
    }
    application: Application
    if args.front_ends == 1:
        application = Classifier.options(**loaded, **_admission(args.ongoing_requests)).bind(args)  # type: ignore[attr-defined]
    else:
        engines = Engine.options(**loaded).bind(args)  # type: ignore[attr-defined]
        application = FrontEndReplica.options(  # type: ignore[attr-defined]
            **common,
            **_admission(math.ceil(args.ongoing_requests / args.front_ends)),
            num_replicas=args.num_replicas * args.front_ends,
            user_config={},
            ray_actor_options=_resources(FRONT_END_CPUS, 0),
        ).bind(args, engines)
    return application


def _admission(requests: int) -> dict[str, Any]:
    """Return the options of replicas that hold at most this many requests."""
    return {
        # A busy replica refuses requests, so that Serve asks another one. If all are busy, as many may wait once more.
        "max_ongoing_requests": requests,
        "max_queued_requests": requests,
        "backpressure_config": {"status_code": 429, "retry_after_s": RETRY_AFTER_SECONDS},
    }


def _resources(cpus: float, gpus: float) -> dict[str, Any]:
    """Return what Ray gives to a replica: resources, and the deploying job's runtime environment.

    The variables for computation are added to it if they are not set.
    """
    job: dict[str, Any] = dict(ray.get_runtime_context().runtime_env) if ray.is_initialized() else {}
    environment = job | {"env_vars": replica_environment() | job.get("env_vars", {})}
    return {"num_cpus": cpus, "num_gpus": gpus, "runtime_env": environment}
