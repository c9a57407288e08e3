"""What may wait in a link's socket, and who goes on first when there is room again."""

from __future__ import annotations

import asyncio
import socket

import uvloop

from appliance.controller.pace import Pace
from appliance.protocol.window import LEAST_QUEUE_BYTES, MOST_QUEUE_BYTES, QUEUED_S


class Fed:
    """A feeder."""

    def look(self) -> None:
        """Nobody asks here."""


def test_what_may_wait_follows_the_rate_half_here_and_half_in_the_kernel() -> None:
    async def go() -> None:
        loop = asyncio.get_running_loop()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            transport, _ = await loop.create_connection(asyncio.Protocol, *listener.getsockname())
            peer, _ = listener.accept()
            with peer:
                pace, feeder = Pace(transport, 0.0), Fed()

                def limits() -> tuple[int, int]:
                    sock = transport.get_extra_info("socket")
                    kernel = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT)
                    return transport.get_write_buffer_limits()[1], kernel

                pace.fed(feeder, 125_000, 0.1)  # 10 Mbit/s
                half = round(1_250_000 * QUEUED_S) // 2
                assert limits() == (half, half)
                pace.fed(feeder, 130_000, 0.2)
                assert limits() == (half, half), "what is nearly the same costs no call"
                pace.fed(feeder, 10**9, 0.3)
                assert limits() == (MOST_QUEUE_BYTES // 2, MOST_QUEUE_BYTES // 2)
                for turn in range(200):
                    pace.fed(feeder, 1, 1.0 + turn)
                assert all(LEAST_QUEUE_BYTES // 2 <= limit <= 0.75 * LEAST_QUEUE_BYTES for limit in limits())
                transport.close()

    uvloop.run(go())


def test_who_fed_last_goes_on_last() -> None:
    async def go() -> None:
        loop = asyncio.get_running_loop()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            transport, _ = await loop.create_connection(asyncio.Protocol, *listener.getsockname())
            pace, first, second = Pace(transport, 0.0), Fed(), Fed()
            for feeder in (first, second, first):
                pace.fed(feeder, 1, 0.0)
            assert list(pace.feeders) == [second, first]
            transport.close()

    uvloop.run(go())
