"""What somebody gave this SE on its console: a token, a seed, or the word that it is to be another SE from now on.

`appliance enroll` writes it, whole, as one document in the SE's state; the daemon looks for it while it runs, acts on
it, and destroys it once a grant is on disk. A seed is copied: what it came from may be unmounted, or closed to the
daemon's user.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

from appliance.errors import DocumentBrokenError
from appliance.runtime import log
from appliance.runtime.stop import StopToken
from appliance.storage.atomic import make_dir, remove_durably
from appliance.storage.document import Document

LOOK_S = 0.5
"""How often is looked whether something was given."""
_MAX_BYTES = 4 << 20
_log = log.bind("enroll")


class Given(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The document. `token` has a form that was checked."""

    token: str = ""
    seed: dict[str, bytes] = {}
    """A seed's files by name."""
    anew: bool = False
    """Whether the identity there is, grant and all, is to be set aside first."""

    def __repr__(self) -> str:
        return f"Given(token={bool(self.token)}, seed={sorted(self.seed)}, anew={self.anew})"


class GivenFile:
    """Where it lies: in `directory`, an SE's state. Written by one process, read and removed by another."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._path = directory / "given.json"
        self._document = Document(self._path, Given, max_bytes=_MAX_BYTES)

    def write(self, given: Given) -> None:
        """Stores it for the daemon, whose user the directory belongs to. Raises `StorageError`."""
        make_dir(self._directory)  # the daemon may never have run
        self._document.save(given)
        owner = self._directory.stat()
        if os.geteuid() != owner.st_uid:
            os.chown(self._path, owner.st_uid, owner.st_gid)

    def read(self) -> Given:
        """Returns what was given, nothing where there is none; what is broken was set aside and told."""
        try:
            return self._document.load() or Given()
        except DocumentBrokenError as error:
            _log.error("%s", error.message, extra={"code": error.code})
            return Given()

    def stamp(self) -> Mapping[str, int]:
        """Changes when something was given; empty where there is nothing that this process may read."""
        try:
            found = self._path.stat()
        except FileNotFoundError:
            return {}
        if not os.access(self._path, os.R_OK):
            return {}  # its writer hands it over in a moment
        return {"inode": found.st_ino, "changed_ns": found.st_mtime_ns}

    def watch(self, stop: StopToken) -> None:
        """Returns when this SE was told to be another one, or to stop."""
        stamp = self.stamp()
        while not stop.wait(LOOK_S):
            if self.stamp() != stamp:
                stamp = self.stamp()
                if self.read().anew:
                    _log.warning("told on the console to give up this identity; the daemon starts over")
                    return

    def destroy(self) -> None:
        """Removes it, with what secrets are in it. Raises `StorageError`."""
        remove_durably(self._path, scrub=True)


def has_grant(directory: Path) -> bool:
    """Whether the SE whose state lies in `directory` is enrolled; looks without changing anything."""
    try:
        document = json.loads((directory / "identity.json").read_bytes())
        return document["value"]["grant"] is not None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False
