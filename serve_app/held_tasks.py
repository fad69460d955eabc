"""Tell Ray Serve which tasks a replica holds, so that Serve's own router prefers it for them.

Serve has this mechanism for models that ``serve.multiplexed`` loads, in a cache that counts models. The tasks here are
limited by their memory, so replicas report them to Serve's controller themselves. This is the only module of the server
that imports undocumented parts of Ray; tests/test_serve_routing.py shows after an upgrade whether they still work.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ray import serve
from ray.serve._private.common import RequestRoutingInfo
from ray.serve.context import _get_global_client

logger = logging.getLogger(__name__)


def report_held_tasks(names: Sequence[str]) -> None:
    """Report the tasks that this replica holds."""
    replica = serve.get_replica_context().replica_id
    try:
        controller = _get_global_client()
        assert controller is not None  # otherwise it raises
        controller.record_request_routing_info(RequestRoutingInfo(replica, multiplexed_model_ids=list(names)))
    except Exception as error:  # requests are still answered, by any replica
        logger.warning("cannot report the loaded tasks to Serve: %s", error)
