"""`controller.connection` overrides calls of asyncssh that aren't public: this holds them in place."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import cast

import asyncssh
import pytest
import uvloop

from appliance.controller.connection import MSG_IGNORE, GatewayConnection
from appliance.controller.pace import DEFERRED_BYTES
from appliance.lab import simulated_link
from appliance.pki import ssh_keys
from appliance.pki.identity import Identity


class _Counting(GatewayConnection):
    def __init__(self, loop: asyncio.AbstractEventLoop, options: asyncssh.SSHServerConnectionOptions) -> None:
        self.asked: list[int] = []
        self.writes = 0
        self.echoes: list[_Echo] = []
        super().__init__(loop, options)

    def send_packet(self, pkttype: int, *args: bytes, handler: object = None) -> None:
        self.asked.append(pkttype)
        super().send_packet(pkttype, *args, handler=handler)

    def _send(self, data: bytes) -> None:
        self.writes += 1
        super()._send(data)


class _Server(asyncssh.SSHServer):
    def public_key_auth_supported(self) -> bool:
        return True

    def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:
        return True

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self.conn = cast("_Counting", conn)

    def connection_requested(self, *_asked: object) -> asyncssh.SSHTCPSession[bytes]:
        self.conn.echoes.append(_Echo())
        return self.conn.echoes[-1]


class _Echo(asyncssh.SSHTCPSession[bytes]):
    def connection_made(self, chan: asyncssh.SSHTCPChannel[bytes]) -> None:
        self.chan = chan

    def data_received(self, data: bytes, datatype: asyncssh.DataType) -> None:
        self.chan.write(data)


@contextlib.asynccontextmanager
async def pair() -> AsyncIterator[tuple[asyncssh.SSHClientConnection, _Counting]]:
    """A client's connection and the gateway's end of it."""
    private, line = ssh_keys.generate()
    loop = asyncio.get_running_loop()
    options = asyncssh.SSHServerConnectionOptions(
        config=None, server_factory=_Server, server_host_keys=[asyncssh.import_private_key(private.reveal())],
        kex_algs=["mlkem768x25519-sha256"],
    )  # fmt: skip
    served: list[_Counting] = []

    def serve() -> _Counting:
        served.append(_Counting(loop, options))
        return served[-1]

    listener = await loop.create_server(serve, "127.0.0.1", 0)
    conn = await simulated_link.connect(
        "127.0.0.1", listener.sockets[0].getsockname()[1], user="se", identity=Identity.create(),
        host_keys=[line], timeout_s=20,
    )  # fmt: skip
    try:
        (server,) = served
        assert server._options is options
        yield conn, server
    finally:
        conn.abort()
        await conn.wait_closed()
        listener.close()
        await listener.wait_closed()


def test_an_answer_is_one_packet_and_a_log_in_makes_no_options_anew() -> None:
    async def main() -> None:
        async with pair() as (conn, server):
            reader, writer = await conn.open_connection("anything", 1)
            writer.write(b"x")
            assert await asyncio.wait_for(reader.readexactly(1), 10) == b"x"
            asked, writes = len(server.asked), server.writes
            writer.write(b"y")
            assert await asyncio.wait_for(reader.readexactly(1), 10) == b"y"
            # asyncssh wanted two packets, one was written.
            assert server.asked[asked:].count(MSG_IGNORE) == 1
            assert server.writes - writes == len(server.asked[asked:]) - 1

    uvloop.run(main())


@pytest.mark.parametrize("rekeying", [False, True], ids=["in the socket", "for new keys"])
def test_what_waits_unsent_is_weighed_and_told_once(*, rekeying: bool) -> None:
    async def main() -> None:
        async with pair() as (conn, server):
            reader, writer = await conn.open_connection("anything", 1)
            writer.write(b"x")
            assert await asyncio.wait_for(reader.readexactly(1), 10) == b"x"
            told: list[int] = []
            server.limit_unsent(1 << 20, lambda: told.append(server.unsent_bytes))
            transport = conn._transport
            assert transport is not None
            transport.pause_reading()
            if rekeying:
                server._send_kexinit()
                server._kexinit_sent = True
            echo, sent = server.echoes[0], 0
            # The kernel takes some megabytes, and the channel's window grants no more than it does.
            echo.chan._send_window = 1 << 30
            while not told and sent < 1 << 27:
                assert server.unsent_bytes < 1_200_000
                echo.chan.write(b"z" * 100_000)
                sent += 100_000
                if rekeying:
                    assert server.deferred_bytes == sum(
                        DEFERRED_BYTES + sum(map(len, parts)) for _, parts in server._deferred_packets
                    )
                await asyncio.sleep(0)
            assert 1 << 20 < told[0] < 1_200_000
            assert rekeying == (server.deferred_bytes > 1 << 20)
            echo.chan.write(b"z" * 100_000)
            sent += 100_000
            transport.resume_reading()
            assert await asyncio.wait_for(reader.readexactly(sent), 20) == b"z" * sent
            assert (len(told), server.deferred_bytes) == (1, 0)

    uvloop.run(main())
