"""Bytes that must never be shown: private keys and passphrases.

A `Secret` says `<redacted>` wherever text is made of it (repr, str, format, tracebacks with locals, logging), can't be
pickled or copied into another process, and compares in constant time. Who needs the bytes says `reveal()`, which is
easy to find in a review. It doesn't scrub memory: Python gives no way to do that for bytes.
"""

from __future__ import annotations

import hmac
from typing import Final, NoReturn, SupportsIndex

REDACTED: Final = "<redacted>"


class Secret:
    """Holds bytes that don't show."""

    __slots__ = ("_value",)

    def __init__(self, value: bytes) -> None:
        self._value = value

    def reveal(self) -> bytes:
        """Returns the bytes, to be written 0600 or handed to a library; never to be logged."""
        return self._value

    def __repr__(self) -> str:
        return REDACTED

    def __format__(self, format_spec: str) -> str:
        return REDACTED

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and hmac.compare_digest(self._value, other._value)

    __hash__ = None  # type: ignore[assignment]  # a hash of a secret is a fact about it

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError("a Secret can't be pickled or copied")
