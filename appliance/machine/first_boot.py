"""Stage seed, first boot on our own system: from a disk as it was baked to a machine whose daemon can enroll. As root.

| step     | what it does                                                                      | needs  |
| -------- | --------------------------------------------------------------------------------- | ------ |
| take     | copies the seed partition's files: trust to its folder, cloud-init's to cloud-init | –      |
| wipe     | overwrites that partition, and discards it                                        | take   |
| remove   | takes it out of the partition table; the root's partition gets its room           | wipe   |
| grow     | tells the kernel, and lets the root file system fill its partition                | remove |
| name     | sets the host name                                                                | take   |
| host key | makes the sshd's Ed25519 key                                                      | –      |

A step is on disk before it is noted, and what is noted isn't done again; each may be repeated. So it may be cut
anywhere, and the next boot goes on. A step that fails is told and tried again at the next boot; what needs it waits,
the others go on: a VM whose disk can't grow still enrolls.

The partition is found by its type and name on the disk that holds the root file system, never by a label. Where there
is none, the image's own folder is the seed. Wishes of attached disks and of the hypervisor are worked in when the seed
is taken; at each later boot those that concern the SE (addresses, token, hints) are handed to it anew.
"""

from __future__ import annotations

import enum
import os
import socket
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import msgspec

from appliance.errors import ApplianceError, SeedError
from appliance.machine import cloud_seed
from appliance.machine.disk import Disk
from appliance.machine.wishes import Wishes, meta_host_name
from appliance.paths import Paths
from appliance.protocol import seed as protocol
from appliance.protocol import strict_json
from appliance.runtime import child, log
from appliance.storage.atomic import make_dir, read_limited, remove_durably, sync_directory, write_atomic
from appliance.storage.document import Document

TRUST_FILES = (protocol.SEED_FILE, protocol.ROOT_CA_FILE, protocol.TRUST_FILE, protocol.IMAGE_KEY_FILE)
CLOUD_DIRECTORY = "var/lib/cloud/seed/nocloud"
_log = log.bind("seed")


class Step(enum.StrEnum):
    """In their order."""

    TAKE = "take"
    WIPE = "wipe"
    REMOVE = "remove"
    GROW = "grow"
    NAME = "name"
    HOST_KEY = "host key"


_NEEDS = {Step.WIPE: Step.TAKE, Step.REMOVE: Step.WIPE, Step.GROW: Step.REMOVE, Step.NAME: Step.TAKE}


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`first-boot`: what is behind us."""

    done: list[Step] = []
    source: str = ""
    """Where the seed was."""
    partition: int = 0
    """Number of the seed partition, 0 where there was none."""
    boot_id: str = ""
    """Of the boot that took the seed."""
    has_hooks: bool = False
    """Programs of the image run before the role starts: cloud-init starts it."""


def next_step(done: Collection[Step], failed: Collection[Step]) -> Step | None:
    """Returns the first step that isn't behind us, didn't fail in this boot, and has what it needs. Pure."""
    for step in Step:
        needs = _NEEDS.get(step)
        if step not in done and step not in failed and (needs is None or needs in done):
            return step
    return None


class FirstBoot:
    """One boot's work.

    Args:
        paths: of the machine.
        disk: with the root file system; None where that isn't on a partition.
        gather: returns the wishes for a VM of this cluster.
        owner: user and group of the SE's daemon, who reads the seed; None leaves files to us.
        boot_id: of this boot.
        now: seconds since 1970.
        needs_seed: False on a controller's image, which may have none.
        own_mark: returns what tells this VM from others of its image, a few letters and digits; "" if nothing does.
        set_host_name: tells the kernel.
    """

    def __init__(
        self,
        paths: Paths,
        *,
        disk: Disk | None,
        gather: Callable[[str], Wishes],
        owner: tuple[int, int] | None,
        boot_id: str,
        now: int,
        needs_seed: bool = True,
        own_mark: Callable[[], str] = lambda: "",
        set_host_name: Callable[[str], None] = socket.sethostname,
    ) -> None:
        self._paths = paths
        self._disk = disk
        self._gather = gather
        self._owner = owner
        self._boot_id = boot_id
        self._now = now
        self._needs_seed = needs_seed
        self._own_mark = own_mark
        self._set_host_name = set_host_name
        self._document = Document(paths.first_boot_file, Record)
        self.record = Record()
        self.failed: dict[Step, ApplianceError] = {}
        self.notes: list[str] = []
        """What was left out of wishes, one sentence each."""

    def run(self) -> Iterator[Step]:
        """Does what is left; yields each step once it is noted. Dropping the iterator is like a power cut there.

        Raises:
            StorageError: the record can't be read or written.
        """
        make_dir(self._paths.state, mode=0o755)
        self.record = self._document.load() or Record()
        work = {
            Step.TAKE: self._take,
            Step.WIPE: self._wipe,
            Step.REMOVE: self._remove,
            Step.GROW: self._grow,
            Step.NAME: self._name,
            Step.HOST_KEY: self._host_key,
        }
        was_taken = Step.TAKE in self.record.done
        while (step := next_step(self.record.done, self.failed)) is not None:
            try:
                changed = work[step]()
            except ApplianceError as error:
                self.failed[step] = error
                _log.error("%s: %s", step.value, error.message, extra={"code": error.code, "hint": error.hint})
                continue
            self.record = msgspec.structs.replace(changed, done=[*changed.done, step])
            self._document.save(self.record)
            yield step
        if was_taken:
            self._hand_over(self._wishes())

    # --- steps -----------------------------------------------------------------------------------------------------

    def _take(self) -> Record:
        partition = self._disk.seed_partition() if self._disk is not None else None
        own = self._paths.root / protocol.IMAGE_DIRECTORY
        if self._disk is not None and partition is not None:
            files = self._disk.read_seed(partition, (*TRUST_FILES, *cloud_seed.FILES))
            if not files:
                raise SeedError("the seed partition holds no seed", hint="bake the image anew", code="SEED-011")
            source = f"partition {partition.number} of {self._disk.path}"
            self._write(own, {name: files[name] for name in TRUST_FILES if name in files}, self._owner)
        elif (own / protocol.TRUST_FILE).exists():
            files, source = {}, str(own)
            self._give(own)
        elif not self._needs_seed:
            return msgspec.structs.replace(self.record, boot_id=self._boot_id)
        else:
            raise SeedError(
                f"this image has no seed, neither a partition {protocol.OWN_LABEL} nor {own}",
                hint="bake one into it: `image-builder build`",
                code="SEED-010",
            )
        wishes = self._named(self._wishes(), files.get(protocol.META_DATA_FILE, b""))
        cloud = cloud_seed.with_wishes(files, wishes, self.notes)
        self._write(self._paths.root / CLOUD_DIRECTORY, cloud, None)
        self._hand_over(wishes)
        return Record(
            source=source,
            partition=partition.number if partition else 0,
            boot_id=self._boot_id,
            has_hooks=cloud_seed.has_hooks(cloud.get(protocol.USER_DATA_FILE, b"#cloud-config\n")),
            done=self.record.done,
        )

    def _wipe(self) -> Record:
        if self._disk is not None and (partition := self._disk.seed_partition()) is not None:
            self._disk.wipe(partition)
        return self.record

    def _remove(self) -> Record:
        if self._disk is not None and (partition := self._disk.seed_partition()) is not None:
            self._disk.remove(partition.number)
        return self.record

    def _grow(self) -> Record:
        if self._disk is not None and self.record.partition:
            self._disk.grow(self.record.partition)
        return self.record

    def _name(self) -> Record:
        meta = self._paths.root / CLOUD_DIRECTORY / protocol.META_DATA_FILE
        try:
            name = meta_host_name(read_limited(meta, max_bytes=protocol.MAX_SEED_BYTES))
        except FileNotFoundError:
            name = ""
        if name:
            write_atomic(self._paths.root / "etc/hostname", f"{name}\n".encode(), mode=0o644)
            try:
                self._set_host_name(name)
            except OSError as error:
                _log.warning("the kernel keeps the old host name until the next boot: %s", error.strerror)
        return self.record

    def _host_key(self) -> Record:
        folder = self._paths.root / "etc/ssh"
        key, draft = folder / "ssh_host_ed25519_key", folder / ".first-boot-key"
        if key.exists() and key.stat().st_size:
            return self.record
        for left in (draft, draft.with_suffix(".pub")):
            remove_durably(left, scrub=True)
        child.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(draft)], timeout_s=60.0)
        public, private = draft.with_suffix(".pub").read_bytes(), draft.read_bytes()
        # The private one last: while it is missing both are made anew.
        write_atomic(key.with_suffix(".pub"), public, mode=0o644)
        write_atomic(key, private, mode=0o600)
        for left in (draft, draft.with_suffix(".pub")):
            remove_durably(left, scrub=True)
        return self.record

    # --- what they share -------------------------------------------------------------------------------------------

    def _wishes(self) -> Wishes:
        try:
            raw = read_limited(
                self._paths.root / protocol.IMAGE_DIRECTORY / protocol.SEED_FILE, max_bytes=protocol.MAX_SEED_BYTES
            )
            cluster_id = strict_json.decode(raw, protocol.Seed, max_bytes=protocol.MAX_SEED_BYTES).cluster_id
        except (FileNotFoundError, ApplianceError):
            cluster_id = ""  # a controller's image; or a broken seed, which the daemon tells of
        wishes = self._gather(cluster_id)
        self.notes += wishes.notes
        return wishes

    def _named(self, wishes: Wishes, meta_data: bytes) -> Wishes:
        """Gives an SE that nobody named a host name of its own: a fleet of one name can't be told apart in any log."""
        if not self._needs_seed or wishes.hostname or meta_host_name(meta_data):
            return wishes
        mark = self._own_mark()
        return msgspec.structs.replace(wishes, hostname=f"{protocol.DEFAULT_HOSTNAME}-{mark}") if mark else wishes

    def _hand_over(self, wishes: Wishes) -> None:
        """Gives the SE's daemon what it may know; without any wish, what an earlier boot heard stays."""
        seed = wishes.seed(cluster_id="", at=self._now)
        if seed is not None:
            folder = self._paths.root / protocol.WISHES_DIRECTORY
            self._write(folder, {protocol.SEED_FILE: strict_json.encode(seed)}, self._owner)

    def _write(self, folder: Path, files: dict[str, bytes], owner: tuple[int, int] | None) -> None:
        make_dir(folder.parent, mode=0o755)
        make_dir(folder)
        for name, content in files.items():
            write_atomic(folder / name, content)
        if owner is not None:
            self._give(folder)

    def _give(self, folder: Path) -> None:
        """Makes a folder and what lies in it the SE's daemon's: it destroys the image key there."""
        if self._owner is None:
            return
        for path in (*folder.iterdir(), folder):
            os.chown(path, *self._owner, follow_symlinks=False)
        sync_directory(folder)
