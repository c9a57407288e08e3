"""The short way of heartbeats: taken for the exact form only, and answering as the ordinary way does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
import uvloop

from appliance.controller.direct import DirectFrontEnd
from appliance.controller.listener import GuardedProtocol, HttpLimits
from appliance.controller.web import Endpoint, ProblemError, Request, Response, application, simple_problem
from appliance.protocol.strict_json import MalformedError

PATH = "/v1/heartbeat"
LIMITS = HttpLimits(
    max_header_bytes=1024, max_body_bytes=4096, header_timeout_s=60, body_timeout_s=60, keep_alive_s=1, max_queued=16
)


class Server:
    """A front end on TCP, and which way each request took."""

    def __init__(self) -> None:
        self.ways: list[str] = []
        endpoints = [Endpoint("POST", PATH, self._ordinary, "", {200: None}, bytes)]
        app = application("test", endpoints, max_body=LIMITS.max_body_bytes)
        self.front = DirectFrontEnd(app, LIMITS, path=PATH, answer=self._short)

    async def _ordinary(self, request: Request, body: bytes) -> Response:
        self.ways.append("ordinary")
        return Response(request.state.name + body, media_type="application/json")

    def _short(self, state: dict[str, Any], body: bytes) -> bytes:
        self.ways.append("short")
        if body == b"problem":
            raise ProblemError(simple_problem(409, "TEST-001", "No"))
        if body == b"malformed":
            raise MalformedError("not so")
        if body == b"bug":
            raise ZeroDivisionError
        answer: bytes = state["name"] + body
        return answer


class Client:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def ask(self, sent: bytes) -> tuple[int, bytes]:
        self.writer.write(sent)
        return await self.answer()

    async def answer(self) -> tuple[int, bytes]:
        head = (await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 5)).decode().lower()
        length = next(int(line.split(":")[1]) for line in head.split("\r\n") if line.startswith("content-length:"))
        return int(head.split(" ")[1]), await self.reader.readexactly(length)


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[Server, Client]]:
    server = Server()
    loop = asyncio.get_running_loop()
    listener = await loop.create_server(lambda: server.front.protocol(name=b"n:"), "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*listener.sockets[0].getsockname())
    try:
        yield server, Client(reader, writer)
    finally:
        writer.close()
        listener.close()
        server.front.close()
        await listener.wait_closed()


def beat(body: bytes, *, head: str = "") -> bytes:
    """What an agent writes."""
    known = f"POST {PATH} HTTP/1.1\r\nhost: channel\r\ncontent-type: application/json\r\n"
    return f"{known}{head}content-length: {len(body)}\r\n\r\n".encode() + body


def test_the_first_request_takes_the_ordinary_way_and_later_ones_the_short_one() -> None:
    async def main() -> None:
        async with connected() as (server, client):
            for number in range(5):
                body = b"%d" % number
                assert await client.ask(beat(body)) == (200, b"n:" + body)
            assert server.ways == ["ordinary", *["short"] * 4]

    uvloop.run(main())


@pytest.mark.parametrize(
    "other",
    [
        beat(b"x", head="x-more: 1\r\n"),
        beat(b"x").replace(b"host: channel", b"Host: channel"),
        beat(b"x").replace(b"host: channel", b"host: other"),
        beat(b"x") + b"\r\n",
    ],
    ids=["a header more", "another spelling", "another host", "more behind it"],
)
def test_what_differs_in_a_byte_takes_the_ordinary_way(other: bytes) -> None:
    async def main() -> None:
        async with connected() as (server, client):
            await client.ask(beat(b"1"))
            assert await client.ask(other) == (200, b"n:x")
            assert server.ways == ["ordinary", "ordinary"]

    uvloop.run(main())


def test_requests_in_pieces_and_in_a_row_are_answered_in_order() -> None:
    async def main() -> None:
        async with connected() as (server, client):
            await client.ask(beat(b"1"))
            whole = beat(b"2")
            client.writer.write(whole[:30])
            # The first piece is read before the second one is sent, or both would arrive as one.
            connection = cast("GuardedProtocol", next(iter(server.front.server_state.connections)))
            async with asyncio.timeout(5):
                while connection._reading == "":  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
            client.writer.write(whole[30:] + beat(b"3") + beat(b"4"))
            assert [await client.answer() for _ in range(3)] == [(200, b"n:2"), (200, b"n:3"), (200, b"n:4")]
            assert await client.ask(beat(b"5")) == (200, b"n:5")
            assert server.ways == [*["ordinary"] * 4, "short"]

    uvloop.run(main())


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [(b"problem", 409, b"TEST-001"), (b"malformed", 400, b"not so"), (b"bug", 500, b"HTTP-500")],
)
def test_refusals_are_problem_documents_and_the_connection_stays(body: bytes, status: int, said: bytes) -> None:
    async def main() -> None:
        async with connected() as (_server, client):
            await client.ask(beat(b"1"))
            got, document = await client.ask(beat(body))
            assert got == status
            assert said in document
            assert await client.ask(beat(b"2")) == (200, b"n:2")

    uvloop.run(main())


def test_a_body_over_the_limit_is_refused() -> None:
    async def main() -> None:
        async with connected() as (server, client):
            await client.ask(beat(b"1"))
            status, _ = await client.ask(beat(b"x" * (LIMITS.max_body_bytes + 1)))
            assert status == 413
            assert server.ways == ["ordinary"]

    uvloop.run(main())


def test_who_beats_stays_and_who_rests_is_closed() -> None:
    async def main() -> None:
        async with connected() as (server, client):
            loop = asyncio.get_running_loop()
            began = loop.time()
            await client.ask(beat(b"1"))
            while loop.time() - began < 1.5 * LIMITS.keep_alive_s:
                assert (await client.ask(beat(b"2")))[0] == 200
                await asyncio.sleep(0.1)
            last = loop.time()
            assert await asyncio.wait_for(client.reader.read(), 5) == b""
            assert loop.time() - last > 0.7 * LIMITS.keep_alive_s
            assert set(server.ways[1:]) == {"short"}

    uvloop.run(main())
