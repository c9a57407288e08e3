"""`fleet.ping` uses a call of asyncssh that isn't public: this holds it in place, against real clients."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import asyncssh
import pytest
from rig import until

from appliance.controller.fleet import ping
from appliance.controller.link import Link
from appliance.pki import ssh_keys

DEADLINE_S = 1.0
SSH = shutil.which("ssh")

ASYNCSSH = """
import asyncio, sys, asyncssh
async def go():
    async with asyncssh.connect("127.0.0.1", int(sys.argv[1]), username="se", known_hosts=sys.argv[2], config=None,
                                client_keys=None, agent_path=None) as conn:
        await conn.wait_closed()
asyncio.run(go())
"""

PARAMIKO = """
import base64, socket, sys, threading, paramiko
from pathlib import Path
transport = paramiko.Transport(socket.create_connection(("127.0.0.1", int(sys.argv[1]))))
key = paramiko.Ed25519Key(data=base64.b64decode(Path(sys.argv[2]).read_text().split()[2]))
transport.connect(hostkey=key)
transport.auth_none("se")
transport.join()
"""


def openssh(port: int, known_hosts: Path) -> list[str]:
    options = {
        "StrictHostKeyChecking": "yes",
        "UserKnownHostsFile": str(known_hosts),
        "GlobalKnownHostsFile": "/dev/null",
        "BatchMode": "yes",
        "IdentitiesOnly": "yes",
    }
    flags = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    return [SSH or "ssh", "-F", "/dev/null", "-N", "-p", str(port), *flags, "se@127.0.0.1"]


CLIENTS: dict[str, Callable[[int, Path], list[str]]] = {
    "asyncssh": lambda port, known_hosts: [sys.executable, "-c", ASYNCSSH, str(port), str(known_hosts)],
    "paramiko": lambda port, known_hosts: [sys.executable, "-c", PARAMIKO, str(port), str(known_hosts)],
    "openssh": openssh,
}


class Peer:
    """A client in a process of its own, and the server's end of its connection."""

    def __init__(self, process: subprocess.Popen[bytes], conn: asyncssh.SSHServerConnection) -> None:
        self.process = process
        self.link = cast("Link", SimpleNamespace(conn=conn, is_gone=False))
        self.conn = conn

    def freeze(self) -> None:
        """Returns when each of its threads stands still: the signal alone doesn't wait for those on other cores."""
        self.process.send_signal(signal.SIGSTOP)
        threads = Path(f"/proc/{self.process.pid}/task")
        until(
            lambda: all(") T " in (thread / "stat").read_text() for thread in threads.iterdir()),
            what="all threads stand still",
        )

    async def ping(self) -> tuple[bool, float]:
        """The verdict, and how long it took."""
        began = time.monotonic()
        return await ping(self.link, DEADLINE_S), time.monotonic() - began


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Starts a client."""
    with log.open("wb") as told:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=told)


@contextlib.asynccontextmanager
async def linked(kind: str, directory: Path) -> AsyncIterator[Peer]:
    ready: asyncio.Future[asyncssh.SSHServerConnection] = asyncio.get_running_loop().create_future()

    class Server(asyncssh.SSHServer):
        def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
            self.conn = conn

        def begin_auth(self, username: str) -> bool:
            return False

        def auth_completed(self) -> None:
            ready.set_result(self.conn)

    private, line = ssh_keys.generate()
    acceptor = await asyncssh.listen(
        "127.0.0.1", 0, server_factory=Server, server_host_keys=[asyncssh.import_private_key(private.reveal())]
    )
    port = acceptor.get_port()
    known_hosts = directory / "known_hosts"
    known_hosts.write_text(ssh_keys.known_hosts_line([f"[127.0.0.1]:{port}"], line) + "\n")
    log = directory / "client.log"
    process = start(CLIENTS[kind](port, known_hosts), log)
    try:
        try:
            conn = await asyncio.wait_for(ready, 20)
        except TimeoutError:
            pytest.fail(log.read_text())
        yield Peer(process, conn)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGCONT)
        process.kill()
        await asyncio.to_thread(process.wait, 10)
        acceptor.close()
        await acceptor.wait_closed()
        if ready.done() and not ready.cancelled():
            ready.result().abort()
            await ready.result().wait_closed()


@pytest.fixture(params=CLIENTS)
def kind(request: pytest.FixtureRequest) -> str:
    if request.param == "openssh" and SSH is None:
        pytest.skip("needs ssh: apt-get install openssh-client")
    return str(request.param)


def test_who_lives_answers_and_who_is_frozen_does_not(kind: str, tmp_path: Path) -> None:
    async def go() -> None:
        async with linked(kind, tmp_path) as peer:
            for _ in range(3):
                answered, took_s = await peer.ping()
                assert answered
                assert took_s < DEADLINE_S
            assert await asyncio.gather(*(ping(peer.link, DEADLINE_S) for _ in range(5))) == [True] * 5
            peer.freeze()
            for _ in range(2):
                answered, took_s = await peer.ping()
                assert not answered
                assert DEADLINE_S <= took_s < 2 * DEADLINE_S
            # It wakes up and answers what it was asked while frozen: late answers are nobody else's.
            peer.process.send_signal(signal.SIGCONT)
            assert (await peer.ping())[0]
            assert (await peer.ping())[0]
            assert not peer.conn.is_closed()

    asyncio.run(go())


def test_who_is_gone_does_not_answer(kind: str, tmp_path: Path) -> None:
    async def go() -> None:
        async with linked(kind, tmp_path) as peer:
            peer.freeze()
            asked = asyncio.create_task(peer.ping())
            await asyncio.sleep(0)
            peer.process.kill()
            answered, took_s = await asked
            assert not answered
            assert took_s < DEADLINE_S
            await asyncio.wait_for(peer.conn.wait_closed(), 5)
            answered, took_s = await peer.ping()
            assert not answered
            assert took_s < DEADLINE_S

    asyncio.run(go())


def test_our_own_abort_is_no_answer(tmp_path: Path) -> None:
    async def go() -> None:
        async with linked("asyncssh", tmp_path) as peer:
            peer.freeze()
            asked = asyncio.create_task(peer.ping())
            await asyncio.sleep(0)
            peer.conn.abort()
            answered, took_s = await asked
            assert not answered
            assert took_s < DEADLINE_S

    asyncio.run(go())
