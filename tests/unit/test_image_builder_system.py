"""Our own system: where packages come from, what is laid over them, what the lists beside it say."""

from __future__ import annotations

import configparser
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from appliance.errors import ImageError
from image_builder import agent, boot_disk, debian, minimal, overlay, sbom
from image_builder.debian import Package

ONE_LINE = """\
# a comment
deb http://mirror.example/debian bookworm main
deb [signed-by=/k.gpg arch=amd64] http://mirror.example/debian bookworm-updates main contrib
deb-src http://mirror.example/debian bookworm main
deb http://other.example/tool stable main
"""
STANZAS = """\
Types: deb
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main

Types: deb
URIs: http://other.example/node
Suites: nodistro
Components: main

Enabled: no
Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main

Types: deb-src
URIs: http://mirror.example/debian
Suites: bookworm
Components: main
"""


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine's apt configuration."""
    (tmp_path / "apt/sources.list.d").mkdir(parents=True)
    monkeypatch.setattr(debian, "_APT", tmp_path / "apt")
    return tmp_path / "apt"


def test_this_machines_sources_of_debian_are_taken_and_no_others(apt: Path) -> None:
    (apt / "sources.list").write_text(ONE_LINE)
    (apt / "sources.list.d/a.sources").write_text(STANZAS)
    (apt / "sources.list.d/b.list.disabled").write_text(ONE_LINE)
    found = debian.sources()
    assert found["list"].count("\n") == 2
    assert "bookworm-updates main contrib" in found["list"]
    assert "deb-src" not in found["list"] + found["sources"]
    assert found["sources"].count("Types:") == 1


def test_named_sources_are_taken_whole(apt: Path, tmp_path: Path) -> None:
    path = tmp_path / "own.list"
    path.write_text("deb [trusted=yes] file:/srv/repo ./\n")
    assert debian.sources([path]) == {"list": "deb [trusted=yes] file:/srv/repo ./\n"}
    with pytest.raises(ImageError, match=r"ends in \.list or \.sources"):
        debian.sources([tmp_path / "own.txt"])
    with pytest.raises(ImageError, match="can't be read"):
        debian.sources([tmp_path / "none.list"])


def test_a_machine_without_debian_is_told_what_to_do(apt: Path) -> None:
    with pytest.raises(ImageError, match="no source of Debian bookworm") as caught:
        debian.sources()
    assert "--sources FILE" in caught.value.hint


def tree(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


STATUS = b"""\
Package: libc6
Status: install ok installed
Architecture: amd64
Source: glibc (2.36-9)
Version: 2.36-9+deb12u14

Package: gone
Status: deinstall ok config-files
Architecture: all
Version: 1

Package: adduser
Status: install ok installed
Architecture: all
Version: 3.134
"""


def test_installed_packages_are_read(tmp_path: Path) -> None:
    with tarfile.open(tree(tmp_path / "t.tar", {"var/lib/dpkg/status": STATUS})) as archive:
        assert debian.packages(archive) == [
            Package("adduser", "3.134", "all", "adduser"),
            Package("libc6", "2.36-9+deb12u14", "amd64", "glibc"),
        ]
        with pytest.raises(ImageError, match="has no boot/vmlinuz"):
            debian.member(archive, "boot/vmlinuz")


@pytest.mark.parametrize(("text", "version"), [("1:9.2p1-2+deb12u3", (9, 2)), ("2.36-9", (2, 36)), ("x", (0, 0))])
def test_versions(text: str, version: tuple[int, int]) -> None:
    assert debian.upstream(text) == version


def test_another_input_is_another_tree() -> None:
    keys = {
        json.dumps(debian.recipe(*arguments), sort_keys=True)
        for arguments in (({"list": "a"}, ()), ({"list": "b"}, ()), ({"list": "a"}, ("vim",)))
    }
    assert len(keys) == 3


# --- overlay ----------------------------------------------------------------------------------------------------------


def place(role: overlay.Role, path: str, *, openssh: tuple[int, int] = (9, 2)) -> overlay.Place:
    found = overlay.places(role, root_guid="AB-1", openssh=openssh, units=UNITS)
    return next(one for one in found if one.path == path)


UNITS = {
    "appliance-se.service": "[Unit]\n",
    "appliance-controller.service": "[Install]\nWantedBy=multi-user.target\n",
    "appliance.sysusers": "u aviseuser - x\n",
    overlay.FIRST_BOOT_UNIT: "[Unit]\nDescription=x\n[Install]\nWantedBy=cloud-init.target sysinit.target\n",
}


def test_units_are_installed_and_first_boot_is_enabled() -> None:
    se = {one.path: one for one in overlay.places("se", root_guid="x", openssh=(9, 2), units=UNITS)}
    assert se["usr/lib/systemd/system/appliance-se.service"].text == "[Unit]\n"
    assert se["usr/lib/sysusers.d/appliance.conf"].text == "u aviseuser - x\n"
    for target in ("cloud-init.target", "sysinit.target"):
        link = se[f"etc/systemd/system/{target}.wants/{overlay.FIRST_BOOT_UNIT}"]
        assert link.link == f"/usr/lib/systemd/system/{overlay.FIRST_BOOT_UNIT}"
    node = overlay.places("controller", root_guid="x", openssh=(9, 2), units=UNITS)
    enabled = {one.link for one in node if ".wants/" in one.path}
    assert enabled == {f"/usr/lib/systemd/system/{overlay.FIRST_BOOT_UNIT}"}, "an operator starts the role"


def test_an_se_lets_nobody_in_from_outside_and_no_disk_give_it_user_data() -> None:
    assert place("se", "etc/ssh/sshd_config.d/20-listen.conf").text == "ListenAddress 127.0.0.1\n"
    cloud = place("se", "etc/cloud/cloud.cfg.d/90-appliance.cfg").text
    assert "fs_label: null" in cloud
    assert "datasource_list: [NoCloud, None]" in cloud
    assert place("controller", "etc/ssh/sshd_config.d/20-listen.conf").text == ""
    assert "Port 2222" in place("controller", "etc/ssh/sshd_config.d/10-appliance.conf").text


@pytest.mark.parametrize(("version", "is_there"), [((9, 2), False), ((9, 8), True), ((10, 0), True)])
def test_the_reverse_path_is_exempt_from_penalties_where_sshd_knows_them(
    version: tuple[int, int], is_there: bool
) -> None:
    text = place("se", "etc/ssh/sshd_config.d/10-appliance.conf", openssh=version).text
    assert ("PerSourcePenaltyExemptList 127.0.0.1" in text) == is_there


def test_sshd_takes_the_settings(tmp_path: Path) -> None:
    key = tmp_path / "ssh_host_ed25519_key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True, timeout=20)
    text = place("se", "etc/ssh/sshd_config.d/10-appliance.conf").text
    text = text.replace("/etc/ssh/ssh_host_ed25519_key", str(key))
    (tmp_path / "config").write_text(place("se", "etc/ssh/sshd_config.d/20-listen.conf").text + text)
    line = ["/usr/sbin/sshd", "-T", "-C", "user=aviseuser,host=x,addr=127.0.0.1", "-f", str(tmp_path / "config")]
    if not Path(line[0]).exists() or not (os.geteuid() == 0 or Path("/run/sshd").exists()):
        pytest.skip("no sshd here that could be asked")
    Path("/run/sshd").mkdir(exist_ok=True)
    told = subprocess.run(line, capture_output=True, text=True, timeout=20)
    assert told.returncode == 0, told.stderr
    for setting in (
        "authorizedkeysfile /var/lib/appliance/se/authorized_keys", "passwordauthentication no",
        "kbdinteractiveauthentication no", "permitrootlogin no", "allowtcpforwarding no",
    ):  # fmt: skip
        assert setting in told.stdout.splitlines()


def test_drop_ins_are_units() -> None:
    for one in overlay.places("se", root_guid="x", openssh=(9, 2), units={}):
        if one.path.startswith("etc/systemd") and not one.link:
            parser = configparser.RawConfigParser(strict=False)
            parser.read_string(one.text)
            assert parser.sections(), one.path


# --- agent ------------------------------------------------------------------------------------------------------------


def make_agent(directory: Path, *, version: str = "1.2.3") -> Path:
    (directory / agent.UNITS).mkdir(parents=True)
    (directory / agent.UNITS / "appliance-se.service").write_text("[Unit]\n")
    (directory / "appliance").write_text(f"#!/bin/sh\necho appliance {version}\n")
    (directory / "appliance").chmod(0o755)
    (directory / "_internal/a.so").write_bytes(b"\x7fELF GLIBC_2.3.4 GLIBC_2.17 GLIBC_2.9")
    (directory / "_internal/notes").write_bytes(b"GLIBC_2.99 in a text")
    return directory


def test_an_agent_tells_its_version_and_what_it_needs(tmp_path: Path) -> None:
    found = agent.load(make_agent(tmp_path / "a"))
    assert (found.version, found.glibc) == ("1.2.3", (2, 17))
    assert agent.load(make_agent(tmp_path / "b")).digest == found.digest
    assert agent.load(make_agent(tmp_path / "c", version="1.2.4")).digest != found.digest
    beside = agent.read_description(agent.describe(found, system_keys=["x"]))
    assert (beside.version, beside.glibc, beside.system_keys) == ("1.2.3", "2.17", ["x"])
    with pytest.raises(ImageError, match=r"agent\.json"):
        agent.read_description(b"{")
    assert overlay.units_of(found) == {"appliance-se.service": "[Unit]\n"}


def test_what_is_no_agent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="doesn't hold the agent"):
        agent.load(tmp_path)
    broken = make_agent(tmp_path / "broken")
    (broken / "appliance").write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(ImageError, match="can't be used"):
        agent.load(broken)
    without = make_agent(tmp_path / "without")
    (without / agent.UNITS / "appliance-se.service").unlink()
    with pytest.raises(ImageError, match="carries no units"):
        overlay.units_of(agent.load(without))


def test_the_overlay_is_roots_and_the_same_each_time(tmp_path: Path) -> None:
    found = agent.load(make_agent(tmp_path / "a"))
    what = overlay.places("se", root_guid="x", openssh=(9, 2), units=UNITS)
    tars = []
    for name in ("1.tar", "2.tar"):
        overlay.write(tmp_path / name, what, found, description=b"{}", epoch=5)
        tars.append((tmp_path / name).read_bytes())
    assert tars[0] == tars[1]
    with tarfile.open(tmp_path / "1.tar") as archive:
        members = {member.name: member for member in archive}
    assert members["usr/bin/appliance"].linkname == "../lib/appliance/appliance"
    assert members["usr/lib/appliance/appliance"].mode == 0o755
    assert all(member.uid == member.gid == 0 and member.mtime == 5 for member in members.values())


# --- lists ------------------------------------------------------------------------------------------------------------


def test_the_bill_of_materials_names_packages_and_agent() -> None:
    packages = [Package("libstdc++6", "1:12.2~x", "amd64", "gcc-12")]
    bill = json.loads(
        sbom.cyclonedx(
            packages, name="edge", digest="d", epoch=0, agent_version="1.2.3", agent_digest="aa", foreign={"f": "bb"}
        )
    )
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.5")
    assert bill["metadata"]["timestamp"] == "1970-01-01T00:00:00Z"
    refs = [one["bom-ref"] for one in bill["components"]]
    assert len(set(refs)) == len(refs) == 3
    assert bill["components"][0]["purl"] == ("pkg:deb/debian/libstdc%2B%2B6@1%3A12.2~x?arch=amd64&distro=debian-12")
    assert sbom.manifest(packages, agent_version="1.2.3") == (b"libstdc++6\t1:12.2~x\tamd64\nappliance\t1.2.3\tamd64\n")


def test_names_of_disks_follow_from_their_content() -> None:
    first = boot_disk.Guids.derive("a")
    assert first == boot_disk.Guids.derive("a")
    assert len({first.disk, first.esp, first.root, first.filesystem, boot_disk.Guids.derive("b").disk}) == 5


def test_the_cache_lies_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert minimal.cache_directory() == tmp_path / "image-builder"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert minimal.cache_directory() == tmp_path / ".cache/image-builder"


FAKE_MMDEBSTRAP = """#!/bin/sh
echo "$$" >>"$CALLS"
until [ "$(ls "$GATE" | wc -l)" -ge 1 ]; do sleep 0.05; done
for word; do case $word in *.tar) echo packages >"$word" ;; esac; done
"""


@pytest.mark.skipif(bool(boot_disk.missing_tools()), reason="what builds a system is not installed")
def test_two_builders_of_one_cache_install_packages_once(tmp_path: Path) -> None:
    """The second waits, says so, and finds them there. mmdebstrap is the border of our system."""
    tools, gate, calls, cache = (tmp_path / name for name in ("tools", "gate", "calls", "cache"))
    tools.mkdir()
    gate.mkdir()
    (tools / "mmdebstrap").write_text(FAKE_MMDEBSTRAP)
    (tools / "mmdebstrap").chmod(0o755)
    sources = tmp_path / "debian.list"
    sources.write_text("deb http://mirror.example/debian bookworm main\n")
    line = [sys.executable, "-m", "image_builder", "packages", "--cache", str(cache), "--sources", str(sources)]
    env = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "CALLS": str(calls), "GATE": str(gate)}
    builders = [
        subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) for _ in range(2)
    ]
    try:
        locks = f":{(_wait_for(cache / 'lock')).stat().st_ino} "
        until_s = time.monotonic() + 60
        while not any("-> FLOCK" in one and locks in one for one in Path("/proc/locks").read_text().splitlines()):
            assert time.monotonic() < until_s, "nobody waits for the other"
            time.sleep(0.02)
        (gate / "open").touch()
        told = [builder.communicate(timeout=60) for builder in builders]
    finally:
        for builder in builders:
            builder.kill()
            builder.wait()
    assert [builder.returncode for builder in builders] == [0, 0], told
    (tree,) = cache.glob("tree-*.tar")
    assert tree.read_text() == "packages\n"
    assert {out for out, _ in told} == {f"{tree}: 0 MiB\n"}
    assert len(calls.read_text().splitlines()) == 1
    assert sum("wait for another builder" in err for _, err in told) == 1


def _wait_for(path: Path) -> Path:
    until_s = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < until_s, path
        time.sleep(0.02)
    return path


def test_old_entries_go_and_what_is_in_use_stays(tmp_path: Path) -> None:
    now = 1_000_000.0
    ages_s = (10, 20, 30, 40, 3599, 3601, 90_000)
    for number, age_s in enumerate(ages_s):
        for name in (f"tree-{number}.tar", f"system-{number}.qcow2", f"system-{number}.json"):
            (tmp_path / name).touch()
            os.utime(tmp_path / name, (now - age_s, now - age_s))
    minimal._prune(tmp_path, now=now)
    for pattern in ("tree-*.tar", "system-*.qcow2", "system-*.json"):
        assert sorted(path.stem[-1] for path in tmp_path.glob(pattern)) == list("01234")
    minimal._prune(tmp_path, now=now + 90_000)
    assert sorted(path.name for path in tmp_path.glob("*.qcow2")) == [f"system-{number}.qcow2" for number in range(3)]
