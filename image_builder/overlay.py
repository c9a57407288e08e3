"""What our own minimal system has beside Debian's packages: the agent, its units, and the settings of others.

All of it is a tar that is laid over the tree of packages, so that a new agent doesn't install Debian anew.

Rules of the SE's system:

- cloud-init reads NoCloud from its own directory alone, which first boot fills from the seed partition. No disk that is
  attached later, no OVF environment and no metadata service can give it user-data, hence no code and no keys.
- sshd takes keys only, and only on the loopback, where the reverse path ends; unless an operator's key was baked in.
"""

from __future__ import annotations

import io
import re
import tarfile
from pathlib import Path
from typing import Literal

import msgspec

from appliance.errors import ImageError
from image_builder import agent as agent_files
from image_builder import kernel_update
from image_builder.agent import Agent

Role = Literal["se", "controller"]

FIRST_BOOT_UNIT = "appliance-first-boot.service"
ENABLED: dict[Role, set[str]] = {
    "se": {FIRST_BOOT_UNIT, "appliance-se.service", "appliance-console.path"},
    "controller": {FIRST_BOOT_UNIT},
}
"""An SE's daemon waits for the mode, which first boot sets; a controller's is enabled by `appliance mode set`."""
DESCRIPTION_FILE = "appliance-image.json"
ESP_NAME = "APPLIANCE-ESP"
"""GPT name of the boot partition."""
EXEMPT_SINCE = (9, 8)
"""OpenSSH that punishes sources, and knows PerSourcePenaltyExemptList."""

_CLOUD: dict[Role, str] = {
    "se": """\
# Only what first boot copies from the image's own seed partition into /var/lib/cloud/seed/nocloud is believed: a disk
# labelled cidata (fs_label), an OVF environment or a metadata service (datasource_list) could bring user-data else.
datasource_list: [NoCloud, None]
datasource:
  NoCloud:
    fs_label: null
# No default user: nobody logs in until an operator's key was baked in. The one named is there already and stays as is.
users: [{name: aviseuser, lock_passwd: false}]
# One stage less, each is a start of Python: what stands in the stage `config` elsewhere comes with the last one. Left
# out is what costs seconds and has nothing to do here: locale, grub, apt, passwords, and keys on the console.
cloud_config_modules: []
cloud_final_modules: [timezone, ntp, runcmd, package-update-upgrade-install, write-files-deferred, scripts-vendor,
  scripts-per-once, scripts-per-boot, scripts-per-instance, scripts-user, final-message, power-state-change]
""",
    "controller": """\
datasource_list: [NoCloud, None]
users: [default]
grub_dpkg: {enabled: false}
""",
}
# No `locale` and no `ssh_pwauth`: both are in the image, and cloud-init would start other programs to set them.
_CLOUD_BOTH = """\
system_info:
  default_user:
    name: operator
    no_user_group: true  # Debian has a group of that name, over which useradd stumbles
    lock_passwd: true
    groups: [sudo, adm, systemd-journal]
    sudo: ["ALL=(ALL) NOPASSWD:ALL"]
    shell: /bin/bash
  network:
    renderers: [networkd]
locale: "false"
disable_root: true
ssh_deletekeys: false
ssh_genkeytypes: [ed25519]
package_update: false
apt:
  preserve_sources_list: true
manage_etc_hosts: localhost
growpart:
  mode: auto
  devices: ["/"]
resize_rootfs: noblock
"""


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """One file or link of the overlay."""

    path: str
    """Without a slash before it."""
    text: str = ""
    mode: int = 0o644
    link: str = ""
    """What it leads to; then it has no text."""


def cloud_settings(role: Role) -> str:
    """Returns cloud-init's settings on our own system."""
    return _CLOUD[role] + _CLOUD_BOTH


def sshd_for_agent(openssh: tuple[int, int]) -> str:
    """Returns sshd's settings for the reverse path on any system."""
    exempt = "PerSourcePenaltyExemptList 127.0.0.1\n" if openssh >= EXEMPT_SINCE else ""
    return f"""\
# Every connection over the reverse path comes from 127.0.0.1, so one bad log-in must not punish that address.
{exempt}PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin no
Match User aviseuser
    AuthorizedKeysFile /var/lib/appliance/se/authorized_keys
    AllowTcpForwarding no
    X11Forwarding no
"""


def _enabling(unit: str, text: str) -> list[Place]:
    """Links a unit as its [Install] section says (systemd.unit(5))."""
    targets = " ".join(re.findall(r"^WantedBy=(.*)$", text, re.MULTILINE)).split()
    return [
        Place(path=f"etc/systemd/system/{target}.wants/{unit}", link=f"/usr/lib/systemd/system/{unit}")
        for target in targets
    ]


def places(role: Role, *, root_guid: str, openssh: tuple[int, int], units: dict[str, str]) -> list[Place]:
    """Returns the overlay's files without the agent.

    Args:
        role: whose system it is.
        root_guid: GPT GUID of the root partition.
        openssh: version of its sshd.
        units: name to text, as the agent carries them.
    """
    port = "" if role == "se" else "Port 2222\n"
    listen = "ListenAddress 127.0.0.1\n" if role == "se" else ""
    found = [
        Place(path="etc/hostname", text=f"appliance-{role}\n"),
        Place(path="etc/hosts", text="127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n"),
        Place(path="etc/fstab", text=f"PARTUUID={root_guid.lower()} / ext4 errors=remount-ro 0 1\n"),
        Place(path="etc/cloud/cloud.cfg.d/90-appliance.cfg", text=cloud_settings(role)),
        Place(
            path="etc/ssh/sshd_config.d/10-appliance.conf",
            text=f"HostKey /etc/ssh/ssh_host_ed25519_key\n{port}{sshd_for_agent(openssh)}",
        ),
        Place(path="etc/ssh/sshd_config.d/20-listen.conf", text=listen),
        Place(
            path="etc/systemd/system/ssh.service.d/10-appliance.conf",
            text="# The image holds no host keys: each VM makes its own.\n"
            "[Service]\nExecStartPre=\n"
            "ExecStartPre=/bin/sh -c 'test -s /etc/ssh/ssh_host_ed25519_key"
            ' || ssh-keygen -q -t ed25519 -N "" -C "" -f /etc/ssh/ssh_host_ed25519_key\'\n'
            "ExecStartPre=/usr/sbin/sshd -t\n",
        ),
        Place(
            path="etc/systemd/system/systemd-networkd-wait-online.service.d/10-appliance.conf",
            text="# A VM without network must come up all the same; the agent waits by itself.\n"
            "[Service]\nExecStart=\nExecStart=/usr/lib/systemd/systemd-networkd-wait-online --any --timeout=20\n",
        ),
        Place(
            path="etc/systemd/resolved.conf.d/10-appliance.conf",
            text="# Names come from DNS; these would listen on every address.\n[Resolve]\nLLMNR=no\nMulticastDNS=no\n",
        ),
        Place(path="etc/default/locale", text="LANG=C.UTF-8\n"),
        # Cleans up after scrubbing LVM snapshots, of which there are none: it only holds up the boot.
        Place(path="etc/systemd/system/e2scrub_reap.service", link="/dev/null"),
        Place(
            path="etc/modprobe.d/appliance.conf",
            text="# Loaded by the processor's name alone, which holds up the boot. This VM starts no VMs of its own,\n"
            "# and its clock rate is its hypervisor's matter.\n"
            "blacklist kvm_amd\nblacklist kvm_intel\nblacklist powernow_k8\n",
        ),
        # Lets the kernel start .pyc files by their name, which nobody does.
        Place(path="etc/systemd/system/systemd-binfmt.service", link="/dev/null"),
        Place(
            path="etc/systemd/journald.conf.d/10-appliance.conf",
            text="[Journal]\nStorage=persistent\nSystemMaxUse=64M\n",
        ),
    ]
    if role == "se":  # its modules are those of the last stage
        found.append(Place(path="etc/systemd/system/cloud-config.service", link="/dev/null"))
    kernel = kernel_update.script(esp_name=ESP_NAME)
    found.append(Place(path=kernel_update.SCRIPT_FILE, text=kernel, mode=0o755))
    found += [Place(path=hook, link=f"/{kernel_update.SCRIPT_FILE}") for hook in kernel_update.HOOKS]
    for name, text in sorted(units.items()):
        if name.endswith(".sysusers"):
            found.append(Place(path="usr/lib/sysusers.d/appliance.conf", text=text))
            continue
        found.append(Place(path=f"usr/lib/systemd/system/{name}", text=text))
        if name in ENABLED[role]:
            found += _enabling(name, text)
    return found


def units_of(agent: Agent) -> dict[str, str]:
    """Returns the units that the agent carries, name to text.

    Raises:
        ImageError: it carries none.
    """
    directory = agent.directory / agent_files.UNITS
    found = {path.name: path.read_text(encoding="utf-8") for path in directory.glob("appliance*")}
    if not found:
        raise ImageError(
            f"the agent in {agent.directory} carries no units in {agent_files.UNITS}", hint="build it anew"
        )
    return found


def write(path: Path, what: list[Place], agent: Agent, *, description: bytes, epoch: int) -> None:
    """Writes the overlay's tar: everything owned by root and dated `epoch`."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        agent_files.add_to(archive, agent, prefix="usr/lib/appliance", epoch=epoch)
        link = Place(path="usr/bin/appliance", link="../lib/appliance/appliance")
        told = Place(path=f"usr/lib/{DESCRIPTION_FILE}", text=description.decode())
        for place in (*what, link, told):
            member = tarfile.TarInfo(place.path)
            member.mtime = epoch
            if place.link:
                member.type, member.linkname, member.mode = tarfile.SYMTYPE, place.link, 0o777
                archive.addfile(member)
                continue
            content = place.text.encode()
            member.size, member.mode = len(content), place.mode
            archive.addfile(member, io.BytesIO(content))
