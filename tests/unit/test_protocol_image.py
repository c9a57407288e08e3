"""The report of a built image: what a controller takes in, and what it says against all else."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from image_reports import report

from appliance.protocol import strict_json
from appliance.protocol.image import MAX_FILES, MAX_REPORT_BYTES, ImageReport, check_report, is_image_id
from appliance.protocol.strict_json import MalformedError


def test_a_report_of_a_build_holds() -> None:
    assert check_report(report()) == []
    assert report(also=["seed-0000000000000002"]).ids == ["seed-0123456789abcdef", "seed-0000000000000002"]


def test_a_report_of_an_earlier_builder_is_read() -> None:
    """Without what was added since."""
    fields = msgspec.to_builtins(report())
    del fields["recipe_digest"], fields["also"]
    found = strict_json.decode(msgspec.json.encode(fields), ImageReport, max_bytes=MAX_REPORT_BYTES)
    assert check_report(found) == []


def test_what_is_not_known_is_refused() -> None:
    raw = msgspec.json.encode({**msgspec.to_builtins(report()), "surprise": 1})
    with pytest.raises(MalformedError):
        strict_json.decode(raw, ImageReport, max_bytes=MAX_REPORT_BYTES)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"schema": 2}, "upgrade the older"),
        ({"role": "controller"}, "only SEs"),
        ({"image_id": "seed-1"}, "image ids 'seed-1'"),
        ({"image_id": "../../etc/passwd"}, "image ids"),
        ({"also": ["x"]}, "image ids"),
        ({"also": [f"seed-{number:016x}" for number in range(9)]}, "1 to 8"),
        ({"image_key_id": "ik-1"}, "image key id"),
        ({"files": {}}, "0 files"),
        ({"files": {"a": "00"}}, "SHA-256"),
        ({"files": {f"{number}": "0" * 64 for number in range(MAX_FILES + 1)}}, f"1 to {MAX_FILES}"),
        ({"name": ""}, "a name or text is empty"),
        ({"name": "x" * 201}, "longer than"),
        ({"name": "\x1b[2J"}, "can't be printed"),
        ({"files": {"a\nb": "0" * 64}}, "can't be printed"),
        ({"system": "x" * 201}, "longer than"),
        ({"baked_at": 0}, "baked_at 0"),
        ({"baked_at": 1 << 60}, "baked_at"),
    ],
)
def test_each_mistake_has_its_sentence(changes: dict[str, Any], told: str) -> None:
    problems = check_report(report(**changes))
    assert len(problems) == 1, problems
    assert told in problems[0]
    assert len(problems[0]) < 400


def test_all_mistakes_are_told_at_once() -> None:
    assert len(check_report(report(image_id="", image_key_id="", files={}, name="", baked_at=-1))) == 5


@pytest.mark.parametrize("text", ["", "seed-", "seed-01234567", "seed-0123456789ABCDEF", "seed-0123456789abcdef\n"])
def test_what_is_no_image_id(text: str) -> None:
    assert not is_image_id(text)
