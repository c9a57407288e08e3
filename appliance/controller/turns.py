"""One piece of work in a turn of the loop, so that links wait for a piece and not for a queue of them.

A turn of the loop does all that is ready before it looks at its sockets again: sixteen handshakes and enrollments that
come together keep each heartbeat waiting for all sixteen. What may wait asks for a turn of its own here; between two of
them the loop serves whatever links have sent. Nothing gets slower by it: the work is the same.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send


class Turns:
    """Hands them out, first come, first served. One loop only."""

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._is_due = False

    async def mine(self) -> None:
        """Returns in a turn in which nobody else's does."""
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()
        self._waiting.append(turn)
        if not self._is_due:
            self._is_due = True
            loop.call_soon(self._next, loop)
        await turn

    def _next(self, loop: asyncio.AbstractEventLoop) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():  # else its task was cancelled
                turn.set_result(None)
                loop.call_soon(self._next, loop)
                return
        self._is_due = False

    def around(self, app: ASGIApp) -> ASGIApp:
        """An application whose requests each begin in a turn of their own."""

        async def begin(scope: Scope, receive: Receive, send: Send) -> None:
            await self.mine()
            await app(scope, receive, send)

        return begin
