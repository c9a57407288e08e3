"""Changing roots, host keys and log-in keys under live links.

Each of the three goes the same way, so that no SE is ever asked to believe what it was not told before:

    begin     the successor is made and announced: the trust document lists both          -> ANNOUNCED
    (SEs take the new version with their next heartbeat; `status` tells who has not yet)
    finish    SWITCHING; the successor takes the old one's place on disk and in the daemon;
              the trust document lists only the successor                                 -> none
    abort     the trust document lists only the old one; the successor is destroyed       -> none

The phase is stored before what it names is done, and each step may be repeated: `resume_files` and `resume` finish
what a power cut left. After a change of root the former root's key stays for signing trust documents, for SEs that
were off all the time, until `forget`.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable
from pathlib import Path

import msgspec

from appliance.controller.material import Files, Material, issue_node_certificate
from appliance.controller.trust import Publication
from appliance.errors import UsageError
from appliance.pki import ssh_keys
from appliance.pki.authority import Authority
from appliance.protocol.operator import RotationView
from appliance.storage.atomic import read_limited, remove_durably, sync_directory, write_atomic
from appliance.storage.document import Document

_log = logging.getLogger(__name__)

MAX_FILE_BYTES = 64 * 1024
_GONE = "gone-"
"""Begin of the name of a key that is being destroyed."""


class Kind(enum.StrEnum):
    """What is changed."""

    CA = "ca"
    HOST_KEY = "host-key"
    LOGIN_KEY = "login-key"


class Phase(enum.StrEnum):
    """How far a change got."""

    ANNOUNCED = "announced"
    SWITCHING = "switching"


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One change under way. `version` is that of the trust document that announced it, 0 until it was published."""

    phase: Phase
    version: int
    began_at: float


class Records(msgspec.Struct, frozen=True, kw_only=True):
    """`rotation.json`: the changes under way, by kind."""

    kinds: dict[str, Record] = {}


def _document(files: Files) -> Document[Records]:
    return Document(files.state / "rotation.json", Records)


def _public(path: Path) -> Path:
    return path.with_name(f"{path.name}.pub")


def _destroy(path: Path) -> None:
    """Scrubs a key; by way of another name, so that a cut never leaves zeros where a key is looked for."""
    gone = path.with_name(f"{_GONE}{path.name}")
    if path.exists():
        path.replace(gone)
    remove_durably(gone, scrub=True)


def _switch_files(files: Files, kind: Kind) -> None:
    """Puts the successor's files in place; may be cut and repeated anywhere."""
    if kind is Kind.CA:
        for path, mode in ((files.root_key, 0o600), (files.root_certificate, 0o644)):
            former = files.former(path)
            if not former.exists():
                write_atomic(former, read_limited(path, max_bytes=MAX_FILE_BYTES), mode=mode)
        paths = [files.cross_certificate, files.root_certificate, files.root_key]
    else:
        private = files.host_key if kind is Kind.HOST_KEY else files.login_key
        paths = [_public(private), private]
    for path in paths:
        if files.successor(path).exists():
            files.successor(path).replace(path)
    sync_directory(files.state)


def resume_files(files: Files) -> None:
    """Finishes what a power cut left of switching files; runs before anything is loaded from them."""
    for gone in files.state.glob(f"{_GONE}*"):
        remove_durably(gone, scrub=True)
    records = _document(files).load()
    for kind, record in records.kinds.items() if records else ():
        if record.phase is Phase.SWITCHING:
            _switch_files(files, Kind(kind))


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
        )

    def begin(self, kind: Kind) -> RotationView:
        """Makes the successor and announces it."""
        if kind.value in self._records.kinds:
            raise UsageError(
                f"a change of the {kind.value} is under way already",
                hint="finish or abort it; `status` tells how far it is",
            )
        self._make(kind)
        self._save(kind, Record(phase=Phase.ANNOUNCED, version=0, began_at=self._wall()))
        self._announce(kind)
        return self.view(kind)

    def _make(self, kind: Kind) -> None:
        files, now = self._material.files, int(self._wall())
        if kind is Kind.CA:
            self.forget()
            authority = self._material.authority
            successor = Authority.create(authority.cluster_id, now=now)
            crossed = authority.cross_sign(successor, now=now)
            write_atomic(files.successor(files.root_key), successor.key_pem().reveal(), mode=0o600)
            write_atomic(files.successor(files.root_certificate), successor.certificate_pem, mode=0o644)
            write_atomic(files.successor(files.cross_certificate), crossed, mode=0o644)
            self._material.load_authorities()
            return
        path = files.host_key if kind is Kind.HOST_KEY else files.login_key
        private, line = ssh_keys.generate()
        write_atomic(files.successor(path), private.reveal(), mode=0o600)
        write_atomic(files.successor(_public(path)), line.encode() + b"\n", mode=0o644)

    def _announce(self, kind: Kind) -> None:
        self._publish(kind, with_successor=True)
        record = self._record(kind)
        self._save(kind, msgspec.structs.replace(record, version=self._publication.version))

    def _publish(self, kind: Kind, *, with_successor: bool) -> None:
        files = self._material.files
        current = files.root_certificate if kind is Kind.CA else _public(files.host_key)
        if kind is Kind.LOGIN_KEY:
            current = _public(files.login_key)
        paths = [current, files.successor(current)] if with_successor else [current]
        texts = [read_limited(path, max_bytes=MAX_FILE_BYTES).decode() for path in paths]
        if kind is Kind.CA:
            self._publication.publish(roots=texts)
            return
        lines = [text.strip() for text in texts]
        if kind is Kind.LOGIN_KEY:
            self._publication.publish(login_keys=lines)
            return
        nodes = [
            msgspec.structs.replace(node, host_keys=lines) if node.number == self._material.cluster.node else node
            for node in self._publication.document.nodes
        ]
        self._publication.publish(nodes=nodes)

    def finish(self, kind: Kind, *, force: bool = False) -> RotationView:
        """Lets the successor take over.

        Raises:
            UsageError: nothing is under way, or SEs have not seen the announcement and `force` isn't given.
        """
        record = self._record(kind)
        waiting = self._waiting(record.version)
        if waiting and not force:
            some = ", ".join(waiting[:5]) + (f" and {len(waiting) - 5} more" if len(waiting) > 5 else "")
            raise UsageError(
                f"{len(waiting)} SEs have not seen the successor yet: {some}",
                hint="wait until they were up once, or pass --force: they come back by a refresh, a minute later",
            )
        self._save(kind, msgspec.structs.replace(record, phase=Phase.SWITCHING))
        _switch_files(self._material.files, kind)
        self._switched(kind)
        return self.view(kind)

    def _switched(self, kind: Kind) -> None:
        """The files are in place: the daemon and the trust document follow."""
        material = self._material
        if kind is Kind.CA:
            material.load_authorities()
            issue_node_certificate(material.authority, material.files, material.cluster, now=int(self._wall()))
        self._on_switch(kind)
        self._publish(kind, with_successor=False)
        self._save(kind, None)

    def abort(self, kind: Kind) -> RotationView:
        """Takes an announcement back."""
        if self._record(kind).phase is Phase.SWITCHING:
            raise UsageError("the successor is taking over already", hint="finish it instead")
        self._publish(kind, with_successor=False)
        files = self._material.files
        paths = {
            Kind.CA: (files.root_key, files.root_certificate, files.cross_certificate),
            Kind.HOST_KEY: (files.host_key, _public(files.host_key)),
            Kind.LOGIN_KEY: (files.login_key, _public(files.login_key)),
        }[kind]
        for path in paths:
            _destroy(files.successor(path))
        self._material.load_authorities()
        self._save(kind, None)
        return self.view(kind)

    def forget(self) -> None:
        """Destroys the former root's key: SEs that were off since before the change of root need a new seed then."""
        files = self._material.files
        for path in (files.root_key, files.root_certificate):
            _destroy(files.former(path))
        self._material.load_authorities()

    def resume(self) -> None:
        """Finishes what a power cut left; `resume_files` ran before."""
        for name, record in list(self._records.kinds.items()):
            kind = Kind(name)
            if record.phase is Phase.SWITCHING:
                _log.warning("finishing the change of the %s that was cut", kind.value)
                self._switched(kind)
            elif not record.version:
                self._announce(kind)
