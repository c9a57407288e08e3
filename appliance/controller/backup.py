"""Backups of a controller: one sealed file with all of its state, keys included.

It is taken beside a running daemon, which needs to know nothing of it: the store is copied under one read transaction,
and the other files are read before and after; where one changed meanwhile (a certificate renewed, a root changed), all
is read again. So what is in a backup stood on the disk at one moment, and the daemon can start from any such moment.

Reading takes the rights to read the keys: no API hands them out. What is sealed is checked before it is written and
again after, as `verify` does: files complete and fitting each other, store undamaged, audit unbroken.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import msgspec

from appliance import __version__
from appliance.controller import records
from appliance.controller.audit import ENTRY_PREFIX, HEAD_PREFIX, start_of
from appliance.controller.material import MAX_FILE_BYTES, ClusterFile, Files
from appliance.controller.records import SeRecord
from appliance.controller.store.copy import StoreCopy, copy_store
from appliance.errors import DowngradeError, StorageError, TrustError
from appliance.paths import Paths
from appliance.pki import sealed, ssh_keys
from appliance.pki.authority import Authority, Issuer
from appliance.pki.certificate import certificate_terms
from appliance.pki.secret import Secret
from appliance.pki.trust import verify_trust
from appliance.protocol import audit as chain
from appliance.protocol import strict_json
from appliance.protocol.enroll import SeStatus
from appliance.protocol.operator import AuditEntry
from appliance.protocol.strict_json import MalformedError
from appliance.protocol.trust import MAX_TRUST_BYTES, Envelope
from appliance.storage.atomic import read_limited, remove_durably, write_atomic

VERSION = 1
MAX_BACKUP_BYTES = 1 << 31
MAX_CONTENT_BYTES = 1 << 32
MAX_STATE_FILE_BYTES = 1 << 20
READ_TRIES = 5
RESERVE_FILE = "disk-reserve"


class StateFile(msgspec.Struct, frozen=True, kw_only=True):
    """One file. `name` is relative to the controller's state directory."""

    name: str
    mode: int
    content: bytes


class Contents(msgspec.Struct, frozen=True, kw_only=True):
    """What is sealed."""

    version: int
    program: str
    made_at: int
    """Seconds since 1970."""
    files: list[StateFile]
    store: bytes
    settings: bytes | None
    """`settings.toml`, None where there was none."""

    def file(self, path: Path) -> bytes:
        """The content of the file of that name. Raises `StorageError` where it is missing."""
        for entry in self.files:
            if entry.name == path.name:
                return entry.content
        raise StorageError(f"the backup has no {path.name}", hint="it was taken of a controller that lacked it already")


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """What a good backup holds."""

    cluster_id: str
    node: int
    epoch: int
    trust_version: int
    root_fingerprint: str
    root_is_locked: bool = False
    """Whether its root key has a passphrase of its own, which a restore asks for."""
    root_change: bool = False
    """Whether a change of root is announced in it: a restore finishes that."""
    made_at: int
    program: str
    files: int
    ses: int
    next_number: int
    audit_entries: int
    audit_head: str
    size_bytes: int = 0
    sha256: str = ""
    """Of the sealed file, where there is one."""


def _is_state(path: Path, files: Files) -> bool:
    """Whether a file belongs to the state: no store, no temporary, nothing set aside or being destroyed."""
    name = path.name
    passing = name.startswith((".", "gone-", f"{files.store.name}")) or ".broken-" in name
    passing = passing or name in {files.ready.name, files.backup_due.name, RESERVE_FILE}
    return not passing and path.is_file() and not path.is_symlink()


def _read_files(files: Files) -> list[StateFile]:
    found = []
    for path in sorted([*files.state.iterdir(), *files.bundles.glob("*")]):
        if _is_state(path, files):
            content = read_limited(path, max_bytes=MAX_STATE_FILE_BYTES)
            mode = path.stat().st_mode & 0o777
            found.append(StateFile(name=str(path.relative_to(files.state)), mode=mode, content=content))
    return found


def collect(paths: Paths, *, now: int) -> Contents:
    """Reads a controller's state, running or not.

    Raises:
        StorageError: there is none, it can't be read, or it changes all the time.
    """
    files = Files(paths.controller_state)
    try:
        files.check_ready()
        for _ in range(READ_TRIES):
            before = _read_files(files)
            store = copy_store(files.store)
            if before == _read_files(files):
                break
        else:
            raise StorageError(f"the files below {files.state} change all the time", hint="try again in a minute")
    except FileNotFoundError as error:
        raise StorageError(f"{error.filename} went away while it was read", hint="try again") from None
    except PermissionError as error:
        raise StorageError(f"{error.filename} may not be read by this user", hint="be root: it holds keys") from None
    try:
        settings = read_limited(paths.settings_file, max_bytes=MAX_STATE_FILE_BYTES)
    except FileNotFoundError:
        settings = None
    return Contents(
        version=VERSION, program=__version__, made_at=now, files=before, store=store, settings=settings
    )  # fmt: skip


def check(contents: Contents) -> Summary:
    """Checks that a controller can be made of `contents`, without writing anything.

    Raises:
        StorageError, TrustError: what is wrong.
    """
    names = Files(Path())
    try:
        cluster = strict_json.decode(contents.file(names.cluster), ClusterFile, max_bytes=MAX_FILE_BYTES)
        root = contents.file(names.root_certificate)
        key = contents.file(names.root_key)
        is_locked = Authority.load(root, key).is_locked
        if is_locked:
            Issuer.load(contents.file(names.issuing_certificate), contents.file(names.issuing_key))
        envelope = strict_json.decode(contents.file(names.trust), Envelope, max_bytes=MAX_TRUST_BYTES)
        trust = verify_trust(envelope, anchors=[root.decode()], current=None)
        for path in (names.host_key, names.login_key):
            ssh_keys.load_private(contents.file(path))
    except (MalformedError, UnicodeDecodeError) as error:
        raise StorageError(f"the backup holds a damaged file: {error}") from None
    if trust.cluster_id != cluster.cluster_id:
        raise StorageError(f"the backup's files are of clusters {trust.cluster_id} and {cluster.cluster_id}")
    with StoreCopy(contents.store, name=names.store) as store:
        ses = [records.decode(entry.value, SeRecord, entry.key) for entry in store.entries(records.SE_PREFIX)]
        prefix = f"{ENTRY_PREFIX}{cluster.node}/"
        entries = [records.decode(entry.value, AuditEntry, entry.key) for entry in store.entries(prefix)]
        kept, number = store.get(f"{HEAD_PREFIX}{cluster.node}"), store.get(records.NUMBER_NEXT)
    head = kept.value.decode().partition(" ")[0] if kept else ""
    verdict = chain.verify(entries, start=start_of(cluster.cluster_id, cluster.node, entries), head=head)
    if not verdict.intact:
        raise TrustError(f"the audit in the backup is broken: {verdict.text}", hint="take an older backup")
    return Summary(
        cluster_id=cluster.cluster_id,
        node=cluster.node,
        epoch=cluster.epoch,
        trust_version=trust.version,
        root_fingerprint=certificate_terms(root).fingerprint,
        root_is_locked=is_locked,
        root_change=len(trust.roots) > 1,
        made_at=contents.made_at,
        program=contents.program,
        files=len(contents.files),
        ses=sum(1 for record in ses if record.status is not SeStatus.DELETED),
        next_number=int(number.value) if number else 1,
        audit_entries=verdict.entries,
        audit_head=verdict.head,
    )


def make(paths: Paths, out: Path, passphrase: Secret, *, now: int) -> Summary:
    """Backs up the controller below `paths` into the one file `out` (0600), which must not exist.

    Raises:
        StorageError, TrustError: it could not be read, holds no sound controller, or could not be written.
        UsageError: a passphrase that protects nothing.
    """
    sealed.check_passphrase(passphrase)
    if out.exists():
        raise StorageError(f"{out} exists already", hint="name another file; an older backup is never written over")
    contents = collect(paths, now=now)
    summary = check(contents)
    about = {
        "version": VERSION,
        "cluster_id": summary.cluster_id,
        "node": summary.node,
        "epoch": summary.epoch,
        "made_at": now,
    }
    plain = zlib.compress(msgspec.msgpack.encode(contents), level=6)
    write_atomic(out, sealed.seal(plain, passphrase, magic=sealed.BACKUP, about=about), mode=0o600)
    verified = verify(out, passphrase)
    _note_taken(Files(paths.controller_state), contents)
    return verified


def _note_taken(files: Files, contents: Contents) -> None:
    """Takes away the mark that a backup is due, where this one holds the root that it is due for."""
    try:
        due = read_limited(files.backup_due, max_bytes=MAX_FILE_BYTES).decode()
    except FileNotFoundError:
        return
    names = Files(Path())
    roots = {names.root_certificate.name, names.successor(names.root_certificate).name}
    held = [certificate_terms(entry.content).fingerprint for entry in contents.files if entry.name in roots]
    if due in held:
        remove_durably(files.backup_due)


def load(path: Path, passphrase: Secret) -> tuple[Contents, bytes]:
    """Opens a backup; returns its contents and the sealed bytes.

    Raises:
        StorageError, TrustError: there is none, it is damaged, or the passphrase is wrong.
        DowngradeError: a newer version of this program made it.
    """
    try:
        raw = read_limited(path, max_bytes=MAX_BACKUP_BYTES)
    except FileNotFoundError:
        raise StorageError(f"there is no {path}", hint="give the file that `controller backup --out` wrote") from None
    try:
        inflater = zlib.decompressobj()
        plain = inflater.decompress(sealed.open_sealed(raw, passphrase, magic=sealed.BACKUP), MAX_CONTENT_BYTES)
        version = msgspec.msgpack.decode(plain, type=_Versioned).version
        if version > VERSION:
            raise DowngradeError(
                f"{path} has version {version}, this program knows up to {VERSION}",
                hint="a newer version of this program made it: use that version",
            )
        return msgspec.msgpack.decode(plain, type=Contents), raw
    except (zlib.error, *strict_json.UNDECODABLE) as error:
        raise StorageError(f"{path} opens, but holds no backup: {error}") from None
    except TrustError as error:
        raise TrustError(f"{path}: {error.message}", hint=error.hint) from None


class _Versioned(msgspec.Struct):
    version: int


def verify(path: Path, passphrase: Secret) -> Summary:
    """Checks that a backup opens and that a controller can be made of it. Raises as `load` and `check`."""
    contents, raw = load(path, passphrase)
    return msgspec.structs.replace(check(contents), size_bytes=len(raw), sha256=sealed.digest(raw))
