"""Read the body of a request, with limits on size and time."""

from __future__ import annotations

import asyncio

from fastapi import Request
from starlette.requests import ClientDisconnect

from serve_app.errors import SlowBody, TooLarge


async def read_body(request: Request, max_bytes: int, seconds: float) -> bytes:
    """Read the whole body.

    Args:
        request: any request. A chunked one does not declare its length.
        max_bytes: maximum size of the body in bytes.
        seconds: time within which the body must arrive.

    Raises:
        TooLarge: the body is larger. This is raised as soon as it is known.
        SlowBody: the body did not arrive in time.
        ClientDisconnect: the client disconnected.
    """
    refused = TooLarge(f"the body has more than {max_bytes} bytes; send fewer or shorter texts")
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and (len(declared) > 18 or int(declared) > max_bytes):
        raise refused
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                body += message.get("body", b"")
                if len(body) > max_bytes:
                    raise refused
                if not message.get("more_body", False):
                    break
    except TimeoutError:
        raise SlowBody(
            f"the body did not arrive within {seconds:g} s; send it faster, or in smaller requests"
        ) from None
    return bytes(body)
