"""The frozen executables as their users get them: both forms start, unpack where they may, and leak nothing.

Made by scripts/build; `scripts/test --frozen` sees to it that they are of these sources. How fast they start is
measured by the bench `start`, not asserted here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from rig import core_limit, free_ports, leaves_core, until

from appliance import __version__
from appliance.paths import Paths

pytestmark = pytest.mark.frozen

DIST = Path(__file__).resolve().parents[2] / "dist"
FORMS = {"directory": "{0}/{0}", "one-file": "one-file/{0}"}
LEAKS = ("LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONHOME", "PYTHONPATH")


def program(name: str, form: str) -> Path:
    path = DIST / FORMS[form].format(name)
    assert path.is_file(), f"{path} is missing; run scripts/build"
    return path


def run(*args: str | Path, env: dict[str, str] | None = None, timeout_s: float = 60) -> str:
    """Runs a frozen program in a bare environment, so that nothing of this Python's can help it. Returns stdout."""
    ended = subprocess.run(
        [str(arg) for arg in args],
        env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", **(env or {})},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert ended.returncode == 0, f"{args}: {ended.returncode}\n{ended.stdout}{ended.stderr}"
    return ended.stdout


@pytest.mark.parametrize("form", FORMS)
def test_it_tells_its_version(form: str) -> None:
    assert __version__ in run(program("appliance", form), "version")
    assert __version__ in run(program("image-builder", form), "--version")


@pytest.mark.parametrize("form", FORMS)
def test_every_command_has_its_help(form: str) -> None:
    """Commands are imported by name when they are called: one that was left out of the freeze shows here."""
    appliance = program("appliance", form)
    listed = run(appliance, "--help").partition("Commands:\n")[2].splitlines()
    nouns = [line.split()[0] for line in listed if line.startswith("  ") and line[2] != " "]
    assert {"run", "mode", "lab", "why", "version"} <= set(nouns)
    for noun in nouns:
        assert f"appliance {noun}" in run(appliance, noun, "--help")


@pytest.mark.parametrize("form", FORMS)
def test_a_daemon_leaves_its_keys_in_no_core_file(form: str, tmp_path: Path) -> None:
    """The frozen program as well: its bootloader, or what it bundles, might undo what the program forbids."""
    paths, appliance = Paths(tmp_path / "root"), program("appliance", form)
    enroll_port, ssh_port = free_ports(2)
    paths.settings_file.parent.mkdir(parents=True)
    paths.settings_file.write_text(
        f'[controller]\nenroll_listen = "127.0.0.1:{enroll_port}"\nssh_listen = "127.0.0.1:{ssh_port}"\n'
        'reverse_port = 0\nmetrics_listen = "127.0.0.1:0"\n'
    )
    at = ("--root", paths.root)
    run(appliance, *at, "controller", "init", "--address", "127.0.0.1", "--date", "now")
    run(appliance, *at, "mode", "set", "controller")
    line = [str(word) for word in (appliance, *at, "run")]
    process = subprocess.Popen(line, cwd=tmp_path, stdin=subprocess.DEVNULL, env={"PATH": "/usr/bin:/bin"})
    try:
        until(paths.controller_file.exists, what="the controller listens", deadline_s=60)
        daemon = json.loads(paths.controller_file.read_text())["pid"]
        assert core_limit(daemon) == (0, 0)
        if form == "directory":
            assert daemon == process.pid
            assert not leaves_core(process)
        else:  # a child of the bootloader, which holds no key
            assert daemon in {child.pid for child in psutil.Process(process.pid).children(recursive=True)}
            process.terminate()
            assert process.wait(30) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def test_one_file_unpacks_where_tmpdir_says_and_cleans_up(tmp_path: Path) -> None:
    with subprocess.Popen(
        [program("appliance", "one-file"), "version"],
        env={"PATH": "/usr/bin:/bin", "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
    ) as process:
        unpacked: set[str] = set()
        while process.poll() is None:
            unpacked |= {path.name for path in tmp_path.iterdir()}
            time.sleep(0.005)  # it lives for half a second; what is looked for is gone afterwards
        assert process.stdout is not None
        assert __version__.encode() in process.stdout.read()
    assert process.returncode == 0
    assert any(name.startswith("_MEI") for name in unpacked)
    assert list(tmp_path.iterdir()) == []


def test_the_directory_form_unpacks_nothing(tmp_path: Path) -> None:
    run(program("appliance", "directory"), "version", env={"TMPDIR": str(tmp_path)})
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module", params=list(FORMS))
def lab(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """A controller and an SE, each a frozen daemon. Yields `lab status`."""
    appliance = program("appliance", request.param)
    top = Path(tempfile.mkdtemp(prefix="frozen-"))  # pytest's own directories are too deep for unix sockets
    root = top / "lab"
    environment = {"LD_LIBRARY_PATH": "/nonexistent/of-the-caller", "TMPDIR": str(top)}
    try:
        run(appliance, "lab", "up", "--ses", "1", "--root", root, env=environment, timeout_s=180)
        yield json.loads(run(appliance, "lab", "status", "--json", "--root", root))
    finally:
        if (root / "lab.json").exists():
            run(appliance, "lab", "down", "--remove", "--root", root, timeout_s=120)
        shutil.rmtree(top)


def environment_of(pid: int) -> dict[str, str]:
    """The environment that a process was started with."""
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_the_main_job_runs_frozen(lab: dict[str, Any]) -> None:
    assert [se["fleet_state"] for se in lab["ses"]] == ["UP"]


def test_children_get_the_environment_of_the_caller_not_of_the_freeze(lab: dict[str, Any]) -> None:
    """A frozen program finds its libraries by LD_LIBRARY_PATH; an sshd that inherits it loads our libcrypto."""
    (se,) = lab["ses"]
    environment = environment_of(se["sshd_pid"])
    assert environment.get("LD_LIBRARY_PATH", "") in {"", "/nonexistent/of-the-caller"}
    assert not [name for name in environment if name.startswith(("_MEI", "_PYI"))]
    libraries = Path(f"/proc/{se['sshd_pid']}/maps").read_text()
    assert "_MEI" not in libraries
    assert "_internal" not in libraries


def test_daemons_are_the_frozen_program(lab: dict[str, Any]) -> None:
    for pid in (lab["controller"]["pid"], lab["ses"][0]["pid"]):
        assert os.path.realpath(f"/proc/{pid}/exe").startswith(str(DIST))
