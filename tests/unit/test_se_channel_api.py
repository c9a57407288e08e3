"""The SE's end of the channel API: answers in any pieces, and everything that is none."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Callable, Iterator

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.errors import TunnelError
from appliance.protocol.tunnel import Confirm, ConfirmAnswer
from appliance.runtime.clock import SystemClock
from appliance.se.channel_api import MAX_ANSWER_BYTES, Answer, AnswerReader, ChannelApi, decode

ONE = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nx: y\r\n\r\nabc"
TWO = b"HTTP/1.1 409\r\ncontent-length:0\r\n\r\n"


@given(st.lists(st.integers(0, len(ONE + TWO)), max_size=6))
def test_answers_come_in_any_pieces(cuts: list[int]) -> None:
    reader, found, stream = AnswerReader(), [], ONE + TWO
    edges = [0, *sorted(cuts), len(stream)]
    for start, end in itertools.pairwise(edges):
        reader.feed(stream[start:end])
        while (answer := reader.next()) is not None:
            found.append(answer)
    assert found == [Answer(200, b"abc"), Answer(409, b"")]


@pytest.mark.parametrize(
    "stream",
    [
        b"HTTP/1.0 200 OK\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 20 OK\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 2000\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 9999999999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % (MAX_ANSWER_BYTES + 1),
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nno colon\r\n\r\n",
        b"SSH-2.0-x\r\n\r\n\r\n",
        b"x" * 8192,
    ],
    ids=lambda stream: stream[:60].decode(),
)
def test_what_is_no_answer(stream: bytes) -> None:
    reader = AnswerReader()
    reader.feed(stream)
    with pytest.raises(TunnelError):
        reader.next()


class Channel:
    """A socket in the shape of a channel."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.closed = False
        self.settimeout, self.recv = sock.settimeout, sock.recv
        self.sendall: Callable[[bytes], object] = sock.sendall

    def shutdown_write(self) -> None:
        self._sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.closed = True
        self._sock.close()


class Far:
    """The far end of each channel that was opened."""

    def __init__(self) -> None:
        self.ends: list[socket.socket] = []
        self.channels: list[Channel] = []

    def open(self) -> Channel:
        near, far = socket.socketpair()
        self.ends.append(far)
        self.channels.append(Channel(near))
        return self.channels[-1]


@pytest.fixture
def far() -> Iterator[Far]:
    found = Far()
    yield found
    for end in found.ends:
        end.close()
    for channel in found.channels:
        channel.close()


@pytest.fixture
def api(far: Far) -> ChannelApi:
    return ChannelApi(far.open, SystemClock())


def test_requests_are_pipelined_and_late_pieces_kept(api: ChannelApi, far: Far) -> None:
    api.send("/a", Confirm(ticket="1"))
    api.send("/b", Confirm(ticket="2"))
    assert api.outstanding == 2
    assert far.ends[0].recv(65536).count(b"POST ") == 2
    far.ends[0].sendall(ONE[:20])
    with pytest.raises(TimeoutError):
        api.receive(0.01)
    far.ends[0].sendall(ONE[20:] + TWO)
    assert api.receive(5) == Answer(200, b"abc")
    assert api.receive(5) == Answer(409, b"")
    assert api.outstanding == 0


def test_a_closed_channel_is_opened_again(api: ChannelApi, far: Far) -> None:
    api.send("/a", Confirm(ticket="1"))
    far.ends[0].shutdown(socket.SHUT_WR)
    assert api.receive(5) is None
    assert api.receive(5) is None
    assert api.outstanding == 0
    api.send("/a", Confirm(ticket="1"))
    assert len(far.ends) == 2


def test_a_broken_channel_is_told(api: ChannelApi, far: Far) -> None:
    api.send("/a", Confirm(ticket="1"))

    def fail(_content: bytes) -> None:
        raise OSError("Socket is closed")

    far.channels[0].sendall = fail
    with pytest.raises(TunnelError, match="Socket is closed"):
        api.send("/a", Confirm(ticket="1"))
    assert api.outstanding == 0


def test_call(api: ChannelApi, far: Far) -> None:
    channel = far.open()
    api = ChannelApi(lambda: channel, SystemClock())
    body = b'{"spent":true}'
    far.ends[0].sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
    assert api.call("/c", Confirm(ticket="t"), ConfirmAnswer, timeout_s=5).spent
    with pytest.raises(TunnelError, match="no answer to /c within"):
        api.call("/c", Confirm(ticket="t"), ConfirmAnswer, timeout_s=0.01)
    far.ends[0].shutdown(socket.SHUT_WR)
    with pytest.raises(TunnelError, match="closed the channel instead of answering /c"):
        api.call("/c", Confirm(ticket="t"), ConfirmAnswer, timeout_s=5)


def test_close(api: ChannelApi, far: Far) -> None:
    api.close()
    api.send("/c", Confirm(ticket="t"))
    api.close()
    assert far.channels[0].closed
    assert api.outstanding == 0


def test_a_refusal_carries_code_and_advice() -> None:
    body = b'{"type":"/p","title":"No","status":409,"code":"TUNNEL-021","advice":"go away"}'
    with pytest.raises(TunnelError, match="refused /x: No") as caught:
        decode(Answer(409, body), ConfirmAnswer, "/x")
    assert (caught.value.code, caught.value.hint) == ("TUNNEL-021", "go away")
    with pytest.raises(TunnelError, match="HTTP 500"):
        decode(Answer(500, b"oops"), ConfirmAnswer, "/x")
    with pytest.raises(TunnelError, match="ConfirmAnswer"):
        decode(Answer(200, msgspec.json.encode({"spent": 1})), ConfirmAnswer, "/x")
