"""`controller init`: makes the cluster. Runs once on a root, before the daemon; nothing here is needed later.

Order: material (with `cluster.json` last), then the store with the first image key and its bundle. A root on which
that was cut short is made anew from the start, since nobody can have been told of its cluster yet.
"""

from __future__ import annotations

import asyncio
import shutil
import time
import uuid
from typing import NamedTuple

from appliance.controller import material
from appliance.controller.audit import Audit
from appliance.controller.material import Files, Material
from appliance.controller.records import ImageKeyRecord
from appliance.controller.registry import Registry
from appliance.controller.store.sqlite import SqliteStore
from appliance.errors import SettingsError, StorageError, UsageError
from appliance.paths import Paths
from appliance.pki.identity import Identity
from appliance.pki.secret import Secret
from appliance.protocol import strict_json
from appliance.protocol.address import format_endpoint
from appliance.protocol.operator import ImageKeyTermsWish
from appliance.protocol.seed import SCHEMA, Bundle
from appliance.runtime.clock import Clock
from appliance.storage.atomic import make_dir, write_atomic
from appliance.storage.lock import RootLock


class ControllerInit(NamedTuple):
    """What was made."""

    cluster_id: str
    bundle_path: str
    image_key_id: str
    root_fingerprint: str


def make_bundle(loaded: Material, record: ImageKeyRecord, identity: Identity) -> Bundle:
    """Returns the bundle of a freshly made image key."""
    return Bundle(
        schema=SCHEMA,
        cluster_id=loaded.cluster.cluster_id,
        root_ca=loaded.root_pem,
        trust=loaded.envelope,
        image_key_id=record.image_key_id,
        image_key_expires_at=record.expires_at,
        image_key=identity.pkcs8().reveal().decode(),
        controllers=[format_endpoint(address, loaded.cluster.enroll_port) for address in loaded.cluster.addresses],
    )


def initialise(
    paths: Paths,
    *,
    addresses: list[str],
    enroll_port: int,
    ssh_port: int,
    clock: Clock,
    date: int | None = None,
    image_key: ImageKeyTermsWish | None = None,
    passphrase: Secret | None = None,
) -> ControllerInit:
    """Makes a one-node cluster below `paths`.

    Args:
        paths: of the root to make it in.
        addresses: names or IP addresses by which SEs reach this node; they go into the trust document and the
        certificate. enroll_port: TCP port of HTTPS enrollment as SEs see it. ssh_port: TCP port of the SSH gateway
        as SEs see it. clock: asked for the time, and whether it is synchronised. date: seconds since 1970, where an
        operator vouches for it. image_key: terms of the first image key. passphrase: of the root key, if it is to have
        one; an issuing CA does the daily signing then.

    Raises:
        UsageError: no address, or a passphrase that protects nothing.
        SettingsError: the clock isn't synchronised and no date was given.
        StorageError: this root holds a controller already, or can't be written.
    """
    if not addresses:
        raise UsageError("no address given", hint="pass --address with a name or IP by which SEs reach this node")
    if date is None and not clock.synchronised():
        shown = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(clock.now()))
        raise SettingsError(
            f"the clock isn't synchronised; it says {shown}. Certificates made by a wrong clock strand SEs",
            hint="start chrony or systemd-timesyncd, or vouch for the time with --date now or --date 2026-01-31T12:00Z",
        )
    now = date if date is not None else int(clock.now())
    files = Files(paths.controller_state)
    make_dir(paths.state, mode=0o755)
    with RootLock(paths.lock):
        if files.ready.exists():
            raise StorageError(
                f"{files.state} holds an initialised controller",
                hint="nothing was changed; `appliance controller show` tells about it",
            )
        if files.state.exists():
            shutil.rmtree(files.state)
        material.create(
            files,
            cluster_id=str(uuid.uuid4()),
            addresses=addresses,
            enroll_port=enroll_port,
            ssh_port=ssh_port,
            now=now,
            passphrase=passphrase,
        )
        loaded = Material(files)
        wish = image_key or ImageKeyTermsWish()
        image_key_id, bundle_path = asyncio.run(_first_image_key(files, loaded, wish, clock, now))
        write_atomic(files.ready, b"", mode=0o644)
    return ControllerInit(
        cluster_id=loaded.cluster.cluster_id,
        bundle_path=bundle_path,
        image_key_id=image_key_id,
        root_fingerprint=loaded.authority.fingerprint,
    )


async def _first_image_key(
    files: Files, loaded: Material, wish: ImageKeyTermsWish, clock: Clock, now: int
) -> tuple[str, str]:
    store = SqliteStore.open(files.store, clock=clock)
    try:
        cluster = loaded.cluster
        audit = Audit(store, cluster_id=cluster.cluster_id, node=cluster.node, epoch=cluster.epoch)
        registry = Registry(store, audit, wall=lambda: float(now))
        await registry.load(reserved=())
        await registry.note(
            actor="controller init", action="cluster.created", subject=cluster.cluster_id,
            detail=f"root CA {loaded.authority.fingerprint}",
        )  # fmt: skip
        record, identity = await registry.create_image_key(wish, actor="controller init")
    finally:
        await store.close()
    bundle_path = files.bundles / f"{record.image_key_id}.json"
    write_atomic(bundle_path, strict_json.encode(make_bundle(loaded, record, identity)), mode=0o600)
    return record.image_key_id, str(bundle_path)
