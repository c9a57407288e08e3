"""Each target holds for what hypothesis makes of good input and of nothing, and for what fuzzing found before."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from targets import TARGETS

CORPUS = Path(__file__).with_name("corpus")
MAX_FILES, MAX_FILE_BYTES = 24, 4096
TOKENS = [
    b"\0", b"\xff", b"\r\n", b"{", b"}", b"[", b'"', b":", b",", b"=", b"-", b"null", b"1e999", b"\\u0000", b"\\ud800",
    b"18446744073709551616", b"-1", b"Content-Length: 9999999999\r\n", b"Transfer-Encoding: chunked\r\n", b"[" * 2000,
]  # fmt: skip
"""What breaks parsers."""


@st.composite
def damaged(draw: st.DrawFn, good: list[bytes]) -> bytes:
    """Good input with some pieces cut out, doubled, changed or put in."""
    raw = draw(st.sampled_from(good))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(raw)))
        end = min(len(raw), start + draw(st.integers(0, 40)))
        piece = draw(st.sampled_from(TOKENS) | st.binary(max_size=8) | st.just(raw[start:end] * 2))
        raw = raw[:start] + piece + raw[end:]
    return raw


@pytest.mark.parametrize("name", TARGETS)
def test_good_input_is_read(name: str) -> None:
    for raw in TARGETS[name].good():
        assert TARGETS[name].run(raw)


@pytest.mark.parametrize("name", TARGETS)
def test_any_input_is_read_or_refused(name: str) -> None:
    target = TARGETS[name]
    examples = 20 if name in {"backup", "iso", "http"} else 60

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(st.binary(max_size=300) | damaged(target.good()))
    def hold(raw: bytes) -> None:
        target.run(raw)

    hold()


@pytest.mark.parametrize("path", sorted(CORPUS.rglob("*.bin")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_what_was_found_before_holds(path: Path) -> None:
    TARGETS[path.parent.name].run(path.read_bytes())


def test_the_corpus_is_small_and_belongs_to_targets() -> None:
    for directory in CORPUS.iterdir():
        assert directory.name in TARGETS, f"{directory}: no such target"
        files = list(directory.iterdir())
        assert len(files) <= MAX_FILES
        assert all(file.suffix == ".bin" and file.stat().st_size <= MAX_FILE_BYTES for file in files)
