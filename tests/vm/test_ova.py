"""An OVA as an importer takes it: its descriptor read by a third party's program, its disk on the devices named there,
and what the operator filled in told to the VM by the ISO transport.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path
from xml.sax.saxutils import quoteattr

import pycdlib
import pytest
from fleet import HERE, SEEN_AS, controller_for_vms, in_vm, wait_up
from images import AGENT, PROJECT, image_builder
from qemu import Disk, Vm
from rig import RunningController

from appliance.protocol import ovf, strict_json
from appliance.protocol.enroll import Policy
from appliance.protocol.operator import ImageKeyTermsWish, TokenWish
from image_builder import ova

pytestmark = [pytest.mark.frozen]

OTHER = "10.0.2.101"
"""Where enrolling is served for the VM: told by no image, so only a property can bring an SE there."""
DISKS: Mapping[str, Disk] = {"VirtualSCSI": "pvscsi"}
CARDS = {"VmxNet3": "vmxnet3"}


def read_by_cot(path: Path) -> str:
    """What the Common OVF Tool says about an OVA."""
    own = PROJECT / ".venv-scan" / "bin" / "cot"
    program = str(own) if own.exists() else shutil.which("cot")
    if program is None:
        pytest.skip("cot is not here; `scripts/test` makes .venv-scan, which has it")
    plain = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    done = subprocess.run(
        [program, "info", "--verbose", str(path)], capture_output=True, text=True, timeout=120, check=True,
        stdin=subprocess.DEVNULL, env={**plain, "COLUMNS": "200"},
    )  # fmt: skip
    return done.stdout


def told(text: str, pattern: str) -> str:
    """The one value that `pattern` finds."""
    (found,) = re.findall(pattern, text, re.MULTILINE)
    assert isinstance(found, str)
    return found


def environment_iso(path: Path, properties: Mapping[str, str]) -> Path:
    """Writes the disk of the ISO transport as vCenter does, with what else stands in such a document."""
    ours = {f"{ovf.CLASS}.{key}": value for key, value in properties.items()}
    lines = "".join(f"<Property oe:key={quoteattr(key)} oe:value={quoteattr(value)}/>" for key, value in ours.items())
    text = (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f'<Environment xmlns="{ovf.NAMESPACE}" xmlns:oe="{ovf.NAMESPACE}"'
        ' xmlns:ve="http://www.vmware.com/schema/ovfenv" oe:id="" ve:vCenterId="vm-42">\n'
        "<PlatformSection><Kind>VMware ESXi</Kind><Version>8.0.0</Version><Vendor>VMware, Inc.</Vendor>"
        "<Locale>en</Locale></PlatformSection>\n"
        f"<PropertySection>{lines}</PropertySection>\n"
        '<ve:EthernetAdapterSection><ve:Adapter ve:mac="52:54:00:12:34:56" ve:network="management"/>'
        "</ve:EthernetAdapterSection>\n</Environment>\n"
    ).encode()
    image = pycdlib.PyCdlib()
    image.new(interchange_level=3, vol_ident="OVF ENV", joliet=3, rock_ridge="1.09")
    image.add_fp(io.BytesIO(text), len(text), "/OVF_ENV.XML;1", rr_name=ovf.FILE_NAME, joliet_path=f"/{ovf.FILE_NAME}")
    image.write(str(path))
    image.close()
    return path


def network(controller: RunningController) -> str:
    """As `fleet.network`, with enrolling at `OTHER` alone."""
    words = ["user", "restrict=on"]
    for address, port in ((OTHER, controller.enroll_port), (SEEN_AS, controller.ssh_port)):
        command = f"{sys.executable} -I {HERE / 'relay.py'} {port}"
        words.append(f"guestfwd=tcp:{address}:{port}-cmd:{command}".replace(",", ",,"))
    return ",".join(words)


def bake_ova(directory: Path, controller: RunningController, *more: str | Path) -> tuple[Path, str, str]:
    """Bakes an OVA whose image key asks for a token. Returns the file, such a token, and the key's id."""
    made = controller.operator.create_image_key(ImageKeyTermsWish(policy=Policy.TOKEN))
    bundle = directory / "token.bundle.json"
    bundle.write_bytes(strict_json.encode(made.bundle))
    key = made.key.image_key_id
    token = controller.operator.create_token(TokenWish(image_key_id=key)).token
    image_builder(
        "build", "--name", "edge", "--bundle", bundle, "--agent-directory", AGENT, "--output-directory", directory,
        "--output-format", "ova", *more,
    )  # fmt: skip
    return directory / "edge.ova", token, key


def imported(path: Path, directory: Path) -> tuple[Path, Disk, str, int]:
    """Unpacks an OVA and returns what its descriptor asks for: disk, how it is attached, kind of card, MiB of memory.

    All of it is what the third party's program read.
    """
    said = read_by_cot(path)
    assert told(said, r"Transport types: (.+)$") == "iso com.vmware.guestInfo"
    assert sorted(re.findall(r"^  <(\w+)>", said, re.MULTILINE)) == sorted(one.key for one in ova.PROPERTIES)
    assert told(said, r"^  None \(default\) +(\d+ +\d+ \w+ +\d+ +\d+ +\d+) /").split() == [
        "2",
        "1",
        "GiB",
        "1",
        "0",
        "1",
    ]
    disk = told(said, r"^  (\S+\.vmdk) .* harddisk @ SCSI 0:0$")
    attached, card = (
        DISKS[told(said, r"SCSI device types: +(.+)$")],
        CARDS[told(said, r"Ethernet device types: +(.+)$")],
    )
    with tarfile.open(path) as archive:
        archive.extract(disk, directory, filter="data")
    return directory / disk, attached, card, 1024


def test_an_ova_comes_up_by_what_the_operator_filled_in(tmp_path: Path) -> None:
    with controller_for_vms(tmp_path / "controller") as controller:
        # an address that leads nowhere: RFC 5737
        archive, token, key = bake_ova(tmp_path, controller, "--controller", "192.0.2.1:8443")
        disk, attached, card, memory = imported(archive, tmp_path)
        properties = {
            "controllers": f"{OTHER}:{controller.enroll_port}", "token": token, "hostname": "branch-7", "dns": "",
            "address": "", "netmask": "", "gateway": "", "operator_key": "",
        }  # fmt: skip
        transport = environment_iso(tmp_path / "ovf-env.iso", properties)
        with Vm(
            tmp_path, disk, firmware="bios", attached=attached, card=card, memory_mib=memory,
            network=network(controller), cdroms=[transport],
        ) as vm:  # fmt: skip
            wait_up(controller, "branch-7")
            detail = controller.operator.se("branch-7")
            (used,) = controller.operator.tokens()
            assert (used.image_key_id, used.status, used.taken_by) == (key, "used", detail.summary.se_id)
            assert in_vm(controller, tmp_path, "branch-7", "hostname").stdout == "branch-7\n"
            assert token not in vm.console(), "the token stands on the console"
            vm.power_button()
            vm.wait_off(deadline_s=300)


HOOK = """#!/bin/sh
# What the kernel itself reads of a disk, said on the console.
mkdir -p /run/looked
for disk in /dev/sr*; do
    mount -t iso9660 -o ro "$disk" /run/looked || continue
    for file in /run/looked/*; do
        echo "looked: $(sha256sum <"$file" | cut -c-64) ${file##*/}" >/dev/ttyS0
    done
    umount /run/looked
done
"""


@pytest.mark.slow
def test_a_static_network_by_properties_and_disks_that_the_kernel_reads(tmp_path: Path) -> None:
    with controller_for_vms(tmp_path / "controller") as controller:
        hook = tmp_path / "look.sh"
        hook.write_text(HOOK)
        archive, token, _ = bake_ova(tmp_path, controller, "--hook", hook)
        disk, attached, card, memory = imported(archive, tmp_path)
        properties = {
            "controllers": f"{OTHER}:{controller.enroll_port}", "token": token, "hostname": "branch-8",
            "address": "10.0.2.77", "netmask": "255.255.255.0", "gateway": "10.0.2.2", "dns": "10.0.2.3",
        }  # fmt: skip
        transport = environment_iso(tmp_path / "ovf-env.iso", properties)
        seed, folder = tmp_path / "seed.iso", tmp_path / "seed"
        bundle = next((controller.paths.controller_state / "bundles").glob("*.json"))
        image_builder("seed", "--bundle", bundle, "--iso", seed, "--out", folder)
        with Vm(
            tmp_path, disk, firmware="bios", attached=attached, card=card, memory_mib=memory,
            network=network(controller), cdroms=[transport, seed],
        ) as vm:  # fmt: skip
            wait_up(controller, "branch-8")
            addresses = json.loads(in_vm(controller, tmp_path, "branch-8", "ip -j -4 addr show eth0").stdout)
            assert [one["local"] for one in addresses[0]["addr_info"]] == ["10.0.2.77"], "DHCP was asked as well"
            assert " via 10.0.2.2 " in in_vm(controller, tmp_path, "branch-8", "ip -4 route show default").stdout
            assert "10.0.2.3" in in_vm(controller, tmp_path, "branch-8", "resolvectl dns eth0").stdout
            looked = dict(reversed(line.split()) for line in re.findall(r"looked: (.+)", vm.console()))
            wanted = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}
            assert wanted.items() <= looked.items(), "the kernel reads another seed than was written"
            vm.power_button()
            vm.wait_off(deadline_s=300)
