"""Documents: what was saved comes back, anything else is set aside or refused, never half believed."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.errors import DocumentBrokenError, DowngradeError, StorageError
from appliance.storage.document import Document


class Inner(msgspec.Struct, frozen=True):
    number: int
    blob: bytes


class State(msgspec.Struct, frozen=True):
    name: str
    ratio: float = 0.5
    inner: Inner | None = None
    labels: dict[str, str] = {}
    big: int = 0


class StateTwo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    title: str


def reseal(path: Path, **changes: Any) -> None:
    """Edits fields of the file without mending its digest."""
    sealed = json.loads(path.read_bytes())
    sealed.update(changes)
    path.write_bytes(json.dumps(sealed).encode())


def test_a_missing_file_is_none(tmp_path: Path) -> None:
    assert Document(tmp_path / "state.json", State).load() is None


@given(
    name=st.text(st.characters(exclude_categories=["Cs"])),
    ratio=st.floats(allow_nan=False, allow_infinity=False),
    number=st.integers(-(2**63), 2**64 - 1),
    blob=st.binary(),
)
def test_what_was_saved_comes_back(
    tmp_path_factory: pytest.TempPathFactory, name: str, ratio: float, number: int, blob: bytes
) -> None:
    document = Document(tmp_path_factory.mktemp("d") / "state.json", State)
    value = State(name, ratio, Inner(number, blob), {name: "x", "b": "y"}, number)
    document.save(value)
    assert document.load() == value


def test_the_file_has_the_declared_mode_and_shape(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    Document(path, State, version=3, mode=0o640).save(State("a"))
    assert path.stat().st_mode & 0o777 == 0o640
    sealed = json.loads(path.read_bytes())
    assert sorted(sealed) == ["sha256", "value", "version"]
    assert sealed["version"] == 3
    assert sealed["value"]["name"] == "a"


def test_layout_does_not_matter_content_does(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    Document(path, State).save(State("a", labels={"x": "1", "y": "2"}))
    path.write_text(json.dumps(json.loads(path.read_bytes()), indent=4))
    assert Document(path, State).load() == State("a", labels={"x": "1", "y": "2"})


def broken(path: Path) -> DocumentBrokenError:
    content = path.read_bytes()
    with pytest.raises(DocumentBrokenError) as caught:
        Document(path, State, max_bytes=4096).load()
    aside = path.with_name("state.json.broken-1")
    assert str(path) in caught.value.message
    assert str(aside) in caught.value.message
    assert aside.read_bytes() == content
    assert Document(path, State).load() is None
    return caught.value


def test_a_file_truncated_anywhere_is_set_aside(tmp_path: Path) -> None:
    whole = tmp_path / "whole.json"
    Document(whole, State).save(State("a", inner=Inner(1, b"\0\1")))
    content = whole.read_bytes()
    for length in range(len(content) - 1):  # the last byte is a line feed
        directory = tmp_path / str(length)
        directory.mkdir()
        (directory / "state.json").write_bytes(content[:length])
        broken(directory / "state.json")


@pytest.mark.parametrize(
    "content",
    [
        bytes(500),
        b"[]",
        b"\xff\xfe",
        b'{"version": 1, "sha256": "", "value": []}',
        b'{"version": 1, "sha256": "", "value": {}, "more": 1}',
        b'{"version": "1", "sha256": "", "value": {}}',
        b"[" * 4000,
        b'{"version": 1, "sha256": "", "value": ' + b'{"a":' * 600 + b"1" + b"}" * 601,
        bytes(5000),
    ],
    ids=["zeros", "array", "not UTF-8", "no object", "unknown field", "wrong type", "deep", "deep value", "too large"],
)
def test_what_is_no_document_is_set_aside(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "state.json").write_bytes(content)
    broken(tmp_path / "state.json")


def test_a_changed_value_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    Document(path, State).save(State("a"))
    reseal(path, value={"name": "b"})
    assert "expected" in broken(path).message


def test_a_value_of_another_type_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    Document(path, StateTwo).save(StateTwo("a"))
    assert "name" in broken(path).message


def test_a_newer_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    Document(path, State, version=3).save(State("a"))
    content = path.read_bytes()
    with pytest.raises(DowngradeError, match="version 3, this program knows up to 2"):
        Document(path, State, version=2).load()
    assert path.read_bytes() == content


def test_an_older_version_is_brought_forward_step_by_step(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    Document(path, State, version=1).save(State("a"))
    current = Document(
        path,
        StateTwo,
        version=3,
        migrations={1: lambda value: {"titel": value["name"] + "1"}, 2: lambda value: {"title": value["titel"] + "2"}},
    )
    assert current.load() == StateTwo("a12")
    current.save(StateTwo("b"))
    assert json.loads(path.read_bytes())["version"] == 3
    assert current.load() == StateTwo("b")


@pytest.mark.parametrize("migrations", [{}, {2: dict}], ids=["none", "from 2"])
def test_a_version_without_a_way_forward_is_refused_and_left_alone(tmp_path: Path, migrations: dict[int, Any]) -> None:
    path = tmp_path / "state.json"
    Document(path, State, version=1).save(State("a"))
    content = path.read_bytes()
    with pytest.raises(StorageError, match="has version 1") as caught:
        Document(path, State, version=3, migrations=migrations).load()
    assert not isinstance(caught.value, DocumentBrokenError)
    assert path.read_bytes() == content


def test_what_would_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    document = Document(tmp_path / "state.json", State, max_bytes=500)
    document.save(State("a"))
    with pytest.raises(StorageError, match="at most 500"):
        document.save(State("a" * 500))
    assert document.load() == State("a")


def test_a_full_disk_keeps_the_old_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = Document(tmp_path / "state.json", State)
    document.save(State("a"))

    def full(fd: int, content: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(StorageError) as caught:
            document.save(State("b"))
    assert caught.value.retryable
    assert document.load() == State("a")


def test_a_file_that_cannot_be_read_is_not_called_broken(tmp_path: Path) -> None:
    (tmp_path / "state.json").mkdir()
    with pytest.raises(StorageError) as caught:
        Document(tmp_path / "state.json", State).load()
    assert not isinstance(caught.value, DocumentBrokenError)
    assert (tmp_path / "state.json").is_dir()
