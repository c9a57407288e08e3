"""First boot in a real VM: our own system takes its seed, scrubs it, enrolls by itself, and stays who it is.

The controller runs on this machine; the VM reaches nothing but its two ports. What the VM did is read from its disk
after it was switched off, and asked over its own reverse path while it ran.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import machine_disk
import pytest
from fleet import UP_S, bake, controller_for_vms, in_vm, network, wait_up
from qemu import Vm
from rig import RunningController, until

from appliance.pki.identity import Identity
from appliance.protocol import strict_json
from image_builder import iso
from image_builder.seed import SeedFile

pytestmark = [pytest.mark.frozen]

GIB = 1 << 30


def forms_of_the_image_key(controller: RunningController) -> dict[str, bytes]:
    """Every form in which it lay on the disk, or could have come to lie there."""
    pem = controller.bundle.image_key.encode()
    body = b"".join(pem.splitlines()[1:-1])
    der = base64.b64decode(body)
    assert Identity.from_pkcs8(pem).pkcs8().reveal() == pem
    return {"PEM": pem.strip(), "base64": body, "DER": der, "seed": der[-32:]}


def found_on(raw: Path, forms: dict[str, bytes]) -> list[str]:
    """Which of `forms` are somewhere in a file; what was never written is passed over."""
    step, overlap = 16 << 20, 4096
    found: set[str] = set()
    with raw.open("rb", buffering=0) as stream:
        end, at, before = raw.stat().st_size, 0, b""
        while at < end:
            try:
                data = os.lseek(stream.fileno(), at, os.SEEK_DATA)
            except OSError:  # only a hole follows
                break
            if data != at:
                before = b""
            window = before + os.pread(stream.fileno(), step, data)
            found |= {name for name, form in forms.items() if form in window}
            at, before = data + len(window) - len(before), window[-overlap:]
    return sorted(found)


def partitions(raw: Path) -> list[dict[str, object]]:
    """The table as sfdisk reads it."""
    told = subprocess.run(["sfdisk", "--json", str(raw)], check=True, capture_output=True, timeout=60).stdout
    entries: list[dict[str, object]] = json.loads(told)["partitiontable"]["partitions"]
    return entries


def root_of(raw: Path) -> str:
    """The root file system inside a disk, as e2fsprogs take it."""
    start = next(one["start"] for one in partitions(raw) if one.get("name") == "APPLIANCE-ROOT")
    assert isinstance(start, int)
    return f"{raw}?offset={start * 512}"


def read_root(raw: Path, path: str) -> str:
    """A text file of the VM's root."""
    done = subprocess.run(["debugfs", "-R", f"cat {path}", root_of(raw)], capture_output=True, timeout=120, check=True)
    return done.stdout.decode("utf-8", "replace")


def journal_of(raw: Path, directory: Path) -> list[dict[str, str]]:
    """The VM's journal, entry by entry."""
    where = directory / "journal"
    where.mkdir()
    subprocess.run(
        ["debugfs", "-R", f"rdump /var/log/journal {where}", root_of(raw)], capture_output=True, timeout=300, check=True
    )
    files = [str(path) for path in where.rglob("*.journal")]
    assert files, "the VM kept no journal"
    words = [word for file in files for word in ("--file", file)]
    told = subprocess.run(["journalctl", *words, "-o", "json", "--all"], capture_output=True, timeout=300, check=True)
    return [json.loads(line) for line in told.stdout.splitlines()]


def booted(controller: RunningController, se: str, *, before: str, deadline_s: float) -> None:
    """Waits until the SE is UP again after another boot."""
    until(
        lambda: controller.operator.se(se).facts.boot_id not in {"", before},
        what=f"{se} said hello after its reboot", deadline_s=deadline_s,
    )  # fmt: skip
    wait_up(controller, se)


def check_disk(raw: Path, controller: RunningController, directory: Path) -> list[dict[str, str]]:
    """The image key is nowhere, the seed partition is gone, the root fills the disk. Returns the journal."""
    assert found_on(raw, forms_of_the_image_key(controller)) == [], "the image key is still on the VM's disk"
    assert [one.get("name") for one in partitions(raw)] == ["APPLIANCE-ESP", "APPLIANCE-ROOT"]
    told = subprocess.run(["sgdisk", "--verify", str(raw)], capture_output=True, text=True, timeout=60, check=True)
    assert "No problems found" in told.stdout, told.stdout
    told = subprocess.run(["dumpe2fs", "-h", root_of(raw)], capture_output=True, text=True, timeout=60, check=True)
    counts = {
        name: int(count) for name, count in re.findall(r"^(Block count|Block size): +(\d+)", told.stdout, re.MULTILINE)
    }
    rest = raw.stat().st_size - counts["Block count"] * counts["Block size"]
    assert rest < 132 << 20, "the root doesn't fill the disk"
    record = json.loads(read_root(raw, "/var/lib/appliance/first-boot"))["value"]
    assert record["done"] == ["take", "wipe", "remove", "grow", "name", "host key"]
    return journal_of(raw, directory)


def check_journal(entries: list[dict[str, str]]) -> None:
    """Nothing of ours failed, and nothing was denied to it."""
    texts = [str(entry.get("MESSAGE", "")) for entry in entries]
    ours = [entry for entry in entries if str(entry.get("_SYSTEMD_UNIT", "")).startswith("appliance")]
    assert ours
    denied = [text for text in texts if re.search(r"audit: type=1326|Failed at step|status=31/SYS", text)]
    assert denied == []
    said = [str(entry.get("MESSAGE", "")) for entry in ours]
    bad = [text for text in said if re.search(r"Operation not permitted|Permission denied|Read-only file|defect", text)]
    assert bad == []


def boot_and_check(tmp_path: Path, *, firmware: str, baked: Sequence[str], se: str, host_name: str) -> None:
    """One VM's life: first boot, a kill of its daemon, a reset, and what is on its disk after it.

    Args:
        tmp_path: for all of it.
        firmware: how it boots.
        baked: options of the build that name the VM.
        se: its name in the controller.
        host_name: what it calls itself.
    """
    with controller_for_vms(tmp_path / "controller") as controller:
        image = bake(tmp_path, controller, *baked, "--disk-size", "3G")
        before = found_on_image(tmp_path, image, controller)
        assert before == ["PEM"], "the image key lies on the image as PEM: the search below would find it"
        began = time.time()
        with Vm(tmp_path, image, firmware=firmware, network=network(controller)) as vm:  # type: ignore[arg-type]
            wait_up(controller, se)
            up_after_s = time.time() - began
            console = vm.console()
            assert re.search(r"appliance: first boot: the seed was taken from partition 3 of /dev/vda", console)
            vm.wait_for(r"appliance: se UP: node 1 up \[.*10\.0\.2\.15.*127\.1\.0\.1\]")
            # The VM's own figures, not this machine's; its first sample comes with a heartbeat after UP.
            memory = until(
                lambda: controller.operator.se(se).summary.memory_total_bytes, what="telemetry came",
                deadline_s=120,
            )  # fmt: skip
            detail = controller.operator.se(se)
            assert 0.85 * GIB < memory < GIB
            assert detail.summary.uptime_s is not None
            assert 0 < detail.summary.uptime_s < time.time() - began + 30
            assert detail.facts.macs == ["52:54:00:12:34:56"]
            assert detail.image_key_gone_at > 0
            kinds = [event.kind for event in controller.operator.events() if event.kind.startswith("se.image-key-")]
            assert kinds == ["se.image-key-destroyed"]
            vm.wait_for(r"Reached target .*Cloud-init target|Cloud-init v\. \S+ finished", deadline_s=UP_S)
            check_units(controller, tmp_path, se, host_name)
            keys = controller.operator.image_keys()
            assert [key.uses for key in keys] == [1]
            first = detail.facts.boot_id
            host_key = detail.host_keys

            vm.reset()
            booted(controller, se, before=first, deadline_s=UP_S)
            again = controller.operator.se(se)
            assert [key.uses for key in controller.operator.image_keys()] == [1], "it enrolled a second time"
            assert (again.summary.number, again.thumbprint, again.host_keys) == (1, detail.thumbprint, host_key)
            assert again.alarms == []
            assert len(controller.operator.ses()) == 1
            vm.power_button()
            vm.wait_off(deadline_s=300)
        print(f"UP {up_after_s:.0f} s after the power button, {time.time() - began:.0f} s in all")
        check_journal(check_disk(vm.raw_disk(), controller, tmp_path))


def found_on_image(directory: Path, image: Path, controller: RunningController) -> list[str]:
    """The control: what a search finds on the image as it was baked."""
    raw = directory / "control.raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(image), str(raw)], check=True, timeout=600)
    try:
        return found_on(raw, {"PEM": forms_of_the_image_key(controller)["PEM"]})
    finally:
        raw.unlink()


_UNIT = "systemctl show appliance-se.service --property"
_FED = f"{_UNIT} WatchdogTimestampMonotonic --value"


def unit(controller: RunningController, directory: Path, se: str, before: str = "") -> dict[str, str]:
    """Properties of the SE's unit as systemd in the VM tells them, after a shell's command line ran there."""
    wanted = "Type,ActiveState,SubState,MainPID,WatchdogUSec,NRestarts"
    told = in_vm(controller, directory, se, f"{before} {_UNIT} {wanted}").stdout
    return dict(line.split("=", 1) for line in told.splitlines())


def check_units(controller: RunningController, directory: Path, se: str, host_name: str) -> None:
    """Type=notify said READY, the watchdog is fed, and a killed daemon comes back and links anew."""
    feeding = f"fed=$({_FED}); test $fed -gt 0 || exit 9; until [ $({_FED}) != $fed ]; do sleep 1; done;"
    first = unit(controller, directory, se, f"[ $(hostname) = {host_name} ] || exit 8; {feeding}")
    assert (first["Type"], first["ActiveState"], first["SubState"]) == ("notify", "active", "running")
    assert first["WatchdogUSec"] == "1min 30s", "the longer limit of a start is over"
    # The path that brings the command dies with the daemon, before or after ssh is told that it ran.
    in_vm(controller, directory, se, f"kill -9 {first['MainPID']}", check=False)
    until(lambda: controller.state(se).startswith("DOWN"), what="the daemon is dead", deadline_s=120)
    wait_up(controller, se)
    second = unit(controller, directory, se)
    assert (second["ActiveState"], second["SubState"]) == ("active", "running")
    assert int(second["NRestarts"]) == int(first["NRestarts"]) + 1
    assert second["MainPID"] != first["MainPID"], (first, second)


def test_an_image_boots_by_uefi_enrolls_and_stays_who_it_is(tmp_path: Path) -> None:
    boot_and_check(tmp_path, firmware="uefi", baked=["--seed-name", "edge-1"], se="edge-1", host_name="edge-1")


@pytest.mark.slow
def test_an_image_boots_by_bios_enrolls_and_stays_who_it_is(tmp_path: Path) -> None:
    """Nobody named it: it makes a host name of its MAC address."""
    boot_and_check(tmp_path, firmware="bios", baked=[], se="se-1", host_name="appliance-se-123456")


# --- what else can come -----------------------------------------------------------------------------------------------


MARK = "foreign user-data ran here"


def evil_seed(rogue: RunningController) -> dict[str, bytes]:
    """All that an attacker with a cluster of their own would bake, and user-data that runs as root."""
    bundle = rogue.bundle
    seed = {
        "schema": 1, "cluster_id": "", "image_key_id": bundle.image_key_id, "image_id": "evil", "baked_at": 1,
        "controllers": bundle.controllers, "hints": {"name": "evil", "labels": {"by": "disk"}},
    }  # fmt: skip
    run = ["sh", "-c", f"echo {MARK} >/dev/console; echo {MARK} >/etc/marked"]
    return {
        "user-data": f"#cloud-config\nbootcmd: {json.dumps([run])}\nruncmd: {json.dumps([run])}\n".encode(),
        "meta-data": b"instance-id: evil\nlocal-hostname: evil\n",
        "seed.json": json.dumps(seed).encode(),
        "root-ca.pem": bundle.root_ca.encode(),
        "trust.json": strict_json.encode(bundle.trust),
        "image-key.pem": bundle.image_key.encode(),
    }


@pytest.mark.slow
def test_foreign_disks_do_not_choose_whom_a_vm_trusts(tmp_path: Path) -> None:
    """A CD labelled cidata and a disk with a partition of our own type and name, both with another cluster's trust."""
    with (
        controller_for_vms(tmp_path / "home") as home,
        controller_for_vms(tmp_path / "rogue") as rogue,
    ):
        image = bake(tmp_path, home, "--seed-name", "edge-1")
        evil = evil_seed(rogue)
        cd, disk = tmp_path / "evil.iso", tmp_path / "evil.disk"
        cd.write_bytes(iso.render([SeedFile(name, content, 0o644) for name, content in evil.items()], at=1))
        machine_disk.make(disk, evil)
        digest = hashlib.sha256(disk.read_bytes()).digest()
        with Vm(tmp_path, image, firmware="bios", network=network(home, rogue), cdroms=[cd], disks=[disk]) as vm:
            vm.wait_for("its trust document is left alone", deadline_s=UP_S)
            until(lambda: home.operator.ses(), what="the SE is enrolled at home", deadline_s=UP_S)
            (se,) = home.operator.ses()
            wait_up(home, se.name)
            # Hints are hints: they name the SE, and decide nothing.
            assert (se.name, se.labels) == ("evil", {"by": "disk"})
            vm.wait_for(r"Cloud-init v\. \S+ finished|Reached target .*Cloud-init target", deadline_s=UP_S)
            vm.power_button()
            vm.wait_off(deadline_s=300)
        assert rogue.operator.ses() == []
        assert MARK not in vm.console()
        raw = vm.raw_disk()
        root = read_root(raw, "/etc/appliance/seed/root-ca.pem")
        assert root.strip() == home.bundle.root_ca.strip()
        assert read_root(raw, "/etc/marked") == ""
        assert found_on(raw, forms_of_the_image_key(rogue)) == [], "another cluster's image key was taken over"
        assert hashlib.sha256(disk.read_bytes()).digest() == digest


@pytest.mark.slow
def test_a_copy_of_a_disk_that_booted_is_found_out(tmp_path: Path) -> None:
    with controller_for_vms(tmp_path / "controller") as controller:
        image = bake(tmp_path, controller, "--seed-name", "edge-1")
        with Vm(tmp_path, image, firmware="bios", network=network(controller)) as vm:
            wait_up(controller, "edge-1")
            vm.wait_for(r"Cloud-init v\. \S+ finished|Reached target .*Cloud-init target", deadline_s=UP_S)
            vm.power_button()
            vm.wait_off(deadline_s=300)
            first = controller.operator.se("edge-1").facts.boot_id
        shutil.copyfile(vm.overlay, tmp_path / "copy.qcow2")
        terms = {"firmware": "bios", "network": network(controller), "fresh": False}
        with Vm(tmp_path, image, **terms) as original:  # type: ignore[arg-type]
            booted(controller, "edge-1", before=first, deadline_s=UP_S)
            assert controller.operator.se("edge-1").alarms == []
            with Vm(tmp_path, image, name="copy", mac="52:54:00:12:34:57", **terms) as copy:  # type: ignore[arg-type]
                copy.wait_for(r"appliance: se DOWN: node 1 quarantined", deadline_s=UP_S)
                # While the copy is there: once it is off, what is left of it are events and audit.
                detail = controller.operator.se("edge-1")
                assert detail.facts.macs == ["52:54:00:12:34:56"], "the link that was there stays"
                assert any("a copy with this SE's key" in alarm for alarm in detail.alarms), detail.alarms
            assert original.pid
        assert [key.uses for key in controller.operator.image_keys()] == [1]


@pytest.mark.slow
def test_without_network_it_waits_and_without_approval_it_shows_its_key(tmp_path: Path) -> None:
    """A static address, no cable at first, and an image key that asks an operator."""
    with controller_for_vms(tmp_path / "controller") as controller:
        bundle = tmp_path / "approve.json"
        controller.command("image-key", "create", "--policy", "approve", "--out", str(bundle))
        image = bake(
            tmp_path,
            controller,
            "--seed-name",
            "edge-1",
            "--network-address",
            "10.0.2.33/24",
            "--network-dns",
            "10.0.2.3",
            bundle=bundle,
        )
        with Vm(tmp_path, image, firmware="uefi", network=network(controller)) as vm:
            vm.wait_for("BdsDxe: starting|Linux version|systemd", deadline_s=UP_S)
            vm.set_link(up=False)
            vm.wait_for(r"appliance: se ENROLLING: nonce: .*", deadline_s=UP_S)
            assert controller.operator.ses() == []
            vm.set_link(up=True)
            key = vm.wait_for(
                r"appliance: se ENROLLING: an operator must approve this SE; its key is SHA256:\S+ \[10\.0\.2\.33\]"
            )
            fingerprint = re.search(r"SHA256:\S+", key)
            assert fingerprint is not None
            controller.command("se", "approve", fingerprint[0])
            wait_up(controller, "edge-1")
            vm.wait_for(r"appliance: se UP: node 1 up \[10\.0\.2\.33, 127\.1\.0\.1\]")
            resolved = in_vm(controller, tmp_path, "edge-1", "cat /run/systemd/resolve/resolv.conf; hostname").stdout
            assert "nameserver 10.0.2.3\n" in resolved
            assert resolved.endswith("edge-1\n")
