"""Accepting connections a few at a time, so that a crowd at the door doesn't keep those waiting who are inside.

Left to themselves, the loop's own ways empty the whole backlog in one turn: four thousand connections that are only
turned away stop every heartbeat for a quarter of a second. Here a turn lets in `LET_IN` at most, since each of them
begins with a key exchange; and after those that were turned away the door rests, so that no more than
`TURNED_AWAY_PER_S` are. The others wait in the kernel, where they cost nothing.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable
from typing import Any

from appliance.controller.descriptors import Descriptors

_log = logging.getLogger(__name__)

LET_IN = 2
"""In one turn of the loop."""
TURN_AWAY = 8
"""The same, of those that are closed at once."""
TURNED_AWAY_PER_S = 2000.0
PAUSE_S = 0.2
"""Where the process is out of descriptors: trying again at once would spin."""

Take = Callable[[socket.socket, Any], bool]
"""Takes an accepted, non-blocking connection and its peer's name; returns whether it was let in, else it is closed."""


class Acceptor:
    """One listening socket. One loop only."""

    def __init__(self, sock: socket.socket, take: Take, *, descriptors: Descriptors, what: str) -> None:
        """`what` names the port in the log."""
        sock.setblocking(False)
        self._sock = sock
        self._take = take
        self._descriptors = descriptors
        self._what = what
        self._loop = asyncio.get_running_loop()
        self._resting: asyncio.TimerHandle | None = None
        self._loop.add_reader(sock.fileno(), self._ready)

    def stop(self) -> None:
        """Accepts no more; the socket stays its owner's."""
        if self._resting is not None:
            self._resting.cancel()
            self._resting = None
        elif self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock.fileno())

    def close(self) -> None:
        """Accepts no more and closes the socket."""
        self.stop()
        self._sock.close()

    def get_addresses(self) -> list[Any]:
        """Where it listens."""
        return [self._sock.getsockname()]

    async def wait_closed(self) -> None:
        """There is nothing to wait for."""

    def _ready(self) -> None:
        let_in = turned_away = 0
        while let_in < LET_IN and turned_away < TURN_AWAY:
            try:
                connection, name = self._sock.accept()
            except (BlockingIOError, InterruptedError):
                break
            except ConnectionAbortedError:
                continue
            except OSError as error:
                if error.errno in {errno.EMFILE, errno.ENFILE}:
                    self._descriptors.ran_out()
                _log.error("can't accept on the %s port: %s", self._what, error)
                self._rest(PAUSE_S)
                return
            connection.setblocking(False)
            if not self._descriptors.spares(connection.fileno()):
                connection.close()
                turned_away += 1
            elif self._take(connection, name):
                let_in += 1
            else:
                turned_away += 1
        if turned_away:
            self._rest(turned_away / TURNED_AWAY_PER_S)

    def _rest(self, seconds: float) -> None:
        self._loop.remove_reader(self._sock.fileno())
        self._resting = self._loop.call_later(seconds, self._go_on)

    def _go_on(self) -> None:
        self._resting = None
        self._loop.add_reader(self._sock.fileno(), self._ready)
