"""HTTP front ends: routes made from msgspec structs, refusals as problem documents, OpenAPI 3.1 from the same table.

One `Endpoint` is one line of a front end's table. The server side of every front end, whatever carries it (TLS, a unix
socket, a channel of a link), is the same guarded protocol object, see `listener`.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from appliance import __version__
from appliance.controller.listener import Turns
from appliance.errors import ApplianceError
from appliance.protocol import problem as problems
from appliance.protocol import strict_json
from appliance.protocol.jws import RawJws
from appliance.protocol.problem import Problem

JSON = "application/json"
JOSE = "application/jose+json"

MAX_NUMBER = 2.0**53
"""Of query parameters, either way; also keeps `nan` and `inf` out, which Python reads as numbers."""

LARGE_BYTES = 1024
"""A body above this waits for its turn: to read one may take some milliseconds, and many that became whole at once, on
as many connections or channels, would be read in one turn of the loop."""
MAX_PARTS = 8192
"""Values in one body: eight bytes each of the largest one that an operator may send."""

_log = logging.getLogger(__name__)


class ProblemError(ApplianceError):
    """An answer that isn't the wanted one."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.title, hint=problem.advice, code=problem.code)
        self.problem = problem


Handler = Callable[[Request, Any], Awaitable[Any]]


class Endpoint(NamedTuple):
    """One operation. `handler(request, body)` returns an `answer`, a `(status, answer)` pair or a Response."""

    method: str
    path: str
    handler: Handler
    summary: str
    answers: dict[int, Any]
    """Status to type of the answer; problems need not be listed."""
    body: Any = None
    """Struct type of the request body, `bytes` for a JWS that the handler parses, None where there is none."""
    query: tuple[str, ...] = ()
    errors: tuple[int, ...] = ()
    """Statuses of the handler's refusals; those of the frame around it (`_runner`) are documented by themselves."""
    admit: Callable[[Request], None] = lambda _request: None
    """Called before anything of the body is read; raises `ProblemError`."""


def problem_response(problem: Problem) -> Response:
    """Renders a problem document; a problem that waiting helps carries Retry-After (RFC 9110 section 10.2.3)."""
    headers = {"Retry-After": str(problem.retry_after_s)} if problem.retry_after_s else {}
    return Response(
        msgspec.json.encode(problem), status_code=problem.status, media_type=problems.CONTENT_TYPE, headers=headers
    )


def simple_problem(status: int, code: str, title: str, *, detail: str = "", advice: str = "") -> Problem:
    """A problem that belongs to no stage's table."""
    return Problem(type=f"/problems/{code}", title=title, status=status, code=code, detail=detail, advice=advice)


def unexpected_problem() -> Problem:
    """The problem that stands for an error of ours."""
    return simple_problem(500, "HTTP-500", "The controller failed on this request")


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Reads a body of at most `max_bytes`."""
    chunks = bytearray()
    async for chunk in request.stream():
        chunks += chunk
        if len(chunks) > max_bytes:
            raise ProblemError(
                simple_problem(413, "HTTP-413", "The body is too large", detail=f"at most {max_bytes} bytes")
            )
    return bytes(chunks)


def _route(path: str, endpoints: Sequence[Endpoint], max_body: int, turns: Turns) -> Route:
    """One route a path, not one a method: a 405 names all methods of the path."""
    runs = {entry.method: _runner(entry, max_body, turns) for entry in endpoints if entry.path == path}
    if "GET" in runs:
        runs["HEAD"] = runs["GET"]

    async def run(request: Request) -> Response:
        return await runs[request.method](request)

    return Route(path, run, methods=list(runs), include_in_schema=False)


def _runner(endpoint: Endpoint, max_body: int, turns: Turns) -> Callable[[Request], Awaitable[Response]]:
    async def run(request: Request) -> Response:
        try:
            endpoint.admit(request)
            body: Any = None
            if endpoint.body is not None:
                body = await read_body(request, max_body)
                if len(body) > LARGE_BYTES:
                    await turns.mine()
                if endpoint.body is not bytes:
                    body = strict_json.decode(body or b"{}", endpoint.body, max_bytes=max_body, max_parts=MAX_PARTS)
            answer = await endpoint.handler(request, body)
        except ProblemError as error:
            return problem_response(error.problem)
        except strict_json.MalformedError as error:
            return problem_response(simple_problem(400, error.code, "The request is malformed", detail=error.message))
        except ClientDisconnect:
            return Response(status_code=400)
        except ApplianceError as error:
            status = 503 if error.retryable else 500
            _log.error("%s %s: %s", endpoint.method, endpoint.path, error.message)
            return problem_response(
                simple_problem(status, error.code, "The controller could not do that", detail=error.message)
            )
        if isinstance(answer, Response):
            return answer
        status, value = answer if isinstance(answer, tuple) else (next(iter(endpoint.answers)), answer)
        return Response(msgspec.json.encode(value), status_code=status, media_type=JSON)

    return run


async def _http_error(_request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    detail = error.detail if isinstance(error, HTTPException) else ""
    answer = problem_response(simple_problem(status, f"HTTP-{status}", detail or "The request can't be served"))
    # A 405 says which methods there are (RFC 9110 section 15.5.6).
    answer.headers.update(getattr(error, "headers", None) or {})
    return answer


async def _unexpected(request: Request, error: Exception) -> Response:
    _log.error("unexpected error in %s %s", request.method, request.url.path, exc_info=error)
    return problem_response(unexpected_problem())


def application(title: str, endpoints: Sequence[Endpoint], *, max_body: int, documented: bool = False) -> Starlette:
    """Builds the ASGI application of one front end; `documented` adds GET /v1/openapi.json."""
    turns = Turns(1)
    routes = [_route(path, endpoints, max_body, turns) for path in dict.fromkeys(entry.path for entry in endpoints)]
    if documented:
        document = msgspec.json.encode(openapi(title, endpoints))

        async def serve_document(_request: Request) -> Response:
            return Response(document, media_type=JSON)

        routes.append(Route("/v1/openapi.json", serve_document, methods=["GET"]))
    return Starlette(routes=routes, exception_handlers={HTTPException: _http_error, Exception: _unexpected})


def _has_defaults(kind: Any) -> bool:
    """Whether a request without a body means the same as one with `{}`."""
    return not any(field.required for field in msgspec.structs.fields(kind))


def openapi(title: str, endpoints: Sequence[Endpoint]) -> dict[str, Any]:
    """Returns an OpenAPI 3.1 document of `endpoints`, schemas by msgspec (so `additionalProperties: false` stays)."""
    bodies = [RawJws if entry.body is bytes else entry.body for entry in endpoints]
    kinds = [
        kind
        for entry, body in zip(endpoints, bodies, strict=True)
        for kind in (*entry.answers.values(), body)
        if kind not in {None, bytes}
    ]
    schemas, components = msgspec.json.schema_components([*kinds, Problem], ref_template="#/components/schemas/{name}")
    rendered = iter(schemas)
    number = {"type": "number", "minimum": -MAX_NUMBER, "maximum": MAX_NUMBER}
    paths: dict[str, Any] = {}
    for entry, body in zip(endpoints, bodies, strict=True):
        responses: dict[str, Any] = {}
        for status, kind in entry.answers.items():
            responses[str(status)] = {"description": entry.summary}
            if kind not in {None, bytes}:
                responses[str(status)]["content"] = {JSON: {"schema": next(rendered)}}
        reference = {"$ref": "#/components/schemas/Problem"}
        around = {503} if body is None else {400, 413, 503}
        for status in sorted(around.union(entry.errors)):
            content = {problems.CONTENT_TYPE: {"schema": reference}}
            responses[str(status)] = {"description": "problem", "content": content}
        operation: dict[str, Any] = {"summary": entry.summary, "responses": responses}
        names = [part[1:-1] for part in entry.path.split("/") if part.startswith("{")]
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ] + [{"name": name, "in": "query", "schema": number} for name in entry.query]
        if body is not None:
            media_type = JOSE if entry.body is bytes else JSON
            required = body is RawJws or not _has_defaults(body)
            operation["requestBody"] = {"required": required, "content": {media_type: {"schema": next(rendered)}}}
        paths.setdefault(entry.path, {})[entry.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": __version__},
        "paths": paths,
        "components": {"schemas": components},
    }


__all__ = ["Endpoint", "ProblemError", "Request", "Response", "StreamingResponse", "application", "openapi"]
