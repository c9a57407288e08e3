"""cloud-init's part: what goes in, what is refused, and that cloud-init itself takes it."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from image_builder import cloud, controller, overlay
from image_builder.cloud import CloudWishes, Hook, Network, Target

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJzCZ1pSBUL9KDvQkWqKYBdRNVEeUnJGuJ0pvDjiRqYP"
FULL = CloudWishes(
    timezone="Europe/Berlin",
    ntp=["ntp.example", "192.0.2.123"],
    operator_key=f"{KEY} me",
    hooks=[Hook("first.sh", b"#!/bin/sh\ntrue\n"), Hook("second", b"#!/usr/bin/env python3\n")],
    network=Network(
        addresses=["192.0.2.5/24", "2001:db8::5/64"],
        gateways=["192.0.2.1", "2001:db8::1"],
        dns=["192.0.2.2"],
        vlan=12,
    ),
)


def values(text: bytes) -> dict[str, Any]:
    lines = text.decode().splitlines()
    return {key: json.loads(value) for key, _, value in (line.partition(": ") for line in lines if line[0] != "#")}


def test_user_data_for_our_own_system() -> None:
    config = values(cloud.user_data(FULL, target=Target.OWN, hostname="edge", mode="se"))
    assert config["hostname"] == "edge"
    assert config["timezone"] == "Europe/Berlin"
    assert config["ntp"] == {"enabled": True, "servers": ["ntp.example", "192.0.2.123"]}
    assert config["users"] == ["default"]
    assert config["ssh_authorized_keys"] == [f"{KEY} me"]
    assert config["runcmd"] == [
        ["/etc/appliance/hooks/01-first.sh"],
        ["/etc/appliance/hooks/02-second"],
        ["appliance", "mode", "set", "se"],
    ]
    hook, _, listen = config["write_files"]
    assert base64.b64decode(hook["content"]) == b"#!/bin/sh\ntrue\n"
    assert hook["permissions"] == "0700"
    assert listen["path"] == "/etc/ssh/sshd_config.d/20-listen.conf"


def test_user_data_elsewhere_installs_the_agent_first() -> None:
    config = values(cloud.user_data(FULL, target=Target.FOREIGN, hostname="", mode="se"))
    assert "users" not in config
    assert "hostname" not in config
    *hooks, install = config["runcmd"]
    assert len(hooks) == 2
    assert install[:2] == ["sh", "-c"]
    subprocess.run(["sh", "-n", "-c", install[2]], check=True, timeout=10)


def test_a_controller_starts_nothing() -> None:
    assert cloud.user_data(cloud.NO_WISHES, target=Target.OWN, hostname="", mode="") == b"#cloud-config\n"


def test_a_controller_makes_its_cluster_once_the_time_is_known() -> None:
    cluster = controller.Cluster(addresses=["10.0.0.1", "node.example"])
    wait, init, mode = controller.commands(cluster)
    subprocess.run(["sh", "-n", "-c", wait[2]], check=True, timeout=10)
    assert init == ["appliance", "controller", "init", "--address", "10.0.0.1", "--address", "node.example"]
    assert mode == ["appliance", "mode", "set", "controller"]
    trusting = controller.commands(controller.Cluster(addresses=["10.0.0.1"], trust_clock=True))
    assert trusting == [["appliance", "controller", "init", "--address", "10.0.0.1", "--date", "now"], mode]


@pytest.mark.parametrize("target", [Target.OWN, Target.FOREIGN])
def test_a_controllers_files(target: Target) -> None:
    alone, (user, meta, network) = (
        controller.files(wishes, controller.Cluster(addresses=["10.0.0.1"]), target=target, hostname="")
        for wishes in (cloud.NO_WISHES, FULL)
    )
    names = ["user-data", "meta-data", *(["network-config"] if target is Target.OWN else [])]
    assert [file.name for file in alone] == names
    assert b"hostname" not in meta.content
    assert alone[1].content != meta.content, "another instance"
    assert values(user.content)["runcmd"][-1] == ["appliance", "mode", "set", "controller"]
    assert network.name == "network-config"


def test_our_own_system_knows_its_first_card_by_name() -> None:
    """Left to itself, cloud-init binds DHCP to the MAC address of the first boot: a copied disk would be cut off."""
    told = cloud.network_config(Network(), target=Target.OWN)
    assert told is not None
    assert values(told) == {"version": 2, "ethernets": {"eth0": {"dhcp4": True}}}


def test_network_config() -> None:
    config = cloud.network_config(FULL.network, target=Target.OWN)
    assert config is not None
    told = values(config)
    assert told["version"] == 2
    assert told["ethernets"] == {"eth0": {}}
    assert told["vlans"]["vlan12"] == {
        "id": 12,
        "link": "eth0",
        "addresses": ["192.0.2.5/24", "2001:db8::5/64"],
        "routes": [{"to": "0.0.0.0/0", "via": "192.0.2.1"}, {"to": "::/0", "via": "2001:db8::1"}],
        "nameservers": {"addresses": ["192.0.2.2"]},
    }
    for target in (Target.FOREIGN, Target.IMAGE):
        assert cloud.network_config(Network(), target=target) is None
        assert cloud.network_config(Network(addresses=[], dns=[]), target=target) is None
    elsewhere = cloud.network_config(Network(dns=["192.0.2.2"]), target=Target.FOREIGN)
    assert elsewhere is not None
    assert values(elsewhere)["ethernets"]["management"] == {
        "match": {"name": "e*"},
        "dhcp4": True,
        "nameservers": {"addresses": ["192.0.2.2"]},
    }


@pytest.mark.parametrize(
    ("wishes", "told"),
    [
        (CloudWishes(timezone="../../etc/shadow"), "timezone"),
        (CloudWishes(timezone="Europe/Berlin\nruncmd: x"), "timezone"),
        (CloudWishes(operator_key="ssh-rsa AAAA"), "operator_key"),
        (CloudWishes(operator_key=f"{KEY}\n{KEY}"), "one line"),
        (CloudWishes(network=Network(addresses=["192.0.2.5"])), "address/prefix"),
        (CloudWishes(network=Network(addresses=["192.0.2.5/33"])), "address/prefix"),
        (CloudWishes(network=Network(addresses=["192.0.2.5/24"], gateways=["192.0.3.1"])), "none of the addresses"),
        (CloudWishes(network=Network(gateways=["192.0.2.1"])), "without an address"),
        (CloudWishes(network=Network(dns=["dns.example"])), "an address expected"),
        (CloudWishes(network=Network(vlan=4095)), "vlan 4095"),
        (CloudWishes(network=Network(interface="eth0; reboot")), "interface"),
        (CloudWishes(hooks=[Hook("a b", b"#!/bin/sh\n")]), "hook 'a b'"),
        (CloudWishes(hooks=[Hook("a", b"\x7fELF")]), "begins with #!"),
        (CloudWishes(hooks=[Hook("a", b"#!" + b"x" * cloud.MAX_HOOK_BYTES)]), "can't carry"),
        (CloudWishes(hooks=[Hook("a", b"#!")] * (cloud.MAX_HOOKS + 1)), "at most 16"),
    ],
)
def test_mistakes(wishes: CloudWishes, told: str) -> None:
    problems = cloud.check(wishes)
    assert any(told in problem for problem in problems), problems


def test_what_holds_is_not_refused() -> None:
    assert cloud.check(FULL) == []
    assert cloud.check(cloud.NO_WISHES) == []


def assert_schema(path: Path, content: bytes) -> None:
    if shutil.which("cloud-init") is None:
        pytest.skip("cloud-init is not installed")
    path.write_bytes(content)
    done = subprocess.run(
        ["cloud-init", "schema", "--config-file", str(path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("target", Target)
def test_cloud_init_takes_the_user_data(tmp_path: Path, target: Target) -> None:
    content = cloud.user_data(FULL, target=target, hostname="edge-1", mode="se")
    assert_schema(tmp_path / "user-data", content)


@pytest.mark.parametrize("role", ["se", "controller"])
def test_cloud_init_takes_our_own_systems_settings(tmp_path: Path, role: overlay.Role) -> None:
    assert_schema(tmp_path / "settings", b"#cloud-config\n" + overlay.cloud_settings(role).encode())


@pytest.mark.parametrize("seed_files", [("seed.json", "image-key.pem"), ()])
def test_the_install_script_is_a_shell_script(seed_files: tuple[str, ...]) -> None:
    script = cloud.install_script(mode="se" if seed_files else "", glibc=(2, 35), seed_files=seed_files)
    subprocess.run(["sh", "-n"], input=script, check=True, timeout=10)
    assert (b"mode set se" in script) == bool(seed_files)


def test_a_foreign_system_takes_the_image_key_once_and_scrubs_its_partition(tmp_path: Path) -> None:
    """The script's middle, with a `mount` that does nothing: run twice, as after a cut, the copy stays the key."""
    here, etc = tmp_path / "here", tmp_path / "etc"
    here.mkdir()
    etc.mkdir()
    (here / "seed.json").write_text("{}")
    (here / "image-key.pem").write_text("-----BEGIN\nx\n")
    script = cloud.install_script(mode="", glibc=(2, 35), seed_files=("seed.json", "image-key.pem")).decode()
    middle = script[script.index("mkdir -p -m 0755 /etc/appliance") : script.index('say "the agent is installed"')]
    text = f'set -eu; here={here}; say() {{ echo "$*"; }}; mount() {{ :; }}\n' + middle.replace("/etc/", f"{etc}/")
    for _ in range(2):
        done = subprocess.run(["sh", "-c", text], check=True, timeout=30, capture_output=True, text=True)
        assert done.stdout == ""
        copy = etc / "appliance/seed/image-key.pem"
        assert copy.read_text() == "-----BEGIN\nx\n"
        assert copy.stat().st_mode & 0o777 == 0o600
        assert (here / "image-key.pem").read_bytes() == bytes(13)


def test_a_time_server_is_a_name_or_an_address() -> None:
    assert cloud.check(CloudWishes(ntp=["a.example", "2001:db8::7"])) == []
    (problem,) = cloud.check(CloudWishes(ntp=["a; reboot"]))
    assert "ntp 'a; reboot'" in problem
