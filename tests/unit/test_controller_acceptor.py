"""A door that takes a few at a time, over real sockets: a crowd at it keeps nobody inside waiting."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
import uvloop
from rig import until_async

from appliance.controller import acceptor
from appliance.controller.acceptor import LET_IN, TURNED_AWAY_PER_S, Acceptor
from appliance.controller.descriptors import TOLD_S, Descriptors

CROWD = 60


class Door:
    """A listening socket with a crowd in its backlog, and what became of them."""

    def __init__(self, sock: socket.socket, *, lets_in: Callable[[int], bool] = lambda _count: True) -> None:
        self.taken: list[socket.socket] = []
        self.turns: list[int] = []
        """The loop's turn in which each came."""
        self.turn = 0
        self._lets_in = lets_in
        self.descriptors = Descriptors(time.monotonic)
        self.acceptor = Acceptor(sock, self._take, descriptors=self.descriptors, what="test")

    def _take(self, connection: socket.socket, name: Any) -> bool:
        assert name[0] == "127.0.0.1"
        assert connection.gettimeout() == 0.0
        self.turns.append(self.turn)
        if self._lets_in(len(self.turns)):
            self.taken.append(connection)
            return True
        connection.close()
        return False

    async def until(self, count: int) -> None:
        """Counts turns until so many came."""
        async with asyncio.timeout(10):
            while len(self.turns) < count:
                self.turn += 1
                await asyncio.sleep(0)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0), backlog=4 * CROWD) as found:
        yield found


@contextlib.contextmanager
def crowd(listener: socket.socket, count: int = CROWD) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(socket.create_connection(listener.getsockname())) for _ in range(count)]


def run(work: Coroutine[Any, Any, None]) -> None:
    uvloop.run(work)


def test_a_turn_lets_in_a_few(listener: socket.socket) -> None:
    async def go() -> None:
        with crowd(listener):
            door = Door(listener)
            await door.until(CROWD)
            assert max(door.turns.count(turn) for turn in set(door.turns)) <= LET_IN
            assert all(connection.fileno() >= 0 for connection in door.taken)
            door.acceptor.stop()
            for connection in door.taken:
                connection.close()

    run(go())


def test_those_who_are_turned_away_come_no_faster_than_that(listener: socket.socket) -> None:
    async def go() -> None:
        with crowd(listener) as there:
            began = time.monotonic()
            door = Door(listener, lets_in=lambda _count: False)
            await door.until(CROWD)
            assert time.monotonic() - began > 0.8 * (CROWD - acceptor.TURN_AWAY) / TURNED_AWAY_PER_S
            assert [client.recv(1) for client in there] == [b""] * CROWD
            door.acceptor.stop()

    run(go())


def test_one_who_may_come_in_comes_behind_a_crowd_that_may_not(listener: socket.socket) -> None:
    async def go() -> None:
        with crowd(listener, CROWD - 1), socket.create_connection(listener.getsockname()) as last:
            door = Door(listener, lets_in=lambda count: count == CROWD)
            await door.until(CROWD)
            (connection,) = door.taken
            connection.send(b"!")
            assert last.recv(1) == b"!"
            connection.close()
            door.acceptor.close()
            with pytest.raises(OSError, match="refused"):
                socket.create_connection(("127.0.0.1", last.getpeername()[1]))

    run(go())


def test_without_descriptors_it_waits_and_goes_on(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(acceptor, "PAUSE_S", 0.02)

    async def go() -> None:
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        with crowd(listener, 3):
            door = Door(listener)
            resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
            try:
                await asyncio.sleep(0.1)  # some pauses of it
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            assert not door.turns
            assert "are in use; raise LimitNOFILE" in door.descriptors.problem()
            assert 1 <= caplog.text.count("can't accept on the test port: ") <= 7, "it doesn't spin"
            await door.until(3)
            door.acceptor.stop()
            for connection in door.taken:
                connection.close()

    run(go())


def test_the_last_descriptors_are_given_to_nobody_who_comes(listener: socket.socket) -> None:
    async def go() -> None:
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        with crowd(listener, 3) as there:
            door = Door(listener)
            assert door.descriptors.problem() == ""
            lowest_free = os.dup(0)
            os.close(lowest_free)
            # An eighth of so many are kept back.
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free * 8 // 7, limits[1]))
            try:
                await until_async(lambda: door.descriptors.refused == 3, what="all are turned away")
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            assert not door.turns
            assert [client.recv(1) for client in there] == [b""] * 3
            assert "connections are turned away" in door.descriptors.problem()
            door.acceptor.stop()

    run(go())


def test_a_shortage_is_told_for_a_while() -> None:
    now = [0.0]
    found = Descriptors(lambda: now[0])
    assert found.problem() == ""
    found.ran_out()
    now[0] = TOLD_S
    assert f"nearly all of {resource.getrlimit(resource.RLIMIT_NOFILE)[0]} file descriptors" in found.problem()
    now[0] += 0.1
    assert found.problem() == ""
    assert found.refused == 1


def test_without_a_limit_there_is_no_shortage(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda _what: limits)
    assert Descriptors(time.monotonic).spares(1 << 20)


def test_a_stop_ends_a_rest_too(listener: socket.socket) -> None:
    async def go() -> None:
        with crowd(listener, 20):
            door = Door(listener, lets_in=lambda _count: False)
            await door.until(1)
            came = len(door.turns)
            door.acceptor.stop()
            await asyncio.sleep(0.05)  # longer than its rest
            assert len(door.turns) == came
            assert door.acceptor.get_addresses() == [listener.getsockname()]
            await door.acceptor.wait_closed()

    run(go())
