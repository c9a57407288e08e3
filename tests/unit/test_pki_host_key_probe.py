"""The host key probe: against real servers, and against bytes that no honest server sends."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator, Sequence

import asyncssh
import pytest

from appliance.errors import TrustError
from appliance.pki import host_key_probe
from appliance.pki.host_key_probe import HostKeyProbe


class Server:
    """An asyncssh server with one host key, in a thread; shows what it says to a probe."""

    def __init__(self, *, kex: Sequence[str], key_type: str = "ssh-ed25519") -> None:
        self.key = asyncssh.generate_private_key(key_type)
        self._kex = kex
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self._ready.wait(10)

    @property
    def line(self) -> str:
        return " ".join(self.key.export_public_key("openssh").decode().split()[:2])

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        acceptor = await asyncssh.listen("127.0.0.1", 0, server_host_keys=[self.key], kex_algs=list(self._kex))
        self.port = acceptor.get_port()
        self._ready.set()
        await self._stop.wait()
        acceptor.close()
        await acceptor.wait_closed()
        await asyncio.sleep(0)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(*kex: str, key_type: str = "ssh-ed25519") -> Server:
        servers.append(Server(kex=kex, key_type=key_type))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def ask(server: Server, *, at_once: int = 65536, change: Callable[[bytes], bytes] = lambda data: data) -> HostKeyProbe:
    """Runs a probe to its end, reading `at_once` bytes each time."""
    probe = HostKeyProbe()
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(probe.hello)
        while probe.host_key is None:
            received = connection.recv(at_once)
            assert received
            connection.sendall(probe.feed(change(received)))
    return probe


@pytest.mark.parametrize("kex", ["curve25519-sha256", "curve25519-sha256@libssh.org", "mlkem768x25519-sha256"])
@pytest.mark.parametrize("at_once", [1, 7, 65536])
def test_a_server_proves_its_key(serve: Callable[..., Server], kex: str, at_once: int) -> None:
    server = serve(kex)
    assert ask(server, at_once=at_once).host_key == server.line


def test_after_the_proof_nothing_is_read(serve: Callable[..., Server]) -> None:
    probe = ask(serve("curve25519-sha256"))
    assert probe.feed(b"\xff" * 100) == b""


def test_a_server_without_a_key_exchange_in_common(serve: Callable[..., Server]) -> None:
    with pytest.raises(TrustError, match="no key exchange in common"):
        ask(serve("ecdh-sha2-nistp256"))


def test_a_server_with_another_type_of_key(serve: Callable[..., Server]) -> None:
    with pytest.raises(TrustError, match="no host key of the type ssh-ed25519"):
        ask(serve("curve25519-sha256", key_type="ecdsa-sha2-nistp256"))


def string(value: bytes) -> bytes:
    return len(value).to_bytes(4, "big") + value


def packet(payload: bytes, padding: int = 4) -> bytes:
    return (1 + len(payload) + padding).to_bytes(4, "big") + bytes([padding]) + payload + b"\0" * padding


VERSION = b"SSH-2.0-Test\r\n"


def kexinit(kex: bytes = b"curve25519-sha256") -> bytes:
    return packet(b"\x14" + b"\0" * 16 + string(kex) + string(b"ssh-ed25519"))


KEY = string(b"ssh-ed25519") + string(bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"))
POINT = b"\x09" + b"\0" * 31
SIGNATURE = string(b"ssh-ed25519") + string(b"\1" * 64)


def reply(blob: bytes = KEY, theirs: bytes = POINT, signature: bytes = SIGNATURE) -> bytes:
    return packet(b"\x1f" + string(blob) + string(theirs) + string(signature))


def test_lines_before_the_version_and_idle_messages_are_passed_over() -> None:
    probe = HostKeyProbe()
    assert probe.feed(b"welcome\r\n\n" + VERSION + packet(b"\2" + string(b"")) + packet(b"\4\0")) == b""
    assert probe.feed(kexinit())[5] == 30
    assert probe.host_key is None


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (b"x" * 300, "not answer like an SSH server"),
        (b"HTTP/1.1 400 Bad Request" * 20 + b"\n", "not answer like an SSH server"),
        (b"SSH-1.5-old\r\n", "before 2.0"),
        (VERSION + b"\0\0\x88\xb9\x04", "a packet of 35001 bytes"),
        (VERSION + b"\0\0\0\x05\x04", "a packet of 5 bytes, 4 of them padding"),
        (VERSION + packet(b"\1" + b"\0\0\0\2"), "hung up"),
        (VERSION + packet(b"\x1f"), "message 31"),
        (VERSION + packet(b"\x14" + b"\0" * 16 + b"\0\0\0\x09ab"), "ends too early"),
        (VERSION + packet(b"\x14" + b"\0" * 16), "ends too early"),
        (VERSION + kexinit() + kexinit(), "message 20"),
        (VERSION + kexinit() + packet(b"\x1f" + string(KEY)), "ends too early"),
        (VERSION + kexinit() + reply(theirs=b"\0" * 32), "its half"),
        (VERSION + kexinit() + reply(theirs=b"\1"), "its half"),
        (VERSION + kexinit(b"mlkem768x25519-sha256") + reply(), "its half"),
        (VERSION + kexinit() + reply(blob=string(b"ssh-rsa") + string(b"\1")), "not of the type"),
        (VERSION + kexinit() + reply(signature=string(b"ssh-rsa") + string(b"\1")), "not of the type"),
        (VERSION + kexinit() + reply(), "does not have"),
        (VERSION + kexinit() + reply(blob=string(b"ssh-ed25519") + string(b"\1" * 31)), "31 bytes"),
        (VERSION + packet(b"\2" * 30000) * 3, "more than 64 KiB"),
    ],
)
def test_what_no_honest_server_says_is_refused(said: bytes, expected: str) -> None:
    probe = HostKeyProbe()
    with pytest.raises(TrustError, match=expected):
        probe.feed(said)
    assert probe.host_key is None


def test_a_changed_bit_is_noticed(serve: Callable[..., Server]) -> None:
    def changed(data: bytes) -> bytes:
        # the last byte of the version line is part of what is signed
        return data.replace(b"SSH-2.0-AsyncSSH", b"SSH-2.0-asyncSSH")

    with pytest.raises(TrustError, match="does not have"):
        ask(serve("curve25519-sha256"), change=changed)


def test_hello_is_one_whole_packet() -> None:
    hello = HostKeyProbe().hello.removeprefix(host_key_probe.VERSION + b"\r\n")
    assert len(hello) % 8 == 0
    assert int.from_bytes(hello[:4], "big") == len(hello) - 4
    assert hello[4] >= 4


@pytest.mark.parametrize(("value", "expected"), [(b"\0\x80", "0000000200" + "80"), (b"\0\x7f", "000000017f")])
def test_numbers_are_written_without_a_sign(value: bytes, expected: str) -> None:
    assert host_key_probe._mpint(value).hex() == expected
