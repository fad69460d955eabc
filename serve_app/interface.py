"""The interface on which the HTTP servers of the replicas listen, so that engines listen on the same one.

Serve passes its HTTP options to the HTTP servers of replicas, but has no documented way to ask for them in a replica. Where
a version of Ray lacks the undocumented one, engines listen on the address that their machine has in the cluster.
"""

from __future__ import annotations

import logging

import ray

logger = logging.getLogger(__name__)

_EVERY = ("0.0.0.0", "::")


def replica_interface() -> tuple[str, str]:
    """Return the interface, and the host at which other replicas reach it."""
    own: str = ray.util.get_node_ip_address()
    try:
        from ray.serve.context import _get_global_client

        client = _get_global_client()
        assert client is not None  # otherwise it raises
        host = str(client.http_config.host or "127.0.0.1")
    except Exception as error:
        logger.warning("cannot ask Serve for its HTTP options, so this engine listens on %s: %s", own, error)
        return own, own
    return host, own if host in _EVERY else host
