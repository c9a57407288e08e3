"""The door in front of asyncssh: who waits in line is connected and not spoken to, and nobody is forgotten."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import time
import weakref
from collections.abc import AsyncIterator

import asyncssh
import pytest
import uvloop
from rig import until_async

from appliance.controller.connection import MAX_SAID_BYTES, Door, listen
from appliance.controller.descriptors import Descriptors
from appliance.controller.slots import FEW, LATE_S, PATIENCE_S, Slots
from appliance.protocol.tunnel import read_slot

VERSION = b"SSH-2.0-"


class Bench:
    """A door with an SSH server behind it that nobody logs in to; every connection made and ended."""

    def __init__(self) -> None:
        self.slots = Slots()
        self.slots.tick(LATE_S * 2, 0)  # behind with its work: only the first few are let in
        self.refused = 0
        self.left = asyncio.Event()
        self.made: list[weakref.ref[asyncssh.SSHServerConnection]] = []
        self.door: Door
        self.port = 0

    def count_refused(self) -> None:
        self.refused += 1

    async def comes(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """One more connection, which speaks at once, as SSH clients do."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(b"SSH-2.0-test\r\n")
        return reader, writer


@contextlib.asynccontextmanager
async def bench(*, most: int = 100, most_per_source: int = 100) -> AsyncIterator[Bench]:
    stand = Bench()

    class Server(asyncssh.SSHServer):
        def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
            stand.made.append(weakref.ref(conn))

        def connection_lost(self, exc: Exception | None) -> None:
            stand.slots.leave()
            stand.door.advance()
            stand.left.set()

    sock = socket.create_server(("127.0.0.1", 0))
    acceptor, stand.door = listen(
        sock,
        lambda options: Door(
            stand.slots, options, most=most, most_per_source=most_per_source, refused=stand.count_refused
        ),
        descriptors=Descriptors(time.monotonic),
        server_factory=Server,
        server_host_keys=[asyncssh.generate_private_key("ssh-ed25519")],
    )
    stand.port = acceptor.get_port()
    writers: list[asyncio.StreamWriter] = []
    plain = stand.comes

    async def comes() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await plain()
        writers.append(writer)
        return reader, writer

    stand.comes = comes  # type: ignore[method-assign]
    try:
        yield stand
    finally:
        stand.door.close()
        acceptor.close()
        for writer in writers:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        while stand.slots.under_way:
            stand.left.clear()
            await asyncio.wait_for(stand.left.wait(), 10)
        await acceptor.wait_closed()


async def in_line(stand: Bench) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Fills the places inside, and returns one that waits."""
    for _ in range(FEW):
        await stand.comes()
    waiting = await stand.comes()
    assert await is_silent(waiting[0])
    return waiting


async def is_closed(reader: asyncio.StreamReader) -> bool:
    with contextlib.suppress(ConnectionResetError):
        return await first_word(reader) == b""
    return True


async def first_word(reader: asyncio.StreamReader) -> bytes:
    return await asyncio.wait_for(reader.read(4096), 10)


async def is_silent(reader: asyncio.StreamReader) -> bool:
    try:
        async with asyncio.timeout(0.1):
            await reader.read(1)
    except TimeoutError:
        return True
    return False


def test_those_above_the_first_few_wait_and_come_one_after_the_other() -> None:
    async def go() -> None:
        async with bench() as stand:
            inside = [await stand.comes() for _ in range(FEW)]
            for reader, _ in inside:
                assert (await first_word(reader)).startswith(VERSION)
            first, second = await stand.comes(), await stand.comes()
            assert await is_silent(first[0])
            inside[0][1].close()
            # What it said while it waited isn't lost: its version was heard, and the server goes on to KEXINIT.
            assert (await asyncio.wait_for(first[0].readuntil(b"curve25519"), 10)).startswith(VERSION)
            assert await is_silent(second[0])
            # Who hung up meanwhile is passed over, and the next one's turn isn't lost.
            third = await stand.comes()
            second[1].close()
            await second[1].wait_closed()
            inside[1][1].close()
            inside[2][1].close()
            assert (await first_word(third[0])).startswith(VERSION)
            assert stand.refused == stand.slots.shed == 0

    uvloop.run(go())


def test_who_finds_no_place_gets_a_slot() -> None:
    async def go() -> None:
        async with bench() as stand:
            stand.slots.rate_per_s = 0.3  # two places
            inside = [await stand.comes() for _ in range(FEW)]
            waiting = [await stand.comes() for _ in range(2)]
            reader, _ = await stand.comes()
            assert read_slot(await first_word(reader)) is not None
            assert await first_word(reader) == b"", "and the connection is closed"
            for reader, _ in waiting:
                assert await is_silent(reader)
            assert stand.slots.shed == 1
            assert len(inside) == FEW

    uvloop.run(go())


def test_who_waits_too_long_gets_a_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    async def go() -> None:
        async with bench() as stand:
            reader, _ = await in_line(stand)
            monkeypatch.setattr("appliance.controller.slots.PATIENCE_S", 0.0)
            stand.door.tick(LATE_S * 2)
            assert read_slot(await first_word(reader)) is not None

    assert PATIENCE_S > 0
    uvloop.run(go())


def test_a_connection_that_ended_is_gone_without_the_collector() -> None:
    """Crowds come and go; each would leave it work that heartbeats wait for."""

    async def go() -> None:
        async with bench() as stand:
            gc.disable()
            try:
                silent, _ = await stand.comes(), await stand.comes()
                assert (await first_word(silent[0])).startswith(VERSION)
                silent[1].transport.abort()
                with contextlib.suppress(asyncssh.Error):  # it is let in by nobody
                    await asyncssh.connect("127.0.0.1", stand.port, known_hosts=None, password="x", config=None)
                await until_async(lambda: not (stand.made[0]() or stand.made[2]()), what="both are gone")
            finally:
                gc.enable()

    uvloop.run(go())


def test_who_hung_up_in_line_harms_nobody_when_its_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    async def go() -> None:
        async with bench() as stand:
            _, writer = await in_line(stand)
            stays, _ = await stand.comes()
            writer.transport.abort()
            assert await is_silent(stays)  # and its end was seen meanwhile
            monkeypatch.setattr("appliance.controller.slots.PATIENCE_S", 0.0)
            stand.door.tick(LATE_S * 2)
            assert read_slot(await first_word(stays)) is not None
            assert stand.slots.shed == 1

    uvloop.run(go())


@pytest.mark.parametrize("limits", [{"most": 2}, {"most_per_source": 2}])
def test_the_line_is_bounded(limits: dict[str, int]) -> None:
    async def go() -> None:
        async with bench(**limits) as stand:
            for _ in range(FEW + 2):
                await stand.comes()
            reader, _ = await stand.comes()
            assert await is_closed(reader)
            assert stand.refused == 1

    uvloop.run(go())


def test_a_tick_on_time_lets_more_in() -> None:
    async def go() -> None:
        async with bench() as stand:
            reader, _ = await in_line(stand)
            stand.door.tick(0.0)
            assert (await first_word(reader)).startswith(VERSION)

    uvloop.run(go())


def test_who_says_too_much_before_its_turn_is_closed() -> None:
    async def go() -> None:
        async with bench() as stand:
            reader, writer = await in_line(stand)
            writer.write(bytes(MAX_SAID_BYTES + 1))
            assert await is_closed(reader)

    uvloop.run(go())


def test_closing_ends_all_that_wait() -> None:
    async def go() -> None:
        async with bench() as stand:
            reader, _ = await in_line(stand)
            stand.door.close()
            assert await is_closed(reader)

    uvloop.run(go())
