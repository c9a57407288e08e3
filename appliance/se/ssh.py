"""One SSH connection of the SE; the only module that knows paramiko.

Dial, key exchange, host key, authentication, in this order; the host key is one of the trust document's for the node
before anything is said about this SE. What the project decided about algorithms is enforced here (`protocol.tunnel`).

paramiko's own waits are long or endless (FACTS, trap 1): the caller has a `Guard` on the wire, which ends each of them.

Channels that carry bulk have windows that follow their way (`protocol.window`), and let everything else pass:
heartbeats, windows, opens and ends never wait behind more than the one bulk packet that is being written.
"""

from __future__ import annotations

import base64
import io
import queue
import threading
from collections.abc import Callable, Collection, Sequence
from typing import Any

from appliance.errors import TrustError, TunnelError
from appliance.pki import ssh_keys
from appliance.pki.identity import Identity
from appliance.protocol import tunnel as said
from appliance.protocol.window import FLOOR_BYTES, MOST_BYTES, Pool, Window
from appliance.runtime.clock import Clock
from appliance.se.channel_api import ByteChannel
from appliance.se.lean_paramiko import paramiko
from appliance.se.wire import Wire

_MACS = ("hmac-sha2-256-etm@openssh.com", "hmac-sha2-512-etm@openssh.com")
"""Agreed on by both sides and never used: all our ciphers carry their own authentication."""
KEY_REFUSED = "TUNNEL-032"
"""Code of the error that the gateway didn't take this SE's key."""
_ENDLESS_S = 3600.0
"""Where paramiko wants a number; the guard is quicker."""
_DISCONNECT, _BY_APPLICATION = b"\x01", 11
"""SSH_MSG_DISCONNECT and its reason SSH_DISCONNECT_BY_APPLICATION (RFC 4253 sections 11.1 and 12)."""

_CHANNEL_REQUEST = b"\x62"
"""SSH_MSG_CHANNEL_REQUEST (RFC 4254 section 5.4)."""

_CHANNEL_DATA, _EXTENDED_DATA, _WINDOW_ADJUST = 94, 95, b"\x5d"
"""SSH_MSG_CHANNEL_DATA, SSH_MSG_CHANNEL_EXTENDED_DATA, SSH_MSG_CHANNEL_WINDOW_ADJUST (RFC 4254 section 5.2)."""

_FAILURES = (paramiko.SSHException, OSError, EOFError)

_OPEN_S = 30.0
"""How long an open may go unanswered by a peer that lives; a silent one is the guard's."""
_MOST_SEEN = 4096
"""Numbers of channels that are kept: what is still under way to one that was closed is no breach of the protocol."""


class _Seen(dict[int, bool]):
    """paramiko's `channels_seen`, which would keep the number of each channel for as long as the link lives."""

    def __setitem__(self, number: int, value: bool) -> None:
        super().__setitem__(number, value)
        if len(self) > _MOST_SEEN:
            del self[next(iter(self))]


class _Packets(paramiko.packet.Packetizer):
    def start_handshake(self, timeout: float) -> None:
        """Does nothing: paramiko would start a timer thread that a failed handshake leaves behind for 15 s."""


_UNREAD_BYTES = 1024 * 1024
"""Of one channel: what is less isn't counted. A window that shrank is still held by what its reader left: hence twice
`MOST_BYTES`."""


def _take_data(channel: paramiko.Channel, message: paramiko.Message) -> None:
    """paramiko grants windows, and takes what is beyond them all the same."""
    channel._feed(message)  # type: ignore[attr-defined]  # noqa: SLF001
    if len(channel.in_buffer) > _UNREAD_BYTES:
        channels = channel.transport._channels.values()  # type: ignore[union-attr]  # noqa: SLF001
        waiting = [size for each in channels if (size := len(each.in_buffer)) > _UNREAD_BYTES]
        if sum(waiting) > 2 * MOST_BYTES + len(waiting) * _UNREAD_BYTES:
            raise paramiko.SSHException("the peer sends more than it may")


class _Transport(paramiko.Transport):
    """Sends bulk one packet at a time, and only while nothing else wants to be sent.

    All senders meet at one lock of paramiko's, and locks know no order: a pump that lets go of it has it again before a
    heartbeat's thread has woken up.
    """

    _channel_handler_table = {  # noqa: RUF012 - paramiko's
        **paramiko.Transport._channel_handler_table,  # type: ignore[attr-defined]  # noqa: SLF001
        _CHANNEL_DATA: _take_data,
        _EXTENDED_DATA: lambda _channel, _message: None,  # nobody reads it
    }

    def __init__(self, wire: Wire) -> None:
        super().__init__(
            wire,  # type: ignore[arg-type]
            default_window_size=FLOOR_BYTES, strict_kex=True, packetizer_class=_Packets,
        )  # fmt: skip
        self.channels_seen = _Seen()
        self._put_off: list[paramiko.Message] = []
        """What this thread itself has to say once the new keys are there."""
        self.bulk_channels: set[int] = set()
        """The peer's numbers of channels that carry bulk."""
        self._bulk_turn = threading.Lock()
        self._changed = threading.Condition()
        self._urgent = 0

    def _parse_newkeys(self, message: paramiko.Message) -> None:
        super()._parse_newkeys(message)  # type: ignore[misc]
        waiting, self._put_off = self._put_off, []
        for data in waiting:
            self._send_user_message(data)

    def _send_user_message(self, data: paramiko.Message) -> None:
        """Raises `OSError` where it can't be sent."""
        if threading.current_thread() is self and not self.clear_to_send.is_set():
            # The answer to a channel's end that crossed our wish for new keys: whoever reads must not wait for what
            # only he can read.
            self._put_off.append(data)
            return
        try:
            self._send_in_turn(data)
        except paramiko.SSHException as error:  # no new keys in time
            raise TimeoutError(str(error)) from None

    def _send_in_turn(self, data: paramiko.Message) -> None:
        head = data.packet.getbuffer()[:5]
        is_bulk = head[0] == _CHANNEL_DATA and int.from_bytes(head[1:], "big") in self.bulk_channels
        head.release()  # or the message couldn't grow any more
        if is_bulk:
            with self._bulk_turn:
                with self._changed:
                    self._changed.wait_for(lambda: not self._urgent)
                super()._send_user_message(data)  # type: ignore[misc]  # has no public name
            return
        with self._changed:
            self._urgent += 1
        try:
            super()._send_user_message(data)  # type: ignore[misc]
        finally:
            with self._changed:
                self._urgent -= 1
                if not self._urgent:
                    self._changed.notify_all()


class BulkChannel:
    """A channel whose receiving window follows its way; one thread reads. Otherwise paramiko's own."""

    def __init__(
        self, channel: paramiko.Channel, transport: _Transport, window: Window, *, pool_lock: threading.Lock,
        rtt_s: Callable[[], float | None], clock: Clock,
    ) -> None:  # fmt: skip
        self._channel = channel
        self._transport = transport
        self._window = window
        self._rtt_s = rtt_s
        self._clock = clock
        self._pool_lock = pool_lock
        transport.bulk_channels.add(channel.remote_chanid)

    @property
    def closed(self) -> bool:
        """See `ByteChannel`."""
        return self._channel.closed

    def settimeout(self, timeout: float | None) -> None:
        """See `ByteChannel`."""
        self._channel.settimeout(timeout)

    def sendall(self, s: bytes) -> None:
        """See `ByteChannel`."""
        self._channel.sendall(s)

    def shutdown_write(self) -> None:
        """See `ByteChannel`."""
        self._channel.shutdown_write()

    def close(self) -> None:
        """See `ByteChannel`."""
        self._transport.bulk_channels.discard(self._channel.remote_chanid)
        with self._pool_lock:
            self._window.close()
        self._channel.close()

    def recv(self, nbytes: int) -> bytes:
        """Returns bytes, b"" at the end. Raises `TimeoutError`."""
        received = self._channel.recv(nbytes)
        with self._pool_lock:
            size = self._window.took(len(received), self._clock.monotonic(), self._rtt_s())
        if size != self._channel.in_window_size and received:
            self._resize(size)
        return received

    def _resize(self, size: int) -> None:
        """Grants what is more at once; what is less is held back from what will be read next."""
        channel: Any = self._channel
        with channel.lock:
            channel.in_window_sofar += size - channel.in_window_size
            channel.in_window_size = size
            channel.in_window_threshold = size // 10
            granted = channel.in_window_sofar if channel.in_window_sofar > channel.in_window_threshold else 0
            channel.in_window_sofar -= granted
        if granted:
            message = paramiko.Message()
            message.add_byte(_WINDOW_ADJUST)
            message.add_int(channel.remote_chanid)
            message.add_int(granted)
            self._transport._send_user_message(message)  # noqa: SLF001 - has no public name


class SshConnection:
    """An authenticated connection, once `log_in` returned.

    Args:
        wire: the connected socket.
        clock: times rates.
        rtt_s: the least round trip of the link, None while none is known.
        allow_curve25519: offers a key exchange without post-quantum protection beside the other one.
    """

    def __init__(self, wire: Wire, *, clock: Clock, rtt_s: Callable[[], float | None], allow_curve25519: bool) -> None:
        self.wire = wire
        self._clock = clock
        self._rtt_s = rtt_s
        self._pool, self._pool_lock = Pool(MOST_BYTES), threading.Lock()
        self._transport = transport = _Transport(wire)
        transport.banner_timeout = transport.auth_timeout = _ENDLESS_S
        transport.channel_timeout = _OPEN_S
        options = transport.get_security_options()
        kex = said.KEX + (said.KEX_FALLBACK if allow_curve25519 else ())
        options.kex = tuple(name for name in kex if name in options.kex)
        options.ciphers = tuple(name for name in said.CIPHERS if name in options.ciphers)
        options.key_types = (ssh_keys.KEY_TYPE,)
        options.digests = _MACS

    def log_in(self, user: str, identity: Identity, *, host_keys: Collection[str]) -> None:
        """Exchanges keys, checks the peer's host key, authenticates.

        Args:
            user: the SEs' common user.
            identity: the SE's key.
            host_keys: lines of the trust document for this node.

        Raises:
            TrustError: another host key; nothing was said about this SE.
            TunnelError: no SSH, other algorithms, the key was refused, or the connection ended.
        """
        transport = self._transport
        try:
            transport.start_client()
            self._check_host_key(transport.get_remote_server_key().asbytes(), host_keys)
            if not transport.agreed_on_strict_kex:  # type: ignore[attr-defined]  # the stubs are older
                raise TunnelError("the gateway doesn't know strict key exchange", code="TUNNEL-031")
            key = paramiko.Ed25519Key(file_obj=io.StringIO(identity.openssh().reveal().decode()))
            if transport.auth_publickey(user, key):
                raise TunnelError("the gateway wants more than this SE's key", code=KEY_REFUSED)
        except paramiko.AuthenticationException:
            raise TunnelError(
                f"the gateway refused this SE's key {identity.thumbprint}",
                hint="see `appliance why` on the controller: revoked, quarantined, or restored from an old backup",
                code=KEY_REFUSED,
            ) from None
        except _FAILURES as error:
            raise TunnelError(
                f"no SSH: {_reason(error)}", hint="is that the gateway's port?", code="TUNNEL-030"
            ) from None
        self.wire.trust()

    def _check_host_key(self, blob: bytes, host_keys: Collection[str]) -> None:
        line = f"{ssh_keys.KEY_TYPE} {base64.b64encode(blob).decode()}"
        if line not in host_keys:
            expected = ", ".join(ssh_keys.fingerprint(known) for known in host_keys) or "none known"
            raise TrustError(
                f"the gateway shows host key {ssh_keys.fingerprint(line)}, expected {expected}",
                hint="a wrong address, something in between, or keys that changed without a trust document",
                code="TUNNEL-033",
            )

    def open_channel(self, host: str, port: int) -> ByteChannel:
        """Opens a `direct-tcpip` channel; all but those of the channel API carry bulk.

        Raises:
            TunnelError: it is refused, or the link ends.
        """
        try:
            channel = self._transport.open_channel("direct-tcpip", (host, port), ("127.0.0.1", 0))
            return channel if (host, port) == (said.CHANNEL_HOST, said.CHANNEL_PORT) else self._bulk(channel)
        except paramiko.ChannelException as error:
            raise TunnelError(
                f"the gateway refused a channel to {host}:{port}: {error.text}", code="TUNNEL-037"
            ) from None
        except _FAILURES as error:
            raise TunnelError(self._ended(error), code="TUNNEL-035") from None

    def _bulk(self, channel: paramiko.Channel) -> BulkChannel:
        window = Window(self._pool, self._clock.monotonic())
        return BulkChannel(
            channel, self._transport, window, pool_lock=self._pool_lock, rtt_s=self._rtt_s, clock=self._clock
        )

    def serve_reverse(self, address: str, port: int, accepted: queue.SimpleQueue[ByteChannel | None]) -> None:
        """Asks for connections to `address:port` on the node; they come as channels in `accepted`.

        Raises:
            TunnelError: refused, or the link ended.
        """

        def take(channel: paramiko.Channel, _origin: Any, _server: Any) -> None:
            # Called by paramiko's reader thread: anything that waits here would stop the whole link.
            accepted.put(self._bulk(channel))

        try:
            self._transport.request_port_forward(address, port, handler=take)
        except _FAILURES as error:
            if not self._transport.is_active():
                raise TunnelError(self._ended(error), code="TUNNEL-035") from None
            raise TunnelError(
                f"the gateway refused to serve {address}:{port} for this SE",
                hint="is it this SE's own address? see `appliance why` on the controller",
                code="TUNNEL-038",
            ) from None

    # What `se.self_test` tries. Each raises `TunnelError` where the link ends meanwhile: that is no refusal.

    def grants_session(self) -> bool:
        """Whether a session channel is granted."""
        return self._grants(lambda: self._transport.open_session().close())

    def grants_channel(self, host: str, port: int) -> bool:
        """Whether a `direct-tcpip` channel is granted."""
        return self._grants(
            lambda: self._transport.open_channel("direct-tcpip", (host, port), ("127.0.0.1", 0)).close()
        )

    def grants_listen(self, address: str, port: int) -> bool:
        """Whether the gateway would listen there; what it grants is given back."""

        def listen() -> None:
            self._transport.request_port_forward(address, port)
            self._transport.cancel_port_forward(address, port)

        return self._grants(listen)

    def grants_request(self, request: str, fields: Sequence[str]) -> bool:
        """Whether a request on a session channel is granted; `fields` are strings that go with it."""
        more = paramiko.Message()
        for field in fields:
            more.add_string(field)
        return self._grants_on_session(request, more.asbytes())

    def grants_x11(self) -> bool:
        """Whether X11 forwarding is granted on a session channel."""
        more = paramiko.Message()
        more.add_boolean(False)  # not for one connection only
        more.add_string("MIT-MAGIC-COOKIE-1")
        more.add_string("0" * 32)
        more.add_int(0)
        return self._grants_on_session("x11-req", more.asbytes())

    def _grants_on_session(self, request: str, fields: bytes) -> bool:
        def ask() -> None:
            channel = self._transport.open_session()
            try:
                message = paramiko.Message()
                message.add_byte(_CHANNEL_REQUEST)
                message.add_int(channel.remote_chanid)
                message.add_string(request)
                message.add_boolean(True)
                message.add_bytes(fields)
                channel._event_pending()  # type: ignore[attr-defined]  # noqa: SLF001 - no public name for one request
                if channel.closed:  # before that: nobody would wake who waits from now on
                    raise paramiko.SSHException("the channel was closed")
                self._transport._send_user_message(message)  # noqa: SLF001
                channel._wait_for_event()  # type: ignore[attr-defined]  # noqa: SLF001
            finally:
                channel.close()

        return self._grants(ask)

    def _grants(self, ask: Callable[[], object]) -> bool:
        try:
            ask()
        except _FAILURES as error:
            if not self._transport.is_active():
                raise TunnelError(self._ended(error), code="TUNNEL-035") from None
            # Or the next loss of this link would be told as this refusal.
            self._transport.get_exception()
            return False
        return True

    def lost(self) -> TunnelError:
        """Returns why a connection is over that nobody here ended."""
        return TunnelError(self._ended(EOFError()), code="TUNNEL-035")

    def _ended(self, error: Exception) -> str:
        """Says why the link ended: paramiko's own "SSH session not active" tells an operator nothing."""
        if self._transport.is_active():
            return f"the link ended: {_reason(error)}"
        reason = self._transport.get_exception()
        return f"the link ended: {_reason(reason) if reason else 'the peer closed the connection'}"

    def say_goodbye(self) -> None:
        """Tells the gateway that this end is meant. Only from a thread that may wait; the guard limits it."""
        message = paramiko.Message()
        message.add_byte(_DISCONNECT)
        message.add_int(_BY_APPLICATION)
        message.add_string("the SE closes the link")
        message.add_string("en")
        try:
            self._transport._send_user_message(message)  # noqa: SLF001 - has no public name
        except _FAILURES:
            return

    def close(self) -> None:
        """Ends the connection, waits for paramiko's thread and gives the descriptor back."""
        self.wire.close()
        self._transport.close()
        if self._transport.is_alive():
            self._transport.join()
        self.wire.release()


def _reason(error: Exception) -> str:
    if isinstance(error, EOFError):
        return "the peer closed the connection"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
