"""The enroll hook as a program: its verdicts, its limits, and what it may not hold up."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from appliance.controller.hook import MAX_RUNNING, MAX_WAITING, EnrollHook, Facts
from appliance.protocol.enroll import Hook, InstanceFacts

FACTS = Facts(
    se_id="s", fingerprint="SHA256:x", image_key_id="ik-1", source="192.0.2.1", name="n", labels={},
    facts=InstanceFacts(), agent_version="1",
)  # fmt: skip


def program(path: Path, lines: str) -> str:
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(0o755)
    return str(path)


def ask(name: str) -> Hook:
    async def go() -> Hook:
        hook = EnrollHook(name)
        try:
            return await hook.ask(FACTS)
        finally:
            hook.close()

    return asyncio.run(go())


@pytest.mark.parametrize(
    ("lines", "verdict"),
    [
        ("exit 0", Hook.ALLOW),
        ("exit 10", Hook.REFUSE),
        ("exit 11", Hook.SILENT),
        ("kill -9 $$", Hook.SILENT),
        ("head -c 10000000 /dev/zero; exit 0", Hook.ALLOW),
        ("exec 0<&- ; exit 0", Hook.ALLOW),
    ],
)
def test_the_exit_code_is_the_verdict(tmp_path: Path, lines: str, verdict: Hook) -> None:
    assert ask(program(tmp_path / "hook", lines)) is verdict


@pytest.mark.parametrize("name", ["", "/nowhere/hook"])
def test_without_a_program_there_is_no_verdict(name: str) -> None:
    assert ask(name) is Hook.SILENT


def test_a_file_that_cannot_be_run_gives_no_verdict(tmp_path: Path) -> None:
    (tmp_path / "hook").write_text("exit 0")
    assert ask(str(tmp_path / "hook")) is Hook.SILENT


def test_requests_do_not_pile_up_before_a_slow_hook(tmp_path: Path) -> None:
    go = tmp_path / "go"
    name = program(tmp_path / "hook", f"until test -e {go}; do sleep 0.02; done; exit 0")

    async def work() -> None:
        hook = EnrollHook(name)
        tasks = [asyncio.create_task(hook.ask(FACTS)) for _ in range(MAX_RUNNING + MAX_WAITING)]
        await asyncio.sleep(0)
        assert hook.is_busy
        go.touch()
        assert set(await asyncio.gather(*tasks)) == {Hook.ALLOW}
        assert not hook.is_busy
        hook.close()

    asyncio.run(work())
