"""Tell Ray Serve which tasks a replica holds, so that Serve's own router prefers it for them.

Serve has this mechanism for models that ``serve.multiplexed`` loads, in a cache that counts models. The tasks here are
limited by their memory, so replicas report them to Serve's controller themselves. This module and
:mod:`serve_app.interface` are the only ones of the server that use undocumented parts of Ray. Where a version of Ray lacks
them, any replica answers any task.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache

from ray import serve

logger = logging.getLogger(__name__)


def report_held_tasks(names: Sequence[str]) -> None:
    """Report the tasks that this replica holds. If that fails, log the reason once, since requests are still answered."""
    try:
        from ray.serve._private.common import RequestRoutingInfo
        from ray.serve.context import _get_global_client

        replica = serve.get_replica_context().replica_id
        client = _get_global_client()
        assert client is not None  # otherwise it raises
        client.record_request_routing_info(RequestRoutingInfo(replica, multiplexed_model_ids=list(names)))
    except Exception as error:
        _warn_once(f"{type(error).__name__}: {error}")


@cache
def _warn_once(reason: str) -> None:
    logger.warning("cannot report the loaded tasks to Serve, whose proxy then sends them to any replica: %s", reason)
