"""The command `mode`: what it refuses, how it counts SEs, and what it shows."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from pathlib import Path

import pytest

from appliance.cli import mode as command
from appliance.cli import root
from appliance.controller import records
from appliance.controller.store.port import Put
from appliance.controller.store.sqlite import SqliteStore
from appliance.errors import StoreError, UnreachableError
from appliance.paths import Paths
from appliance.protocol.enroll import InstanceFacts, SeStatus
from appliance.runtime import mode, units
from appliance.runtime.clock import SystemClock
from appliance.runtime.mode import Mode, ModeDocument, Phase
from appliance.storage.lock import RootLock


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(tmp_path)


def enroll(paths: Paths, *statuses: SeStatus) -> None:
    """Puts SEs into a real store."""
    paths.controller_state.mkdir(parents=True)

    async def put() -> None:
        store = SqliteStore.open(paths.store_file, clock=SystemClock())
        for number, status in enumerate(statuses, 1):
            record = records.SeRecord(
                se_id=f"se-{number}", number=number, name="", labels={}, se_key="", thumbprint="", host_keys=[],
                image_key_id="", status=status, enrolled_at=0.0, source="", facts=InstanceFacts(), agent_version="",
            )  # fmt: skip
            await store.txn([], [Put(records.se_key(record.se_id), records.encode(record))])
        await store.close()

    asyncio.run(put())


def run(paths: Paths, *arguments: str) -> int:
    return root.main(["--root", str(paths.root), "--set", "controller.ssh_listen=127.0.0.1:0", "mode", *arguments])


def test_without_a_controller_there_are_no_ses(paths: Paths) -> None:
    assert command.count_enrolled(paths) == 0


def test_a_stopped_controller_s_ses_are_counted_in_its_store(paths: Paths) -> None:
    enroll(paths, SeStatus.ENROLLED, SeStatus.REVOKED, SeStatus.ENROLLED, SeStatus.PENDING, SeStatus.DELETED)
    assert command.count_enrolled(paths) == 2


def test_a_running_controller_that_does_not_answer_is_no_zero(paths: Paths) -> None:
    enroll(paths)
    with RootLock(paths.lock), pytest.raises(UnreachableError):
        command.count_enrolled(paths)


def test_a_broken_store_is_no_zero(paths: Paths) -> None:
    paths.controller_state.mkdir(parents=True)
    paths.store_file.write_bytes(b"")
    with pytest.raises(StoreError):
        command.count_enrolled(paths)


def test_a_controller_with_ses_is_left_by_force_only(paths: Paths, capsys: pytest.CaptureFixture[str]) -> None:
    enroll(paths, SeStatus.ENROLLED)
    assert run(paths, "set", "controller") == 0
    assert run(paths, "set", "se") == 8
    assert "error MODE-003: 1 SE is enrolled at this controller" in capsys.readouterr().err
    assert mode.load(paths).mode is Mode.CONTROLLER
    assert run(paths, "set", "se", "--force", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["mode"], found["phase"]) == ("se", "done")
    assert found["not_done"][-1].startswith("the daemon was not started")
    assert paths.store_file.exists()


def test_what_would_keep_a_controller_from_starting_is_told(paths: Paths, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        arguments = ["--root", str(paths.root), "--set", f"controller.ssh_listen=127.0.0.1:{port}", "mode", "set"]
        assert root.main([*arguments, "controller"]) == 0
    out = capsys.readouterr().out
    assert "not done: there is no cluster on this machine yet" in out
    assert f"not done: port {port}, which the controller needs for its SEs, is held by " in out
    assert f"(process {os.getpid()})" in out


def test_a_port_held_by_our_own_daemon_is_fine(paths: Paths, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as own, RootLock(paths.lock):
        override = f"controller.ssh_listen=127.0.0.1:{own.getsockname()[1]}"
        mode.document_of(paths).save(ModeDocument(mode=Mode.CONTROLLER, target=Mode.CONTROLLER))
        assert root.main(["--root", str(paths.root), "--set", override, "mode", "set", "controller"]) == 0
    assert "is held by" not in capsys.readouterr().out


@pytest.mark.parametrize(("has_cluster", "code"), [(False, "MODE-008"), (True, "MODE-004")])
def test_with_systemd_it_is_refused_before_anything_is_changed(
    paths: Paths, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, has_cluster: bool, code: str
) -> None:
    monkeypatch.setattr(units, "why_not_systemd", lambda _: "")
    if has_cluster:
        paths.controller_state.mkdir(parents=True)
        (paths.controller_state / "cluster.json").touch()
    with socket.create_server(("127.0.0.1", 0)) as other:
        override = f"controller.ssh_listen=127.0.0.1:{other.getsockname()[1]}"
        assert root.main(["--root", str(paths.root), "--set", override, "mode", "set", "controller"]) == 8
    assert f"error {code}: " in capsys.readouterr().err
    assert not paths.mode_file.exists()


def test_show(paths: Paths, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(paths, "show") == 0
    assert capsys.readouterr().out == "none, no daemon runs\n"
    paths.state.mkdir(parents=True)
    mode.document_of(paths).save(ModeDocument(mode=Mode.SE, target=Mode.NONE, phase=Phase.INTENT, at=5.0))
    with RootLock(paths.lock):
        run(paths, "show")
        first, second = capsys.readouterr().out.splitlines()
        assert first == f"se, its daemon runs (process {os.getpid()})"
        assert second.startswith("a change to none was cut after intent")
        run(paths, "show", "--json")
    assert json.loads(capsys.readouterr().out) == {
        "mode": "se",
        "target": "none",
        "phase": "intent",
        "changed_at": 5.0,
        "daemon_pid": os.getpid(),
        "daemon": f"its daemon runs (process {os.getpid()})",
    }


def test_show_of_a_daemon_that_is_somebody_elses(paths: Paths, capsys: pytest.CaptureFixture[str]) -> None:
    paths.state.mkdir(parents=True)
    mode.document_of(paths).save(ModeDocument(mode=Mode.SE, target=Mode.SE))
    paths.lock.symlink_to("nowhere")  # can't be read by root either
    assert run(paths, "show") == 0
    assert capsys.readouterr().out == "se, whether its daemon runs only root can see\n"
