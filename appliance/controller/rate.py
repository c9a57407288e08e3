"""Token buckets: a steady rate with a burst; global and per source before authentication, per image key after it.

Pure: time is an argument (monotonic seconds). A source is an IPv4 address or the /64 of an IPv6 one.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from ipaddress import IPv6Address, IPv6Network

MAX_SOURCES = 4096
"""Sources remembered at a time; the one not heard of for the longest is forgotten first."""

TOLD_EVERY_S = 600.0
"""A flood by one image key makes so seldom an audit entry."""


def network_of(source: str) -> str:
    """What counts as one source: an IPv4 address, or the /64 in which an IPv6 host may take any (RFC 7421).

    What is no IPv6 address is returned as it is.
    """
    try:
        address = IPv6Address(source.partition("%")[0])
    except ValueError:
        return source
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(IPv6Network((int(address) >> 64 << 64, 64)))


class Bucket:
    """Holds at most `burst` tokens and gains `rate_per_s` a second."""

    __slots__ = ("_at", "_tokens")

    def __init__(self, burst: float, now: float) -> None:
        self._tokens = burst
        self._at = now

    def take(self, now: float, *, rate_per_s: float, burst: float) -> bool:
        """Takes one token where there is one."""
        self._tokens = min(burst, self._tokens + max(0.0, now - self._at) * rate_per_s)
        self._at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    def wait_s(self, *, rate_per_s: float) -> float:
        """Seconds until there is a token again, as it was when last asked."""
        return max(0.0, 1 - self._tokens) / rate_per_s


class Rates:
    """One global bucket and one for each source. A thousand VMs behind one NAT are one source: choose bursts so."""

    def __init__(
        self, *, rate_per_s: float, burst: int, source_rate_per_s: float, source_burst: int, now: float
    ) -> None:
        self._rate = (rate_per_s, float(burst))
        self._source_rate = (source_rate_per_s, float(source_burst))
        self._global = Bucket(self._rate[1], now)
        self._sources: OrderedDict[str, Bucket] = OrderedDict()

    def allow(self, source: str, now: float) -> bool:
        """Whether a request from `source` may pass; the source is asked first so that one can't drain the rest."""
        source = network_of(source)
        bucket = self._sources.get(source)
        if bucket is None:
            bucket = self._sources[source] = Bucket(self._source_rate[1], now)
            if len(self._sources) > MAX_SOURCES:
                self._sources.popitem(last=False)
        self._sources.move_to_end(source)
        if not bucket.take(now, rate_per_s=self._source_rate[0], burst=self._source_rate[1]):
            return False
        return self._global.take(now, rate_per_s=self._rate[0], burst=self._rate[1])


class KeyRates:
    """One bucket for each image key, asked after its signature was verified: nobody else can drain it.

    There are no more buckets than image keys in the store. A key's own terms go before the ones given here.
    """

    def __init__(self, *, rate_per_s: float, burst: int) -> None:
        self.rate_per_s, self.burst = rate_per_s, burst
        self._buckets: dict[str, Bucket] = {}
        self.limited: Counter[str] = Counter()
        """Image key id to refused requests since start."""
        self._untold: Counter[str] = Counter()
        self._told_at: dict[str, float] = {}

    def wait_s(self, image_key_id: str, now: float, *, rate_per_s: float, burst: int) -> float:
        """Takes one request of a key; 0 where it may pass, else how many seconds it should wait."""
        rate_per_s, burst = rate_per_s or self.rate_per_s, burst or self.burst
        bucket = self._buckets.setdefault(image_key_id, Bucket(burst, now))
        if bucket.take(now, rate_per_s=rate_per_s, burst=burst):
            return 0.0
        self.limited[image_key_id] += 1
        self._untold[image_key_id] += 1
        return bucket.wait_s(rate_per_s=rate_per_s)

    def tell(self, now: float) -> dict[str, int]:
        """Returns refused requests by key that weren't told yet; of one key again only after `TOLD_EVERY_S`."""
        due = [key for key in self._untold if now - self._told_at.get(key, -TOLD_EVERY_S) >= TOLD_EVERY_S]
        self._told_at.update(dict.fromkeys(due, now))
        return {key: self._untold.pop(key) for key in due}
