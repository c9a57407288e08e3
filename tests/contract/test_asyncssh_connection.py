"""`controller.connection` overrides calls of asyncssh that aren't public: this holds them in place."""

from __future__ import annotations

import asyncio

import asyncssh
import uvloop

from appliance.controller.connection import MSG_IGNORE, GatewayConnection
from appliance.lab import simulated_link
from appliance.pki import ssh_keys
from appliance.pki.identity import Identity


class _Counting(GatewayConnection):
    def __init__(self, loop: asyncio.AbstractEventLoop, options: asyncssh.SSHServerConnectionOptions) -> None:
        self.asked: list[int] = []
        self.writes = 0
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

    def connection_requested(self, *_asked: object) -> asyncssh.SSHTCPSession[bytes]:
        return _Echo()


class _Echo(asyncssh.SSHTCPSession[bytes]):
    def connection_made(self, chan: asyncssh.SSHTCPChannel[bytes]) -> None:
        self.chan = chan

    def data_received(self, data: bytes, datatype: asyncssh.DataType) -> None:
        self.chan.write(data)


def test_an_answer_is_one_packet_and_a_log_in_makes_no_options_anew() -> None:
    async def main() -> None:
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
            reader, writer = await conn.open_connection("anything", 1)
            writer.write(b"x")
            assert await asyncio.wait_for(reader.readexactly(1), 10) == b"x"
            (server,) = served
            asked, writes = len(server.asked), server.writes
            writer.write(b"y")
            assert await asyncio.wait_for(reader.readexactly(1), 10) == b"y"
            # asyncssh wanted two packets, one was written.
            assert server.asked[asked:].count(MSG_IGNORE) == 1
            assert server.writes - writes == len(server.asked[asked:]) - 1
            assert server._options is options
        finally:
            conn.abort()
            await conn.wait_closed()
            listener.close()
            await listener.wait_closed()

    uvloop.run(main())
