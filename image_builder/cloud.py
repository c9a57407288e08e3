"""cloud-init's part of a seed: `user-data` and `network-config` from what a recipe wishes. Pure: no file, no clock.

What is written is cloud-config and network config version 2 (cloudinit.readthedocs.io); both as JSON values in YAML,
since every JSON text is a YAML text and needs no quoting rules of its own.

Three kinds of disk get it: one with the agent (a seed alone: `IMAGE`), our own minimal system (`OWN`), and any other
system, where the first thing to do is to install the agent from the disk's own partition (`FOREIGN`).
"""

from __future__ import annotations

import base64
import enum
import ipaddress
import json
import re
from collections.abc import Sequence
from typing import Any

import msgspec

from appliance.errors import ApplianceError
from appliance.pki import ssh_keys

AGENT_TAR = "appliance.tar"
INSTALL_SCRIPT = "install.sh"
HOOKS_DIRECTORY = "/etc/appliance/hooks"
MAX_HOOK_BYTES = 16 * 1024
MAX_HOOKS = 16
"""cloud-init's sources cut user-data at 64 KiB or less; base64 costs a third."""

_INTERFACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,14}|[A-Za-z0-9_.*?-]{1,15}")
_TIMEZONE = re.compile(r"[A-Za-z0-9_+-]{1,32}(/[A-Za-z0-9_+-]{1,32}){0,2}")
_NTP = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.:-]{0,252}[A-Za-z0-9])?")
_HOOK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


class Target(enum.Enum):
    """What the user-data is for."""

    IMAGE = "image"
    OWN = "own"
    FOREIGN = "foreign"


class Network(msgspec.Struct, frozen=True, kw_only=True):
    """The management network. Without addresses: DHCP."""

    interface: str = ""
    """Name or glob; empty takes the first (`eth0` on our own system, `e*` elsewhere)."""
    addresses: Sequence[str] = ()
    """`address/prefix` each."""
    gateways: Sequence[str] = ()
    dns: Sequence[str] = ()
    vlan: int = 0
    """0: untagged."""


class Hook(msgspec.Struct, frozen=True):
    """A program to be run once, as root, at first boot before the agent starts."""

    name: str
    content: bytes


class CloudWishes(msgspec.Struct, frozen=True, kw_only=True):
    """What cloud-init shall do beside starting the agent."""

    timezone: str = ""
    operator_key: str = ""
    """OpenSSH public key line."""
    network: Network = Network()
    ntp: Sequence[str] = ()
    """Names or addresses of time servers; none leaves the system's own."""
    hooks: Sequence[Hook] = ()


NO_WISHES = CloudWishes()


def check(wishes: CloudWishes) -> list[str]:
    """Returns what is wrong with `wishes`, one sentence each; empty where they hold."""
    problems = []
    if wishes.timezone and not _TIMEZONE.fullmatch(wishes.timezone):
        problems.append(f"timezone {wishes.timezone!r}: a name such as Europe/Berlin expected")
    if wishes.operator_key:
        try:
            ssh_keys.parse_public(" ".join(wishes.operator_key.split()[:2]))
        except ApplianceError as error:
            problems.append(f"operator_key: one OpenSSH public key line (ssh-ed25519 …) expected: {error.message}")
        if "\n" in wishes.operator_key.strip():
            problems.append("operator_key: one line expected")
    problems += _check_network(wishes.network)
    wrong = [text for text in wishes.ntp if not _NTP.fullmatch(text)]
    problems += [f"network ntp {text!r}: a name or an address expected" for text in wrong]
    if len(wishes.hooks) > MAX_HOOKS:
        problems.append(f"{len(wishes.hooks)} hooks, at most {MAX_HOOKS} fit")
    for hook in wishes.hooks:
        if not _HOOK_NAME.fullmatch(hook.name):
            problems.append(f"hook {hook.name!r}: letters, digits, '.', '_', '-' expected in its file name")
        if not hook.content.startswith(b"#!"):
            problems.append(f"hook {hook.name!r}: a script that begins with #! expected")
    if sum(len(hook.content) for hook in wishes.hooks) > MAX_HOOK_BYTES:
        problems.append(f"the hooks have more than {MAX_HOOK_BYTES} bytes together, which user-data can't carry")
    return problems


def _check_network(network: Network) -> list[str]:
    problems = []
    if network.interface and not _INTERFACE.fullmatch(network.interface):
        problems.append(f"network interface {network.interface!r}: a name or a glob of at most 15 characters expected")
    if not 0 <= network.vlan <= 4094:
        problems.append(f"network vlan {network.vlan}: 1 to 4094 expected (IEEE 802.1Q), 0 for none")
    interfaces = []
    for text in network.addresses:
        try:
            interfaces.append(ipaddress.ip_interface(text if "/" in text else ""))
        except ValueError:
            problems.append(f"network address {text!r}: address/prefix expected, such as 192.0.2.10/24")
    for what, texts in (("gateway", network.gateways), ("dns", network.dns)):
        for text in texts:
            try:
                address = ipaddress.ip_address(text)
            except ValueError:
                problems.append(f"network {what} {text!r}: an address expected")
                continue
            if what == "gateway" and interfaces and not any(address in one.network for one in interfaces):
                problems.append(f"network gateway {text}: it is in the network of none of the addresses")
    if network.gateways and not network.addresses:
        problems.append("a network gateway without an address: DHCP gives both")
    return problems


def user_data(
    wishes: CloudWishes, *, target: Target, hostname: str, mode: str, last: Sequence[Sequence[str]] = ()
) -> bytes:
    """Returns the cloud-config.

    Args:
        wishes: checked before.
        target: what kind of disk it is for.
        hostname: empty leaves it alone.
        mode: role to start, `se`; empty starts none.
        last: commands to run after everything else.
    """
    config: dict[str, Any] = {}
    if hostname:
        config |= {"hostname": hostname, "preserve_hostname": False}
    if wishes.timezone:
        config["timezone"] = wishes.timezone
    if wishes.ntp:
        config["ntp"] = {"enabled": True, "servers": list(wishes.ntp)}
    files = [
        {
            "path": f"{HOOKS_DIRECTORY}/{number:02}-{hook.name}",
            "permissions": "0700",
            "encoding": "b64",
            "content": base64.b64encode(hook.content).decode(),
        }
        for number, hook in enumerate(wishes.hooks, start=1)
    ]
    if wishes.operator_key:
        config["ssh_authorized_keys"] = [wishes.operator_key.strip()]
        if target is Target.OWN:
            config["users"] = ["default"]
            files.append(
                {
                    "path": "/etc/ssh/sshd_config.d/20-listen.conf",
                    "content": "# An operator's key was baked in: listen everywhere, not on the loopback alone.\n",
                }
            )
    if files:
        config["write_files"] = files
    commands: list[Any] = [[file["path"]] for file in files if file["path"].startswith(HOOKS_DIRECTORY)]
    if target is Target.FOREIGN:
        commands.append(["sh", "-c", _INSTALL])
    elif mode:
        commands.append(["appliance", "mode", "set", mode])
    commands += last
    if commands:
        config["runcmd"] = commands
    lines = ["#cloud-config", *(f"{name}: {json.dumps(value)}" for name, value in config.items())]
    return ("\n".join(lines) + "\n").encode()


_INSTALL = (
    "m=/run/appliance-seed; mkdir -m 0700 -p $m;"
    " for d in $(blkid -t LABEL=CIDATA -o device); do"
    f" mount -t vfat -o ro,umask=0077 $d $m && [ -e $m/{INSTALL_SCRIPT} ] && exec sh $m/{INSTALL_SCRIPT};"
    " umount $m; done; echo 'appliance: the seed partition is not there' >/dev/console; exit 1"
)


def network_config(network: Network, *, target: Target) -> bytes | None:
    """Returns network config version 2, or None where DHCP on the first interface is all there is to say.

    On our own system that is said as well: what cloud-init makes up by itself names the MAC address of the first boot,
    and a VM that was copied or moved since would be cut off.
    """
    if target is not Target.OWN and not any(msgspec.to_builtins(network).values()):
        return None
    terms: dict[str, Any] = {}
    if network.addresses:
        terms["addresses"] = list(network.addresses)
        terms["routes"] = [
            {"to": "::/0" if ipaddress.ip_address(gateway).version == 6 else "0.0.0.0/0", "via": gateway}
            for gateway in network.gateways
        ]
    else:
        terms["dhcp4"] = True
    if network.dns:
        terms["nameservers"] = {"addresses": list(network.dns)}
    interface = network.interface or ("eth0" if target is Target.OWN else "e*")
    link: dict[str, Any] = {}
    name = interface
    if set(interface) & set("*?"):
        name, link = "management", {"match": {"name": interface}}
    config: dict[str, Any] = {"version": 2}
    if network.vlan:
        config["ethernets"] = {name: link}
        config["vlans"] = {f"vlan{network.vlan}": {"id": network.vlan, "link": name, **terms}}
    else:
        config["ethernets"] = {name: {**link, **terms}}
    return ("\n".join(f"{key}: {json.dumps(value)}" for key, value in config.items()) + "\n").encode()


# A scrubbed file is zeros: a second run must not take it for the key. What was copied is on disk before it goes here.
_COPY = """\
mkdir -p -m 0755 /etc/appliance && mkdir -p -m 0700 /etc/appliance/seed
for f in FILES; do
    ! grep -qa '[!-~]' "$here/$f" || install -m 0600 "$here/$f" "/etc/appliance/seed/$f"
done
sync
key=$here/image-key.pem
mount -o remount,rw "$here" 2>/dev/null &&
    dd if=/dev/zero of="$key" bs="$(stat -c %s "$key")" count=1 conv=notrunc,fsync 2>/dev/null &&
    mount -o remount,ro "$here" || say "the image key could not be scrubbed from its partition"
"""


def install_script(*, mode: str, glibc: tuple[int, int], seed_files: Sequence[str]) -> bytes:
    """Returns the shell script that puts the agent of a seed partition onto a foreign system and starts it.

    Args:
        mode: role to start; empty starts none.
        glibc: the oldest that the agent runs with.
        seed_files: names of the files that first boot needs.
    """
    need = f"{glibc[0]}.{glibc[1]}"
    copy = _COPY.replace("FILES", " ".join(seed_files)) if seed_files else "sync\n"
    start = f"appliance mode set {mode}\n" if mode else ""
    return f"""#!/bin/sh
# Installs the agent that lies beside this file and starts it. Run once by cloud-init, as root.
set -eu
here=$(dirname "$0")
say() {{ echo "appliance: $*"; echo "appliance: $*" >/dev/console 2>/dev/null || :; }}
trap 'code=$?; [ $code = 0 ] || say "the agent could not be installed, exit code $code"' EXIT
have=$(getconf GNU_LIBC_VERSION 2>/dev/null | cut -d" " -f2)
have=${{have:-none}}
if [ "$have" = none ] || [ "$(printf '%s\\n' {need} "$have" | sort -V | head -n 1)" != {need} ]; then
    say "this system has glibc $have, the agent needs {need}: bake the image on a newer system"
    exit 1
fi
rm -rf /usr/lib/appliance.new
mkdir /usr/lib/appliance.new
tar -x -C /usr/lib/appliance.new --no-same-owner -f "$here/{AGENT_TAR}"
rm -rf /usr/lib/appliance
mv /usr/lib/appliance.new/appliance /usr/lib/appliance
rmdir /usr/lib/appliance.new
ln -sf ../lib/appliance/appliance /usr/bin/appliance
install -D -m 0644 "$here/sshd.conf" /etc/ssh/sshd_config.d/10-appliance.conf
systemctl try-reload-or-restart ssh.service sshd.service 2>/dev/null || :
{copy}{start}say "the agent is installed"
""".encode()
