"""Front ends from a table: answers and refusals as declared, and an OpenAPI document that says the same."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import msgspec
import pytest
from json_schema import Schema, check_document, faults, resolve

from appliance.controller.web import (
    Endpoint,
    ProblemError,
    Request,
    Response,
    application,
    openapi,
    problem_response,
    simple_problem,
)
from appliance.errors import NotFoundError, StoreError
from appliance.protocol.operator import ImageKeyTermsWish, SeDetail, StatusView
from appliance.protocol.problem import CONTENT_TYPE, Problem
from appliance.protocol.tunnel import Hello


class Wish(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is asked for."""

    name: str
    count: int = 1


class Made(msgspec.Struct):
    """What comes of it."""

    name: str
    parts: list[int]
    note: str | None = None


async def make(_request: Request, wish: Wish) -> tuple[int, Made]:
    return (201 if wish.count else 202), Made(wish.name, list(range(wish.count)))


async def show(request: Request, _body: None) -> Made:
    return Made(request.path_params["name"], [])


async def raw(_request: Request, body: bytes) -> Response:
    return Response(body[::-1])


ERRORS: dict[str, Exception] = {
    "problem": ProblemError(simple_problem(409, "X-001", "No", detail="d", advice="a")),
    "later": ProblemError(Problem(type="/problems/X-002", title="t", status=429, code="X-002", retry_after_s=7)),
    "store": StoreError("the disk is full", retryable=True),
    "ours": NotFoundError("nothing there"),
    "defect": RuntimeError("secret detail"),
}


async def fail(request: Request, _body: None) -> None:
    raise ERRORS[request.path_params["how"]]


TABLE = [
    Endpoint("POST", "/v1/things", make, "Make", {201: Made, 202: Made}, Wish, errors=(400,)),
    Endpoint("GET", "/v1/things/{name}", show, "Show", {200: Made}, query=("after",), errors=(404,)),
    Endpoint("POST", "/v1/raw", raw, "Turn round", {200: None}, bytes),
    Endpoint("GET", "/v1/fail/{how}", fail, "Fail", {200: None}),
]


class Answer(msgspec.Struct):
    """What an application answered."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.body)


def ask(method: str, path: str, body: bytes = b"", *, max_body: int = 1000, gone: bool = False) -> Answer:
    """One request, spoken in ASGI."""
    answer = Answer(0, {}, b"")
    received = iter([{"type": "http.request", "body": body[:10], "more_body": True},
                     {"type": "http.disconnect"} if gone else {"type": "http.request", "body": body[10:]}])  # fmt: skip

    async def receive() -> dict[str, Any]:
        return next(received)

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            answer.status = message["status"]
            answer.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            answer.body += message.get("body", b"")

    scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": [], "state": {}}

    async def go() -> None:
        serving: Awaitable[None] = application("T", TABLE, max_body=max_body, documented=True)(scope, receive, send)
        await serving

    asyncio.run(go())
    return answer


@pytest.fixture(scope="module")
def document() -> Schema:
    found: Schema = ask("GET", "/v1/openapi.json").json
    return found


def schema_of(document: Schema, method: str, path: str, status: int) -> Schema:
    (content,) = document["paths"][path][method]["responses"][str(status)]["content"].values()
    found: Schema = content["schema"]
    return found


def test_the_document_holds(document: Schema) -> None:
    check_document(document)
    assert document == msgspec.json.decode(msgspec.json.encode(openapi("T", TABLE)))
    assert set(document["paths"]) == {entry.path for entry in TABLE}


@pytest.mark.parametrize(
    ("body", "status"), [(b'{"name": "a", "count": 3}', 201), (b'{"name": "a"}', 201), (b'{"name":"","count":0}', 202)]
)
def test_answers_are_as_declared(document: Schema, body: bytes, status: int) -> None:
    answer = ask("POST", "/v1/things", body)
    assert (answer.status, answer.headers["content-type"]) == (status, "application/json")
    assert faults(document, schema_of(document, "post", "/v1/things", status), answer.json) == []


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{}", b"null", b"[]", b"{", b"\xff", b'{"name": 1}', b'{"name": "a", "count": "1"}',
        b'{"name": "a", "other": 1}', b'{"name": "a", "name": "b"}', b'{"name": "a", "count": NaN}',
        b'{"name": "a", "count": 1e999}', b"[" * 500, b'{"name": "\\ud800"}',
    ],
)  # fmt: skip
def test_a_body_that_does_not_fit_is_refused(document: Schema, body: bytes) -> None:
    answer = ask("POST", "/v1/things", body)
    assert (answer.status, answer.headers["content-type"]) == (400, CONTENT_TYPE)
    assert faults(document, schema_of(document, "post", "/v1/things", 400), answer.json) == []


def test_what_the_schema_refuses_we_refuse_too(document: Schema) -> None:
    body = document["paths"]["/v1/things"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert resolve(document, body)["additionalProperties"] is False
    assert faults(document, body, {"name": "a", "other": 1}) == ["$: other is unknown"]
    assert "additionalProperties" not in resolve(document, schema_of(document, "post", "/v1/things", 201))


def test_raw_bodies_come_as_they_are_and_bounded() -> None:
    assert ask("POST", "/v1/raw", b"x" * 500 + b"y").body == b"y" + b"x" * 500
    answer = ask("POST", "/v1/raw", b"x" * 1001)
    assert (answer.status, answer.json["code"]) == (413, "HTTP-413")


def test_a_client_that_goes_away_is_no_defect(caplog: pytest.LogCaptureFixture) -> None:
    assert ask("POST", "/v1/raw", b"x" * 100, gone=True).status == 400
    assert caplog.records == []


@pytest.mark.parametrize(
    ("how", "status", "code"),
    [("problem", 409, "X-001"), ("later", 429, "X-002"), ("store", 503, "STORE-001"), ("ours", 500, "NOTFOUND-001")],
)
def test_refusals_are_problem_documents(how: str, status: int, code: str) -> None:
    answer = ask("GET", f"/v1/fail/{how}")
    assert answer.headers["content-type"] == CONTENT_TYPE
    problem = msgspec.json.decode(answer.body, type=Problem)
    assert (answer.status, problem.status, problem.code) == (status, status, code)
    assert answer.headers.get("retry-after") == ("7" if how == "later" else None)


def test_a_defect_is_told_to_the_log_and_not_to_the_client(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RuntimeError):  # Starlette answers, then raises for the server to log
        ask("GET", "/v1/fail/defect")
    assert "unexpected error in GET /v1/fail/defect" in caplog.text


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nope", 404), ("PUT", "/v1/things", 405)])
def test_what_is_not_in_the_table_is_a_problem_too(method: str, path: str, status: int) -> None:
    answer = ask(method, path)
    assert (answer.status, answer.headers["content-type"], answer.json["code"]) == (
        status, CONTENT_TYPE, f"HTTP-{status}",
    )  # fmt: skip


def test_problem_response_has_no_retry_after_where_waiting_does_not_help() -> None:
    assert "retry-after" not in problem_response(simple_problem(400, "X", "x")).headers


def test_each_operation_gets_its_own_schemas() -> None:
    async def handler(_request: Request, _body: Any) -> None: ...

    table = [
        Endpoint("POST", "/a", handler, "A", {200: StatusView}, ImageKeyTermsWish),
        Endpoint("POST", "/b", handler, "B", {200: SeDetail, 201: list[SeDetail]}, Hello),
        Endpoint("GET", "/c", handler, "C", {200: None}),
        Endpoint("POST", "/d", handler, "D", {200: list[StatusView]}, bytes),
    ]
    document = openapi("T", table)
    check_document(document)
    found = {path: resolve(document, schema_of(document, "post", path, 200)).get("title") for path in ("/a", "/b")}
    assert found == {"/a": "StatusView", "/b": "SeDetail"}
    assert schema_of(document, "post", "/d", 200)["items"]["$ref"].endswith("/StatusView")
    bodies = [document["paths"][path]["post"]["requestBody"]["content"] for path in ("/a", "/b", "/d")]
    assert [resolve(document, entry["application/json"]["schema"])["title"] for entry in bodies[:2]] == [
        "ImageKeyTermsWish",
        "Hello",
    ]
    assert list(bodies[2]) == ["application/jose+json"]
