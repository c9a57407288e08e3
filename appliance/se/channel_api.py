"""The SE's end of the channel API: HTTP/1.1 on one kept-open channel of a link.

Written out here instead of taken from http.client: a second ping must be able to go out while the first is unanswered
(pipelining, RFC 9112 section 9.3.2), and an answer that comes in pieces over several deadlines must not be lost;
http.client can do neither, and brings the TLS stack into a process that doesn't speak TLS any more.

`AnswerReader` is pure: bytes in, answers out. It takes what our own controller sends (a length, no chunks) and refuses
all else. `ChannelApi` opens the channel again where the controller closed it between two requests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeVar

import msgspec

from appliance.errors import ApplianceError, TunnelError
from appliance.protocol import strict_json
from appliance.protocol.problem import Problem
from appliance.protocol.tunnel import CHANNEL_HOST, MAX_HEADER_BYTES
from appliance.runtime.clock import Clock

T = TypeVar("T")

MAX_ANSWER_BYTES = 512 * 1024
"""An answer may carry a trust document of 256 KiB in base64."""
_CHUNK_BYTES = 32 * 1024
_ROOM_S = 30.0
"""How long a controller that lives may leave no room for a request; one that is silent is the guard's."""


class ByteChannel(Protocol):
    """A channel of a link: what paramiko's has of a socket."""

    @property
    def closed(self) -> bool:
        """Whether it is gone, by either side."""
        ...

    def settimeout(self, timeout: float | None) -> None:
        """Limits the next reads and writes."""
        ...

    def recv(self, nbytes: int) -> bytes:
        """Returns bytes, b"" at the end. Raises `TimeoutError`."""
        ...

    def sendall(self, s: bytes) -> object:
        """Sends all of it."""
        ...

    def shutdown_write(self) -> None:
        """Sends the end of the stream."""
        ...

    def close(self) -> None:
        """Closes both ways."""
        ...


class Answer(NamedTuple):
    """One HTTP answer."""

    status: int
    body: bytes


class AnswerReader:
    """Finds answers in a stream of bytes."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, content: bytes) -> None:
        """Takes what came."""
        self._buffer += content

    def next(self) -> Answer | None:
        """Returns the next whole answer, None where it isn't whole yet.

        Raises:
            TunnelError: what came is no answer of a controller.
        """
        head, end, rest = bytes(self._buffer[: MAX_HEADER_BYTES + 4]).partition(b"\r\n\r\n")
        if not end:
            if len(head) > MAX_HEADER_BYTES:
                raise _no_answer(f"headers of more than {MAX_HEADER_BYTES} bytes")
            return None
        status, length = _head(head)
        start = len(head) + len(end)
        if len(self._buffer) < start + length:
            return None
        body = bytes(self._buffer[start : start + length])
        del rest, self._buffer[: start + length]
        return Answer(status, body)


def _no_answer(what: str) -> TunnelError:
    return TunnelError(f"the channel API's answer can't be read: {what}", code="TUNNEL-036", hint="upgrade the agent")


def _head(head: bytes) -> tuple[int, int]:
    """Returns status and body length of a header block (RFC 9112 sections 4 to 6)."""
    first, *lines = head.split(b"\r\n")
    version, _, rest = first.partition(b" ")
    status = rest[:3]
    if version != b"HTTP/1.1" or not status.isdigit() or rest[3:4] not in {b"", b" "}:
        raise _no_answer(f"status line {first[:40]!r}")
    lengths = []
    for line in lines:
        name, colon, value = line.partition(b":")
        match name.lower():
            case b"content-length":
                lengths.append(value.strip())
            case b"transfer-encoding":
                raise _no_answer("chunks, a length expected")
            case _ if not colon:
                raise _no_answer(f"header line {line[:40]!r}")
    if len(lengths) != 1 or not lengths[0].isdigit() or len(lengths[0]) > 9:
        raise _no_answer("one content-length expected")
    length = int(lengths[0])
    if length > MAX_ANSWER_BYTES:
        raise _no_answer(f"{length} bytes, at most {MAX_ANSWER_BYTES} are accepted")
    return int(status), length


class ChannelApi:
    """Sends requests and receives their answers in the same order. One thread.

    Args:
        open_channel: opens a channel to the channel API; raises `TunnelError`.
        clock: for deadlines.
    """

    def __init__(self, open_channel: Callable[[], ByteChannel], clock: Clock) -> None:
        self._open_channel = open_channel
        self._clock = clock
        self._channel: ByteChannel | None = None
        self._reader = AnswerReader()
        self.outstanding = 0
        """Requests without an answer yet."""

    def send(self, path: str, request: msgspec.Struct) -> None:
        """Sends one request. Raises `TunnelError` where the link takes nothing any more."""
        body = strict_json.encode(request)
        head = (
            f"POST {path} HTTP/1.1\r\nhost: {CHANNEL_HOST}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        )
        if self._channel is None or self._channel.closed:
            self._forget()
            self._channel = self._open_channel()
        try:
            self._channel.settimeout(_ROOM_S)
            self._channel.sendall(head.encode() + body)
        except TimeoutError:
            self._forget()
            raise TunnelError(
                f"the controller takes no requests, for {_ROOM_S:g} s now, though it sends", code="TUNNEL-050"
            ) from None
        except (OSError, EOFError) as error:
            self._forget()
            raise TunnelError(f"the link broke while a request was sent: {error}", code="TUNNEL-035") from None
        self.outstanding += 1

    def receive(self, timeout_s: float) -> Answer | None:
        """Returns the next answer; None where the controller closed the channel, which is no loss of the link.

        Raises:
            TimeoutError: not within `timeout_s`; what came of it is kept.
            TunnelError: something else than an answer came.
        """
        ends_at = self._clock.monotonic() + timeout_s
        while (answer := self._reader.next()) is None:
            if self._channel is None:
                return None
            left_s = ends_at - self._clock.monotonic()
            if left_s <= 0:
                raise TimeoutError
            self._channel.settimeout(left_s)
            received = self._channel.recv(_CHUNK_BYTES)
            if not received:
                self._forget()
                return None
            self._reader.feed(received)
        self.outstanding -= 1
        return answer

    def call(self, path: str, request: msgspec.Struct, kind: type[T], *, timeout_s: float) -> T:
        """Sends one request and returns its answer as a `kind`; only where none is outstanding.

        Raises:
            TunnelError: no answer in time, or a refusal.
        """
        self.send(path, request)
        try:
            answer = self.receive(timeout_s)
        except TimeoutError:
            raise TunnelError(f"no answer to {path} within {timeout_s:g} s", code="TUNNEL-034") from None
        if answer is None:
            raise TunnelError(f"the controller closed the channel instead of answering {path}", code="TUNNEL-035")
        return decode(answer, kind, path)

    def close(self) -> None:
        """Closes the channel."""
        if self._channel is not None:
            self._channel.close()
        self._forget()

    def _forget(self) -> None:
        self._channel = None
        self._reader = AnswerReader()
        self.outstanding = 0


def decode(answer: Answer, kind: type[T], path: str) -> T:
    """Returns a 200's body as a `kind`. Raises `TunnelError` for a refusal or a body of another kind."""
    if answer.status != 200:
        try:
            problem = strict_json.decode(answer.body, Problem, max_bytes=MAX_ANSWER_BYTES)
        except ApplianceError:
            raise _no_answer(f"HTTP {answer.status} to {path}") from None
        raise TunnelError(f"the controller refused {path}: {problem.title}", hint=problem.advice, code=problem.code)
    try:
        return strict_json.decode(answer.body, kind, max_bytes=MAX_ANSWER_BYTES)
    except ApplianceError as error:
        raise _no_answer(error.message) from None
