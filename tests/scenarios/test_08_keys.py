"""08: an SE changes its own key, with power cuts on both sides of the controller's answer; the key that logs in to it
is changed; a quarantine ends."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from lab_rig import RealSe, Site, site
from rig import machine, until, until_async

from appliance.errors import UsageError
from appliance.pki.identity import Identity
from appliance.se.identity import IdentityRecord
from appliance.storage.document import Document


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, RealSe]]:
    """A controller and one SE that is UP."""
    with site(tmp_path_factory.mktemp("keys")) as found:
        se = found.se("se-1").start()
        found.until_up(se)
        yield found, se


def document(se: RealSe) -> Document[IdentityRecord]:
    return Document(se.paths.se_state / "identity.json", IdentityRecord)


def record(se: RealSe) -> IdentityRecord:
    found = document(se).load()
    assert found is not None
    return found


def thumbprint(key: str) -> str:
    return Identity.from_pkcs8(key.encode()).thumbprint


def known(at: Site) -> str:
    """The fingerprint that the controller knows."""
    return at.controller.operator.se("se-1").thumbprint


def rotate(at: Site, se: RealSe) -> tuple[str, str]:
    """Has the SE change its key; returns the old and the new one as PEM."""
    before = record(se).key
    at.controller.command("se", "rotate-key", "se-1", "--reason", "test")
    until(lambda: known(at) != thumbprint(before), what="the controller knows the new key")
    until(lambda: not record(se).next_key, what="the SE took it into use")
    return before, record(se).key


def test_a_new_key_takes_the_old_ones_place_under_a_live_link(place: tuple[Site, RealSe]) -> None:
    at, se = place
    number = at.controller.operator.se("se-1").summary.number
    beats = at.controller.operator.se("se-1").last_heartbeat_at
    before, after = rotate(at, se)
    assert known(at) == thumbprint(after) != thumbprint(before)
    until(lambda: at.controller.operator.se("se-1").last_heartbeat_at > beats, what="the link lived through it")
    se.kill()
    se.start()
    at.until_up(se)
    assert at.controller.operator.se("se-1").summary.number == number
    assert at.events("se.clone") == []
    actions = [entry.action for entry in at.controller.operator.audit()]
    assert "se.key-rotated" in actions
    assert at.controller.operator.verify_audit().intact


def test_a_lost_answer_strands_nobody(place: tuple[Site, RealSe]) -> None:
    """The controller took the new key, and power failed before the SE heard of it."""
    at, se = place
    before, after = rotate(at, se)
    se.kill()
    document(se).save(msgspec.structs.replace(record(se), key=before, next_key=after))
    se.start()
    at.until_up(se)
    until(lambda: not record(se).next_key, what="the SE took the new key into use")
    assert record(se).key == after


def test_a_request_that_never_left_changes_nothing(place: tuple[Site, RealSe]) -> None:
    """The SE stored its next key, and power failed before the controller heard of it."""
    at, se = place
    se.kill()
    waiting = Identity.create().pkcs8().reveal().decode()
    current = record(se).key
    document(se).save(msgspec.structs.replace(record(se), next_key=waiting))
    se.start()
    at.until_up(se)
    assert known(at) == thumbprint(current)
    at.controller.command("se", "rotate-key", "se-1")
    until(lambda: known(at) == thumbprint(waiting), what="the key that was waiting is used")


def logged_in(at: Site, se: RealSe, key: Path) -> subprocess.CompletedProcess[str]:
    """Runs `echo` on the SE over the reverse path, with stock ssh and that key alone."""
    options = [
        "UserKnownHostsFile=/dev/null", "GlobalKnownHostsFile=/dev/null", "StrictHostKeyChecking=no",
        "BatchMode=yes", "IdentitiesOnly=yes", "IdentityAgent=none",
    ]  # fmt: skip
    line = [
        "ssh", "-F", "none", "-i", str(key), "-p", str(at.controller.bound["reverse_port"]),
        *(word for option in options for word in ("-o", option)),
        f"{se.user}@{at.controller.operator.se(se.name).summary.address}", "echo", "reached",
    ]  # fmt: skip
    return subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)


def test_a_log_in_key_that_was_replaced_opens_no_ses_sshd(place: tuple[Site, RealSe], tmp_path: Path) -> None:
    """Its successor gets in from the change on, and a copy of the file of before no more, once the SE has heard."""
    at, se = place
    operator = at.controller.operator
    current, former = at.controller.paths.controller_state / "id_se", tmp_path / "id_se"
    shutil.copy(current, former)
    assert logged_in(at, se, former).stdout == "reached\n"
    operator.rotate("login-key", "begin")
    until(
        lambda: not next(view.waiting for view in operator.rotations() if view.kind == "login-key"),
        what="the SE knows the next key",
    )
    assert operator.rotate("login-key", "finish").phase == "none"
    done = logged_in(at, se, current)
    assert (done.returncode, done.stdout) == (0, "reached\n"), done.stderr
    done = until(lambda: (tried := logged_in(at, se, former)).returncode and tried, what="the former key is refused")
    assert (done.returncode, done.stdout) == (255, "")
    assert "Permission denied (publickey)" in done.stderr
    assert logged_in(at, se, current).stdout == "reached\n"
    at.until_up(se)


def test_only_an_enrolled_se_has_a_key_to_change(place: tuple[Site, RealSe]) -> None:
    at, se = place
    at.controller.command("se", "revoke", "se-1")
    with pytest.raises(UsageError, match="revoked"):
        at.controller.operator.rotate_se_key("se-1", reason="")
    at.controller.command("se", "reinstate", "se-1")
    at.until_up(se)


def test_a_released_quarantine_ends_and_the_first_to_come_back_is_the_se(place: tuple[Site, RealSe]) -> None:
    at, _ = place
    controller = at.controller

    async def go() -> None:
        async with machine() as stand:
            first = stand.se(controller.bundle, "twin")
            await first.enroll()
            await first.link()
            await first.beat()
            copy = stand.se(controller.bundle, "twin")
            copy.identity, copy.se_id, copy.grant, copy.ticket = first.identity, first.se_id, first.grant, first.ticket
            assert (await copy.link()).quarantined
            await until_async(lambda: controller.operator.se("twin").alarms, what="the alarm")
            # The operator finds out that the first one is the impostor, switches it off, and releases.
            first.close()
            controller.command("se", "release", "twin", "--reason", "the first was a copy")
            copy.close()
            assert not (await copy.link()).quarantined
            await copy.beat()
            assert not [text for text in controller.operator.se("twin").alarms if "quarantine" in text]

    asyncio.run(go())
    assert any(entry.action == "se.released" for entry in controller.operator.audit())
