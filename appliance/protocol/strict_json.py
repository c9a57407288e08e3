"""Strict decoding of foreign JSON: one name once, no unknown field, bounded size, depth, numbers; no NUL or surrogate.

`msgspec` checks types and unknown fields but keeps the last of two equal names and accepts any depth the C stack
holds; signatures over documents that two parsers read differently are worth nothing, so both are refused here
(RFC 8259 section 4 leaves duplicate names to the implementation; RFC 7493 (I-JSON) section 2.3 forbids them).
"""

from __future__ import annotations

import json
import math
import re
import sys
from typing import Any, Final, TypeVar

import msgspec

from appliance.errors import ApplianceError

T = TypeVar("T")

MAX_DEPTH: Final = 16
"""Levels of nesting; the deepest of our own documents has six."""

MAX_INT: Final = 2**63 - 1

UNDECODABLE: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What msgspec's own decoders raise on foreign bytes, where a file of ours is read without the rules of this module."""

_STRUCTURE: Final = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[{\]}]', re.DOTALL)
"""A whole string (possessive, and ended by the text where its quote is missing: linear time), or a bracket."""

_DIGITS: Final = bytes.maketrans(b"123456789", b"000000000")
_LONG_NUMBER: Final = b"0" * 19
"""As many digits as 64 bits hold."""

_REFUSED: Final = re.compile("[\0\ud800-\udfff]")


class MalformedError(ApplianceError):
    """The bytes are not a document of the expected kind."""

    code = "PROTOCOL-001"
    exit_code = 6


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise MalformedError(f"the name {name[:40]!r} stands twice in one object", hint="write each name once")
        found[name] = value
    return found


def _refuse_constant(name: str) -> Any:
    raise MalformedError(f"{name} is no JSON number")


def _parse_int(text: str) -> int:
    # Python's integers have no end, but columns, other languages and time functions do (RFC 7493 section 2.2).
    number = int(text) if len(text) <= 20 else MAX_INT + 1
    if not -MAX_INT - 1 <= number <= MAX_INT:
        raise MalformedError(f"an integer of {len(text)} characters is outside 64 bits")
    return number


def _parse_float(text: str) -> float:
    # `1e999` is valid JSON and would become infinity, which no comparison with a limit survives.
    number = float(text)
    if not math.isfinite(number):
        raise MalformedError("a number is too large")
    return number


def _depth(text: str) -> int:
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return 0
    deepest = level = 0
    for part in _STRUCTURE.findall(text):
        if part in "[{":
            level += 1
            deepest = max(deepest, level)
        elif part in "]}":
            level -= 1
    return deepest


def _check_strings(value: Any) -> None:
    if isinstance(value, str):
        if _REFUSED.search(value):
            raise MalformedError("a string holds a NUL or a lone surrogate")
    elif isinstance(value, dict):
        for name, inner in value.items():
            _check_strings(name)
            _check_strings(inner)
    elif isinstance(value, list):
        for inner in value:
            _check_strings(inner)


def _as_we_write_it(raw: bytes, kind: type[T]) -> T | None:
    """Returns `raw` decoded where `encode` would give the same bytes again, else None.

    Then no name stands twice and no number is beyond what we write, without a look at each of them: most of what is
    decoded comes from another part of this program, and this takes a tenth of the time. What could hide something
    even so (escapes, many levels, long rows of digits) isn't judged here.
    """
    if raw.count(b"{") + raw.count(b"[") > MAX_DEPTH or b"\\" in raw or _LONG_NUMBER in raw.translate(_DIGITS):
        return None
    try:
        value = msgspec.json.decode(raw, type=kind)
        return value if encode(value) == raw else None
    except (*UNDECODABLE, TypeError, ValueError):
        return None


def decode(raw: bytes, kind: type[T], *, max_bytes: int, max_parts: int = sys.maxsize) -> T:
    """Decodes `raw` as one `kind`.

    Args:
        raw: UTF-8 JSON text.
        kind: a msgspec struct declared with `forbid_unknown_fields=True`.
        max_bytes: the most that is looked at.
        max_parts: the most values in it, about: a quarter of a megabyte of empty lists takes 45 ms to refuse.

    Raises:
        MalformedError: too long, of too many values, not UTF-8, not JSON, nested too deeply, a name twice, a number
            outside 64 bits, a wrong or unknown field.
    """
    if len(raw) > max_bytes:
        raise MalformedError(f"document of {len(raw)} bytes, at most {max_bytes} are accepted")
    if raw.count(b",") + raw.count(b"[") + raw.count(b"{") > max_parts:
        raise MalformedError(f"more than {max_parts} values")
    own = _as_we_write_it(raw, kind)
    if own is not None:
        return own
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedError(f"not UTF-8 at byte {error.start}") from None
    if _depth(text) > MAX_DEPTH:
        raise MalformedError(f"nested deeper than {MAX_DEPTH} levels")
    try:
        value = json.loads(
            text,
            object_pairs_hook=_pairs,
            parse_constant=_refuse_constant,
            parse_int=_parse_int,
            parse_float=_parse_float,
        )
    except ValueError as error:
        raise MalformedError(f"not JSON: {error}") from None
    _check_strings(value)
    try:
        return msgspec.convert(value, kind, strict=True)
    except msgspec.ValidationError as error:
        # The text quotes foreign names; cut, so that a log line stays a line.
        raise MalformedError(f"not a {kind.__name__}: {str(error)[:200]}") from None


def encode(value: Any) -> bytes:
    """Encodes a struct as UTF-8 JSON with sorted object keys, so equal values are equal bytes."""
    return msgspec.json.encode(value, order="sorted")
