"""`appliance lab`, as its user sees it: up, status, a command over the reverse path, up again, down."""

from __future__ import annotations

import json
import os
import shlex
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from appliance.errors import ChildError
from appliance.runtime import child

QUICK = ("--set", "controller.heartbeat_interval_s=1", "--set", "se.telemetry_interval_s=1")
CURVE25519 = ("--set", "controller.allow_curve25519=true")
"""Stock SSH clients of Debian 12 know no post-quantum key exchange."""


def lab(root: Path, verb: str, *words: str, options: tuple[str, ...] = ()) -> child.Completed:
    return child.run(
        [sys.executable, "-m", "appliance", *options, "lab", verb, "--root", str(root), *words], timeout_s=150
    )


def status(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(lab(root, "status", "--json").stdout)
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    # pytest's directories are too deep for unix sockets
    path = tmp_path_factory.getbasetemp().parent / f"lab-{os.getpid()}"
    try:
        lab(path, "up", "--ses", "2", options=QUICK + CURVE25519)
        yield path
    finally:
        if (path / "lab.json").exists():
            lab(path, "down", "--remove")
    assert not path.exists()


def test_status_names_what_an_outside_client_needs(root: Path) -> None:
    told = status(root)
    controller = told["controller"]
    assert controller["running"]
    assert told["trouble"] == ""
    paths = {"operator_socket", "root_certificate", "trust_document", "ssh_host_key", "login_key", "bundle"}
    for path in paths | {"state", "settings", "log", "health"}:
        assert Path(controller[path]).exists(), path
    with urllib.request.urlopen(controller["metrics_url"], timeout=10) as answer:
        assert b"appliance_ses" in answer.read()
    assert [se["name"] for se in told["ses"]] == ["se-1", "se-2"]
    assert {se["address"] for se in told["ses"]} == {"127.1.0.1", "127.1.0.2"}
    for se in told["ses"]:
        assert (se["running"], se["sshd_running"], se["fleet_state"]) == (True, True, "UP")
        for path in ("seed", "state", "identity", "settings", "log", "health", "sshd_log", "sshd_host_key"):
            assert Path(se[path]).exists(), path


def test_the_reverse_path_leads_to_each_ses_own_sshd(root: Path) -> None:
    for se in status(root)["ses"]:
        assert child.run([*se["ssh"], 'echo "$APPLIANCE_SE"'], timeout_s=30).stdout == f"{se['name']}\n"


def test_stock_tools_find_every_door_by_the_status_alone(root: Path) -> None:
    told = status(root)
    controller = told["controller"]
    door = controller["enroll_url"].removeprefix("https://").partition("/")[0]
    root_ca = ["-CAfile", controller["root_certificate"], "-verify_return_error"]
    tls = child.run(["openssl", "s_client", "-connect", door, *root_ca, "-brief"], timeout_s=30)
    assert "Verification: OK" in tls.stderr
    scan = ["ssh-keyscan", "-t", "ed25519", "-p", str(controller["ssh_port"]), controller["ssh_host"]]
    assert Path(controller["ssh_host_key"]).read_text().split()[1] in child.run(scan, timeout_s=30).stdout
    keys = ["-i", controller["login_key"], "-o", f"UserKnownHostsFile={told['known_hosts']}", "-o", "BatchMode=yes"]
    to_gateway = [f"{controller['ssh_user']}@{controller['ssh_host']}", "id"]
    refused = ["ssh", "-F", "none", *keys, "-o", "StrictHostKeyChecking=no", "-p", str(controller["ssh_port"])]
    with pytest.raises(ChildError, match="Permission denied"):  # that key opens SEs, not the gateway
        child.run([*refused, *to_gateway], timeout_s=30)
    for se in told["ses"]:
        over = ["ssh", "-F", "none", *keys, "-p", str(controller["reverse_port"]), f"{told['user']}@{se['address']}"]
        assert child.run([*over, 'echo "$APPLIANCE_SE"'], timeout_s=30).stdout == f"{se['name']}\n"


def test_keys_and_seeds_are_not_for_other_users(root: Path) -> None:
    told = status(root)
    assert Path(told["controller"]["login_key"]).stat().st_mode & 0o077 == 0
    for se in told["ses"]:
        assert Path(se["seed"]).stat().st_mode & 0o077 == 0
        assert (Path(se["state"]) / "authorized_keys").stat().st_mode & 0o077 == 0


def test_a_second_up_keeps_what_runs_and_adds_what_is_wanted(root: Path) -> None:
    before = status(root)
    lab(root, "up", "--ses", "3")
    after = status(root)
    assert after["controller"] == before["controller"]
    assert [(se["pid"], se["sshd_pid"]) for se in after["ses"][:2]] == [
        (se["pid"], se["sshd_pid"]) for se in before["ses"]
    ]
    assert after["ses"][2]["fleet_state"] == "UP"


def test_down_ends_everything_and_up_finds_the_same_fleet_again(root: Path) -> None:
    before = status(root)
    lab(root, "down")
    resting = status(root)
    assert not resting["controller"]["running"]
    assert not any(se["running"] or se["sshd_running"] for se in resting["ses"])
    pids = [before["controller"]["pid"], *(pid for se in before["ses"] for pid in (se["pid"], se["sshd_pid"]))]
    assert not any(_runs(pid) for pid in pids)
    lab(root, "down")  # again changes nothing
    lab(root, "up", "--ses", str(len(before["ses"])))
    assert [(se["se_id"], se["address"]) for se in status(root)["ses"]] == [
        (se["se_id"], se["address"]) for se in before["ses"]
    ]


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in {"Z", "X"}


def test_all_mistakes_in_settings_are_told_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(ChildError) as caught:
        lab(tmp_path / "x", "up", options=("--set", "controller.heartbeat_interval_s=abc", "--set", "se.sead=y"))
    assert "heartbeat_interval_s" in caught.value.message
    assert "did you mean 'seed'" in caught.value.message
    assert not (tmp_path / "x").exists()


def test_an_se_that_does_not_come_up_is_told_with_its_reason(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp().parent / f"lab-{os.getpid()}-b"
    try:
        with pytest.raises(ChildError, match="1 of 1 SEs aren't UP") as caught:
            lab(path, "up", "--ses", "1", "--deadline", "12", options=("--set", "se.sshd_port=9"))
        assert "se-1: controller: stopped at reverse path" in caught.value.message
    finally:
        lab(path, "down", "--remove")


def test_a_place_that_is_no_lab_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    with pytest.raises(ChildError, match="is no lab and not empty: precious"):
        lab(tmp_path, "up")
    for verb in ("down", "status"):
        with pytest.raises(ChildError, match="there is no lab at"):
            lab(tmp_path, verb)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_help_names_the_verbs() -> None:
    told = child.run([*child.self_command(), "lab", "--help"], timeout_s=30).stdout
    assert {"up", "down", "status", "demo"} <= set(shlex.split(told.replace("'", "")))
