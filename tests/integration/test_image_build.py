"""Images baked onto small made-up systems: what comes out, and everything that must not go in.

A made-up system is a partition table, a FAT or ext4 partition and the text by which a C library tells its version: all
that the builder ever looks at. Real systems are baked and booted in tests/vm.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster_bundle import NOW, Cluster
from rig import running, until

from appliance.errors import ApplianceError
from appliance.pki import sealed
from appliance.pki.secret import Secret
from image_builder import verify as verifying
from image_builder.steps import Silent

MIB = 1 << 20
AT = 1_750_000_000
PASSPHRASE = Secret(b"five random words or more")
LIBC = b"GNU C Library (Debian GLIBC 2.36-9) stable release version 2.36.\n"
TOOLS = ("qemu-img", "qemu-io", "mcopy", "mformat", "sgdisk", "sfdisk", "mke2fs")

pytestmark = pytest.mark.skipif(
    any(shutil.which(tool) is None and not Path("/usr/sbin", tool).exists() for tool in TOOLS),
    reason=f"one of {', '.join(TOOLS)} is not installed",
)


@pytest.fixture(scope="module")
def cluster() -> Cluster:
    return Cluster()


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Something of the agent's form."""
    directory = tmp_path_factory.mktemp("dist") / "appliance"
    units = directory / "_internal/appliance/cli/units"
    units.mkdir(parents=True)
    program = directory / "appliance"
    program.write_text("#!/bin/sh\necho appliance 9.8.7\n")
    program.chmod(0o755)
    (units / "appliance-se.service").write_text("[Unit]\n")
    (directory / "_internal/library.so").write_bytes(b"\x7fELF GLIBC_2.17 GLIBC_2.35 GLIBC_2.4")
    (directory / "_internal/link.so").symlink_to("library.so")
    return directory


def make_system(
    path: Path, *, table: str = "gpt", form: str = "qcow2", content: bytes = LIBC, partitions: int = 1
) -> Path:
    """Makes a disk of 40 MiB."""
    raw = path.with_suffix(".making")
    with raw.open("wb") as stream:
        stream.truncate(40 * MIB)
    kind = "L" if table == "gpt" else "83"
    starts = [(1 + 9 * number) * 2048 for number in range(partitions)]
    label = "label: gpt\n" if table == "gpt" else "label: dos\nlabel-id: 0x5eed0001\n"
    sfdisk(raw, label + "".join(f"start={start}, size=16384, type={kind}\n" for start in starts))
    files = path.with_suffix(".files")
    files.mkdir()
    (files / "libc.so.6").write_bytes(b"\0" * 64 + content)
    root = path.with_suffix(".ext4")
    run("truncate", "-s", "8M", root)
    run("mke2fs", "-q", "-t", "ext4", "-d", files, root)
    with raw.open("r+b") as stream:
        stream.seek(MIB)
        stream.write(root.read_bytes())
    if form == "raw":
        raw.rename(path)
        return path
    options = ["-o", "subformat=streamOptimized"] if form == "vmdk" else []
    run("qemu-img", "convert", "-f", "raw", "-O", form, *options, raw, path)
    raw.unlink()
    return path


def sfdisk(disk: Path, text: str) -> None:
    subprocess.run(
        [shutil.which("sfdisk") or "/usr/sbin/sfdisk", "-q", str(disk)], input=text.encode(), check=True, timeout=60,
        capture_output=True,
    )  # fmt: skip


def run(*arguments: str | Path) -> str:
    program = shutil.which(str(arguments[0])) or f"/usr/sbin/{arguments[0]}"
    line = [program, *map(str, arguments[1:])]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
    return done.stdout


class Baker:
    """Runs `image-builder build` in a folder of its own."""

    def __init__(self, directory: Path, cluster: Cluster, agent: Path) -> None:
        self.directory = directory
        self.out = directory / "out"
        self.out.mkdir(parents=True)
        self.bundle = directory / "bundle.json"
        self.bundle.write_bytes(cluster.bundle())
        self.agent = agent

    def command(self, base: Path | None, *options: str | Path) -> list[str]:
        given = ["--bundle", self.bundle, "--agent-directory", self.agent, "--output-directory", self.out]
        given += ["--baked-at", str(AT), "--cache", self.directory / "cache"]
        given += ["--base-image", base] if base is not None else []
        return [sys.executable, "-m", "image_builder", "build", *map(str, (*given, *options))]

    def build(self, base: Path | None, *options: str | Path, env: dict[str, str] | None = None) -> Any:
        done = subprocess.run(
            [*self.command(base, *options), "--json"],
            capture_output=True, text=True, timeout=300, env={**os.environ, **(env or {})},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def refused(self, base: Path | None, *options: str | Path, env: dict[str, str] | None = None, code: int = 6) -> str:
        """Builds what can't be built; nothing may be left of it."""
        done = subprocess.run(
            self.command(base, *options), capture_output=True, text=True, timeout=300,
            env={**os.environ, **(env or {})},
        )  # fmt: skip
        assert done.returncode == code, f"{done.returncode}: {done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr
        assert list(self.out.iterdir()) == []
        return done.stderr


@pytest.fixture
def baker(tmp_path: Path, cluster: Cluster, agent: Path) -> Baker:
    return Baker(tmp_path / "here", cluster, agent)


def read_seed(disk: Path, name: str, directory: Path) -> bytes:
    """Reads a file of the last partition with mtools, as any other program would."""
    raw = directory / "read.raw"
    run("qemu-img", "convert", "-O", "raw", disk, raw)
    last = json.loads(run("sfdisk", "--json", raw))["partitiontable"]["partitions"][-1]
    copy = directory / "read.file"
    run("mcopy", "-n", "-o", "-i", f"{raw}@@{last['start'] * 512}", f"::{name}", copy)
    return copy.read_bytes()


@pytest.mark.parametrize("table", ["gpt", "dos"])
@pytest.mark.parametrize("form", ["qcow2", "raw", "vmdk"])
def test_any_system_gets_a_seed(tmp_path: Path, baker: Baker, table: str, form: str, cluster: Cluster) -> None:
    base = make_system(tmp_path / f"base.{form}", table=table, form=form)
    before = hashlib.sha256(base.read_bytes()).hexdigest()
    told = baker.build(base, "--name", "edge", "--seed-name", "edge-1", "--output-format", "qcow2")
    image = baker.out / "edge.qcow2"
    assert hashlib.sha256(base.read_bytes()).hexdigest() == before
    assert told["system"] == f"sha256:{before}"
    assert told["files"]["edge.qcow2"] == hashlib.sha256(image.read_bytes()).hexdigest()
    assert "No errors" in run("qemu-img", "check", image)
    assert json.loads(read_seed(image, "seed.json", tmp_path))["image_id"] == told["image_id"]
    (tmp_path / "agent.tar").write_bytes(read_seed(image, "appliance.tar", tmp_path))
    with tarfile.open(tmp_path / "agent.tar") as archive:
        names = {member.name: member for member in archive}
    assert names["appliance/appliance"].mode == 0o755
    assert names["appliance/_internal/link.so"].linkname == "library.so"
    assert all(member.uid == member.gid == 0 and member.mtime == AT for member in names.values())
    script = read_seed(image, "install.sh", tmp_path)
    subprocess.run(["sh", "-n"], input=script, check=True, timeout=10)
    raw = tmp_path / "read.raw"
    label = b"CIDATA     "
    partitions = json.loads(run("sfdisk", "--json", raw))["partitiontable"]["partitions"]
    assert label in raw.read_bytes()[partitions[-1]["start"] * 512 :][:512]
    # the system itself is where it was, to the byte
    original = tmp_path / "base.check"
    run("qemu-img", "convert", "-O", "raw", base, original)
    assert raw.read_bytes()[MIB : 9 * MIB] == original.read_bytes()[MIB : 9 * MIB]
    found = verifying.verify(image, steps=Silent())
    assert found.problems == []
    assert (found.seed_on, found.agent_version, found.cluster_id) == ("CIDATA", "9.8.7", "c-1")
    assert found.image_key_id == cluster.image_key_id
    if table == "gpt":
        assert "No problems found" in run("sgdisk", "-v", raw)


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path, cluster: Cluster, agent: Path) -> None:
    base = make_system(tmp_path / "base.qcow2")
    formats = [word for form in ("qcow2", "ova", "iso", "raw") for word in ("--output-format", form)]
    bundle = cluster.bundle()
    told: list[Any] = []
    for name in ("one place", "anöther"):
        baker = Baker(tmp_path / name, cluster, agent)
        baker.bundle.write_bytes(bundle)  # signing is random, so a bundle is an input
        told.append(baker.build(base, "--name", "edge", *formats, env={"TZ": "Asia/Tokyo"} if told else {}))
        for entry in baker.out.iterdir():
            assert stat_mode(entry) == (0o600 if entry.suffix in {".qcow2", ".ova", ".iso", ".raw"} else 0o644), entry
    assert told[0] == told[1]
    first, second = (tmp_path / name / "out" for name in ("one place", "anöther"))
    assert sorted(path.name for path in first.iterdir()) == [
        "edge.cdx.json", "edge.image.json", "edge.iso", "edge.ova", "edge.packages.txt", "edge.qcow2", "edge.raw",
    ]  # fmt: skip
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


def stat_mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_verify_bakes_again(tmp_path: Path, baker: Baker) -> None:
    base = make_system(tmp_path / "base.qcow2")
    recipe = baker.directory / "recipe.toml"
    terms = {"bundle": "bundle.json", "name": "edge", "base.image": str(base), "agent.directory": str(baker.agent)}
    recipe.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in terms.items()))
    baker.build(base, "--name", "edge")
    line = [sys.executable, "-m", "image_builder", "verify", "--json", str(baker.out / "edge.qcow2")]
    line += ["--cache", str(baker.directory / "cache"), "--rebuild", str(recipe)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    recipe.write_text(recipe.read_text() + 'hostname = "other"\n')
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert done.returncode == 11
    assert "baked again" in done.stderr
    assert "its image id is" in done.stderr


def test_an_ova_is_what_importers_take(tmp_path: Path, baker: Baker) -> None:
    base = make_system(tmp_path / "base.qcow2")
    baker.build(base, "--name", "Räder & Co", "--output-format", "ova", "--disk-size", "64M")
    path = baker.out / "Räder & Co.ova"
    with tarfile.open(path) as archive:
        members = archive.getmembers()
        assert [member.name for member in members] == ["R-der-Co.ovf", "R-der-Co.mf", "R-der-Co-disk1.vmdk"]
        archive.extractall(tmp_path / "ova", filter="data")
    for line in (tmp_path / "ova/R-der-Co.mf").read_text().splitlines():
        name, _, digest = line.removeprefix("SHA256(").partition(")= ")
        assert hashlib.sha256((tmp_path / "ova" / name).read_bytes()).hexdigest() == digest
    vmdk = tmp_path / "ova/R-der-Co-disk1.vmdk"
    told = json.loads(run("qemu-img", "info", "--output=json", vmdk))
    assert told["virtual-size"] == 64 * MIB
    assert told["format-specific"]["data"]["create-type"] == "streamOptimized"
    assert "Räder &amp; Co" in (tmp_path / "ova/R-der-Co.ovf").read_text()
    found = verifying.verify(path, steps=Silent())
    assert found.problems == []
    assert found.ova_properties[:2] == ["controllers", "token"]


def rewrite(source: Path, target: Path, change: Callable[[list[tuple[tarfile.TarInfo, bytes]]], Any]) -> Path:
    with tarfile.open(source) as archive:
        members = [(member, archive.extractfile(member).read()) for member in archive]  # type: ignore[union-attr]
    members = change(members) or members
    import io

    with tarfile.open(target, "w", format=tarfile.USTAR_FORMAT) as archive:
        for member, content in members:
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return target


def test_an_ova_that_importers_refuse_is_told(tmp_path: Path, baker: Baker) -> None:
    base = make_system(tmp_path / "base.qcow2")
    baker.build(base, "--name", "edge", "--output-format", "ova")
    ova = baker.out / "edge.ova"

    def replaced(ending: str, old: bytes, new: bytes) -> Callable[[list[tuple[tarfile.TarInfo, bytes]]], Any]:
        return lambda members: [
            (member, content.replace(old, new) if member.name.endswith(ending) else content)
            for member, content in members
        ]

    cases: list[tuple[Callable[[list[tuple[tarfile.TarInfo, bytes]]], Any], str]] = [
        (replaced(".mf", b"SHA256", b"SHA1"), "exactly 'SHA256(name)= hex' expected"),
        (replaced(".mf", b")= ", b") = "), "exactly 'SHA256(name)= hex' expected"),
        (replaced(".ovf", b'ovf:size="', b'ovf:size="9'), "in the archive it is"),
        (replaced(".ovf", b"vmdisk1", b"vmdisk2"), "the manifest says"),
        (replaced(".ovf", b"<Envelope", b"<!DOCTYPE x><Envelope"), "DOCTYPE"),
        (replaced(".ovf", b"</Envelope>", b""), "no XML"),
        (replaced(".vmdk", b"KDMV", b"KDMX"), "no VMDK"),
        (lambda members: members[:1] + members[2:], "0 manifests"),
    ]
    for number, (change, told) in enumerate(cases):
        path = rewrite(ova, tmp_path / f"{number}.ova", change)
        with contextlib.suppress(ApplianceError):
            assert any(told in problem for problem in verifying.verify(path, steps=Silent()).problems), told
    disordered = rewrite(ova, tmp_path / "disordered.ova", lambda members: members[::-1])
    with pytest.raises(ApplianceError, match="must be its first member"):
        verifying.verify(disordered, steps=Silent())


def test_a_private_key_on_the_disk_is_found(tmp_path: Path, baker: Baker, cluster: Cluster) -> None:
    base = make_system(tmp_path / "base.raw", form="raw")
    baker.build(base, "--name", "edge", "--output-format", "raw")
    image = baker.out / "edge.raw"
    for name, pem, told in (
        ("root", cluster.authority.key_file().reveal(), "a root CA's"),
        ("node", cluster.host_key.reveal(), "the SSH host key of node 1"),
        ("other", Cluster().authority.key_file().reveal(), "a private key (PKCS #8)"),
        ("sealed", cluster.authority.key_file(PASSPHRASE).reveal(), "a root CA's"),
        ("sealed-other", Cluster().authority.key_file(PASSPHRASE).reveal(), "a sealed root key"),
        ("backup", sealed.seal(b"all", PASSPHRASE, magic=sealed.BACKUP, about={}), "a sealed backup of a controller"),
    ):
        changed = tmp_path / name
        content = bytearray(image.read_bytes())
        content[20 * MIB + 77 : 20 * MIB + 77 + len(pem)] = pem
        changed.write_bytes(content)
        problems = verifying.verify(changed, steps=Silent()).problems
        assert len(problems) == 1
        assert told in problems[0]
        assert str(20 * MIB + 77) in problems[0]


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_system_with_a_key_of_the_cluster_is_refused(tmp_path: Path, baker: Baker, cluster: Cluster) -> None:
    base = make_system(tmp_path / "base.qcow2", content=LIBC + cluster.authority.key_file().reveal())
    assert "a root CA's" in baker.refused(base)


def test_a_system_that_was_a_controller_is_refused(tmp_path: Path, baker: Baker) -> None:
    """Of any cluster: the bundle tells nothing of its keys, their certificates do."""
    other = Cluster().authority
    node = other.issue_node(node=3, addresses=["192.0.2.3"], now=NOW)
    base = make_system(tmp_path / "node.qcow2", content=LIBC + node.certificate_pem + node.key.reveal())
    assert f"node 3's, of cluster {other.cluster_id}" in baker.refused(base)
    locked = make_system(tmp_path / "locked.qcow2", content=LIBC + other.key_file(PASSPHRASE).reveal())
    assert "a sealed root key lies on it" in baker.refused(locked)


def test_an_old_c_library_is_refused_by_name(tmp_path: Path, baker: Baker) -> None:
    base = make_system(tmp_path / "base.qcow2", content=LIBC.replace(b"2.36.", b"2.31."))
    assert "has glibc 2.31, the agent needs 2.35" in baker.refused(base)


@pytest.mark.parametrize("form", ["qcow2", "raw", "vmdk"])
@pytest.mark.parametrize("table", ["gpt", "dos"])
def test_a_truncated_system_is_refused(tmp_path: Path, baker: Baker, form: str, table: str) -> None:
    count = 4 if table == "dos" else 1
    content = LIBC + os.urandom(3 * MIB)
    base = make_system(tmp_path / f"base.{form}", form=form, table=table, partitions=count, content=content)
    os.truncate(base, base.stat().st_size // 8 * 5 // 512 * 512)
    told = baker.refused(base)
    assert "truncated" in told or "no whole" in told or "damaged" in told


def test_what_is_no_system_is_refused(tmp_path: Path, baker: Baker) -> None:
    assert "is a folder" in baker.refused(tmp_path)
    assert "is not there" in baker.refused(tmp_path / "nothing")
    empty = tmp_path / "empty"
    empty.write_bytes(b"\0" * 8 * MIB)
    assert "no bootable disk image" in baker.refused(empty)
    leaning = tmp_path / "leaning.qcow2"
    base = make_system(tmp_path / "base.qcow2")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", leaning)
    assert "leans on another file" in baker.refused(leaning)


def test_a_wrong_checksum_is_refused(tmp_path: Path, baker: Baker) -> None:
    base = make_system(tmp_path / "base.qcow2")
    assert f"base.sha256 says {'0' * 64}" in baker.refused(base, "--base-sha256", "0" * 64)
    digest = hashlib.sha256(base.read_bytes()).hexdigest()
    baker.build(base, "--base-sha256", digest)


def test_a_full_disk_or_table_is_refused(tmp_path: Path, baker: Baker) -> None:
    four = make_system(tmp_path / "four.qcow2", table="dos", partitions=4)
    assert "four primary partitions" in baker.refused(four)
    base = make_system(tmp_path / "base.qcow2", partitions=4)
    assert "no free space at its end" in baker.refused(base, "--disk-size", "40M")
    assert "less than the base's disk" in baker.refused(base, "--disk-size", "39M")


def test_what_a_bundle_says_is_looked_at(tmp_path: Path, baker: Baker, cluster: Cluster) -> None:
    base = make_system(tmp_path / "base.qcow2")
    told = baker.refused(base, "--cluster", "c-2", "--image-key-id", "ik-000000000000")
    assert "the bundle is of cluster 'c-1', 'c-2' was named" in told
    assert f"the bundle holds the image key {cluster.image_key_id}" in told
    baker.bundle.write_bytes(cluster.bundle(image_key_expires_at=AT))
    assert "expired" in baker.refused(base)
    baker.bundle.write_bytes(Cluster().bundle(root_ca=cluster.authority.certificate_pem.decode()))
    assert "does not verify against its root" in baker.refused(base)
    baker.bundle.write_bytes(b"{}")
    assert "the bundle can't be used" in baker.refused(base)


def test_five_mistakes_are_told_at_once(tmp_path: Path, baker: Baker) -> None:
    told = baker.refused(
        tmp_path, "--disk-size", "big", "--label", "no-equals", "--timezone", "..", "--agent-directory", tmp_path,
        "--network-address", "10.0.0.1", "--cluster", "c-2",
    )  # fmt: skip
    for part in (
        "is a folder", "disk.size 'big'", "label 'no-equals'", "timezone '..'", "doesn't hold the agent",
        "network address '10.0.0.1'", "'c-2' was named",
    ):  # fmt: skip
        assert part in told, told
    assert told.count("\n  - ") >= 7


def test_missing_tools_are_named_with_their_package(tmp_path: Path, baker: Baker, monkeypatch: Any) -> None:
    from appliance.runtime import child
    from image_builder import boot_disk

    monkeypatch.setattr(child, "_SYSTEM_DIRECTORIES", "/nowhere")
    monkeypatch.setenv("PATH", "/nowhere")
    told = boot_disk.missing_tools()
    for package in ("mmdebstrap", "mtools", "gdisk", "syslinux", "qemu-utils"):
        assert any(f"apt-get install {package}" in one for one in told), told


def test_a_taken_name_is_refused(tmp_path: Path, baker: Baker) -> None:
    base = make_system(tmp_path / "base.qcow2")
    baker.build(base, "--name", "edge")
    done = subprocess.run(baker.command(base, "--name", "edge"), capture_output=True, text=True, timeout=60)
    assert done.returncode == 6
    assert "edge.qcow2 exists already" in done.stderr


# --- what goes wrong in the middle ------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB."""
    where = tmp_path / "small"
    where.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting takes root")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(where)], capture_output=True)
    if done.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.decode()}")
    yield where
    subprocess.run(["umount", str(where)], check=True, timeout=60)


def test_a_full_disk_in_the_middle_leaves_nothing(
    tmp_path: Path, baker: Baker, small_disk: Path, cluster: Cluster
) -> None:
    content = LIBC + os.urandom(6 * MIB)
    base = make_system(tmp_path / "base.qcow2", content=content)
    baker.out = small_disk
    formats = [word for form in ("qcow2", "ova", "raw") for word in ("--output-format", form)]
    done = subprocess.run(baker.command(base, *formats), capture_output=True, text=True, timeout=120)
    assert done.returncode in {4, 9}, done.stderr
    assert "Traceback" not in done.stderr
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_build_that_is_stopped_leaves_nothing(tmp_path: Path, baker: Baker, number: signal.Signals) -> None:
    base = make_system(tmp_path / "base.qcow2")
    # a tool that takes its time, as it would with a large disk
    slow = tmp_path / "bin"
    slow.mkdir()
    (slow / "qemu-io").write_text(f"#!/bin/sh\necho $$ >{tmp_path}/started\nexec sleep 300\n")
    (slow / "qemu-io").chmod(0o755)
    process = subprocess.Popen(
        baker.command(base), env={**os.environ, "PATH": f"{slow}:{os.environ['PATH']}"},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        started = tmp_path / "started"
        until(lambda: started.exists() and started.read_text().strip(), what="the slow tool")
        assert any(baker.out.iterdir())
        process.send_signal(number)
        _, stderr = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    assert b"Traceback" not in stderr
    assert list(baker.out.iterdir()) == []
    tool = int((tmp_path / "started").read_text())
    until(lambda: not Path(f"/proc/{tool}").exists() or _is_zombie(tool), what="the slow tool ends")


def _is_zombie(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return ") Z " in Path(f"/proc/{pid}/stat").read_text()
    return True


def test_a_seed_is_fast(tmp_path: Path, baker: Baker) -> None:
    """Far slower than promised, it would be another thing than writing two MiB; the bench measures it properly."""
    base = make_system(tmp_path / "base.qcow2")
    began = time.monotonic()
    baker.build(base)
    assert time.monotonic() - began < 30


# --- keys, controllers, signatures ------------------------------------------------------------------------------------


@pytest.fixture
def speaking_agent(tmp_path: Path, agent: Path) -> Path:
    """The made-up agent with the real command line."""
    directory = tmp_path / "speaking"
    shutil.copytree(agent, directory, symlinks=True)
    (directory / "appliance").write_text(f'#!/bin/sh\nexec {sys.executable} -m appliance "$@"\n')
    return directory


def test_an_image_key_is_made_for_the_image_and_revoked_when_it_fails(
    tmp_path: Path, cluster: Cluster, speaking_agent: Path
) -> None:
    base = make_system(tmp_path / "base.qcow2")
    baker = Baker(tmp_path / "here", cluster, speaking_agent)
    with running(tmp_path / "root") as controller:
        command = baker.command(base, "--image-key-create", "--image-key-root", controller.root, "--name", "edge")
        command += ["--image-key-max-uses", "3", "--image-key-expires", "2h"]
        at = command.index("--bundle")
        del command[at : at + 2]
        before = len(controller.operator.image_keys())
        done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        (key,) = (one for one in controller.operator.image_keys() if one.image_key_id == told["image_key_id"])
        assert (key.max_uses, key.status, key.note) == (3, "active", "image edge")
        bundle = baker.out / "edge.bundle.json"
        assert stat_mode(bundle) == 0o600
        assert json.loads(bundle.read_text())["image_key_expires_at"] == key.expires_at
        assert verifying.verify(baker.out / "edge.qcow2", steps=Silent()).image_key_id == key.image_key_id

        # what fails after the key was made takes it back
        for path in baker.out.iterdir():
            path.unlink()
        failing = tmp_path / "bin"
        failing.mkdir()
        (failing / "qemu-io").write_text("#!/bin/sh\necho no luck >&2\nexit 1\n")
        (failing / "qemu-io").chmod(0o755)
        env = {**os.environ, "PATH": f"{failing}:{os.environ['PATH']}"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
        assert done.returncode == 9, done.stderr
        assert "no luck" in done.stderr
        assert list(baker.out.iterdir()) == []
        keys = controller.operator.image_keys()
        assert len(keys) == before + 2
        assert sorted(one.status for one in keys).count("revoked") == 1


def test_a_built_image_is_in_the_ledger(tmp_path: Path, cluster: Cluster, speaking_agent: Path) -> None:
    """All forms of one build are one image there, with the digests of the files and the ids that their seeds carry."""
    base = make_system(tmp_path / "base.qcow2")
    baker = Baker(tmp_path / "here", cluster, speaking_agent)
    with running(tmp_path / "root") as controller:
        made = ["--image-key-create", "--image-key-root", controller.root, "--output-register", controller.root]
        command = baker.command(base, *made, "--name", "edge", "--output-format", "raw", "--output-format", "iso")
        at = command.index("--bundle")
        del command[at : at + 2]
        done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        assert told == json.loads((baker.out / "edge.image.json").read_text())
        (image,) = controller.operator.images().images
        assert (image.image_id, image.image_key_id, image.status) == (told["image_id"], told["image_key_id"], "live")
        assert (image.recipe_digest, image.agent_version) == (told["recipe_digest"], told["agent_version"])
        for name, sha256 in image.files:
            assert hashlib.sha256((baker.out / name).read_bytes()).hexdigest() == sha256
        assert {"edge.raw", "edge.iso"} <= {name for name, _ in image.files}
        ids = [verifying.verify(baker.out / f"edge.{form}", steps=Silent()).image_id for form in ("raw", "iso")]
        assert ids == [image.image_id, *image.also], "whatever an SE of it names is this image"

        # A controller that isn't there is found out before anything is made.
        for path in baker.out.iterdir():
            path.unlink()
        controller.stop()
        again = baker.command(base, "--output-register", controller.root)
        done = subprocess.run(again, capture_output=True, text=True, timeout=300)
        assert done.returncode == 9
        assert "no controller runs here" in done.stderr
        assert list(baker.out.iterdir()) == []


@pytest.mark.slow
def test_an_image_that_can_not_be_registered_stays(tmp_path: Path, cluster: Cluster, speaking_agent: Path) -> None:
    """The bundle is of another cluster than the controller that shall take it in."""
    base = make_system(tmp_path / "base.qcow2")
    baker = Baker(tmp_path / "here", cluster, speaking_agent)
    with running(tmp_path / "root") as controller:
        command = baker.command(base, "--output-register", controller.root, "--name", "edge")
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 11, done.stderr
        assert "not in the controller's ledger" in done.stderr
        assert "appliance image add edge.image.json" in done.stderr
        assert (baker.out / "edge.qcow2").is_file()
        assert controller.operator.images().images == []


@pytest.mark.slow
def test_another_agent_makes_another_image(tmp_path: Path, cluster: Cluster, agent: Path, speaking_agent: Path) -> None:
    """Onto a foreign system the agent comes with the seed: an id must not stand for both."""
    base = make_system(tmp_path / "base.qcow2")
    bundle = cluster.bundle()
    told = []
    for number, each in enumerate((agent, speaking_agent)):
        baker = Baker(tmp_path / str(number), cluster, each)
        baker.bundle.write_bytes(bundle)
        told.append(baker.build(base, "--name", "edge"))
    assert told[0]["image_id"] != told[1]["image_id"]
    assert told[0]["recipe_digest"] != told[1]["recipe_digest"]


def test_a_controllers_image_carries_no_seed(tmp_path: Path, baker: Baker) -> None:
    base = make_system(tmp_path / "base.qcow2")
    command = baker.command(base, "--role", "controller", "--name", "node", "--hostname", "node-1")
    at = command.index("--bundle")
    del command[at : at + 2]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert b'hostname: "node-1"' in read_seed(baker.out / "node.qcow2", "user-data", tmp_path)
    found = verifying.verify(baker.out / "node.qcow2", steps=Silent())
    assert (found.problems, found.cluster_id, found.image_key_id) == ([], "", "")


def test_an_ova_may_be_signed(tmp_path: Path, baker: Baker) -> None:
    base = make_system(tmp_path / "base.qcow2")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    making = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=publisher"]
    run("openssl", *making, "-keyout", key, "-out", certificate)
    signing = ["--ova-certificate", certificate, "--ova-key", key]
    assert "output.formats has no ova" in baker.refused(base, *signing)
    assert "isn't that of the key" in baker.refused(
        base, "--ova-certificate", certificate, "--ova-key", _another_key(tmp_path), "--output-format", "ova"
    )
    baker.build(base, "--name", "edge", "--output-format", "ova", *signing)
    found = verifying.verify(baker.out / "edge.ova", steps=Silent())
    assert (found.problems, found.ova_signer) == ([], "CN=publisher")
    with tarfile.open(baker.out / "edge.ova") as archive:
        assert [name.rpartition(".")[2] for name in archive.getnames()] == ["ovf", "mf", "cert", "vmdk"]

    def forged(members: list[tuple[tarfile.TarInfo, bytes]]) -> list[tuple[tarfile.TarInfo, bytes]]:
        return [(member, content + b"\n" if member.name.endswith(".mf") else content) for member, content in members]

    problems = verifying.verify(
        rewrite(baker.out / "edge.ova", tmp_path / "forged.ova", forged), steps=Silent()
    ).problems
    assert any("isn't what its certificate signed" in problem for problem in problems)


def _another_key(directory: Path) -> Path:
    path = directory / "other.pem"
    run("openssl", "genpkey", "-quiet", "-algorithm", "RSA", "-out", path)
    return path


def test_a_key_in_a_hook_is_refused(tmp_path: Path, baker: Baker, cluster: Cluster) -> None:
    base = make_system(tmp_path / "base.qcow2")
    hook = tmp_path / "hook.sh"
    hook.write_bytes(b"#!/bin/sh\ncat <<E\n" + cluster.authority.key_file().reveal() + b"E\n")
    told = baker.refused(base, "--hook", hook)
    assert "hook hook.sh holds a private key" in told
    assert cluster.authority.key_file().reveal().splitlines()[1].decode() not in told
