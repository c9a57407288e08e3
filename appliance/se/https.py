"""One HTTPS conversation with a controller node at first boot or refresh: verified before the first byte of a request.

Order: TCP, TLS 1.3 (chain to a trusted root, no clock), `check_peer` (this cluster, a node, not revoked), then
requests; `check_time` once the caller knows a time it may believe. Each request has one deadline over all of its bytes,
each answer a limit on all of its bytes, headers included: neither a silent nor a dripping nor a flooding peer holds the
SE up.

Errors: `UnreachableError` for what another try or another address may mend, `TrustError` for a peer that isn't ours.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import socket
import ssl
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple, Self

from appliance.errors import TrustError, UnreachableError
from appliance.pki import tls
from appliance.pki.certificate import CertificateTerms, moment
from appliance.protocol import tunnel
from appliance.protocol.enroll import ATTEMPT_HEADER, PROTOCOL_HEADER
from appliance.protocol.trust import TrustDocument
from appliance.runtime.clock import Clock
from appliance.runtime.stop import StopToken
from appliance.se.wire import connect

MAX_ANSWER_BYTES = 768 * 1024
"""A grant carries a trust document of up to 256 KiB in base64, and a receipt."""
JSON, JOSE = "application/json", "application/jose+json"
REQUEST_DEADLINE_S = 15.0
MAX_RETRY_AFTER_S = 3600.0
"""No controller parks an SE for longer."""


class Answer(NamedTuple):
    """An HTTP answer. `retry_after_s` is 0 where none was given."""

    status: int
    body: bytes
    retry_after_s: float
    protocol: int = 1
    """The highest one that the controller speaks, where it says so."""


class _Timed:
    """A socket as http.client sees it: every read and write within one deadline and one budget."""

    def __init__(self, sock: ssl.SSLSocket, clock: Clock) -> None:
        self._sock = sock
        self._clock = clock
        self._ends_at = clock.monotonic()
        self._budget_bytes = 0

    def begin(self, deadline_s: float, budget_bytes: int) -> None:
        self._ends_at = self._clock.monotonic() + deadline_s
        self._budget_bytes = budget_bytes

    def _arm(self) -> None:
        left_s = self._ends_at - self._clock.monotonic()
        if left_s <= 0:
            raise TimeoutError("the request's deadline is over")
        self._sock.settimeout(left_s)

    def sendall(self, content: bytes) -> None:
        rest = memoryview(content)
        while rest:
            self._arm()
            rest = rest[self._sock.send(rest) :]

    def receive_into(self, buffer: Any) -> int:
        if self._budget_bytes <= 0:
            raise UnreachableError(f"the controller's answer is longer than {MAX_ANSWER_BYTES} bytes")
        self._arm()
        count = self._sock.recv_into(memoryview(buffer)[: self._budget_bytes])
        self._budget_bytes -= count
        return count

    def makefile(self, mode: str) -> io.BufferedReader:  # noqa: ARG002 - http.client's only use is "rb"
        return io.BufferedReader(_Reading(self))

    def close(self) -> None:
        self._sock.close()


class _Reading(io.RawIOBase):
    """One answer's bytes; closing it leaves the connection open."""

    def __init__(self, timed: _Timed) -> None:
        self._timed = timed

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        return self._timed.receive_into(buffer)


class Conversation:
    """A context manager over one TLS connection to `address`.

    Args:
        address: `host:port`.
        trust: whom to believe.
        clock: for deadlines only.
        connect_timeout_s: for TCP and the TLS handshake, each.
        stop: ends a wait at once.

    Raises (on entering):
        UnreachableError: no TCP, no TLS, not within the deadline.
        TrustError: somebody else than a node of this cluster answers.
    """

    def __init__(
        self, address: str, *, trust: TrustDocument, clock: Clock, connect_timeout_s: float, stop: StopToken
    ) -> None:
        self.address = address
        self._trust = trust
        self._clock = clock
        self._timeout_s = connect_timeout_s
        self._stop = stop
        self._sock: socket.socket | None = None
        self._chain: list[bytes] = []
        self._withdraw: Callable[[], None] = lambda: None

    def __enter__(self) -> Self:
        raw = connect(self.address, default_port=8443, timeout_s=self._timeout_s, stop=self._stop)
        try:
            self.peer = self._shake_hands(raw)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._withdraw()
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def _hang_up(self) -> None:
        # Wakes whoever waits on the socket; the file descriptor is closed by its owner, not under somebody's feet.
        # The plain socket's shutdown, since SSLSocket's would turn TLS off and go on in the clear.
        if self._sock is not None:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    def _shake_hands(self, raw: socket.socket) -> CertificateTerms:
        raw.settimeout(self._timeout_s)
        self._sock = raw
        context = tls.client_context(self._trust.roots)
        try:
            # Where the peer has hung up already, this fails and not the handshake.
            self._sock = secured = context.wrap_socket(raw, do_handshake_on_connect=False)
            self._withdraw = self._stop.on_stop(self._hang_up)
            secured.do_handshake()
        except ssl.SSLCertVerificationError as error:
            raise tls.explain(error) from None
        except OSError as error:
            why = "no answer in time" if isinstance(error, TimeoutError) else error.strerror or str(error)
            raise UnreachableError(
                f"no TLS with {self.address}: {why}", hint="is that the controller's enroll port (8443)?"
            ) from None
        self._chain = tls.peer_chain(secured)
        peer = tls.check_peer(
            self._chain,
            cluster_id=self._trust.cluster_id,
            revoked_node_keys=self._trust.revoked_node_keys,
        )
        self._timed = _Timed(secured, self._clock)
        self._http = http.client.HTTPConnection("controller")
        self._http.auto_open = 0  # a closed connection is an error, never a new one that nobody verified
        self._http.sock = self._timed  # the part of a socket that http.client uses
        return peer

    @property
    def is_of_later_root(self) -> bool:
        """Whether the controller's root is a later one than this SE knows (`pki.tls`)."""
        return tls.is_of_later_root(self._chain)

    def check_time(self, now: float) -> None:
        """Checks the peer's certificates against `now`, seconds since 1970. Raises `TrustError`."""
        tls.check_validity(self._chain, now=now)

    def post(self, path: str, body: bytes, *, attempt_id: str, media_type: str = JOSE) -> Answer:
        """Sends one request and returns its answer, whatever its status.

        Raises:
            UnreachableError: no whole answer within the deadline, or no HTTP.
        """
        if self._sock is None:
            raise UnreachableError("the connection is closed")
        self._timed.begin(REQUEST_DEADLINE_S, MAX_ANSWER_BYTES)
        headers = {
            "content-type": media_type if body else JSON,
            ATTEMPT_HEADER: attempt_id,
            PROTOCOL_HEADER: str(tunnel.PROTOCOL_NUMBER),
        }
        try:
            self._http.request("POST", path, body=body, headers={**headers, "host": self.address})
            answer = self._http.getresponse()
            content = answer.read()
            retry_after = answer.headers.get("retry-after", "")
            protocol = tunnel.parse_number(answer.headers.get(PROTOCOL_HEADER, ""))
        except TimeoutError:
            raise UnreachableError(
                f"{self.address} gave no whole answer to {path} within {REQUEST_DEADLINE_S:g} s"
            ) from None
        except (OSError, http.client.HTTPException, ValueError, LookupError) as error:
            raise UnreachableError(
                f"{self.address} broke off at {path}: {type(error).__name__} {error}".rstrip(),
                hint="is that the controller's enroll port (8443)?",
            ) from None
        seconds = float(retry_after) if retry_after.isascii() and retry_after.isdigit() else 0.0
        return Answer(answer.status, content, min(seconds, MAX_RETRY_AFTER_S), protocol)


def believed_time(*, clock: Clock, controller_time: int, floor: int) -> float:
    """Returns the time to judge certificates by: the local clock where the kernel trusts it, else the controller's.

    Args:
        clock: this machine's.
        controller_time: from the nonce answer, TLS-protected; seconds since 1970.
        floor: bake time or the newest trust document's signing time, whichever is later.

    Raises:
        TrustError: the controller's time would be needed and lies before the floor.
    """
    if clock.synchronised():
        return clock.now()
    if controller_time < floor:
        raise TrustError(
            f"the controller says it is {moment(controller_time)}, but what this SE trusts is of {moment(floor)}",
            hint="set the controller's clock",
        )
    return float(controller_time)
