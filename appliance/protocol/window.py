"""How much a channel of a link may have under way, and how much may wait in a link's socket. Both ends keep to it.

Whoever receives grants the window (RFC 4254 section 5.2). One that is too small makes a long way slow: 2 MiB at 70 ms
are 30 MB/s, however wide the way is. One that is too large stands as a queue before the narrowest place of the way, and
pings wait behind it: 2 MiB at 10 Mbit/s are 1.7 s. So a channel's window follows what its way holds:

    window = delivered rate x (2 x minimum RTT + SLACK_S)        FLOOR_BYTES .. MOST_BYTES

Twice the RTT lets the rate double with each round trip until the way is full, and then leaves a queue of at most
RTT + SLACK_S. The rate is what the reader took, so a reader that stops makes no window grow. The RTT is the least that
the link ever had: that of a minute full of bulk would hold its own queue, and grow with it.

Whoever sends lets wait in its socket what leaves within `QUEUED_S`: `queue`. What is above stays in the channels, and
pings pass it by.

Pure: bytes and monotonic seconds come from the caller. Not thread-safe.
"""

from __future__ import annotations

FLOOR_BYTES = 64 * 1024
"""Of each channel, from its beginning: two packets."""
MOST_BYTES = 64 * 1024 * 1024
SLACK_S = 0.05
"""What both ends' processors and readers may be late without a pause on the way."""
QUEUED_S = 0.1
"""What may wait in a sender's socket. As much again is left for the packet under way and for queues elsewhere."""
LEAST_QUEUE_BYTES = 16 * 1024
MOST_QUEUE_BYTES = 256 * 1024
"""More gives no speed: whoever fills the socket is woken when half of it is gone."""
PERIOD_S = 0.02
"""The least time over which a rate is measured; on a long way it is the RTT."""
RTT_MOST_S = 2.0
"""What counts of an RTT that a peer tells: it decides about our memory."""
FADES = 0.9
"""What is left of the best rate after a period that was slower: whoever rests for a moment isn't slow."""


class Rate:
    """The best rate of late, in bytes a second.

    Measured over two periods: whatever came in a burst waited in the one before it.
    """

    __slots__ = ("_before", "_count", "_since", "per_s")

    def __init__(self, now: float) -> None:
        self.per_s = 0.0
        self._since = now
        self._count = 0
        self._before = (0, 0.0)
        """Bytes and seconds of the period before."""

    def add(self, count: int, now: float, period_s: float = PERIOD_S) -> bool:
        """Notes `count` bytes. Returns whether a period ended, so that `per_s` is new."""
        self._count += count
        took_s = now - self._since
        if took_s < max(period_s, PERIOD_S):
            return False
        bytes_before, before_s = self._before
        measured = (bytes_before + self._count) / (before_s + took_s)
        self.per_s = max(measured, self.per_s * FADES)
        self._before = (self._count, took_s)
        self._count, self._since = 0, now
        return True

    @property
    def queue_bytes(self) -> int:
        """What may wait in a socket that sends at this rate."""
        return round(min(max(self.per_s * QUEUED_S, LEAST_QUEUE_BYTES), MOST_QUEUE_BYTES))


class Pool:
    """The memory that all windows above the floor share, in bytes: what may wait for readers that don't read."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.taken_bytes = 0


class Window:
    """The receiving window of one channel. `close` gives back what it took of the pool."""

    __slots__ = ("_pool", "_rate", "size")

    def __init__(self, pool: Pool, now: float) -> None:
        self._pool = pool
        self._rate = Rate(now)
        self.size = FLOOR_BYTES
        """Bytes that the peer may have under way."""

    def took(self, count: int, now: float, rtt_s: float | None) -> int:
        """The reader took `count` bytes. Returns the size from now on.

        Args:
            count: bytes.
            now: monotonic seconds.
            rtt_s: the least that the link ever had, seconds; None where none is known, and the window stays.
        """
        if self._rate.add(count, now, min(rtt_s or 0.0, RTT_MOST_S)) and rtt_s is not None:
            wanted = round(self._rate.per_s * (2 * min(rtt_s, RTT_MOST_S) + SLACK_S))
            self._resize(min(max(wanted, FLOOR_BYTES), MOST_BYTES))
        return self.size

    def close(self) -> None:
        """The channel is gone."""
        self._resize(FLOOR_BYTES)

    def _resize(self, wanted: int) -> None:
        free = self._pool.most_bytes - self._pool.taken_bytes
        granted = min(wanted, self.size + max(free, 0))
        self._pool.taken_bytes += granted - self.size
        self.size = granted
