"""Stage tunnel, the gateway: an SSH server that knows public keys, two users, and no session at all.

What a link may do is decided for each channel by the link's own SE, not once at log-in (DESIGN section 8):

    direct-tcpip to channel:80      the channel API, served in this process: the link is the identity
    direct-tcpip to NAME:1          a controller service that the settings name
    tcpip-forward of its own address and REVERSE_PORT   granted; the one reverse listener serves it
    anything else                   refused: session, exec, subsystem, agent, X11, streamlocal, tun, foreign addresses

Only Ed25519 keys are accepted: asyncssh doesn't hold a client to `signature_algs` (FACTS, trap 27).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import asyncssh

from appliance import settings
from appliance.controller.attempts import Attempts
from appliance.controller.connection import Door, listen
from appliance.controller.crowd import Crowd
from appliance.controller.descriptors import Descriptors
from appliance.controller.fleet import Fleet
from appliance.controller.link import REFUSED_RESTS_S, Link
from appliance.controller.listener import FrontEnd, peer_address
from appliance.controller.pace import paced
from appliance.controller.rate import network_of
from appliance.controller.slots import TICK_S, Slots
from appliance.controller.splice import MIN_PACKET_BYTES, SshEnd, TcpEnd, has_tiny_packets
from appliance.errors import TrustError
from appliance.pki import ssh_keys
from appliance.protocol import tunnel
from appliance.protocol.address import REVERSE_PORT, parse_endpoint, se_address
from appliance.protocol.enroll import SeStatus
from appliance.protocol.fleet import Reason
from appliance.protocol.why import Step, StepResult
from appliance.protocol.window import FLOOR_BYTES, MOST_QUEUE_BYTES, Pool, Window

_log = logging.getLogger(__name__)


CHANNEL_WINDOW_BYTES = 128 * 1024
"""Of the channel API: what a peer may send while an earlier request is answered is kept in memory."""
MOST_WAITING_BYTES = 16 * 1024
"""Of answers that a channel's peer leaves no window for: no more are made while so much waits in it. What waits in
channels isn't weighed with what waits in their connection; this times `max_channels_per_link` is well below that."""
MAX_REASON_CHARS = 200
"""Of what a peer says when it hangs up."""
SERVICE_TIMEOUT_S = 10.0
"""How long a controller service may take to accept a connection."""


def refuse(reason: str) -> asyncssh.ChannelOpenError:
    """The error that refuses a channel open (RFC 4254 section 5.1)."""
    return asyncssh.ChannelOpenError(asyncssh.OPEN_ADMINISTRATIVELY_PROHIBITED, reason)


class OwnListener(asyncssh.SSHListener):
    """Stands for the SE's own reverse address; the one reverse listener does the work."""

    def __init__(self, link: Link) -> None:
        super().__init__()
        self._link = link

    def get_port(self) -> int:
        return REVERSE_PORT

    def close(self) -> None:
        self._link.reverse_granted = False

    async def wait_closed(self) -> None:
        return


class ChannelSession(asyncssh.SSHTCPSession[bytes]):
    """Carries one channel's bytes to a protocol object, the guarded HTTP one or a service's socket."""

    def __init__(self, protocol: asyncio.Protocol, on_data: Callable[[], None], on_close: Callable[[], None]) -> None:
        self._protocol = protocol
        self._on_data = on_data
        self._on_close = on_close

    def connection_made(self, chan: asyncssh.SSHTCPChannel[bytes]) -> None:
        chan.set_write_buffer_limits(high=MOST_WAITING_BYTES)
        self._protocol.connection_made(chan)  # type: ignore[arg-type]

    def data_received(self, data: bytes, datatype: asyncssh.DataType) -> None:  # noqa: ARG002
        self._on_data()
        self._protocol.data_received(data)

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._protocol.connection_lost(exc)
        self._on_close()

    def pause_writing(self) -> None:
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        self._protocol.resume_writing()


class Gateway:
    """The SSH side of the controller. One loop only."""

    def __init__(
        self,
        *,
        terms: settings.Controller,
        se_user: str,
        fleet: Fleet,
        attempts: Attempts,
        channel_api: FrontEnd,
        windows: Pool,
        descriptors: Descriptors,
        on_lost: Callable[[Link], None],
        wall: Callable[[], float],
        monotonic: Callable[[], float],
    ) -> None:
        self.terms = terms
        self.se_user = se_user
        self.fleet = fleet
        self.attempts = attempts
        self.channel_api = channel_api
        self.windows = windows
        self.descriptors = descriptors
        self.on_lost = on_lost
        self.wall = wall
        self.monotonic = monotonic
        self.draining = False
        self.slots = Slots()
        self.door: Door | None = None
        """From `listen` on."""
        self.link_ids = itertools.count(1)
        self.strangers: Crowd[Peer] = Crowd(terms.max_unauthenticated, terms.max_unauthenticated_per_source)
        self.links = 0
        self.empty = asyncio.Event()
        """Set while there is no link."""
        self.empty.set()
        self.refusals: Counter[str] = Counter()
        """Refused connections, log-ins, channels and forwards, by kind."""

    def _makes_room(self, source: str) -> bool:
        """Whether one more may wait for its log-in. Where another one has to go for it, it goes."""
        if self.draining or self.links >= self.terms.max_links:
            return False
        network = network_of(source)
        if (peer := self.strangers.gives_way(network)) is not None:
            self.refusals["connection"] += 1
            peer.give_way()
        return self.strangers.has_room(network)

    def problem(self) -> str:
        """What keeps everybody out, "" where nothing does."""
        most = self.terms.max_links
        return f"all {most} links that controller.max_links allows are taken" if self.links >= most else ""

    def lets_in(self, source: str) -> bool:
        """The same, and counts who is turned away, the newcomer too."""
        if self._makes_room(source):
            return True
        self.refusals["connection"] += 1
        return False

    def listen(self, sock: socket.socket, host_key: Path) -> asyncssh.SSHAcceptor:
        """Starts accepting on a bound socket."""
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):
            # Each connection has it from the listener; `pace` makes it less where the way is slow.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, MOST_QUEUE_BYTES // 2)
        kex = list(tunnel.KEX) + (list(tunnel.KEX_FALLBACK) if self.terms.allow_curve25519 else [])
        acceptor, self.door = listen(
            sock,
            self._door_for,
            descriptors=self.descriptors,
            has_room=self.lets_in,
            server_factory=lambda: Peer(self),
            server_host_keys=[str(host_key)],
            server_version="appliance",
            kex_algs=kex,
            encryption_algs=list(tunnel.CIPHERS),
            mac_algs=["hmac-sha2-256-etm@openssh.com"],
            compression_algs=["none"],
            signature_algs=["ssh-ed25519"],
            public_key_auth=True,
            password_auth=False,
            kbdint_auth=False,
            host_based_auth=False,
            gss_host=None,
            agent_forwarding=False,
            x11_forwarding=False,
            allow_scp=False,
            login_timeout=self.terms.login_timeout_s,
        )
        return acceptor

    def _door_for(self, options: asyncssh.SSHServerConnectionOptions) -> Door:
        def refused() -> None:
            self.refusals["connection"] += 1

        most, most_per_source = self.terms.max_unauthenticated, self.terms.max_unauthenticated_per_source
        return Door(self.slots, options, most=most, most_per_source=most_per_source, refused=refused)

    async def keep_slots(self) -> None:
        """Tells the slots how far the loop is behind, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            await asyncio.sleep(TICK_S)
            if self.door is not None:
                self.door.tick(loop.time() - began - TICK_S)

    def left(self, *, logged_in: bool) -> None:
        """A log-in is over: somebody else may begin."""
        self.slots.leave(logged_in=logged_in)
        if self.door is not None:
            self.door.advance()

    def drain(self) -> None:
        """Lets nobody in any more."""
        self.draining = True
        if self.door is not None:
            self.door.close()


class Peer(asyncssh.SSHServer):
    """One incoming connection: unauthenticated first, a link afterwards."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._conn: asyncssh.SSHServerConnection | None = None
        self._source = ""
        self._counted = False
        self._se_id = ""
        self._thumbprint = ""
        self._link: Link | None = None
        self._was_refused = False
        self._has_slot = True

    def _leave_slot(self) -> None:
        if self._has_slot:
            self._has_slot = False
            self._gateway.left(logged_in=self._link is not None)

    # Connection and log-in.

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self._conn = conn
        self._source = peer_address(conn.get_extra_info("peername"))
        # Asked again: others came between the accept and this.
        if not self._gateway.lets_in(self._source):
            conn.abort()
            return
        self._gateway.strangers.add(network_of(self._source), self)
        self._counted = True

    def _no_longer_waiting(self) -> None:
        if self._counted:
            self._counted = False
            self._gateway.strangers.remove(network_of(self._source), self)

    def give_way(self) -> None:
        """Hasn't logged in, and another one needs the place."""
        self._no_longer_waiting()
        if self._conn is not None:
            self._conn.abort()

    def begin_auth(self, username: str) -> bool:
        if username != self._gateway.se_user:
            # asyncssh goes on with authentication; no key will fit, and the attempt is told to `why`.
            self._refused_login(f"unknown user {username[:32]!r}")
        return True

    def public_key_auth_supported(self) -> bool:
        return True

    def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:
        if username != self._gateway.se_user:
            return False
        try:
            line = b" ".join(key.export_public_key("openssh").split()[:2]).decode()
            ssh_keys.parse_public(line)
        except (TrustError, asyncssh.KeyExportError, UnicodeDecodeError):
            self._refused_login("the key is no Ed25519 key")
            return False
        record = self._gateway.fleet.registry.se_by_key(ssh_keys.fingerprint(line))
        if record is None:
            self._refused_login(f"the key {ssh_keys.fingerprint(line)} is not enrolled")
            return False
        if record.status is not SeStatus.ENROLLED:
            self._refused_login(f"{record.name} is {record.status.value}", record.se_id)
            return False
        self._se_id, self._thumbprint = record.se_id, record.thumbprint
        return True

    def _refused_login(self, text: str, se_id: str = "") -> None:
        self._was_refused = True
        self._gateway.refusals["login"] += 1
        self._gateway.attempts.note(
            self._source, Step.LINK, StepResult.FAILED, at=self._gateway.wall(), se_id=se_id, code="TUNNEL-010",
            text=f"log-in refused: {text}", hint="see `appliance se list`; an SE must enroll before it links",
        )  # fmt: skip

    def auth_completed(self) -> None:
        self._no_longer_waiting()
        gateway, conn = self._gateway, self._conn
        record = gateway.fleet.registry.se(self._se_id)
        # Checked again: the SE may have been revoked, or got a new key, while it proved this one.
        if (
            conn is None
            or record is None
            or record.status is not SeStatus.ENROLLED
            or record.thumbprint != self._thumbprint
        ):
            self._refused_login("no longer enrolled", self._se_id)
            if conn is not None:
                conn.abort()
            return
        conn.set_keepalive(0, 3)
        self._link = Link(
            conn,
            link_id=next(gateway.link_ids),
            se_id=self._se_id,
            thumbprint=self._thumbprint,
            source=self._source,
            terms=gateway.terms,
            now=gateway.monotonic(),
        )
        self._link.on_up = self._leave_slot
        paced(conn).limit_unsent(gateway.terms.link_unsent_max_bytes, self._unread)
        gateway.slots.logged_in()
        gateway.links += 1
        gateway.empty.clear()
        gateway.fleet.opened(self._link)
        gateway.attempts.note(
            self._source, Step.LINK, StepResult.OK, at=gateway.wall(), se_id=self._se_id, text="logged in"
        )
        # A link that never says hello, or whose hello was refused, must not stay.
        asyncio.get_running_loop().call_later(gateway.terms.login_timeout_s, self._hello_deadline)

    def _hello_deadline(self) -> None:
        # One that never says a heartbeat is nobody's to wait for any more: those that do would be kept out for ever.
        self._leave_slot()
        link = self._link
        if link is not None and not link.ticket and not link.quarantined:
            self._gateway.refusals["no-hello"] += 1
            link.close(Reason.LINK_LOST, "no hello was accepted on the link")

    def _unread(self) -> None:
        if self._link is not None:
            self._gateway.fleet.unread(self._link)

    def connection_lost(self, exc: Exception | None) -> None:
        self._leave_slot()
        self._no_longer_waiting()
        link, self._link = self._link, None
        if link is not None:
            self._gateway.links -= 1
            if not self._gateway.links:
                self._gateway.empty.set()
            if not link.lost_text:
                link.lost_reason = Reason.LINK_LOST if exc else Reason.CLOSED_BY_SE
                link.lost_text = f"the connection broke: {exc}"[:MAX_REASON_CHARS] if exc else "the SE closed the link"
            self._gateway.on_lost(link)
        elif exc is not None and self._counted is False and not self._se_id and not self._was_refused:
            # Where a log-in was refused, that says more than how its peer took it.
            self._gateway.refusals["no-login"] += 1
            self._gateway.attempts.note(
                self._source, Step.LINK, StepResult.FAILED, at=self._gateway.wall(), code="TUNNEL-011",
                text=f"the SSH connection ended before log-in: {exc}", hint="check what speaks to the SSH port",
            )  # fmt: skip
        self._conn = None

    # What a link may open.

    def _refused(self, kind: str) -> bool:
        """Counts a refusal, and says whether it belongs to the link's self-test.

        Nobody announces a self-test: each link may be refused once in each of its ways, and that much a thief of its
        key may hide among them; it is counted all the same.
        """
        probes = self._link.probes if self._link is not None else set()
        is_probe = kind in probes
        probes.discard(kind)
        self._gateway.refusals["self-test" if is_probe else kind] += 1
        if not is_probe:
            self._tires()
        return is_probe

    def _tires(self) -> None:
        """Leaves a link unread for a moment that asks again and again for what it can't have: others wait meanwhile."""
        if self._link is not None and self._link.was_refused(self._gateway.monotonic()):
            paced(self._link.conn).rest(REFUSED_RESTS_S)

    def session_requested(self) -> bool:
        self._refused("session")
        raise refuse("no sessions here")

    def unix_connection_requested(self, dest_path: str) -> bool:  # noqa: ARG002
        self._gateway.refusals["streamlocal"] += 1
        self._tires()
        raise refuse("no stream-local forwarding here")

    def unix_server_requested(self, listen_path: str) -> bool:  # noqa: ARG002
        self._gateway.refusals["streamlocal"] += 1
        self._tires()
        return False

    def server_requested(self, listen_host: str, listen_port: int) -> OwnListener | bool:
        link = self._link
        record = self._gateway.fleet.registry.se(self._se_id)
        if (
            link is None
            or record is None
            or link.quarantined
            or listen_host != se_address(record.number)
            or listen_port != REVERSE_PORT
        ):
            if not self._refused("forward"):
                _log.warning(
                    "refused to listen on %s:%d for %s", listen_host, listen_port, self._se_id,
                    extra={"stage": "tunnel"},
                )  # fmt: skip
            return False
        link.reverse_granted = True
        return OwnListener(link)

    def connection_requested(
        self, dest_host: str, dest_port: int, _orig_host: str, _orig_port: int
    ) -> tuple[asyncssh.SSHTCPChannel[bytes], Awaitable[asyncssh.SSHTCPSession[bytes]]]:
        link, conn = self._link, self._conn
        if link is None or conn is None:
            raise refuse("not a link yet")
        if link.channels >= self._gateway.terms.max_channels_per_link:
            self._gateway.refusals["channel"] += 1
            self._tires()
            raise refuse(f"at most {self._gateway.terms.max_channels_per_link} channels a link")
        if (dest_host, dest_port) == (tunnel.CHANNEL_HOST, tunnel.CHANNEL_PORT):
            # Counted at once: asyncssh reads many requests before it awaits what opens the first.
            link.channels += 1
            channel = conn.create_tcp_channel(window=CHANNEL_WINDOW_BYTES)
            return channel, self._open(link, channel)
        target = self._gateway.terms.services.get(dest_host)
        if target is None or dest_port != tunnel.SERVICE_PORT or not link.confirmed:
            self._refused("channel")
            raise refuse(f"no channels to {dest_host}:{dest_port}")
        link.channels += 1
        channel = conn.create_tcp_channel(window=FLOOR_BYTES)
        return channel, self._open_service(link, channel, target)

    async def _open(self, link: Link, channel: asyncssh.SSHTCPChannel[bytes]) -> ChannelSession:
        self._refuse_tiny_packets(link, channel)
        gateway = self._gateway
        protocol = gateway.channel_api.protocol(link=link, source=link.source)
        return ChannelSession(protocol, lambda: gateway.fleet.seen(link), lambda: self._closed(link))

    def _refuse_tiny_packets(self, link: Link, channel: asyncssh.SSHTCPChannel[bytes]) -> None:
        # asyncssh knows the announced packet size before it awaits what opens the channel.
        if has_tiny_packets(channel):
            self._closed(link)
            self._gateway.refusals["channel"] += 1
            raise refuse(f"packets of at least {MIN_PACKET_BYTES} bytes expected")

    async def _open_service(self, link: Link, channel: asyncssh.SSHTCPChannel[bytes], target: str) -> SshEnd:
        self._refuse_tiny_packets(link, channel)
        end = TcpEnd()
        window = Window(self._gateway.windows, asyncio.get_running_loop().time())
        session = SshEnd(end, link, self._gateway.fleet.seen, window=window, on_close=lambda: self._closed(link))
        try:
            host, port = parse_endpoint(target, default_port=0)
            async with asyncio.timeout(SERVICE_TIMEOUT_S):
                await asyncio.get_running_loop().create_connection(lambda: end, host, port)
        except (OSError, TimeoutError) as error:
            self._closed(link)
            raise asyncssh.ChannelOpenError(asyncssh.OPEN_CONNECT_FAILED, f"the service is down: {error}") from None
        if link.is_gone and end.transport is not None:
            # asyncssh drops the session of a connection that broke meanwhile, and tells it nothing.
            end.transport.close()
        return session

    @staticmethod
    def _closed(link: Link) -> None:
        link.channels -= 1
