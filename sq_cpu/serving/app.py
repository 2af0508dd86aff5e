"""The routes: OpenAI's for models, completions and chats, and those of who runs the server."""

from __future__ import annotations

import asyncio
import contextlib
import time
from contextlib import AbstractAsyncContextManager, aclosing
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from sq_cpu.serving.answers import Answer, Piece
from sq_cpu.serving.door import Door
from sq_cpu.serving.formats import ChatFormat, CompletionFormat, Format, event
from sq_cpu.serving.protocol import ChatRequest, CompletionRequest, explained
from sq_cpu.serving.refusals import Refused, error_body
from sq_cpu.serving.service import Service

__all__ = ["make_app"]

_MOST_BYTES = 8 << 20  # of a body; a context of a million tokens as text
_PATIENCE = 60.0  # seconds for a client to read what it is sent
_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
]

_ERROR_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": {"application/json": {"schema": _ERROR_SCHEMA}}}
    for status, text in (
        (400, "The request is wrong, or asks for what is not supported."),
        (401, "The key is wrong or missing."),
        (404, "There is no such model."),
        (413, "The body is too large."),
        (429, "The queue is full."),
        (500, "The engine failed."),
        (503, "The server is shutting down."),
    )
}
_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer; server-sent events with stream=true.",
        "content": {"application/json": {}, "text/event-stream": {}},
    },
    **_ERRORS,
}


def make_app(service: Service, key: str | None) -> ASGIApp:
    """Return the server's application.

    Parameters
    ----------
    service : that answers
    key : that requests must give; None: none
    """
    app = FastAPI(
        title="sq_cpu",
        version=version("sq_cpu"),
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(Exception, _failed)
    born = int(time.time())

    @app.post("/v1/completions", responses=_ANSWERS, response_class=Response)
    async def complete(body: CompletionRequest) -> Response:
        form = CompletionFormat(
            service.name,
            logprobs=body.logprobs is not None,
            include_usage=body.include_usage(),
        )
        return _Answering(service.completion(body), form, body.stream is True)

    @app.post("/v1/chat/completions", responses=_ANSWERS, response_class=Response)
    async def chat(body: ChatRequest) -> Response:
        form = ChatFormat(
            service.name, logprobs=body.logprobs is True, include_usage=body.include_usage()
        )
        return _Answering(service.chat(body), form, body.stream is True)

    @app.get("/v1/models", responses={401: _ERRORS[401]})
    async def models() -> dict[str, Any]:
        card = {"id": service.name, "object": "model", "created": born, "owned_by": "sq_cpu"}
        return {"object": "list", "data": [card]}

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/ready", responses={503: _ERRORS[503]})
    async def ready() -> dict[str, str]:
        if not service.ready:
            raise Refused(503, "draining" if service.draining else "the engine has failed")
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response, responses={401: _ERRORS[401]})
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    return Door(app, key, _MOST_BYTES)


def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return _refused(request, explained([*error.errors()]))


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    body = getattr(error, "body", None)
    if body is None:  # of the framework: no such route, no such method
        where = f"{request.method} {request.url.path[:200]}"
        body = error_body(error.status_code, f"{where}: {error.detail}")
    return JSONResponse(body, error.status_code, error.headers)


def _failed(request: Request, error: Exception) -> Response:
    return JSONResponse(error_body(500, "the server failed; its log says why"), 500)


class _Answering(Response):
    """Runs an answer while the client is there, and sends it whole or step by step.

    Parameters
    ----------
    entering : gives the answer
    form : how it is written
    stream : as server-sent events
    """

    def __init__(
        self, entering: AbstractAsyncContextManager[Answer], form: Format, stream: bool
    ) -> None:
        super().__init__()
        self._entering = entering
        self._form = form
        self._send_answer = self._send_events if stream else self._send_whole

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; a client that goes away, or does not read, ends it before the next token."""
        work = asyncio.ensure_future(self._send_answer(scope, receive, send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not work.done():
                work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work

    async def _send_whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        pieces: list[Piece] = []
        async with self._entering as answer, aclosing(answer.pieces()) as steps:
            async for made in steps:
                pieces += made
            response = JSONResponse(self._form.whole(answer, pieces))
        await response(scope, receive, send)

    async def _send_events(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False
        loop = asyncio.get_running_loop()
        work: Any = asyncio.current_task()

        async def flush(text: str, more: bool = True) -> None:
            nonlocal begun
            if not begun:  # what is refused before the first token has a status of its own
                begun = True
                start = {"type": "http.response.start", "status": 200, "headers": _STREAM}
                await send(start)
            part = {"type": "http.response.body", "body": text.encode(), "more_body": more}
            late = loop.call_later(_PATIENCE, work.cancel)
            try:
                await send(part)
            finally:
                late.cancel()

        try:
            async with self._entering as answer, aclosing(answer.pieces()) as steps:
                async for made in steps:
                    await flush(self._form.chunks(made))
                last = self._form.last(answer)
            await flush(last, more=False)
        except Refused as refused:
            if not begun:
                raise
            await flush(event(refused.body), more=False)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
