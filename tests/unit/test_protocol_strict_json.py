"""protocol.strict_json: foreign bytes either are one document with one meaning, or are refused."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.protocol import strict_json
from appliance.protocol.strict_json import MAX_DEPTH, MAX_INT, MalformedError


class Inner(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    text: str = ""


class Doc(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    count: int = 0
    ratio: float = 0.0
    text: str = ""
    inner: Inner = Inner()
    many: list[Inner] = []
    labels: dict[str, str] = {}
    any: Any = None


def decode(raw: bytes, max_bytes: int = 1 << 20) -> Doc:
    return strict_json.decode(raw, Doc, max_bytes=max_bytes)


def test_a_good_document_is_decoded_and_encodes_to_the_same_bytes_whatever_its_order() -> None:
    one = decode(b'{"count": 1, "inner": {"text": "\xc3\xa4"}, "labels": {"b": "2", "a": "1"}, "many": [{}]}')
    two = decode(b'{"labels": {"a": "1", "b": "2"}, "many": [{}], "inner": {"text": "\\u00e4"}, "count": 1}')
    assert one == two
    assert strict_json.encode(one) == strict_json.encode(two)
    assert decode(strict_json.encode(one)) == one


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"{} {}", "not JSON"),
        (b"[]", "not a Doc"),
        (b"null", "not a Doc"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        (b"\xff{}", "not UTF-8 at byte 0"),
        (b'{"text": "\xed\xa0\x80"}', "not UTF-8 at byte 10"),
        (b"{'count': 1}", "not JSON"),
        (b'{"count": 1,}', "not JSON"),
        (b'{"text": "\x01"}', "not JSON"),
        (b'{"count": 1, "count": 2}', "'count' stands twice"),
        (b'{"count": 1, "c\\u006funt": 2}', "'count' stands twice"),
        (b'{"inner": {"text": "", "text": ""}}', "'text' stands twice"),
        (b'{"labels": {"a": "", "a": ""}}', "'a' stands twice"),
        (b'{"any": [{"x": {"y": 1, "y": 1}}]}', "'y' stands twice"),
        (b'{"other": 1}', "unknown field"),
        (b'{"inner": {"other": 1}}', "unknown field"),
        (b'{"count": "1"}', "Expected `int`"),
        (b'{"count": 1.0}', "Expected `int`"),
        (b'{"count": true}', "Expected `int`"),
        (b'{"count": null}', "Expected `int`"),
        (b'{"text": 1}', "Expected `str`"),
        (b'{"ratio": NaN}', "NaN is no JSON number"),
        (b'{"ratio": Infinity}', "Infinity is no JSON number"),
        (b'{"ratio": -Infinity}', "-Infinity is no JSON number"),
        (b'{"ratio": 1e999}', "too large"),
        (b'{"ratio": -1e999}', "too large"),
        (b'{"count": 9223372036854775808}', "outside 64 bits"),
        (b'{"count": -9223372036854775809}', "outside 64 bits"),
        (b'{"count": ' + b"9" * 100_000 + b"}", "outside 64 bits"),
        (b'{"text": "a\\u0000b"}', "NUL or a lone surrogate"),
        (b'{"text": "\\ud800"}', "NUL or a lone surrogate"),
        (b'{"text": "\\udfff x"}', "NUL or a lone surrogate"),
        (b'{"labels": {"\\u0000": ""}}', "NUL or a lone surrogate"),
        (b'{"labels": {"\\udc00": ""}}', "NUL or a lone surrogate"),
        (b'{"co\\u0000unt": 1}', "NUL or a lone surrogate"),
        (b'{"many": [{"text": "\\ud800"}]}', "NUL or a lone surrogate"),
    ],
)
def test_refused(raw: bytes, says: str) -> None:
    with pytest.raises(MalformedError, match=says):
        decode(raw)


def test_the_numbers_at_the_edges_are_kept() -> None:
    assert decode(b'{"count": %d}' % MAX_INT).count == MAX_INT
    assert decode(b'{"count": %d}' % (-MAX_INT - 1)).count == -MAX_INT - 1
    assert decode(b'{"ratio": 1.7976931348623157e308}').ratio == 1.7976931348623157e308
    assert decode(b'{"ratio": 2}').ratio == 2.0


def test_a_surrogate_pair_is_one_character() -> None:
    assert decode(b'{"text": "\\ud83d\\ude00"}').text == "\N{GRINNING FACE}"


def test_size_is_looked_at_first() -> None:
    assert decode(b"{}", max_bytes=2) == Doc()
    with pytest.raises(MalformedError, match="document of 3 bytes, at most 2 are accepted"):
        decode(b"\xff\xff\xff", max_bytes=2)


def test_more_values_than_are_accepted_are_refused_before_they_are_looked_at() -> None:
    def of(count: int) -> Doc:
        raw = b'{"any":[' + b",".join([b"[]"] * count) + b"]}"
        return strict_json.decode(raw, Doc, max_bytes=1 << 20, max_parts=100)

    # An object, a list, and of each value in it a bracket and but for one a comma.
    assert of(49).any == [[]] * 49
    with pytest.raises(MalformedError, match="more than 100 values"):
        of(50)


def test_nesting_up_to_the_limit_passes_and_one_more_is_refused() -> None:
    levels = MAX_DEPTH - 1
    assert decode(b'{"any": ' + b"[" * levels + b"]" * levels + b"}").any is not None
    with pytest.raises(MalformedError, match="nested deeper than 16"):
        decode(b'{"any": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}")


@pytest.mark.parametrize("opener", [b"[", b'{"a":', b'[{"any":', b'{"any":[{"\\"":'])
def test_ten_thousand_levels_are_refused_before_a_parser_recurses(opener: bytes) -> None:
    with pytest.raises(MalformedError, match="nested deeper"):
        decode(opener * 10_000)


def test_brackets_in_strings_and_many_flat_objects_are_no_nesting() -> None:
    brackets = '[{"\\' * 5_000
    flat = strict_json.encode({"text": brackets, "many": [{}] * 5_000})
    assert decode(flat).text == brackets


@pytest.mark.parametrize(
    "hostile", [b'{"text":"' + b'\\"' * 200_000, b'[[[[[[[[[[[[[[[[["' + b"\\" * 400_001, b'"[" ' * 100_000]
)
def test_the_look_at_nesting_takes_linear_time(hostile: bytes) -> None:
    start = time.process_time()
    with pytest.raises(MalformedError):
        decode(hostile, max_bytes=1 << 20)
    assert time.process_time() - start < 2.0


def test_messages_stay_short() -> None:
    long = "x" * 50_000
    for raw in (f'{{"{long}": 1}}', f'{{"{long}": 1, "{long}": 1}}'):
        with pytest.raises(MalformedError) as caught:
            decode(raw.encode())
        assert len(caught.value.message) < 300


@given(st.binary(max_size=200) | st.text(alphabet='{}[]",:\\u0d8tex1e9-. ', max_size=80).map(str.encode))
def test_any_bytes_are_a_document_or_malformed(raw: bytes) -> None:
    try:
        found = decode(raw)
    except MalformedError:
        return
    assert decode(strict_json.encode(found)) == found


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=30,
)


def acceptable(value: object, level: int = 1) -> bool:
    """The rules once more, said another way."""
    match value:
        case bool() | None:
            return True
        case int():
            return -(2**63) <= value < 2**63
        case float():
            return math.isfinite(value)
        case str():
            return "\0" not in value and not any(0xD800 <= ord(char) < 0xE000 for char in value)
        case list():
            return level <= 15 and all(acceptable(inner, level + 1) for inner in value)
        case dict():
            return level <= 15 and all(acceptable(k) and acceptable(v, level + 1) for k, v in value.items())
    raise AssertionError(value)


@given(JSON, st.booleans())
def test_what_is_accepted_is_what_the_standard_parser_reads(value: object, ascii_only: bool) -> None:
    text = json.dumps({"any": value}, ensure_ascii=ascii_only)
    raw = text.encode("utf-8", "surrogatepass")
    if acceptable(value):
        assert decode(raw).any == json.loads(text)["any"]
    else:
        with pytest.raises(MalformedError):
            decode(raw)


@given(st.dictionaries(st.sampled_from("abc"), st.text(max_size=3), min_size=1), st.data())
def test_a_name_twice_is_refused_wherever_it_stands(labels: dict[str, str], data: st.DataObject) -> None:
    again = data.draw(st.sampled_from(sorted(labels)))
    members = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in [*labels.items(), (again, "")]]
    order = data.draw(st.permutations(members))
    with pytest.raises(MalformedError):
        decode(f'{{"labels": {{{", ".join(order)}}}}}'.encode())


_ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=8,
)


@given(
    fields=st.fixed_dictionaries(
        {},
        optional={
            "count": st.integers(-(2**65), 2**65),
            "ratio": st.floats(),
            "text": st.text(max_size=20),
            "labels": st.dictionaries(st.text(max_size=2), st.text(max_size=2), max_size=3),
            "any": _ANY,
        },
    ),
    place=st.integers(0, 200),
    put=st.sampled_from([b"", b"0", b'"', b"[", b"{", b"\\", b"\0", b" ", b'"any":1,', b"9" * 20, b"e9", b"-"]),
)
def test_the_short_way_never_says_anything_else_than_the_long_one(
    fields: dict[str, Any], place: int, put: bytes
) -> None:
    written = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace")
    raw = written[:place] + put + written[place:]
    short = strict_json._as_we_write_it(raw, Doc)
    if short is None:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strict_json, "_as_we_write_it", lambda *_: None)
        assert decode(raw) == short


def test_what_we_write_takes_the_short_way_and_what_could_hide_something_does_not() -> None:
    mine = strict_json.encode(Doc(count=1, text="\u00e4", labels={"b": "1", "a": "2"}, any={"x": [1, 2.5, None]}))
    assert strict_json._as_we_write_it(mine, Doc) == decode(mine)
    for other in (
        mine + b" ",
        mine.replace(b'"count":1', b'"count":1,"count":1'),
        mine.replace(b'"count":1', b'"count":9223372036854775808'),
        mine.replace(b"\xc3\xa4", b"\\u00e4"),
        mine.replace(b"[1,", b"[" * MAX_DEPTH),
    ):
        assert strict_json._as_we_write_it(other, Doc) is None
