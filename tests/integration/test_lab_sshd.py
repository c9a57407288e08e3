"""The lab's SSH server is a real one: the key in the SE's file gets in, nothing else does."""

from __future__ import annotations

import getpass
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from appliance.errors import ChildError
from appliance.lab import ports, sshd
from appliance.lab.layout import Layout, SePart
from appliance.pki import ssh_keys
from appliance.runtime import child


class Server(NamedTuple):
    layout: Layout
    part: SePart
    known_hosts: Path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    layout = Layout(tmp_path_factory.mktemp("lab"))
    part = SePart(name="se-1", sshd_port=ports.free_ports(1)[0])
    layout.se(part.name).se_state.mkdir(parents=True)
    sshd.prepare(layout, part, user=getpass.getuser())
    kind, key = layout.host_key(part.name).with_suffix(".pub").read_text().split()[:2]
    known_hosts = layout.root / "known"
    known_hosts.write_text(f"[127.0.0.1]:{part.sshd_port} {kind} {key}\n")
    with sshd.start(layout, part) as daemon:
        until = time.monotonic() + 20
        while not sshd.is_answering(part.sshd_port):
            assert daemon.poll() is None, daemon.log_path.read_text()
            assert time.monotonic() < until
            time.sleep(0.02)
        yield Server(layout, part, known_hosts)


def login(server: Server, key: Path, *words: str) -> child.Completed:
    options = [
        f"UserKnownHostsFile={server.known_hosts}",
        "GlobalKnownHostsFile=/dev/null",
        "StrictHostKeyChecking=yes",
        "IdentitiesOnly=yes",
        "BatchMode=yes",
    ]
    return child.run(
        [
            *("ssh", "-F", "none", "-i", str(key), "-p", str(server.part.sshd_port)),
            *(word for option in options for word in ("-o", option)),
            f"{getpass.getuser()}@127.0.0.1",
            *words,
        ],
        timeout_s=30,
    )


def make_key(path: Path) -> str:
    private, line = ssh_keys.generate()
    path.touch(mode=0o600)
    path.write_bytes(private.reveal())
    return line


def test_the_key_in_the_ses_file_gets_in_and_no_other(server: Server, tmp_path: Path) -> None:
    allowed, other = tmp_path / "allowed", tmp_path / "other"
    line = make_key(allowed)
    make_key(other)
    with pytest.raises(ChildError, match="Permission denied"):  # no file yet
        login(server, allowed, "true")
    keys = server.layout.se("se-1").se_state / "authorized_keys"
    keys.touch(mode=0o600)
    keys.write_text(f"{line}\n")
    assert login(server, allowed, 'echo "$APPLIANCE_SE"').stdout == "se-1\n"
    with pytest.raises(ChildError, match="Permission denied"):
        login(server, other, "true")


def test_nothing_but_a_public_key_is_offered(server: Server) -> None:
    asked = subprocess.run(
        [
            *("ssh", "-F", "none", "-p", str(server.part.sshd_port), "-o", "PreferredAuthentications=none", "-v"),
            *("-o", f"UserKnownHostsFile={server.known_hosts}", "-o", "BatchMode=yes", "127.0.0.1"),
        ],
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert "Authentications that can continue: publickey\n" in asked.stderr


def test_preparing_again_keeps_the_host_key(server: Server) -> None:
    key = server.layout.host_key("se-1")
    before = key.read_bytes()
    sshd.prepare(server.layout, server.part, user=getpass.getuser())
    assert key.read_bytes() == before
    assert key.stat().st_mode & 0o777 == 0o600


def test_the_version_is_read_from_the_program() -> None:
    assert sshd.version(sshd.find()) >= (8, 0)
