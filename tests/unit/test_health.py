"""Health: the chain's rule, the state line, and a file that is written when there is something to say."""

from __future__ import annotations

import gc
import os
import resource
from pathlib import Path

import pytest
from rig import open_descriptors

from appliance.protocol.why import Link, Step, StepResult
from appliance.runtime.health import SILENT_S, Health, read_health, stuck


class Hands:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.at = 1000.0

    def now(self) -> float:
        return self.at

    def monotonic(self) -> float:
        return self.at

    def synchronised(self) -> bool:
        return True


@pytest.fixture
def clock() -> Hands:
    return Hands()


@pytest.fixture
def health(tmp_path: Path, clock: Hands) -> Health:
    return Health(tmp_path / "health.json", "se", clock)


def results(health: Health) -> dict[Step, StepResult]:
    return {link.step: link.result for link in health.chain("x").steps}


def test_at_first_an_se_waits_for_all_but_what_it_cannot_see(health: Health) -> None:
    found = results(health)
    assert found.pop(Step.REVERSE) is StepResult.UNSEEN
    assert set(found.values()) == {StepResult.WAITING}
    assert health.chain("x").verdict.startswith("waiting for boot")


def test_a_controller_process_sees_no_chain_of_its_own(tmp_path: Path, clock: Hands) -> None:
    health = Health(tmp_path / "h", "controller", clock)
    assert set(results(health).values()) == {StepResult.UNSEEN}


def test_the_first_failure_is_the_verdict(health: Health) -> None:
    health.step(Step.BOOT, StepResult.OK, "up")
    health.step(Step.TLS, StepResult.FAILED, "another root CA", "TRUST-001", "look at the seed")
    chain = health.chain("se-1")
    assert (chain.subject, chain.side) == ("se-1", "se")
    assert chain.verdict == "stopped at tls: another root CA (TRUST-001)"
    assert chain.steps[1].hint == "look at the seed"


@pytest.mark.parametrize("result", [StepResult.FAILED, StepResult.WAITING])
def test_what_came_after_a_step_that_no_longer_holds_waits(health: Health, result: StepResult) -> None:
    for step in (Step.LINK, Step.HELLO, Step.HEARTBEAT):
        health.step(step, StepResult.OK)
    health.step(Step.LINK, result, "the cable")
    found = results(health)
    assert (found[Step.HELLO], found[Step.HEARTBEAT]) == (StepResult.WAITING, StepResult.WAITING)
    assert found[Step.REVERSE] is StepResult.UNSEEN


def test_what_is_written_is_read(health: Health, tmp_path: Path, clock: Hands) -> None:
    health.line("se", "UP", "OK", ["127.1.0.1"])
    clock.at += 5
    health.step(Step.BOOT, StepResult.OK)
    found = read_health(tmp_path / "health.json")
    assert found is not None
    assert (found.side, found.mode, found.state, found.reason) == ("se", "se", "UP", "OK")
    assert (found.addresses, found.pid) == (["127.1.0.1"], os.getpid())
    assert (found.started_at, found.since, found.written_at) == (1000.0, 1000.0, 1005.0)
    assert found.steps[0].at == 1005.0
    spares = {".health.json.spare-0", ".health.json.spare-1"}
    assert {file.name for file in tmp_path.iterdir()} == {"health.json", "console", *spares}


def test_it_gives_its_spares_back(tmp_path: Path, clock: Hands) -> None:
    before = open_descriptors()
    health = Health(tmp_path / "health.json", "se", clock)
    assert open_descriptors() == before + 2
    del health
    gc.collect()
    assert open_descriptors() == before


def test_without_a_descriptor_it_is_told_all_the_same_and_readers_see_nothing_half(
    health: Health, tmp_path: Path
) -> None:
    path, before = tmp_path / "health.json", resource.getrlimit(resource.RLIMIT_NOFILE)
    health.line("se", "STARTING", "", [])
    for state in ("LINKED", "UP", "DOWN", "UP"):
        whole = path.read_bytes()
        with path.open("rb") as reader:
            resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
            try:
                health.line("se", state, "", [])
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, before)
            assert reader.read() == whole, "what somebody reads is never written to"
        found = read_health(path)
        assert found is not None
        assert found.state == state


def test_the_line_for_the_console_changes_with_what_it_says_alone(health: Health, tmp_path: Path) -> None:
    console = tmp_path / "console"
    health.line("se", "ENROLLING", "an operator must approve this SE; its key is SHA256:abc", ["127.1.0.1"])
    text = console.read_text()
    assert text.startswith("appliance: se ENROLLING: an operator must approve this SE; its key is SHA256:abc [")
    assert text.endswith("127.1.0.1]\n")
    first = console.stat().st_ino
    health.line("se", "ENROLLING", "an operator must approve this SE; its key is SHA256:abc", ["127.1.0.1"])
    health.step(Step.BOOT, StepResult.OK)
    assert console.stat().st_ino == first
    health.line("se", "UP", "node 1 up", ["127.1.0.1"])
    assert console.read_text().startswith("appliance: se UP: node 1 up [")


def test_a_step_of_an_earlier_life_keeps_its_time(health: Health) -> None:
    health.take_over(Link(step=Step.GRANT, result=StepResult.OK, at=7.0, text="number 1"))
    assert health.chain("x").steps[3].at == 7.0


def test_since_moves_with_the_state_only(health: Health, tmp_path: Path, clock: Hands) -> None:
    health.line("se", "UP", "OK", ["127.1.0.1"])
    clock.at += 5
    health.line("se", "UP", "OK", ["127.1.0.1", "127.1.0.2"])
    found = read_health(tmp_path / "health.json")
    assert found is not None
    assert found.since == 1000.0
    health.line("se", "DOWN", "LINK_LOST", [])
    found = read_health(tmp_path / "health.json")
    assert found is not None
    assert found.since == 1005.0


def test_news_are_written_at_once_and_the_same_at_most_each_second(
    health: Health, tmp_path: Path, clock: Hands
) -> None:
    def written_at() -> float:
        found = read_health(tmp_path / "health.json")
        assert found is not None
        return found.written_at

    health.step(Step.HEARTBEAT, StepResult.OK)
    clock.at += 0.5
    health.step(Step.HEARTBEAT, StepResult.OK)
    assert written_at() == 1000.0
    health.step(Step.HEARTBEAT, StepResult.OK, "RTT 3 ms")
    assert written_at() == 1000.5
    clock.at += 1.0
    health.step(Step.HEARTBEAT, StepResult.OK, "RTT 3 ms")
    assert written_at() == 1001.5


def test_a_failure_to_write_is_told_once_and_disturbs_nobody(
    tmp_path: Path, clock: Hands, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "run"
    health = Health(directory / "health.json", "se", clock)
    health.step(Step.BOOT, StepResult.OK, "1")
    health.step(Step.BOOT, StepResult.OK, "2")
    assert len(caplog.records) == 1
    directory.mkdir()
    health.step(Step.BOOT, StepResult.OK, "3")
    found = read_health(directory / "health.json")
    assert found is not None
    assert found.steps[0].text == "3"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"side": 3}', b"\xff"])
def test_what_cannot_be_read_is_nothing(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "health.json"
    assert read_health(file) is None
    file.write_bytes(content)
    assert read_health(file) is None


def test_a_daemon_that_beats_is_believed_and_one_that_stopped_is_not(health: Health, tmp_path: Path) -> None:
    path = tmp_path / "health.json"
    health.beat()  # there is nothing yet: it is written
    assert stuck(os.getpid(), path) == ""
    long_ago = path.stat().st_mtime - SILENT_S - 5
    os.utime(path, (long_ago, long_ago))
    assert "has not stirred for 3" in stuck(os.getpid(), path)
    health.beat()
    assert stuck(os.getpid(), path) == ""
    assert stuck(os.getpid(), tmp_path / "none") == ""


def test_a_health_file_that_somebody_took_is_there_again(health: Health, tmp_path: Path) -> None:
    health.line("se", "UP", "node 1 up", [])
    (tmp_path / "health.json").unlink()
    health.beat()
    found = read_health(tmp_path / "health.json")
    assert found is not None
    assert found.state == "UP"
