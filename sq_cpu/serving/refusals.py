"""What is answered in place of an answer, in the shape of OpenAI's errors."""

from __future__ import annotations

from typing import Any

from fastapi import HTTPException

from sq_cpu.errors import printable

__all__ = ["Refused", "error_body"]


class Refused(HTTPException):
    """A request that gets no answer.

    Parameters
    ----------
    status : of HTTP
    message : one line that names the cause and the fix
    param : the field of the request that it is about
    code : a word for programs
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        headers = {}
        if status in (429, 503):
            headers["Retry-After"] = "1"
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        super().__init__(status, message, headers)
        self.body = error_body(status, message, param, code)


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """Return an error as OpenAI's clients read it."""
    kind = "invalid_request_error"
    if status == 429:
        kind = "rate_limit_error"
    if status >= 500:
        kind = "server_error"
    return {"error": {"message": printable(message), "type": kind, "param": param, "code": code}}
