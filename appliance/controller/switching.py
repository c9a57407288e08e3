"""Puts several files of the controller's state in place as one step: all of them, or none, whatever is cut when.

What is to come lies beside its place as `staged-<name>` or `next-<name>`. Once all of it is there, `switching.json`
names the renames, and from then on there is no way back: the next start carries out what a power cut left. So all that
needs a passphrase is done before that, and a start never needs one.

    stage      staged-* are written, in any order; cut here, they are destroyed by the next start
    switch     switching.json; former-* are copied; each file is renamed into its place (what lay there is scrubbed
               where it held a key); what is named is destroyed; switching.json is removed
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from appliance.storage.atomic import read_limited, remove_durably, sync_directory, write_atomic
from appliance.storage.document import Document

MAX_FILE_BYTES = 1 << 20
_GONE = "gone-"
"""Begin of the name of a file that is being destroyed."""
_STAGED = "staged-"


class Move(msgspec.Struct, frozen=True):
    """One rename, of names in the state directory."""

    source: str
    target: str


class Journal(msgspec.Struct, frozen=True, kw_only=True):
    """`switching.json`."""

    moves: list[Move]
    keep: dict[str, str] = {}
    """Names whose files are copied to another name before anything else, unless that is there."""
    destroy: list[str] = []


def _document(state: Path) -> Document[Journal]:
    return Document(state / "switching.json", Journal)


def staged(path: Path) -> Path:
    """Where what is to take the place of `path` is written."""
    return path.with_name(f"{_STAGED}{path.name}")


def destroy(path: Path) -> None:
    """Scrubs a file; by way of another name, so that a cut never leaves zeros where a key is looked for."""
    gone = path.with_name(f"{_GONE}{path.name}")
    if path.exists():
        path.replace(gone)
    remove_durably(gone, scrub=True)


def switch(
    state: Path,
    moves: Sequence[tuple[Path, Path]],
    *,
    keep: Sequence[tuple[Path, Path]] = (),
    gone: Sequence[Path] = (),
) -> None:
    """Carries out `moves` (from, to), after copying each of `keep` (from, to) and before destroying `gone`.

    Args:
        state: the directory that all of them lie in.
        moves: their sources exist.
        keep: what is there already is left alone.
        gone: may be missing.

    Raises:
        StorageError: the journal could not be written, and nothing was changed; or a later step failed, and the next
            start goes on with it.
    """
    journal = Journal(
        moves=[Move(source.name, target.name) for source, target in moves],
        keep={source.name: target.name for source, target in keep},
        destroy=[path.name for path in gone],
    )
    _document(state).save(journal)
    _carry_out(state, journal)


def _carry_out(state: Path, journal: Journal) -> None:
    for source, copy in journal.keep.items():
        path, target = state / source, state / copy
        if not target.exists():
            mode = path.stat().st_mode & 0o777
            write_atomic(target, read_limited(path, max_bytes=MAX_FILE_BYTES), mode=mode)
    for move in journal.moves:
        source_path, target_path = state / move.source, state / move.target
        if not source_path.exists():
            continue
        is_private = target_path.exists() and not target_path.stat().st_mode & 0o077
        if is_private:
            target_path.replace(state / f"{_GONE}{move.target}")
        source_path.replace(target_path)
        if is_private:
            sync_directory(state)
            remove_durably(state / f"{_GONE}{move.target}", scrub=True)
    for name in journal.destroy:
        destroy(state / name)
    sync_directory(state)
    remove_durably(state / "switching.json")


def resume(state: Path) -> None:
    """Finishes a switch that was cut, and destroys what was being destroyed, or staged for one that never began."""
    for left in state.glob(f"{_GONE}*"):
        remove_durably(left, scrub=True)
    journal = _document(state).load()
    if journal is not None:
        _carry_out(state, journal)
    for left in state.glob(f"{_STAGED}*"):
        destroy(left)
