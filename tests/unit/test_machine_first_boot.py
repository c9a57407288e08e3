"""First boot on disk images: every step, cut after each, and what it does with wishes, attackers and failures."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import machine_disk
import pytest
from cluster_bundle import NOW, Cluster
from machine_disk import META_DATA, SEED_BYTES, SEED_START, USER_DATA

from appliance.errors import ChildError, StorageError
from appliance.machine import cloud_seed, console, role, wishes
from appliance.machine.boot import own_mark
from appliance.machine.disk import Disk
from appliance.machine.first_boot import FirstBoot, Record, Step, next_step
from appliance.machine.media import Medium
from appliance.machine.wishes import Wishes
from appliance.paths import Paths
from appliance.protocol import seed as protocol
from appliance.protocol import strict_json
from appliance.protocol.seed import Hints
from appliance.runtime import mode
from appliance.runtime.clock import SystemClock
from appliance.runtime.mode import Mode
from appliance.se import seed as se_seed
from appliance.settings import Settings, Users
from image_builder import cloud
from image_builder.seed import Wishes as BakeWishes
from image_builder.seed import bake

CLUSTER = Cluster()
NOBODY = Wishes()


def seed_files(name: str = "edge-1", **more: str) -> dict[str, bytes]:
    baked = bake(
        CLUSTER.bundle(), BakeWishes(name=name), baked_at=NOW, now=NOW, target=cloud.Target.OWN,
        cloud_wishes=cloud.CloudWishes(**more),  # type: ignore[arg-type]
    )  # fmt: skip
    return {one.name: one.content for one in baked.files}


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    root = tmp_path / "root"
    (root / "etc/ssh").mkdir(parents=True)
    return Paths(root)


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return machine_disk.make(tmp_path / "disk", seed_files())


class Boot(FirstBoot):
    """One boot of a machine whose kernel keeps what it is told."""

    def __init__(
        self, paths: Paths, disk: Disk | None, *, wished: Wishes = NOBODY, boot_id: str = "boot-1",
        gather: Callable[[str], Wishes] | None = None, own_mark: str = "12ab56",
    ) -> None:  # fmt: skip
        self.host_names: list[str] = []
        owner = (65534, 65534) if os.geteuid() == 0 else None
        super().__init__(
            paths, disk=disk, gather=gather or (lambda _: wished), owner=owner, boot_id=boot_id, now=NOW,
            own_mark=lambda: own_mark, set_host_name=self.host_names.append,
        )  # fmt: skip


def image_key_is_on(path: Path) -> bool:
    return CLUSTER.image_key.pkcs8().reveal().splitlines()[1] in path.read_bytes()


def check_whole(paths: Paths, disk: Disk, *, host_name: str = "edge-1") -> None:
    """What must hold after first boot, however often it was cut."""
    given = paths.root / "etc/appliance/seed"
    assert {file.name for file in given.iterdir()} == {"seed.json", "root-ca.pem", "trust.json", "image-key.pem"}
    assert given.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in given.iterdir()} == {0o600}
    if os.geteuid() == 0:
        assert {file.stat().st_uid for file in (given, *given.iterdir())} == {65534}
    loaded = se_seed.load(paths, setting="")
    assert loaded.image_key is not None
    taken = paths.root / "var/lib/cloud/seed/nocloud"
    assert {file.name for file in taken.iterdir()} == {"user-data", "meta-data", "network-config"}
    assert not image_key_is_on(disk.path)
    assert disk.path.read_bytes()[SEED_START : SEED_START + SEED_BYTES - (1 << 20)] == bytes(SEED_BYTES - (1 << 20))
    assert disk.seed_partition() is None
    assert (paths.root / "etc/hostname").read_text() == f"{host_name}\n"
    key = paths.root / "etc/ssh/ssh_host_ed25519_key"
    assert key.stat().st_mode & 0o777 == 0o600
    assert key.with_suffix(".pub").read_text().startswith("ssh-ed25519 ")
    assert sorted(file.name for file in key.parent.iterdir()) == ["ssh_host_ed25519_key", "ssh_host_ed25519_key.pub"]


def test_a_first_boot_takes_all_steps_and_the_next_none(paths: Paths, disk: Disk) -> None:
    assert image_key_is_on(disk.path)
    boot = Boot(paths, disk)
    assert list(boot.run()) == list(Step)
    assert boot.host_names == ["edge-1"]
    check_whole(paths, disk)
    key = (paths.root / "etc/ssh/ssh_host_ed25519_key").read_bytes()
    (paths.root / "etc/appliance/seed/image-key.pem").unlink()  # spent meanwhile
    again = Boot(paths, disk, boot_id="boot-2")
    assert list(again.run()) == []
    assert not (paths.root / "etc/appliance/seed/image-key.pem").exists()
    assert (paths.root / "etc/ssh/ssh_host_ed25519_key").read_bytes() == key
    assert again.record.boot_id == "boot-1"


@pytest.mark.parametrize("cut", list(Step))
def test_cut_after_any_step_it_finishes_at_the_next_boot(paths: Paths, disk: Disk, cut: Step) -> None:
    for step in Boot(paths, disk).run():
        if step is cut:
            break
    list(Boot(paths, disk, boot_id="boot-2").run())
    check_whole(paths, disk)


@pytest.mark.parametrize("cut", list(Step))
def test_cut_before_a_step_is_noted_it_may_be_repeated(
    paths: Paths, disk: Disk, cut: Step, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The effect is there and the note of it isn't: the worst moment for a power cut."""

    class PowerCutError(BaseException):
        pass

    boot = Boot(paths, disk)
    save = boot._document.save

    def save_or_die(record: Record) -> None:
        if cut in record.done:
            raise PowerCutError
        save(record)

    monkeypatch.setattr(boot._document, "save", save_or_die)
    with pytest.raises(PowerCutError):
        list(boot.run())
    list(Boot(paths, disk, boot_id="boot-2").run())
    check_whole(paths, disk)


def test_each_vm_of_one_image_has_a_host_key_of_its_own(tmp_path: Path) -> None:
    keys = set()
    for name in ("a", "b"):
        (tmp_path / name / "etc/ssh").mkdir(parents=True)
        list(Boot(Paths(tmp_path / name), machine_disk.make(tmp_path / f"{name}.disk", seed_files())).run())
        keys.add((tmp_path / name / "etc/ssh/ssh_host_ed25519_key.pub").read_text())
    assert len(keys) == 2


def test_every_decision_of_the_plan() -> None:
    assert next_step([], []) is Step.TAKE
    assert next_step([], [Step.TAKE]) is Step.HOST_KEY
    assert next_step([Step.TAKE], [Step.WIPE]) is Step.NAME, "what isn't wiped isn't removed either"
    assert next_step([Step.TAKE, Step.WIPE, Step.REMOVE], [Step.GROW]) is Step.NAME
    assert next_step(list(Step), []) is None
    assert next_step([], [Step.TAKE, Step.HOST_KEY]) is None


# --- what can be wrong -----------------------------------------------------------------------------------------------


def test_an_image_without_a_seed_says_so_and_still_has_a_host_key(paths: Paths, tmp_path: Path) -> None:
    boot = Boot(paths, None)
    assert list(boot.run()) == [Step.HOST_KEY]
    assert boot.failed[Step.TAKE].code == "SEED-010"
    empty = Boot(paths, machine_disk.make(tmp_path / "empty", {}))
    assert list(empty.run()) == []
    assert empty.failed[Step.TAKE].code == "SEED-011"


def test_the_images_own_folder_is_a_seed(paths: Paths) -> None:
    own = paths.root / "etc/appliance/seed"
    own.mkdir(parents=True)
    for name, content in seed_files().items():
        if not name.endswith("-data"):
            (own / name).write_bytes(content)
    boot = Boot(paths, None)
    assert list(boot.run()) == list(Step)
    assert boot.record.source == str(own)
    if os.geteuid() == 0:
        assert (own / "image-key.pem").stat().st_uid == 65534


class Stubborn(Disk):
    """A disk that refuses some things: the border of our system."""

    refuses: str = ""

    def wipe(self, partition: object) -> None:
        if self.refuses == "wipe":
            raise StorageError("the disk fails")
        super().wipe(partition)  # type: ignore[arg-type]

    def grow(self, number: int) -> None:
        if self.refuses == "grow":
            raise ChildError("resize2fs ended with exit code 1")
        super().grow(number)


@pytest.mark.parametrize(("refuses", "done"), [
    ("wipe", [Step.TAKE, Step.NAME, Step.HOST_KEY]),
    ("grow", [Step.TAKE, Step.WIPE, Step.REMOVE, Step.NAME, Step.HOST_KEY]),
])  # fmt: skip
def test_a_disk_that_fails_does_not_keep_the_vm_from_enrolling(
    paths: Paths, disk: Disk, refuses: str, done: list[Step]
) -> None:
    stubborn = Stubborn(disk.path, root=2, root_device=None)
    stubborn.refuses = refuses
    boot = Boot(paths, stubborn)
    assert list(boot.run()) == done
    assert list(boot.failed) == [Step(refuses)]
    list(Boot(paths, disk, boot_id="boot-2").run())
    check_whole(paths, disk)


def test_a_damaged_file_on_the_partition_is_told_and_nothing_is_wiped(paths: Paths, tmp_path: Path) -> None:
    disk = machine_disk.make(tmp_path / "disk", {**seed_files(), "trust.json": bytes(protocol.MAX_BUNDLE_BYTES + 1)})
    boot = Boot(paths, disk)
    list(boot.run())
    assert "trust.json has" in boot.failed[Step.TAKE].message
    assert image_key_is_on(disk.path)


# --- wishes ----------------------------------------------------------------------------------------------------------


def local_seed(**more: object) -> bytes:
    terms: dict[str, object] = {"schema": 1, "cluster_id": "", "image_key_id": "", "image_id": "", "baked_at": NOW}
    return strict_json.encode({**terms, "controllers": [], **more})


def cidata(**files: bytes) -> Medium:
    return Medium("sr0", "CIDATA", {name.replace("_", "-", 1) if "config" in name else name.replace("_", "."): content
                                    for name, content in files.items()})  # fmt: skip


def environment(**properties: str) -> bytes:
    lines = "".join(f'<Property oe:key="appliance.{key}" oe:value="{value}"/>' for key, value in properties.items())
    space = "http://schemas.dmtf.org/ovf/environment/1"
    return (
        f'<?xml version="1.0"?><Environment xmlns="{space}" xmlns:oe="{space}">'
        f"<PropertySection>{lines}</PropertySection></Environment>"
    ).encode()


def test_a_foreign_disk_gives_hints_and_never_an_anchor(paths: Paths, disk: Disk) -> None:
    """A disk labelled cidata with another cluster's root, trust and user-data, and with hints beside them."""
    other = Cluster()
    foreign = {one.name: one.content for one in bake(
        other.bundle(), BakeWishes(), baked_at=NOW, now=NOW, target=cloud.Target.OWN).files}  # fmt: skip
    seed = local_seed(controllers=["198.51.100.9:8443"], hints={"name": "by-disk", "labels": {"site": "north"}})
    medium = Medium("sr0", "cidata", {**foreign, "seed.json": seed, "user-data": b"#!/bin/sh\n"})
    wished = wishes.gather([medium], [], cluster_id="c-1")
    assert any("trust document is left alone" in note for note in wished.notes)
    list(Boot(paths, disk, wished=wished).run())
    check_whole(paths, disk, host_name="by-disk")
    loaded = se_seed.load(paths, setting="")
    assert loaded.document.roots == [CLUSTER.authority.certificate_pem.decode()]
    assert loaded.image_key is not None
    assert loaded.image_key.public_line == CLUSTER.image_key.public_line
    assert loaded.controllers == ("c.example:8443", "198.51.100.9:8443")
    assert loaded.hints == Hints(name="by-disk", labels={"site": "north"})
    config = wishes.read_lines((paths.root / "var/lib/cloud/seed/nocloud/user-data").read_bytes())
    assert config == {"hostname": "by-disk", "preserve_hostname": False}


def test_a_disk_of_another_cluster_and_a_broken_one_are_left_out() -> None:
    foreign = Medium("sr0", "cidata", {"seed.json": local_seed(cluster_id="c-2", controllers=["192.0.2.1"])})
    broken = Medium("sr1", "CIDATA", {"seed.json": b"{"})
    unlabelled = Medium("sdb1", "BACKUP", {"seed.json": local_seed(controllers=["192.0.2.2"])})
    found = wishes.gather([foreign, broken, unlabelled], [], cluster_id="c-1")
    assert found.controllers == []
    assert "it is for cluster 'c-2'" in found.notes[0]
    assert "seed.json left out" in found.notes[1]
    assert found.seed(cluster_id="", at=NOW) is None


def test_an_ovf_environment_becomes_network_name_key_and_addresses(paths: Paths, disk: Disk) -> None:
    _, line = cluster_key()
    document = environment(
        controllers="192.0.2.1 198.51.100.1:9443", address="192.0.2.10", netmask="255.255.255.0", gateway="192.0.2.254",
        dns="192.0.2.53", hostname="Edge_7.example", operator_key=line,
    )  # fmt: skip
    wished = wishes.gather([Medium("sr0", "OVF ENV", {"ovf-env.xml": document})], [], cluster_id="c-1")
    assert wished.notes == []
    boot = Boot(paths, disk, wished=wished)
    list(boot.run())
    assert boot.host_names == ["edge-7-example"]
    taken = paths.root / "var/lib/cloud/seed/nocloud"
    network = wishes.read_lines((taken / "network-config").read_bytes())
    assert network == {"version": 2, "ethernets": {"eth0": {
        "addresses": ["192.0.2.10/24"], "routes": [{"to": "0.0.0.0/0", "via": "192.0.2.254"}],
        "nameservers": {"addresses": ["192.0.2.53"]},
    }}}  # fmt: skip
    config = wishes.read_lines((taken / "user-data").read_bytes())
    assert config["hostname"] == "edge-7-example"
    assert config["ssh_authorized_keys"] == [line]
    assert config["write_files"][-1]["path"] == cloud_seed.LISTEN_FILE
    assert wishes.meta_host_name((taken / "meta-data").read_bytes()) == "edge-7-example"
    loaded = se_seed.load(paths, setting="")
    assert loaded.controllers == ("c.example:8443", "192.0.2.1:8443", "198.51.100.1:9443")
    assert loaded.hints.name == "Edge_7.example"


def cluster_key() -> tuple[object, str]:
    from appliance.pki import ssh_keys

    return ssh_keys.generate()


def test_dns_alone_keeps_dhcp_and_guestinfo_is_heard_last() -> None:
    first = Medium("sr0", "OVF ENV", {"ovf-env.xml": environment(dns="192.0.2.53", hostname="a")})
    found = wishes.gather([first], [("guestinfo.ovfEnv", environment(hostname="b"))], cluster_id="")
    assert wishes.read_lines(found.network)["ethernets"] == {
        "eth0": {"dhcp4": True, "nameservers": {"addresses": ["192.0.2.53"]}}
    }
    assert (found.hostname, found.sources) == ("b", ["sr0", "guestinfo.ovfEnv"])


@pytest.mark.parametrize(("document", "said"), [
    (b"<!DOCTYPE x><Environment/>", "DOCTYPE"),
    (environment(operator_key="ssh-rsa AAAA"), "operator_key"),
    (environment(token="nonsense"), "token"),
])  # fmt: skip
def test_a_wrong_environment_is_left_out_and_told(document: bytes, said: str) -> None:
    found = wishes.gather([Medium("sr0", "", {"ovf-env.xml": document})], [], cluster_id="")
    assert said in " ".join(found.notes)
    assert (found.token, found.operator_key, found.controllers) == ("", "", [])


def test_every_network_that_the_builder_writes_is_taken() -> None:
    nets = [
        cloud.Network(
            addresses=["192.0.2.10/24", "2001:db8::2/64"], gateways=["192.0.2.1", "2001:db8::1"], dns=["192.0.2.53"]
        ),
        cloud.Network(vlan=12, dns=["192.0.2.53"]),
        cloud.Network(interface="en*", addresses=["192.0.2.10/24"]),
        cloud.Network(interface="eth1"),
    ]
    for net in nets:
        raw = cloud.network_config(net, target=cloud.Target.OWN)
        assert raw is not None
        # what is empty may go
        assert wishes.read_lines(wishes.checked_network(raw)) == wishes.read_lines(raw.replace(b', "routes": []', b""))


@pytest.mark.parametrize("raw", [
    b"version: 2\nethernets: {}\nbonds: {}\n",
    b'version: 2\nethernets: {"eth0": {"dhcp4": true, "set-name": "x"}}\n',
    b'version: 2\nethernets: {"eth0": {"addresses": ["$(reboot)"]}}\n',
    b'version: 2\nethernets: {"eth0": {"routes": [{"to": "x", "via": "192.0.2.1"}]}}\n',
    b'version: 2\nethernets: {"eth0": {"nameservers": {"addresses": ["x"]}}}\n',
    b"version: 1\nethernets: {}\n",
    b"network:\n  version: 2\n",
    b"\xff\xfe",
    b"version: [2\n",
])  # fmt: skip
def test_another_network_config_is_left_out(raw: bytes) -> None:
    found = wishes.gather([Medium("sr0", "cidata", {"network-config": raw})], [], cluster_id="")
    assert found.network == b""
    assert "network-config left out" in found.notes[0]


def test_later_boots_hear_new_wishes_and_forget_none(paths: Paths, disk: Disk) -> None:
    list(Boot(paths, disk).run())
    wished = wishes.gather(
        [Medium("sr0", "cidata", {"seed.json": local_seed(controllers=["192.0.2.9:8443"])})], [], cluster_id="c-1"
    )
    list(Boot(paths, disk, boot_id="boot-2", wished=wished).run())
    list(Boot(paths, disk, boot_id="boot-3").run())
    assert se_seed.load(paths, setting="").controllers == ("c.example:8443", "192.0.2.9:8443")
    file = paths.root / "etc/appliance/wishes/seed.json"
    assert file.stat().st_mode & 0o777 == 0o600


def test_the_cluster_of_the_image_is_known_when_wishes_are_gathered(paths: Paths, disk: Disk) -> None:
    asked: list[str] = []

    def gather(cluster_id: str) -> Wishes:
        asked.append(cluster_id)
        return NOBODY

    list(Boot(paths, disk, gather=gather).run())
    assert asked == ["c-1"]


@pytest.mark.parametrize(("baked", "on_disk", "expected"), [
    ("", {}, "appliance-se-12ab56"),
    ("edge-1", {}, "edge-1"),
    ("", {"name": "Edge_7.north"}, "edge-7-north"),
    ("edge-1", {"name": "branch-7"}, "branch-7"),
    ("edge-1", {"name": "branch-7", "hostname": "vm-7"}, "vm-7"),
    ("edge-1", {"hostname": "vm-7"}, "vm-7"),
])  # fmt: skip
def test_the_host_name_is_what_was_wished_else_one_of_its_own(
    paths: Paths, tmp_path: Path, baked: str, on_disk: dict[str, str], expected: str
) -> None:
    """A disk of `image-builder seed` for one VM, over the name in the image that all of them share."""
    disk = machine_disk.make(tmp_path / "named", seed_files(baked))
    media = []
    if on_disk:
        own = bake(CLUSTER.bundle(), BakeWishes(**on_disk), baked_at=NOW, now=NOW)  # type: ignore[arg-type]
        media = [Medium("sr0", "CIDATA", {file.name: file.content for file in own.files})]
    boot = Boot(paths, disk, wished=wishes.gather(media, [], cluster_id="c-1"))
    list(boot.run())
    assert boot.host_names == [expected]
    assert (paths.root / "etc/hostname").read_text() == f"{expected}\n"
    taken = paths.root / "var/lib/cloud/seed/nocloud"
    assert wishes.meta_host_name((taken / "meta-data").read_bytes()) == expected, "cloud-init would set another"
    config = wishes.read_lines((taken / "user-data").read_bytes())
    assert config["hostname"] == expected


def test_a_vm_that_nothing_tells_from_others_keeps_the_images_name(paths: Paths, tmp_path: Path) -> None:
    boot = Boot(paths, machine_disk.make(tmp_path / "unnamed", seed_files("")), own_mark="")
    assert list(boot.run()) == list(Step)
    assert boot.host_names == []


def test_a_vms_own_mark_is_the_end_of_its_mac_address(tmp_path: Path) -> None:
    assert own_mark(tmp_path) == ""
    machine_id, address = tmp_path / "etc/machine-id", tmp_path / "sys/class/net/eth0/address"
    for path in (machine_id, address):
        path.parent.mkdir(parents=True)
    machine_id.write_text("0123456789abcdef0123456789abcdef\n")
    assert own_mark(tmp_path) == "012345"
    address.write_text("52:54:00:AB:cd:56\n")
    assert own_mark(tmp_path) == "abcd56"
    address.write_text("\n")
    assert own_mark(tmp_path) == "012345"


def test_user_data_of_another_form_is_passed_on_as_it_is() -> None:
    notes: list[str] = []
    files = {"user-data": b"#cloud-config\nusers:\n  - x\n", "meta-data": META_DATA}
    found = cloud_seed.with_wishes(files, Wishes(hostname="b"), notes)
    assert found["user-data"] == files["user-data"]
    assert wishes.meta_host_name(found["meta-data"]) == "b"
    assert len(notes) == 1


def test_the_role_is_started_once() -> None:
    """By first boot, or by cloud-init where hooks come before it: each start of the program costs a slow VM seconds."""
    start = ["appliance", "mode", "set", "se"]

    def left(**more: object) -> object:
        hooks = cloud.CloudWishes(**more)  # type: ignore[arg-type]
        raw = cloud.user_data(hooks, target=cloud.Target.OWN, hostname="a", mode="se", last=[["true"]] if more else [])
        found = cloud_seed.with_wishes({"user-data": raw}, NOBODY, [])
        return wishes.read_lines(found["user-data"]).get("runcmd")

    assert left() is None
    assert left(timezone="Europe/Berlin") == [["true"]]
    assert start in left(hooks=[cloud.Hook("a.sh", b"#!/bin/sh\n")])  # type: ignore[operator]
    by_hand = b"#cloud-config\nruncmd:\n  - [appliance, mode, set, se]\n"
    assert cloud_seed.with_wishes({"user-data": by_hand}, NOBODY, [])["user-data"] == by_hand


def test_hooks_are_seen() -> None:
    hooked = cloud.user_data(
        cloud.CloudWishes(hooks=[cloud.Hook("a.sh", b"#!/bin/sh\n")]), target=cloud.Target.OWN, hostname="", mode="se"
    )
    assert cloud_seed.has_hooks(hooked)
    assert cloud_seed.has_hooks(b"#!/bin/sh\n"), "what can't be read may hold anything"
    assert not cloud_seed.has_hooks(USER_DATA)
    assert not cloud_seed.has_hooks(b"#cloud-config\n")


def test_the_console_shows_one_line_on_each_that_the_kernel_uses(tmp_path: Path) -> None:
    active = tmp_path / "sys/class/tty/console/active"
    active.parent.mkdir(parents=True)
    active.write_text("tty0 ttyS0 gone\n")
    for name in ("tty0", "ttyS0", "other"):
        (tmp_path / name).write_bytes(b"")
    console.say("first boot: \x1b[2J\u00e9 done", sys=tmp_path / "sys", dev=tmp_path)
    assert (tmp_path / "tty0").read_bytes() == b"\r\nappliance: first boot: ?[2J? done\r\n"
    assert (tmp_path / "ttyS0").read_bytes() == (tmp_path / "tty0").read_bytes()
    assert (tmp_path / "other").read_bytes() == b""
    assert not (tmp_path / "gone").exists()
    console.say("x", sys=tmp_path / "nowhere", dev=tmp_path)


# --- the role --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("terms", "due"), [
    ({"role": Mode.SE, "is_told": False, "has_hooks": False, "is_later_boot": False}, True),
    ({"role": Mode.SE, "is_told": False, "has_hooks": True, "is_later_boot": False}, False),
    ({"role": Mode.SE, "is_told": False, "has_hooks": True, "is_later_boot": True}, True),
    ({"role": Mode.SE, "is_told": True, "has_hooks": False, "is_later_boot": True}, False),
    ({"role": Mode.CONTROLLER, "is_told": False, "has_hooks": False, "is_later_boot": True}, False),
    ({"role": Mode.NONE, "is_told": False, "has_hooks": False, "is_later_boot": True}, False),
])  # fmt: skip
def test_when_the_role_is_set(terms: dict[str, object], due: bool) -> None:
    assert role.is_due(**terms) is due  # type: ignore[arg-type]


def test_the_role_is_the_images(paths: Paths) -> None:
    assert role.of_image(paths) is Mode.NONE
    file = paths.root / role.DESCRIPTION_FILE
    file.parent.mkdir(parents=True)
    for text, expected in (('{"role": "se", "more": 1}', Mode.SE), ('{"role": "x"}', Mode.NONE), ("{", Mode.NONE)):
        file.write_text(text)
        assert role.of_image(paths) is expected


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_an_se_starts_by_its_mode_alone(paths: Paths) -> None:
    settings = Settings(users=Users(se="nobody", controller="other"))
    role.start(paths, settings, SystemClock())
    assert mode.running_role(paths) is Mode.SE
    assert mode.load(paths).phase is mode.Phase.DONE
    uid, _ = role.user_of(settings) or (0, 0)
    assert paths.lock.stat().st_uid == paths.se_state.stat().st_uid == uid != 0
    assert role.user_of(Settings(users=Users(se="no-such-user"))) is None


def test_a_token_is_not_shown() -> None:
    assert "token" not in repr(Wishes(token="secret-token"))
