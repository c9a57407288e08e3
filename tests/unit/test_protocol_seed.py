"""What a VM may wish for, and which seeds this program reads."""

from __future__ import annotations

import pytest

from appliance.errors import SeedError
from appliance.protocol.seed import MAX_LABELS, SCHEMA, Hints, check_hints, check_schema


@pytest.mark.parametrize(
    "hints",
    [
        Hints(),
        Hints(name="a"),
        Hints(name="edge-1.example", labels={"site": "north", "note": "", "a.b_c": "~ any printable ASCII !"}),
        Hints(name="x" * 63, labels={f"label{number}": "x" * 63 for number in range(MAX_LABELS)}),
    ],
)
def test_good_hints(hints: Hints) -> None:
    assert check_hints(hints) == []


@pytest.mark.parametrize(
    ("hints", "said"),
    [
        (Hints(name="x" * 64), "name"),
        (Hints(name="-a"), "name '-a'"),
        (Hints(name="a\n"), "name"),
        (Hints(name="a/../b"), "name"),
        (Hints(name="é"), "name"),
        (Hints(labels={"": "x"}), "label ''"),
        (Hints(labels={"a b": "x"}), "label 'a b'"),
        (Hints(labels={"a": "x" * 64}), "value of label 'a'"),
        (Hints(labels={"a": "\x1b[2J"}), "value of label 'a'"),
        (Hints(labels={f"label{number}": "" for number in range(MAX_LABELS + 1)}), "17 labels"),
    ],
)
def test_bad_hints_are_named(hints: Hints, said: str) -> None:
    problems = check_hints(hints)
    assert len(problems) == 1
    assert said in problems[0]


def test_all_problems_are_told_at_once() -> None:
    assert len(check_hints(Hints(name=".", labels={"a": "é", " ": "x"}))) == 3


def test_a_seed_of_another_schema_is_refused_with_advice() -> None:
    check_schema(SCHEMA)
    with pytest.raises(SeedError, match=f"seed schema {SCHEMA + 1}, this program reads {SCHEMA}") as caught:
        check_schema(SCHEMA + 1)
    assert "image-builder" in caught.value.hint
