"""Restore: makes a controller of a backup on an empty root, as the same node of the same cluster in a new epoch.

What the former controller did after the backup is unknown, and SEs remember it. So, before anything is started:

    epoch, trust version   jump to the second of the restore, above all that came before (docs/adr/0009)
    nonce key              new: what was asked for before can't be played again
    numbers                go on far above those that can have been given out since
    link tickets           unknown: the first that comes counts
    unused tokens          withdrawn: they may have been used since
    audit                  goes on in a new segment, whose genesis names node, epoch and the entry before it
    a root announced       takes over: whether the change was finished or not after the backup, SEs trust either the
                           new root, or the old one, which certified the new one's key
    issuing CA             a new one, where it ends within a month
    RECOVERY               begins

All of it is done in a directory of its own beside the place, which one rename puts there. A restore that was cut
leaves that directory, which nobody looks at and the next try replaces: there is no half-restored controller.
"""

from __future__ import annotations

import asyncio
import functools
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec

from appliance.controller import backup, records
from appliance.controller.audit import Audit
from appliance.controller.backup import Contents, Summary
from appliance.controller.material import (
    NONCE_KEY_BYTES,
    ClusterFile,
    Files,
    Material,
    issue_node_certificate,
    write_pair,
)
from appliance.controller.records import SeRecord, TokenRecord
from appliance.controller.recovery import RECOVERY, RecoveryRecord
from appliance.controller.registry import Registry
from appliance.controller.rotation import Kind, Rotation, is_announced, resume_files
from appliance.controller.store.port import MAX_OPERATIONS, Compare, Put, Store
from appliance.controller.store.sqlite import SqliteStore
from appliance.controller.trust import Publication
from appliance.errors import SettingsError, StorageError, UsageError
from appliance.paths import Paths
from appliance.pki.secret import Secret
from appliance.protocol import strict_json
from appliance.protocol.address import MAX_SE_NUMBER, format_endpoint
from appliance.protocol.receipt import SKIPPED_NUMBERS
from appliance.protocol.tunnel import UNKNOWN_TICKET
from appliance.runtime.clock import Clock
from appliance.storage.atomic import make_dir, sync_directory, write_atomic
from appliance.storage.lock import RootLock

R = TypeVar("R", SeRecord, TokenRecord)

STAGING = "controller.restoring"
ACTOR = "controller restore"
ISSUING_LEFT_S = 30 * 86400
"""An issuing CA with less left is replaced."""


class Restored(NamedTuple):
    """What was made, and of what."""

    backup: Summary
    epoch: int
    trust_version: int
    numbers_from: int
    tokens_withdrawn: int
    settings_kept: bool
    """Whether this root had settings already, which were left alone."""


class NewPlace(NamedTuple):
    """Where SEs reach the restored node; what is empty or 0 stays as it was."""

    addresses: Sequence[str] = ()
    enroll_port: int = 0
    ssh_port: int = 0


def restore(
    paths: Paths,
    file: Path,
    passphrase: Secret,
    *,
    clock: Clock,
    date: int | None = None,
    place: NewPlace = NewPlace(),  # noqa: B008 - a tuple
    skip_numbers: int = SKIPPED_NUMBERS,
    root_passphrase: Callable[[], Secret] | None = None,
) -> Restored:
    """Restores the backup `file` below `paths`, which holds no controller.

    Args:
        paths: of the root to restore into.
        file: made by `backup.make`.
        passphrase: of the backup.
        clock: asked for the time, and whether it is synchronised.
        date: seconds since 1970, where an operator vouches for it.
        place: where it differs from the backup's.
        skip_numbers: how many SE numbers are passed over.
        root_passphrase: asked for the root key's passphrase where that has one.

    Raises:
        SettingsError: the clock isn't synchronised and no date was given.
        StorageError, TrustError: the backup does not hold, or this root can't be written.
        PassphraseError: the root key's passphrase is missing or wrong.
        UsageError: there are not so many numbers left.
    """
    if date is None and not clock.synchronised():
        shown = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(clock.now()))
        raise SettingsError(
            f"the clock isn't synchronised; it says {shown}. The new epoch comes of it, and must lie above every other",
            hint="start chrony or systemd-timesyncd, or vouch for the time with --date now",
        )
    now = date if date is not None else int(clock.now())
    final, staging = Files(paths.controller_state), Files(paths.state / STAGING)
    make_dir(paths.state, mode=0o755)
    with RootLock(paths.lock):
        if final.ready.exists():
            raise StorageError(
                f"{final.state} holds a controller",
                hint="nothing was changed; restore below another --root, or move that directory away",
            )
        contents, _ = backup.load(file, passphrase)
        summary = backup.check(contents)
        if now < contents.made_at:
            raise UsageError(
                f"it is {now} (seconds since 1970) by this clock, and the backup was taken at {contents.made_at}",
                hint="set the clock, or give the time with --date",
            )
        if summary.next_number + skip_numbers > MAX_SE_NUMBER:
            raise UsageError(
                f"{skip_numbers} SE numbers can't be skipped: {summary.next_number} is next, {MAX_SE_NUMBER} the last",
                hint="pass --skip-numbers with more than were given out since the backup",
            )
        if staging.state.exists():
            shutil.rmtree(staging.state)
        _write(staging, contents)
        epoch = _renew(staging, place, now=now, root_passphrase=root_passphrase)
        record = asyncio.run(_renew_store(staging, summary, epoch=epoch, now=now, skip=skip_numbers, clock=clock))
        write_atomic(staging.ready, b"", mode=0o644)
        settings_kept = _write_settings(paths, contents)
        if final.state.exists():
            shutil.rmtree(final.state)
        staging.state.rename(final.state)
        sync_directory(paths.state)
    return Restored(
        backup=summary,
        epoch=epoch,
        trust_version=Material(final).trust.version,
        numbers_from=record.numbers_from,
        tokens_withdrawn=record.tokens_withdrawn,
        settings_kept=settings_kept,
    )


def _write(files: Files, contents: Contents) -> None:
    make_dir(files.state, mode=0o700)
    make_dir(files.bundles, mode=0o700)
    for entry in contents.files:
        path = files.state / entry.name
        if path.parent not in {files.state, files.bundles}:
            raise StorageError(f"the backup holds {entry.name!r}, which is no file of a controller")
        write_atomic(path, entry.content, mode=entry.mode)
    write_atomic(files.store, contents.store, mode=0o600)


def _write_settings(paths: Paths, contents: Contents) -> bool:
    if paths.settings_file.exists() or contents.settings is None:
        return paths.settings_file.exists()
    make_dir(paths.settings_file.parent, mode=0o755)
    write_atomic(paths.settings_file, contents.settings, mode=0o644)
    return False


def _renew(files: Files, place: NewPlace, *, now: int, root_passphrase: Callable[[], Secret] | None) -> int:
    """Raises epoch and trust version, moves the node where it is to be; returns the epoch."""
    resume_files(files)
    write_atomic(files.nonce_key, secrets.token_bytes(NONCE_KEY_BYTES), mode=0o600)
    material = Material(files)
    if material.authority.is_locked and root_passphrase is not None:
        with material.unlocked(material.unlock(root_passphrase())):
            cluster = _speak_anew(material, place, now=now)
    else:
        cluster = _speak_anew(material, place, now=now)
    write_atomic(files.cluster, strict_json.encode(cluster), mode=0o644)
    issue_node_certificate(material.issuer, files, cluster, now=now)
    return cluster.epoch


def _speak_anew(material: Material, place: NewPlace, *, now: int) -> ClusterFile:
    """Signs what the roots must sign; returns what the cluster is from now on."""
    files = material.files
    was = material.cluster
    cluster = msgspec.structs.replace(
        was,
        epoch=max(was.epoch + 1, now),
        addresses=list(place.addresses) or was.addresses,
        enroll_port=place.enroll_port or was.enroll_port,
        ssh_port=place.ssh_port or was.ssh_port,
    )
    nodes = [
        msgspec.structs.replace(
            node,
            enroll=[format_endpoint(address, cluster.enroll_port) for address in cluster.addresses],
            ssh=[format_endpoint(address, cluster.ssh_port) for address in cluster.addresses],
        )
        if node.number == cluster.node and any(place)
        else node
        for node in material.trust.nodes
    ]
    publication = Publication(material, on_publish=lambda _: None, wall=lambda: float(now))
    if material.issuing is not None and material.issuing.expires_at - now < ISSUING_LEFT_S:
        write_pair(material.authority.issue_issuing(now=now), files.issuing_certificate, files.issuing_key)
    publication.publish(at_least=cluster.epoch, epoch=cluster.epoch, nodes=nodes)
    rotation = Rotation(material, publication, waiting=lambda _: [], on_switch=lambda _: None, wall=lambda: float(now))
    rotation.resume()
    if is_announced(files, Kind.CA):
        rotation.finish(Kind.CA)
    return cluster


async def _renew_store(
    files: Files, summary: Summary, *, epoch: int, now: int, skip: int, clock: Clock
) -> RecoveryRecord:
    store = SqliteStore.open(files.store, clock=clock)
    try:
        await _rewrite(store, records.SE_PREFIX, SeRecord, _without_tickets)
        withdrawn = await _rewrite(store, records.TOKEN_PREFIX, TokenRecord, functools.partial(_withdrawn, now=now))
        audit = Audit(store, cluster_id=summary.cluster_id, node=summary.node, epoch=epoch)
        registry = Registry(store, audit, wall=lambda: float(now))
        await registry.load(reserved=())
        record = RecoveryRecord(
            epoch=epoch,
            began_at=now,
            backup_made_at=summary.made_at,
            backup_epoch=summary.epoch,
            numbers_known=summary.next_number,
            numbers_from=summary.next_number + skip,
            tokens_withdrawn=withdrawn,
            audit_sequence=audit.count,
            trust_version=summary.trust_version,
        )
        number_unchanged, _ = registry.next_number_taken()
        async with registry.turn():
            await registry.commit(
                compares=[number_unchanged],
                writes=[
                    Put(RECOVERY, records.encode(record)),
                    Put(records.NUMBER_NEXT, str(record.numbers_from).encode()),
                ],
                actor=ACTOR,
                action="controller.restored",
                subject=summary.cluster_id,
                detail=f"backup of {summary.made_at}, epoch {summary.epoch}; numbers from {record.numbers_from}",
            )
    finally:
        await store.close()
    return record


async def _rewrite(store: Store, prefix: str, kind: type[R], change: Callable[[R], R]) -> int:
    """Changes all records of a kind; returns how many differ."""
    after, count = "", 0
    while page := await store.range(prefix, start_after=after, limit=MAX_OPERATIONS):
        after = page[-1].key
        puts, compares = [], []
        for entry in page:
            was = records.decode(entry.value, kind, entry.key)
            if (changed := change(was)) != was:
                compares.append(Compare(entry.key, "mod_revision", "=", entry.mod_revision))
                puts.append(Put(entry.key, records.encode(changed)))
        if puts and not (await store.txn(compares, puts)).succeeded:
            raise StorageError("the store changed while it was restored", hint="try again")
        count += len(puts)
    return count


def _without_tickets(record: SeRecord) -> SeRecord:
    return msgspec.structs.replace(record, ticket=UNKNOWN_TICKET, ticket_pending="", ticket_superseded="")


def _withdrawn(record: TokenRecord, *, now: int) -> TokenRecord:
    if record.revoked_at or record.taken_by:
        return record
    return msgspec.structs.replace(record, revoked_at=now, note=f"{record.note} (withdrawn by a restore)".strip())
