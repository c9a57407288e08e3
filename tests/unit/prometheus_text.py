"""A strict reader of Prometheus text (exposition format 0.0.4), for tests.

It takes what the format's description allows and no more: HELP and TYPE once and before the samples of a metric, the
samples of a metric together, no series twice, only known escapes in label values.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
_HELP = re.compile(rf"# HELP ({_NAME}) (.+)")
_TYPE = re.compile(rf"# TYPE ({_NAME}) (counter|gauge)")
_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^\\"\n]|\\["\\n])*)"(?:,|$)')
_SAMPLE = re.compile(rf'({_NAME})(?:\{{((?:[^"{{}}]|"(?:[^\\"]|\\.)*")*)\}})? (-?[0-9]+(?:\.[0-9]+)?(?:e[-+]?[0-9]+)?)')
_ESCAPE = re.compile(r'\\(["\\n])')

Labels = frozenset[tuple[str, str]]


class Family(NamedTuple):
    """A metric's type, help and samples."""

    kind: str
    text: str
    samples: dict[Labels, float]


def _labels(text: str) -> Labels:
    pairs, place = [], 0
    while place < len(text):
        label = _LABEL.match(text, place)
        assert label, f"label expected at {text[place:]!r}"
        pairs.append((label[1], _ESCAPE.sub(lambda escape: "\n" if escape[1] == "n" else escape[1], label[2])))
        place = label.end()
    assert len({name for name, _ in pairs}) == len(pairs), f"label twice in {text!r}"
    return frozenset(pairs)


def read(content: bytes) -> dict[str, Family]:
    """Returns all metrics by name. Raises AssertionError where the text isn't right."""
    text = content.decode("utf-8")
    assert text.endswith("\n")
    families: dict[str, Family] = {}
    lines = iter(text.removesuffix("\n").split("\n"))
    name = ""
    for line in lines:
        if (help_line := _HELP.fullmatch(line)) is not None:
            name = help_line[1]
            type_line = _TYPE.fullmatch(next(lines))
            assert type_line, f"TYPE expected after {line!r}"
            assert type_line[1] == name
            assert name not in families, f"{name} comes twice"
            families[name] = Family(type_line[2], help_line[2], {})
            continue
        sample = _SAMPLE.fullmatch(line)
        assert sample, f"not a sample: {line!r}"
        assert sample[1] == name, f"sample of {sample[1]} among those of {name}"
        labels = _labels(sample[2] or "")
        assert labels not in families[name].samples, f"series twice: {line!r}"
        families[name].samples[labels] = float(sample[3])
    assert all(family.samples for family in families.values())
    return families
