"""What a real controller says of its front ends, and whether it keeps to it: every operation is asked."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from json_schema import Schema, check_document, faults, resolve
from rig import RunningController, machine, running, until_async

from appliance.pki import tls
from appliance.protocol import enroll, strict_json, tunnel
from appliance.protocol.enroll import EnrollRequest, NonceAnswer
from appliance.protocol.problem import CONTENT_TYPE
from appliance.protocol.tunnel import Confirm, Heartbeat

DOCUMENT = "/v1/openapi.json"
LAST = ("drain", "delete", "reject", "revoke")
"""Asked last, in this order from the end: they take away what the others show."""


class Reply(NamedTuple):
    """One HTTP answer."""

    status: int
    kind: str
    body: bytes


def over_socket(path: Path, method: str, target: str, body: bytes | None = None) -> Reply:
    """Asks the operator API."""
    connection = http.client.HTTPConnection("controller", timeout=20)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.settimeout(20)
    connection.sock.connect(str(path))
    return reply(connection, method, target, body)


def over_tls(controller: RunningController, method: str, target: str, body: bytes | None = None) -> Reply:
    """Asks the enroll API."""
    context = tls.client_context([controller.bundle.root_ca])
    connection = http.client.HTTPSConnection("127.0.0.1", controller.enroll_port, timeout=20, context=context)
    return reply(connection, method, target, body)


def reply(connection: http.client.HTTPConnection, method: str, target: str, body: bytes | None) -> Reply:
    try:
        connection.request(method, target, body, {"Content-Type": "application/json"} if body is not None else {})
        answer = connection.getresponse()
        return Reply(answer.status, answer.headers.get_content_type(), answer.read())
    finally:
        connection.close()


def assert_documented(document: Schema, method: str, path: str, given: Reply) -> None:
    """Asserts that an answer is one of those the document names, in its shape."""
    where = f"{method.upper()} {path} -> {given.status}"
    responses = document["paths"][path][method.lower()]["responses"]
    assert str(given.status) in responses, f"{where} is not documented: {given.body[:300]!r}"
    content = responses[str(given.status)].get("content")
    if content is None:
        return
    assert given.kind in content, f"{where}: {given.kind}"
    assert faults(document, content[given.kind]["schema"], json.loads(given.body)) == [], where


@pytest.fixture(scope="module")
def controller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningController]:
    with running(tmp_path_factory.mktemp("openapi") / "root") as found:
        yield found


def strict_bodies(document: Schema) -> dict[str, Schema]:
    """Schemas of the JSON bodies of all POSTs, by path."""
    return {
        path: resolve(document, item["post"]["requestBody"]["content"]["application/json"]["schema"])
        for path, item in document["paths"].items()
        if "application/json" in item.get("post", {}).get("requestBody", {}).get("content", {})
    }


def test_the_enroll_and_channel_apis_keep_to_their_documents(controller: RunningController) -> None:
    document: Schema = json.loads(over_tls(controller, "GET", DOCUMENT).body)
    check_document(document)
    for path in (enroll.ENROLL_PATH, enroll.REFRESH_PATH):
        for body in (b"", b"{}", b"\xff", b"x" * 20_000):
            assert_documented(document, "POST", path, over_tls(controller, "POST", path, body))
    assert_documented(document, "POST", enroll.NONCE_PATH, over_tls(controller, "POST", enroll.NONCE_PATH, b""))

    async def go() -> None:
        async with machine() as stand:
            se = stand.se(controller.bundle, "documented")

            def enrolled(make: Any) -> Reply:
                nonce = over_tls(controller, "POST", enroll.NONCE_PATH, b"").body
                decoded = strict_json.decode(nonce, NonceAnswer, max_bytes=1000)
                return over_tls(controller, "POST", make[0], make[1](decoded.nonce))

            for make in (
                (enroll.REFRESH_PATH, se.signed_refresh),  # not known yet
                (enroll.ENROLL_PATH, se.signed_enrollment),
                (enroll.REFRESH_PATH, se.signed_refresh),
            ):
                given = await asyncio.to_thread(enrolled, make)
                assert_documented(document, "POST", make[0], given)
            assert given.status == 200
            await se.enroll()
            await se.connect()
            await se.open_reverse()
            assert se.conn is not None
            reader, writer = await se.conn.open_connection(tunnel.CHANNEL_HOST, tunnel.CHANNEL_PORT)

            async def say(method: str, path: str, body: bytes) -> Reply:
                head = f"{method} {path} HTTP/1.1\r\nhost: c\r\ncontent-length: {len(body)}\r\n\r\n"
                writer.write(head.encode() + body)
                lines = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)).decode().lower().split("\r\n")
                headers = dict(line.split(": ", 1) for line in lines[1:] if line)
                given = await reader.readexactly(int(headers["content-length"]))
                return Reply(int(lines[0].split(" ")[1]), headers["content-type"], given)

            spoken: Schema = json.loads((await say("GET", DOCUMENT, b"")).body)
            check_document(spoken)
            assert strict_bodies(spoken).keys() == spoken["paths"].keys()
            assert all(schema["additionalProperties"] is False for schema in strict_bodies(spoken).values())
            beat = strict_json.encode(Heartbeat(sequence=1, time=0.0))
            for path in spoken["paths"]:
                for body in (b"{}", b'{"unknown": 1}', beat):
                    assert_documented(spoken, "POST", path, await say("POST", path, body))
            hello = {
                "protocol": 1, "agent_version": "t", "facts": {}, "ticket": "", "trust_version": 0, "time": 0.0,
                "host_keys": [se.host_key],
            }  # fmt: skip
            given = await say("POST", tunnel.HELLO_PATH, json.dumps(hello).encode())
            assert given.status == 200
            assert_documented(spoken, "POST", tunnel.HELLO_PATH, given)
            ticket = strict_json.encode(Confirm(ticket=json.loads(given.body)["ticket"]))
            for path, body in ((tunnel.CONFIRM_PATH, ticket), (tunnel.HEARTBEAT_PATH, beat)):
                given = await say("POST", path, body)
                assert given.status == 200
                assert_documented(spoken, "POST", path, given)
            writer.close()

    asyncio.run(go())


def test_every_operator_operation_answers_as_documented(controller: RunningController) -> None:
    path = controller.paths.controller_socket
    document: Schema = json.loads(over_socket(path, "GET", DOCUMENT).body)
    check_document(document)
    closed = strict_bodies(document)
    assert closed
    assert all(schema["additionalProperties"] is False for schema in closed.values()), closed

    async def go() -> None:
        async with machine() as stand:
            se = stand.se(controller.bundle, "asked")
            await se.enroll()
            await se.link()
            await se.beat(telemetry=True)
            await until_async(lambda: controller.state("asked") == "UP OK", what="UP")
            await asyncio.to_thread(ask_all, se.attempt_id)

    def ask_all(attempt_id: str) -> None:
        known = {
            "se": ["asked", "nobody"],
            "subject": ["asked", "127.0.0.1", attempt_id, "nobody"],
            "key": [controller.bundle.image_key_id, "ik-none"],
            "token": ["nobody"],
            "image": ["seed-0123456789abcdef", "nobody"],
            "kind": ["ca", "host-key", "login-key", "nothing"],
        }
        operations = [(name, method) for name, item in document["paths"].items() for method in item]
        operations.sort(key=lambda one: LAST[::-1].index(one[0].rsplit("/")[-1]) if one[0].endswith(LAST) else -1)
        for name, method in operations:
            part = name.partition("{")[2].partition("}")[0]
            query = {entry["name"] for entry in document["paths"][name][method]["parameters"] if entry["in"] == "query"}
            for value in known[part] if part else [""]:
                target = name.replace(f"{{{part}}}", value)
                if method == "get":
                    assert_documented(document, method, name, over_socket(path, "GET", target))
                    for wrong in ("nan", "-inf", "1e300", "x"):
                        for each in query:
                            given = over_socket(path, "GET", f"{target}?{each}={wrong}")
                            assert given.status in {400, 404}, (target, each, wrong, given)
                            assert_documented(document, method, name, given)
                    continue
                for body in (b'{"unknown": 1}', b"[]", b"{}") if name in closed else (b"",):
                    given = over_socket(path, "POST", target, body)
                    assert_documented(document, method, name, given)
                    if body != b"{}" and name in closed:
                        assert (given.status, given.kind) == (400, CONTENT_TYPE), (target, body, given)

    asyncio.run(go())


def test_metrics_have_a_document_too(controller: RunningController) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", controller.bound["metrics_port"], timeout=20)
    document: Schema = json.loads(reply(connection, "GET", DOCUMENT, None).body)
    check_document(document)
    assert set(document["paths"]) == {"/metrics"}


def test_what_the_enroll_document_asks_for_is_what_the_struct_holds() -> None:
    """The JWS payload is no JSON body of the document; its struct must be as strict."""
    assert EnrollRequest.__struct_config__.forbid_unknown_fields


def test_no_document_without_tls(controller: RunningController) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", controller.enroll_port, timeout=5)
    with pytest.raises((OSError, http.client.HTTPException, ssl.SSLError)):
        reply(connection, "GET", DOCUMENT, None)
