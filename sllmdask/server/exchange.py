"""What every route shares: JSON in and out, the error envelope, the request's id."""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from sllmdask.errors import (
    BodyTooLarge,
    InvalidRequest,
    MethodNotAllowed,
    RouteNotFound,
    SllmError,
    UnsupportedMediaType,
)
from sllmdask.server import openai

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

#: Where a request keeps its id: the client's ``x-request-id`` if that is fit to be written in a header and a log.
REQUEST_ID: web.RequestKey[str] = web.RequestKey("request_id", str)
_FIT_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def fresh_id() -> str:
    return f"req-{secrets.token_hex(12)}"


def request_id(request: web.BaseRequest) -> str:
    """The id of `request`, the same at every call."""
    if REQUEST_ID not in request:
        given = request.headers.get("x-request-id", "")
        request[REQUEST_ID] = given if _FIT_ID.fullmatch(given) else fresh_id()
    return request[REQUEST_ID]


async def read_json(request: web.Request) -> Any:
    """The body's JSON; raises :class:`UnsupportedMediaType`, :class:`BodyTooLarge` or :class:`InvalidRequest`."""
    if "content-type" in request.headers and request.content_type != "application/json":
        raise UnsupportedMediaType(request.content_type)
    if (request.content_length or 0) > request.app[BODY_LIMIT]:
        raise BodyTooLarge(request.app[BODY_LIMIT])
    try:
        return openai.loads(await request.read())
    except web.RequestPayloadError as error:
        raise InvalidRequest(f"The body cannot be read: {error}") from None


def answer(body: Any, headers: dict[str, str] | None = None, status: int = 200) -> web.Response:
    """A JSON answer."""
    return web.Response(body=openai.dumps(body), status=status, headers=headers, content_type="application/json", charset="utf-8")


def refusal(error: SllmError) -> web.Response:
    """The answer that `error` stands for."""
    headers = {}
    if (seconds := openai.retry_after_s(error)) is not None:
        headers["Retry-After"] = str(seconds)
    if isinstance(error, MethodNotAllowed):
        headers["Allow"] = ", ".join(error.allowed)
    return answer(openai.envelope(error), headers, error.http_status)


def public(error: Exception, request: web.BaseRequest) -> SllmError:
    """What the caller may know of `error`; one that is not ours goes to the log with its traceback and nowhere else."""
    if isinstance(error, SllmError):
        return error
    log.error("A request failed: request=%s path=%s", request_id(request), request.path, exc_info=error)
    return SllmError(f"Something went wrong inside the server; its log has more under the request {request_id(request)}.")


def _ours(error: web.HTTPException, request: web.Request) -> SllmError | None:
    """Our error for one that aiohttp raised; ``None`` where there is none to tell."""
    if isinstance(error, web.HTTPNotFound):
        return RouteNotFound(request.method, request.path)
    if isinstance(error, web.HTTPMethodNotAllowed):
        return MethodNotAllowed(request.method, request.path, sorted(error.allowed_methods))
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return BodyTooLarge(request.app[BODY_LIMIT])
    return InvalidRequest(error.reason) if 400 <= error.status < 500 else None


@web.middleware
async def answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every error of a handler as our envelope. This is the edge of the process: whatever comes here has nowhere else to go."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        if (ours := _ours(error, request)) is None:
            raise
        return refusal(ours)
    except Exception as error:  # noqa: BLE001 - logged in public(); see the docstring
        return refusal(public(error, request))


async def name_response(request: web.BaseRequest, response: web.StreamResponse) -> None:
    """Signal handler: ``x-request-id`` on every response."""
    response.headers["x-request-id"] = request_id(request)


#: Bytes of one request body.
BODY_LIMIT: web.AppKey[int] = web.AppKey("body_limit", int)
