"""The bytes of a request, bounded in size and in time."""

from __future__ import annotations

import asyncio

from fastapi import Request

from serve_app.errors import SlowBody, TooLarge


async def read_body(request: Request, max_bytes: int, seconds: float) -> bytes:
    """The whole body.

    Args:
        request: of any kind; a chunked one does not tell its length beforehand.
        max_bytes: bytes that it may have.
        seconds: time that it may take to arrive.

    Raises:
        TooLarge: more bytes; it is refused as soon as that is known.
        SlowBody: it has not arrived in time.
    """
    refused = TooLarge(f"the body has more than {max_bytes} bytes; send fewer or shorter texts")
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and (len(declared) > 18 or int(declared) > max_bytes):
        raise refused
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_bytes:
                    raise refused
    except TimeoutError:
        raise SlowBody(
            f"the body did not arrive within {seconds:g} s; send it faster, or in smaller requests"
        ) from None
    return bytes(body)
