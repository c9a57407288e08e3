"""One simulated SE: the real protocol, many in one process. Enrolls over TLS, links over SSH, says hello, beats,
serves the reverse path.

What is simulated is the machine, not the protocol: keys, signatures, certificates, tickets and channels are real.
All SEs of a process share one SSH server behind their reverse paths and one host's telemetry. State is kept in
memory, so a process that ends takes its SEs with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ssl
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar, cast

import asyncssh
import msgspec

from appliance import __version__
from appliance.controller.connection import GatewayConnection
from appliance.errors import EnrollError, TrustError, TunnelError, UnreachableError
from appliance.lab import simulated_link
from appliance.pki import jws, tls
from appliance.pki.identity import Identity
from appliance.pki.trust import verify_trust
from appliance.protocol import enroll, strict_json, token, tunnel
from appliance.protocol.address import REVERSE_PORT, parse_endpoint, se_address
from appliance.protocol.enroll import Claim, EnrollRequest, Grant, InstanceFacts, NonceAnswer, Pending, RefreshRequest
from appliance.protocol.jws import encode_part
from appliance.protocol.problem import Problem
from appliance.protocol.seed import Bundle, Hints
from appliance.protocol.trust import Envelope, TrustDocument, TrustNode, replaces
from appliance.protocol.tunnel import (
    Confirm,
    ConfirmAnswer,
    Heartbeat,
    HeartbeatAnswer,
    Hello,
    HelloAnswer,
    RotateAnswer,
    RotateKey,
)

T = TypeVar("T")

MAX_ANSWER_BYTES = 1024 * 1024
REQUEST_TIMEOUT_S = 30.0


class Answer(NamedTuple):
    """Status and body of one HTTP answer."""

    status: int
    body: bytes

    def decode(self, kind: type[T]) -> T:
        """The body as a `kind`. Raises `EnrollError` with the problem's code where the answer is a problem document."""
        if self.status >= 400:
            try:
                problem = msgspec.json.decode(self.body, type=Problem)
            except msgspec.MsgspecError:
                raise EnrollError(f"status {self.status} without a problem document") from None
            raise EnrollError(f"{problem.title}: {problem.detail}", hint=problem.advice, code=problem.code)
        return strict_json.decode(self.body, kind, max_bytes=MAX_ANSWER_BYTES)


async def exchange(reader: Any, writer: Any, path: str, body: bytes, *, headers: str = "") -> Answer:
    """Sends one POST and reads its answer, over a TLS stream or a channel (both have asyncio's stream methods)."""
    writer.write(
        f"POST {path} HTTP/1.1\r\nhost: {tunnel.CHANNEL_HOST}\r\ncontent-type: application/json\r\n{headers}"
        f"content-length: {len(body)}\r\n\r\n".encode()
        + body
    )
    head = (await reader.readuntil(b"\r\n\r\n")).decode("ascii").split("\r\n")
    status = int(head[0].split(" ")[1])
    length = next(int(line.split(":")[1]) for line in head if line.lower().startswith("content-length:"))
    return Answer(status, await reader.readexactly(length) if length else b"")


@dataclass
class Beats:
    """What a simulated SE, or all of a process, measured."""

    answered: int = 0
    lost: int = 0
    """Links lost with a heartbeat unanswered."""
    rtts_s: list[float] = field(default_factory=list)


@functools.lru_cache(maxsize=8)
def _context(roots: tuple[str, ...]) -> ssl.SSLContext:
    """One for all SEs with the same roots, which a real SE has to itself."""
    return tls.client_context(list(roots))


class SharedSshd:
    """The SSH server behind the reverse paths of all SEs of a process: serves the channels themselves, without a port.

    Attributes:
        host_key: its public line.
    """

    def __init__(self) -> None:
        key = asyncssh.generate_private_key("ssh-ed25519")
        self.host_key = " ".join(key.export_public_key("openssh").decode().split()[:2])
        # Never logged in to: the controller only does a key exchange with it.
        self._options = asyncssh.SSHServerConnectionOptions(
            config=None, server_host_keys=[key], server_factory=asyncssh.SSHServer
        )

    def connection(self) -> GatewayConnection:
        """A connection, to be given a channel as its transport."""
        return GatewayConnection(asyncio.get_running_loop(), self._options)


class SimulatedSe:
    """One SE of the simulated fleet."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        name: str,
        sshd: SharedSshd,
        beats: Beats,
        telemetry: Callable[[], list[str]] = list,
        user: str = "aviseuser",
    ) -> None:
        self.bundle = bundle
        self.name = name
        self.identity = Identity.create()
        self.se_id = str(uuid.uuid4())
        self.attempt_id = uuid.uuid4().hex[:16]
        self.host_key = sshd.host_key
        self.sshd = sshd
        self.beats = beats
        self.telemetry = telemetry
        self.user = user
        self.grant: Grant | None = None
        self.token = ""
        """Sent with an enrollment; what a rejoin goes by."""
        self.ticket = ""
        self.spent = False
        self.open_doors: list[tunnel.Door] = []
        self.image_key = tunnel.ImageKeyCopies.UNTOLD
        """What the self-test of its link was granted; said with each heartbeat."""
        self.links = 0
        self.conn: asyncssh.SSHClientConnection | None = None
        self.interval_s = 5.0
        self.trust: TrustDocument | None = None
        """What this SE believes; None until the first grant."""
        self.audit_heads: list[Envelope] = []
        """What it shows with hello; a real SE keeps the newest of each epoch."""
        self._channel: tuple[Any, Any] | None = None
        self._sequence = 0
        self._rtt_s = 0.0
        self.facts = InstanceFacts(boot_id=str(uuid.uuid4()), instance_id=name)

    # enroll

    async def _tls(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        host, port = parse_endpoint(self.bundle.controllers[0], default_port=8443)
        context = _context(tuple(self._roots()))
        reader, writer = await asyncio.open_connection(host, port, ssl=context, ssl_handshake_timeout=REQUEST_TIMEOUT_S)
        session: ssl.SSLObject = writer.get_extra_info("ssl_object")
        try:
            tls.check_peer(tls.peer_chain(session), cluster_id=self.bundle.cluster_id, revoked_node_keys=())
        except TrustError:
            writer.close()
            raise
        return reader, writer

    def _request(self, nonce: str) -> EnrollRequest:
        return EnrollRequest(
            audience=self.bundle.cluster_id,
            nonce=nonce,
            se_id=self.se_id,
            se_key=self.identity.public_line,
            host_keys=[self.host_key],
            facts=self.facts,
            agent_version=__version__,
            attempt_id=self.attempt_id,
            hints=Hints(name=self.name),
            token=self.token,
        )

    def signed_enrollment(self, nonce: str) -> bytes:
        """The JWS of an enrollment with `nonce`."""
        image = Identity.from_pkcs8(self.bundle.image_key.encode())
        signers = [("image", self.bundle.image_key_id, image), ("se", self.identity.thumbprint, self.identity)]
        return jws.sign(strict_json.encode(self._request(nonce)), signers)  # type: ignore[arg-type]

    def signed_rejoin(self, nonce: str) -> bytes:
        """The JWS of a rejoin with `nonce`, by the token that this SE has."""
        return jws.sign(strict_json.encode(self._request(nonce)), [("se", self.identity.thumbprint, self.identity)])

    def claim(self) -> Claim | None:
        """What it shows to a restored controller, None where it has no grant."""
        if self.grant is None:
            return None
        return Claim(
            receipt=self.grant.receipt,
            se_key=self.identity.public_line,
            host_keys=[self.host_key],
            facts=self.facts,
        )

    def signed_refresh(self, nonce: str) -> bytes:
        """The JWS of a refresh with `nonce`."""
        request = RefreshRequest(
            audience=self.bundle.cluster_id, nonce=nonce, se_id=self.se_id, agent_version=__version__,
            attempt_id=self.attempt_id, claim=self.claim(),
        )  # fmt: skip
        return jws.sign(strict_json.encode(request), [("se", self.identity.thumbprint, self.identity)])

    async def ask(self, path: str, make: Callable[[str], bytes]) -> Answer:
        """Gets a nonce and posts what `make` signs with it, on one connection."""
        header = f"{enroll.ATTEMPT_HEADER}: {self.attempt_id}\r\n{enroll.PROTOCOL_HEADER}: {tunnel.PROTOCOL_NUMBER}\r\n"
        reader, writer = await self._tls()
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                nonce = (await exchange(reader, writer, enroll.NONCE_PATH, b"", headers=header)).decode(NonceAnswer)
                return await exchange(reader, writer, path, make(nonce.nonce), headers=header)
        finally:
            writer.close()
            with contextlib.suppress(OSError, ssl.SSLError):
                await writer.wait_closed()

    async def enroll(self) -> Grant:
        """Enrolls, and checks the grant's trust document. Raises `EnrollError` with the refusal's code."""
        answer = await self.ask(enroll.ENROLL_PATH, self.signed_enrollment)
        self.grant = answer.decode(Grant)
        self.follow(self.grant.trust)
        return self.grant

    async def ask_in(self) -> Pending | Grant:
        """Enrolls where the image key's policy may say to wait. Raises as `enroll`."""
        answer = await self.ask(enroll.ENROLL_PATH, self.signed_enrollment)
        if answer.status == 202:
            return answer.decode(Pending)
        self.grant = answer.decode(Grant)
        self.follow(self.grant.trust)
        return self.grant

    async def rejoin(self) -> Grant:
        """Takes the place of the SE that its token names, with a new key and nothing else. Raises as `enroll`."""
        self.se_id = token.parse(self.token).se_id
        self.identity, self.ticket, self.spent = Identity.create(), "", False
        self.grant = (await self.ask(enroll.REJOIN_PATH, self.signed_rejoin)).decode(Grant)
        self.follow(self.grant.trust)
        return self.grant

    async def refresh(self) -> Grant:
        """Gets the current grant with the SE's key alone."""
        self.grant = (await self.ask(enroll.REFRESH_PATH, self.signed_refresh)).decode(Grant)
        self.follow(self.grant.trust)
        return self.grant

    def _roots(self) -> list[str]:
        return self.trust.roots if self.trust is not None else [self.bundle.root_ca]

    def follow(self, envelope: Envelope) -> TrustDocument:
        """Verifies a trust document and believes it where it is newer, as a real SE does."""
        document = verify_trust(envelope, anchors=self._roots(), current=self.trust)
        if replaces(document, self.trust):
            self.trust = document
        return self.trust or document

    def _node(self) -> TrustNode:
        if self.trust is None and self.grant is not None:
            self.follow(self.grant.trust)
        if self.trust is None:
            raise EnrollError("this SE has no grant yet")
        return self.trust.nodes[0]

    # tunnel

    async def connect(self) -> asyncssh.SSHClientConnection:
        """Logs in and asks for the reverse address; says nothing yet."""
        node = self._node()
        host, port = parse_endpoint(node.ssh[0], default_port=22)
        try:
            self.conn = await simulated_link.connect(
                host,
                port,
                user=self.user,
                identity=self.identity,
                host_keys=node.host_keys,
                timeout_s=REQUEST_TIMEOUT_S,
            )
        except (OSError, asyncssh.Error, TimeoutError) as error:
            raise UnreachableError(f"no link to {host}:{port}: {error}") from error
        return self.conn

    async def open_reverse(self) -> None:
        """Asks for this SE's own reverse address and serves it from the shared SSH server."""
        if self.conn is None or self.grant is None:
            raise TunnelError("no connection yet")
        await self._listen(self.conn, self.grant.address)

    def _listen(self, conn: asyncssh.SSHClientConnection, address: str) -> Awaitable[asyncssh.SSHListener]:
        return conn.create_server(
            lambda _host, _port: cast("asyncssh.SSHTCPSession[bytes]", self.sshd.connection()), address, REVERSE_PORT
        )

    async def say(self, path: str, message: Any, kind: type[T]) -> T:
        """One request over the channel API. Raises `EnrollError` for a problem document."""
        if self.conn is None:
            raise TunnelError("no connection yet")
        if self._channel is None:
            reader, writer = await self.conn.open_connection(tunnel.CHANNEL_HOST, tunnel.CHANNEL_PORT)
            self._channel = (reader, writer)
        reader, writer = self._channel
        return (await exchange(reader, writer, path, strict_json.encode(message))).decode(kind)

    async def hello(self) -> HelloAnswer:
        """Says hello with the ticket this SE has."""
        message = Hello(
            protocol=tunnel.PROTOCOL_NUMBER,
            agent_version=__version__,
            facts=self.facts,
            ticket=self.ticket,
            trust_version=self.trust.version if self.trust else 0,
            time=time.time(),
            host_keys=[self.host_key],
            links=self.links,
            audit_heads=self.audit_heads,
        )
        answer = await self.say(tunnel.HELLO_PATH, message, HelloAnswer)
        self.links += 1
        self.interval_s = answer.heartbeat_interval_s
        return answer

    async def link(self) -> HelloAnswer:
        """Connects, says hello and confirms: after this the link is as good as up."""
        await self.connect()
        await self.open_reverse()
        answer = await self.hello()
        if not answer.quarantined:
            # A real SE stores the ticket before it confirms.
            self.ticket = answer.ticket
            confirmed = await self.say(tunnel.CONFIRM_PATH, Confirm(ticket=answer.ticket), ConfirmAnswer)
            self.spent = confirmed.spent
            self.image_key = tunnel.ImageKeyCopies.DESTROYED if self.spent else tunnel.ImageKeyCopies.UNTOLD
            self.open_doors = await self.self_test()
        return answer

    async def self_test(self) -> list[tunnel.Door]:
        """Tries what the gateway must refuse, all at once, as a real SE does. Returns what was granted."""
        if self.conn is None or self.grant is None:
            raise TunnelError("no connection yet")
        conn, number = self.conn, self.grant.number
        foreign = se_address(number + 1 if number % 2 else number - 1)
        tries: dict[tunnel.Door, Awaitable[Any]] = {
            tunnel.Door.SESSION: conn.create_session(asyncssh.SSHClientSession),
            tunnel.Door.CONNECT: conn.create_connection(asyncssh.SSHTCPSession, *tunnel.SELF_TEST_CHANNEL),
            tunnel.Door.LISTEN: conn.create_server(
                lambda _host, _port: asyncssh.SSHTCPSession(), foreign, REVERSE_PORT
            ),
        }
        answers = await asyncio.gather(*tries.values(), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(
                answer, (asyncssh.ChannelOpenError, asyncssh.ChannelListenError)
            ):
                raise answer
        return [door for door, answer in zip(tries, answers, strict=True) if not isinstance(answer, BaseException)]

    async def beat(self, *, telemetry: bool = False) -> HeartbeatAnswer:
        """One heartbeat."""
        self._sequence += 1
        started = time.monotonic()
        message = Heartbeat(
            sequence=self._sequence,
            time=time.time(),
            rtt_s=self._rtt_s,
            telemetry=self.telemetry() if telemetry else [],
            trust_version=self.trust.version if self.trust else 0,
            open_doors=self.open_doors,
            image_key=self.image_key,
        )
        answer = await self.say(tunnel.HEARTBEAT_PATH, message, HeartbeatAnswer)
        self._rtt_s = time.monotonic() - started
        self.beats.rtts_s.append(self._rtt_s)
        self.beats.answered += 1
        self.interval_s = answer.interval_s
        if answer.trust is not None:
            self.follow(answer.trust)
        if answer.rotate_key:
            await self.rotate_key()
        return answer

    async def rotate_key(self) -> None:
        """Makes a new key and puts it in the old one's place."""
        if self.grant is None:
            raise EnrollError("this SE has no grant yet")
        successor = Identity.create()
        statement = tunnel.rotation_statement(self.bundle.cluster_id, self.se_id, successor.public_line)
        proof = encode_part(successor.sign(statement))
        await self.say(tunnel.ROTATE_PATH, RotateKey(se_key=successor.public_line, proof=proof), RotateAnswer)
        self.identity = successor

    def close(self) -> None:
        """Drops the link at once."""
        self._channel = None
        if self.conn is not None:
            self.conn.abort()
            self.conn = None
