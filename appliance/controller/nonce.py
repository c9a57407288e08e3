"""Enrollment nonces: stateless until used. A nonce is `time | random | MAC`, so handing out a million costs no memory.

Freshness comes from the MAC'd time, single use from the set of used ones, which forgets what is stale anyway. A
nonce of an enrollment is also stored durably, in the enrollment's own transaction, so a restart doesn't forget it.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import struct
from collections import OrderedDict

from appliance.protocol import jws
from appliance.protocol.enroll import NONCE_LIFE_S
from appliance.protocol.strict_json import MalformedError

_TIME = struct.Struct(">q")
_RANDOM_BYTES = 16
_MAC_BYTES = 16
_LENGTH = _TIME.size + _RANDOM_BYTES + _MAC_BYTES


class Nonces:
    """Issues and checks nonces under one cluster key (32 bytes)."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._used: OrderedDict[str, int] = OrderedDict()

    def _mac(self, part: bytes) -> bytes:
        return hmac.digest(self._key, b"appliance nonce v1" + part, hashlib.sha256)[:_MAC_BYTES]

    def issue(self, now: int) -> str:
        """Returns a fresh nonce; `now` is seconds since 1970."""
        part = _TIME.pack(now) + secrets.token_bytes(_RANDOM_BYTES)
        return jws.encode_part(part + self._mac(part))

    def is_fresh(self, nonce: str, now: int) -> bool:
        """Whether this cluster issued `nonce` at most NONCE_LIFE_S ago."""
        try:
            raw = jws.decode_part(nonce)
        except MalformedError:
            return False
        if len(raw) != _LENGTH:
            return False
        part, mac = raw[:-_MAC_BYTES], raw[-_MAC_BYTES:]
        if not hmac.compare_digest(mac, self._mac(part)):
            return False
        issued: int = _TIME.unpack_from(part)[0]
        return 0 <= now - issued <= NONCE_LIFE_S

    def use(self, nonce: str, now: int) -> bool:
        """Marks a fresh nonce as used; False where it was used before."""
        while self._used:
            oldest, at = next(iter(self._used.items()))
            if now - at <= NONCE_LIFE_S:
                break
            del self._used[oldest]
        if nonce in self._used:
            return False
        self._used[nonce] = now
        return True
