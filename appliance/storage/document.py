"""One value in one file: versioned, checksummed, migrated when read, never half written.

On disk: JSON `{"sha256", "value", "version"}`, where `sha256` is the digest of the value's canonical bytes (JSON with
sorted names, no white space). Read in this order: missing -> None; not JSON, or not that shape -> broken; a newer
version -> refused, left alone; wrong digest -> broken; migrated version by version; not the declared type -> broken.
A broken file is set aside under another name, never deleted, and the error names both. The caller decides what follows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, NoReturn, TypeVar

import msgspec

from appliance.errors import DocumentBrokenError, DowngradeError, StorageError
from appliance.protocol import strict_json
from appliance.storage.atomic import TooLargeError, read_limited, set_aside, write_atomic

T = TypeVar("T")

Migration = Callable[[dict[str, Any]], dict[str, Any]]

_NO_MIGRATIONS: Mapping[int, Migration] = MappingProxyType({})


class _Sealed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int
    sha256: str
    value: dict[str, Any]


def _digest(value: dict[str, Any]) -> str:
    return hashlib.sha256(msgspec.json.encode(value, order="sorted")).hexdigest()


class Document(Generic[T]):
    """A file that holds one `kind`, a msgspec struct."""

    def __init__(
        self,
        path: Path,
        kind: type[T],
        *,
        version: int = 1,
        migrations: Mapping[int, Migration] = _NO_MIGRATIONS,
        max_bytes: int = 1 << 20,
        mode: int = 0o600,
    ) -> None:
        """Names the file; nothing is read yet.

        Args:
            path: the file; its directory must exist when it is saved.
            kind: the struct.
            version: of the shape that `kind` has now.
            migrations: from version n, what makes a value of version n + 1 of one of version n.
            max_bytes: of the file.
            mode: its permission bits.
        """
        self._path = path
        self._kind = kind
        self._version = version
        self._migrations = migrations
        self._max_bytes = max_bytes
        self._mode = mode

    def load(self) -> T | None:
        """Returns the value, None where the file is missing.

        Raises:
            DocumentBrokenError: truncated, changed or no `kind`; set aside.
            DowngradeError: written by a newer version; left alone.
            StorageError: it can't be read, or is older than the oldest migration; left alone.
        """
        try:
            raw = read_limited(self._path, max_bytes=self._max_bytes)
        except FileNotFoundError:
            return None
        except TooLargeError as error:
            self._refuse(f"it holds more than {self._max_bytes} bytes", error)
        try:
            sealed = msgspec.json.decode(raw, type=_Sealed)
        except strict_json.UNDECODABLE as error:
            self._refuse(str(error), error)
        if sealed.version > self._version:
            raise DowngradeError(
                f"{self._path} has version {sealed.version}, this program knows up to {self._version}",
                hint="a newer version of this program wrote it: run that version; the file was left alone",
            )
        if (got := _digest(sealed.value)) != sealed.sha256:
            self._refuse(f"the value's SHA-256 is {got}, expected {sealed.sha256}", None)
        return self._decode(self._migrate(sealed))

    def save(self, value: T) -> None:
        """Writes the value; when this returns, it survives a power cut.

        Raises:
            StorageError: it could not be written, or would be too large to be read again; the old value is kept.
        """
        plain = msgspec.json.decode(msgspec.json.encode(value), type=dict[str, Any])
        sealed = _Sealed(version=self._version, sha256=_digest(plain), value=plain)
        content = msgspec.json.encode(sealed, order="sorted") + b"\n"
        if len(content) > self._max_bytes:
            raise StorageError(
                f"cannot write {self._path}: {len(content)} bytes, at most {self._max_bytes} are read back",
                hint="the old content was kept; this is a defect of the program, please report it",
            )
        write_atomic(self._path, content, mode=self._mode)

    def _migrate(self, sealed: _Sealed) -> dict[str, Any]:
        value = sealed.value
        for version in range(sealed.version, self._version):
            if version not in self._migrations:
                raise StorageError(
                    f"{self._path} has version {sealed.version}, this program reads from version "
                    f"{min(self._migrations, default=self._version)} on",
                    hint="start a version in between once, it will bring the file forward; the file was left alone",
                )
            value = self._migrations[version](value)
        return value

    def _decode(self, value: dict[str, Any]) -> T:
        try:
            return msgspec.json.decode(msgspec.json.encode(value), type=self._kind)
        except msgspec.ValidationError as error:
            self._refuse(str(error), error)

    def _refuse(self, reason: str, cause: BaseException | None) -> NoReturn:
        aside = set_aside(self._path)
        raise DocumentBrokenError(
            f"{self._path} is broken and was set aside as {aside}: {reason}",
            hint=f"nothing was deleted; look at {aside}, or put a good copy back as {self._path}",
        ) from cause
