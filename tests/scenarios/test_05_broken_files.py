"""05: state files that are cut short, overwritten or gone: named, set aside or left for a backup, nobody stranded."""

from __future__ import annotations

import contextlib
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab_rig import RealSe, Site, site
from rig import until

from appliance.protocol.why import Step

DAMAGES = {
    "truncated": lambda content: content[: len(content) // 2],
    "overwritten": lambda content: b"\x00\xff no such file \n" * 20,
    "empty": lambda content: b"",
    "missing": lambda content: None,
}
UNREADABLE = ("truncated", "missing")
"""What a controller's files are put through here; `tests/unit` does the rest."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, RealSe]]:
    """A controller and one SE that is UP."""
    with site(tmp_path_factory.mktemp("broken")) as found:
        se = found.se("se-1").start()
        found.until_up(se)
        yield found, se


def damage(path: Path, how: str) -> bytes:
    """Spoils a file and returns what it was."""
    content = path.read_bytes()
    spoiled = DAMAGES[how](content)
    if spoiled is None:
        path.unlink()
    else:
        path.write_bytes(spoiled)
    return content


NEEDED = (
    "cluster.json", "root-ca.pem", "root-ca.key", "trust.json", "nonce.key", "ssh_host_ed25519_key", "id_se",
    "store.sqlite",
)  # fmt: skip
REPLACEABLE = ("node.pem", "node.key")


@pytest.fixture
def stopped(place: tuple[Site, RealSe]) -> Iterator[Site]:
    """The site while its controller is stopped; afterwards it runs again and everybody is UP."""
    at, se = place
    assert at.controller.stop() == 0
    yield at
    at.controller.start()
    at.until_up(se)
    assert at.events("se.clone") == at.events("se.rolled-back") == []
    assert at.uses() == 1


def test_a_controller_without_one_of_its_files_names_it_and_changes_nothing(stopped: Site) -> None:
    state = stopped.controller.paths.controller_state
    for path, how in [*((state / file, "truncated") for file in NEEDED), (state / "store.sqlite", "missing")]:
        content = damage(path, how)
        try:
            done = stopped.controller.command("run", check=False)
            left = path.read_bytes() if path.exists() else None
        finally:
            path.write_bytes(content)
        what = f"{path.name} {how}: {done.stdout}{done.stderr}"
        assert left == DAMAGES[how](content), f"{path.name} {how}: it must be left as it is"
        assert done.returncode == 4, what
        assert re.search(rf"error STOR\w+-\d+: .*{re.escape(str(path))}", done.stderr), what
        assert "backup" in done.stderr.partition("hint: ")[2], what
        assert "Traceback" not in done.stderr, what


@pytest.mark.parametrize("how", UNREADABLE)
def test_a_controllers_node_certificate_is_issued_anew(place: tuple[Site, RealSe], stopped: Site, how: str) -> None:
    _, se = place
    for file in REPLACEABLE:
        damage(stopped.controller.paths.controller_state / file, how)
        stopped.controller.start()
        stopped.until_up(se)
        assert "the node certificate is issued anew" in stopped.controller.log.read_text()
        assert stopped.controller.stop() == 0
    assert "Traceback" not in stopped.controller.log.read_text()


@pytest.mark.parametrize("how", DAMAGES)
def test_an_se_whose_ticket_is_lost_is_admitted_and_told(place: tuple[Site, RealSe], how: str) -> None:
    at, se = place
    number, rolled = at.controller.operator.se("se-1").summary.number, len(at.events("se.rolled-back"))
    se.stop()
    damage(se.paths.se_state / "tickets.json", how)
    se.start()
    until(lambda: at.controller.state("se-1").startswith("UP"), what="the SE is UP")
    until(lambda: se.state == "UP", what="the SE says so too")
    assert at.controller.operator.se("se-1").summary.number == number
    assert len(at.events("se.rolled-back")) == rolled + 1, "an operator is told: it might have been a restored disk"
    if how != "missing":
        assert "tickets.json is broken and was set aside as" in se.logged()
    assert at.events("se.clone") == []
    assert "Traceback" not in se.logged()


@pytest.mark.parametrize("file", ["trust.json", "authorized_keys", "image-key.pem"])
def test_an_se_replaces_what_it_can_get_again(place: tuple[Site, RealSe], file: str) -> None:
    at, se = place
    path = se.paths.se_state / file
    for how in DAMAGES:
        se.stop()
        before = path.read_bytes() if path.exists() else b""
        path.write_bytes(before)
        damage(path, how)
        se.start()
        at.until_up(se)
        if file == "authorized_keys":
            assert path.read_bytes() == before
        if file == "trust.json" and how in {"truncated", "overwritten"}:
            assert "trust.json is broken and was set aside as" in se.logged()
    assert "Traceback" not in se.logged()
    assert at.uses() == 1


def size_of(folder: Path) -> int:
    """Bytes of its files; one that goes away meanwhile has none."""
    size = 0
    for entry in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            size += entry.stat().st_size
    return size


def test_a_broken_spool_costs_its_samples_and_nothing_else(place: tuple[Site, RealSe]) -> None:
    at, se = place
    at.ssh.cut()
    try:
        segments = se.paths.se_state / "spool"
        until(lambda: size_of(segments) > 0, what="samples wait")
        se.kill()
        for segment in segments.iterdir():
            damage(segment, "truncated")
            (segments / f"{segment.name}.odd").write_bytes(b"\xff" * 100)
    finally:
        at.ssh.mend()
    se.start()
    at.until_up(se)
    assert "Traceback" not in se.logged()


def test_a_broken_identity_is_set_aside_and_told_and_the_old_se_is_left_alone(place: tuple[Site, RealSe]) -> None:
    """The seed still has an image key, so the machine comes back as another SE, which both sides can tell."""
    at, se = place
    before, rolled = at.controller.operator.se("1"), at.events("se.rolled-back")
    se.stop()
    damage(se.paths.se_state / "identity.json", "truncated")
    se.start()
    until(lambda: len(at.controller.operator.ses()) == 2, what="the machine enrolls anew")
    until(lambda: at.controller.state("2") == "UP OK", what="the new SE is UP")
    assert at.events("se.rolled-back") == rolled, "tickets of the old SE don't count for the new one"
    assert "identity.json is broken and was set aside as" in se.logged()
    assert (se.paths.se_state / "identity.json.broken-1").exists()
    old = at.controller.operator.se("1")
    assert (old.summary.se_id, old.thumbprint, old.status) == (before.summary.se_id, before.thumbprint, "enrolled")
    assert old.summary.state == "DOWN"
    assert at.uses() == 2


def test_a_broken_identity_without_an_image_key_waits_and_says_what_for(place: tuple[Site, RealSe]) -> None:
    at, se = place
    known = len(at.controller.operator.ses())
    se.stop()
    image_key = at.layout.seed("se-1") / "image-key.pem"
    key = image_key.read_bytes()
    image_key.unlink()
    damage(se.paths.se_state / "identity.json", "overwritten")
    se.start()
    told = until(lambda: se.failed(Step.BOOT), what="the SE says what it lacks")
    assert "neither an identity nor an image key" in told
    assert "identity.json is broken and was set aside as" in told
    chain = se.why()
    assert chain.verdict.startswith("stopped at boot")
    assert "rejoin" in next(link.hint for link in chain.steps if link.step is Step.BOOT)
    assert len(at.controller.operator.ses()) == known
    # The backup of the file brings the same SE back.
    se.stop()
    identity = se.paths.se_state / "identity.json"
    assert not identity.exists()
    image_key.write_bytes(key)


@pytest.mark.parametrize("file", ["mode", "lock"])
def test_broken_files_of_the_process_itself(place: tuple[Site, RealSe], file: str) -> None:
    at, se = place
    if se.process is not None:
        se.process.send_signal(signal.SIGTERM)
        se.wait()
    path = at.layout.se("se-1").state / file
    content = damage(path, "overwritten")
    se.start()
    if file == "mode":
        assert se.wait() == 4
        assert f"{path} is broken and was set aside as" in se.logged()
        path.write_bytes(content)
        se.start()
    until(lambda: se.state, what="the daemon runs")
    assert "Traceback" not in se.logged()
