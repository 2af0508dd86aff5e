"""What stands before all routes: the key, and the size of a body."""

from __future__ import annotations

import hashlib
import hmac
import os

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sq_cpu.serving.refusals import Refused

__all__ = ["Door"]

_OPEN = ("/health", "/ready")


class Door:
    """Lets in requests that have the key and a body that is not too large.

    Parameters
    ----------
    app : what is behind
    key : that "Authorization: Bearer KEY" has to give; None: none. /health and /ready need none
    most_bytes : of a body
    """

    def __init__(self, app: ASGIApp, key: str | None, most_bytes: int) -> None:
        self._app = app
        self._digest = None if key is None else _digest(os.fsencode(key))
        self._most_bytes = most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._most_bytes:
                raise self._too_large()
            return message

        try:
            self._check(scope["path"], Headers(scope=scope))
        except Refused as refused:
            # Its body is not read.
            headers = {**(refused.headers or {}), "Connection": "close"}
            answer = JSONResponse(refused.body, refused.status_code, headers)
            await answer(scope, receive, send)
            return
        await self._app(scope, counted, send)

    def _check(self, path: str, headers: Headers) -> None:
        if self._digest is not None and path not in _OPEN:
            kind, _, given = headers.get("authorization", "").partition(" ")
            # Headers are bytes that were read as Latin-1.
            right = hmac.compare_digest(_digest(given.encode("latin-1")), self._digest)
            if kind.lower() != "bearer" or not right:
                raise Refused(
                    401,
                    "the API key is wrong or missing",
                    code="invalid_api_key",
                )
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 18 or int(length) > self._most_bytes:
            raise self._too_large()

    def _too_large(self) -> Refused:
        return Refused(413, f"the body has more than {self._most_bytes} bytes; send less")


def _digest(key: bytes) -> bytes:
    # Of one length, so that to compare tells nothing of the key's.
    return hashlib.sha256(key).digest()
