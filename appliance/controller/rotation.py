"""Changing roots, host keys and log-in keys under live links.

Each of the three goes the same way, so that no SE is ever asked to believe what it was not told before:

    begin     the successor is made and announced: the trust document lists both          -> ANNOUNCED
    (SEs take the new version with their next heartbeat; `status` tells who has not yet)
    finish    one switch of files (`switching`): the successor takes the old one's place, and the trust
              document lists only that one; then the daemon follows                       -> none
    abort     the trust document lists only the old one; the successor is destroyed       -> none

All three sign trust documents, so the roots must be open (`Material.unlocked`) where they have a passphrase. After a
power cut nobody asks for one: `resume_files` and `resume` finish a switch that began, and take back a change whose
successor the trust document in force doesn't list (a `begin` that was cut before it, or an `abort` after it).

SEs that slept through any number of changes of root follow one by one. Of each change the node keeps what the root
before it said last, and no key: the trust document that ended the change (`trust-<version>.json`), and the next root's
key as that root certified it (`cross-ca.pem`). The former root's key stays until `forget`, for agents that don't ask
for what they missed.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from appliance.controller import switching
from appliance.controller.material import Files, Material, issue_node_certificate, write_pair
from appliance.controller.switching import destroy, staged
from appliance.controller.trust import Publication
from appliance.errors import UsageError
from appliance.pki import ssh_keys
from appliance.pki.authority import Authority
from appliance.pki.certificate import all_of
from appliance.pki.secret import Secret
from appliance.protocol.operator import RotationView
from appliance.protocol.trust import MAX_ROOT_CHANGES, MAX_TRUST_BYTES
from appliance.storage.atomic import read_limited, remove_durably, write_atomic
from appliance.storage.document import Document

_log = logging.getLogger(__name__)

MAX_FILE_BYTES = 64 * 1024


class Kind(enum.StrEnum):
    """What is changed."""

    CA = "ca"
    HOST_KEY = "host-key"
    LOGIN_KEY = "login-key"


class Phase(enum.StrEnum):
    """How far a change got."""

    ANNOUNCED = "announced"


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One change under way. `version` is that of the trust document that announced it, 0 until it was published."""

    phase: Phase
    version: int
    began_at: float


class Records(msgspec.Struct, frozen=True, kw_only=True):
    """`rotation.json`: the changes under way, by kind."""

    kinds: dict[str, Record] = {}


class NextRoot(NamedTuple):
    """A root that is to be the next one, and what its key's file holds."""

    authority: Authority
    key_file: Secret


def make_root(cluster_id: str, *, now: int, passphrase: Secret | None) -> NextRoot:
    """Makes a successor; half a second and 128 MiB where there is a passphrase: for a thread."""
    authority = Authority.create(cluster_id, now=now)
    return NextRoot(authority, authority.key_file(passphrase))


def _document(files: Files) -> Document[Records]:
    return Document(files.state / "rotation.json", Records)


def _public(path: Path) -> Path:
    return path.with_name(f"{path.name}.pub")


def _paths(files: Files, kind: Kind) -> list[Path]:
    """The files of a kind that have a successor; the one that the trust document lists is the first."""
    if kind is Kind.CA:
        return [files.root_certificate, files.cross_certificate, files.root_key]
    private = files.host_key if kind is Kind.HOST_KEY else files.login_key
    return [_public(private), private]


def _text(path: Path) -> str:
    return read_limited(path, max_bytes=MAX_FILE_BYTES).decode()


def is_announced(files: Files, kind: Kind) -> bool:
    """Whether a change of that kind is under way on disk."""
    records = _document(files).load()
    return records is not None and kind.value in records.kinds


def resume_files(files: Files) -> None:
    """Finishes or takes back what a power cut left of changing files; runs before anything is loaded from them."""
    switching.resume(files.state)
    for kind in Kind:
        if not is_announced(files, kind):
            for path in _paths(files, kind):
                destroy(files.successor(path))


class Rotation:
    """Carries changes out. One loop only.

    Args:
        material: changed in place when a successor takes over.
        publication: of the trust document.
        waiting: names SEs that have not seen a version of the trust document yet.
        on_switch: called when a successor took over, so that live listeners show it.
        wall: seconds since 1970.
    """

    def __init__(
        self,
        material: Material,
        publication: Publication,
        *,
        waiting: Callable[[int], list[str]],
        on_switch: Callable[[Kind], None],
        wall: Callable[[], float],
    ) -> None:
        self._material = material
        self._publication = publication
        self._waiting = waiting
        self._on_switch = on_switch
        self._wall = wall
        self._document = _document(material.files)
        self._records = self._document.load() or Records()

    @property
    def version(self) -> int:
        """Version of the trust document in force."""
        return self._publication.version

    def _save(self, kind: Kind, record: Record | None) -> None:
        kinds = {name: entry for name, entry in self._records.kinds.items() if name != kind.value}
        if record is not None:
            kinds[kind.value] = record
        records = Records(kinds=kinds)
        self._document.save(records)
        self._records = records

    def _record(self, kind: Kind) -> Record:
        record = self._records.kinds.get(kind.value)
        if record is None:
            raise UsageError(
                f"no change of the {kind.value} is under way",
                hint=f"begin one: `appliance controller rotate-{kind.value} begin`",
            )
        return record

    def view(self, kind: Kind) -> RotationView:
        """How far the change of a kind got."""
        record = self._records.kinds.get(kind.value)
        return RotationView(
            kind=kind.value,
            phase=record.phase.value if record else "none",
            version=record.version if record else 0,
            began_at=record.began_at if record else 0.0,
            waiting=self._waiting(record.version) if record else [],
            former_kept=kind is Kind.CA and self._material.former is not None,
            backup_due=kind is Kind.CA and self._material.files.backup_due.exists(),
        )

    def begin(self, kind: Kind, root: NextRoot | None = None) -> RotationView:
        """Makes the successor and announces it.

        Args:
            kind: what is changed.
            root: the successor where that is a root; one without a passphrase is made where there is none.

        Raises:
            UsageError: such a change is under way, or the trust document has no room for it.
            PassphraseError: the root key is locked.
        """
        if kind.value in self._records.kinds:
            raise UsageError(
                f"a change of the {kind.value} is under way already",
                hint="finish or abort it; `status` tells how far it is",
            )
        material = self._material
        material.check_open()
        if kind is Kind.CA:
            self._make_root(root or make_root(material.cluster.cluster_id, now=int(self._wall()), passphrase=None))
        else:
            public, path = _paths(material.files, kind)
            private, line = ssh_keys.generate()
            write_atomic(material.files.successor(path), private.reveal(), mode=0o600)
            write_atomic(material.files.successor(public), line.encode() + b"\n", mode=0o644)
        record = Record(phase=Phase.ANNOUNCED, version=0, began_at=self._wall())
        self._save(kind, record)
        if kind is Kind.CA and material.successor is not None and not material.files.backup_due.exists():
            write_atomic(material.files.backup_due, material.successor.fingerprint.encode(), mode=0o644)
        try:
            self._publication.publish(**self._listed(kind, current=True, successor=True))
        except UsageError:  # no room for it
            self._take_back(kind)
            raise
        self._save(kind, msgspec.structs.replace(record, version=self._publication.version))
        return self.view(kind)

    def _make_root(self, made: NextRoot) -> None:
        files, material = self._material.files, self._material
        self.forget()
        crossed = [material.authority.cross_sign(made.authority, now=int(self._wall()))]
        if files.cross_certificate.exists():
            # The way from each root before: no key of those is needed any more.
            crossed += all_of(read_limited(files.cross_certificate, max_bytes=MAX_FILE_BYTES))
        write_atomic(files.successor(files.root_key), made.key_file.reveal(), mode=0o600)
        write_atomic(files.successor(files.root_certificate), made.authority.certificate_pem, mode=0o644)
        write_atomic(files.successor(files.cross_certificate), b"".join(crossed[:MAX_ROOT_CHANGES]), mode=0o644)
        material.successor = made.authority

    def _listed(self, kind: Kind, *, current: bool, successor: bool) -> dict[str, Any]:
        """The fields of the trust document that list a kind's current one, its successor, or both."""
        files, path = self._material.files, _paths(self._material.files, kind)[0]
        paths = [place for place, wanted in ((path, current), (files.successor(path), successor)) if wanted]
        if kind is Kind.CA:
            return {"roots": [_text(place) for place in paths]}
        lines = [_text(place).strip() for place in paths]
        if kind is Kind.LOGIN_KEY:
            return {"login_keys": lines}
        nodes = self._publication.document.nodes
        mine = self._material.cluster.node
        return {
            "nodes": [msgspec.structs.replace(node, host_keys=lines) if node.number == mine else node for node in nodes]
        }

    def finish(self, kind: Kind, *, force: bool = False) -> RotationView:
        """Lets the successor take over.

        Raises:
            UsageError: nothing is under way, or SEs have not seen the announcement and `force` isn't given.
            PassphraseError: the root key is locked.
        """
        waiting = self._waiting(self._record(kind).version)
        if waiting and not force:
            some = ", ".join(waiting[:5]) + (f" and {len(waiting) - 5} more" if len(waiting) > 5 else "")
            raise UsageError(
                f"{len(waiting)} SEs have not seen the successor yet: {some}",
                hint="wait until they were up once, or pass --force: they come back by a refresh, a minute later",
            )
        material, files = self._material, self._material.files
        material.check_open()
        moves = [(files.successor(path), path) for path in _paths(files, kind)]
        keep: list[tuple[Path, Path]] = []
        if kind is Kind.CA:
            keep = [(path, files.former(path)) for path in (files.root_key, files.root_certificate)]
            moves += self._stage_issuing()
        version = self._publication.stage(**self._listed(kind, current=False, successor=True))
        gone: list[Path] = []
        if kind is Kind.CA:
            kept = files.succession(version)
            write_atomic(staged(kept), read_limited(staged(files.trust), max_bytes=MAX_TRUST_BYTES), mode=0o644)
            moves.append((staged(kept), kept))
            gone = [files.succession(entry.version) for entry in material.successions[: 1 - MAX_ROOT_CHANGES]]
        switching.switch(files.state, [*moves, (staged(files.trust), files.trust)], keep=keep, gone=gone)
        material.load_authorities()
        self._publication.reload()
        if kind is Kind.CA:
            issue_node_certificate(material.issuer, files, material.cluster, now=int(self._wall()))
        self._on_switch(kind)
        self._save(kind, None)
        return self.view(kind)

    def _stage_issuing(self) -> list[tuple[Path, Path]]:
        """Has the next root make an issuing CA, where the present one has one."""
        material, files = self._material, self._material.files
        if material.issuing is None or material.successor is None:
            return []
        places = (files.issuing_certificate, files.issuing_key)
        issued = material.successor.issue_issuing(now=int(self._wall()))
        write_pair(issued, *(staged(path) for path in places))
        return [(staged(path), path) for path in places]

    def abort(self, kind: Kind) -> RotationView:
        """Takes an announcement back.

        Raises:
            UsageError: nothing is under way.
            PassphraseError: the root key is locked.
        """
        self._record(kind)
        self._material.check_open()
        self._publication.publish(**self._listed(kind, current=True, successor=False))
        self._take_back(kind)
        return self.view(kind)

    def _take_back(self, kind: Kind) -> None:
        material, files = self._material, self._material.files
        root = material.successor if kind is Kind.CA else None
        if root is not None and files.backup_due.exists() and _text(files.backup_due) == root.fingerprint:
            remove_durably(files.backup_due)
        for path in _paths(files, kind):
            destroy(files.successor(path))
        if kind is Kind.CA:
            material.successor = None
        self._save(kind, None)

    def forget(self) -> None:
        """Destroys the former root's key; what it said of its successor stays."""
        files = self._material.files
        for path in (files.root_key, files.root_certificate):
            destroy(files.former(path))
        self._material.former = None

    def resume(self) -> None:
        """Finishes or takes back what a power cut left; `resume_files` ran before."""
        for name, record in list(self._records.kinds.items()):
            kind = Kind(name)
            if not self._is_listed(kind):
                _log.warning("the change of the %s, which was cut, is over", kind.value)
                self._take_back(kind)
            elif not record.version:
                self._save(kind, msgspec.structs.replace(record, version=self._publication.version))

    def _is_listed(self, kind: Kind) -> bool:
        """Whether the trust document in force lists the successor, whose files are there."""
        files = self._material.files
        if not all(files.successor(path).exists() for path in _paths(files, kind)):
            return False
        document = self._publication.document
        return all(
            getattr(document, name) == value for name, value in self._listed(kind, current=True, successor=True).items()
        )
