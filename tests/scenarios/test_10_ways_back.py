"""10: who gets in, and back in: real SEs by each policy, after their state is lost, after operators' mistakes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from lab_rig import RealSe, Site, site
from rig import until

from appliance.pki.identity import Identity
from appliance.protocol.enroll import Policy
from appliance.protocol.operator import ImageKeyTermsWish, TokenWish
from appliance.protocol.why import Step, StepResult
from appliance.se.identity import IdentityRecord
from appliance.storage.document import Document


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A controller whose hook lets in who is named so."""
    root = tmp_path_factory.mktemp("ways")
    hook = root / "hook"
    hook.write_text('#!/bin/sh\ngrep -q \'"name":"by-hook"\' && exit 0\nexit 10\n')
    hook.chmod(0o755)
    with site(root / "site", settings={"enroll_hook": str(hook)}) as found:
        yield found


def newcomer(at: Site, tmp_path: Path, policy: Policy, name: str = "") -> RealSe:
    """An SE with a seed of a new image key of `policy`; it isn't started."""
    se = at.se(name or f"{policy.value}-{uuid.uuid4().hex[:6]}")
    bundle = tmp_path / f"{se.name}.bundle.json"
    created = at.controller.operator.create_image_key(ImageKeyTermsWish(policy=policy))
    bundle.write_bytes(msgspec.json.encode(created.bundle))
    bundle.chmod(0o600)
    shutil.rmtree(seed(se))
    se.bake(bundle)
    return se


def seed(se: RealSe) -> Path:
    """Where its seed lies."""
    return se._layout.seed(se.name)


def veteran(at: Site) -> RealSe:
    """An SE that came by an open image key and is UP."""
    se = at.se(f"se-{uuid.uuid4().hex[:6]}").start()
    at.until_up(se)
    return se


def give(se: RealSe, *args: str, typed: str = "") -> subprocess.CompletedProcess[str]:
    """Runs `appliance enroll` on its console, with what is typed there."""
    line = [sys.executable, "-m", "appliance", "--root", str(se.paths.root), "enroll", "--wait", "15", *args]
    return subprocess.run(line, input=typed, capture_output=True, text=True, timeout=60, check=False)


def token(at: Site, *args: str) -> str:
    """A new token, as the controller's operator gets it."""
    return at.controller.command("token", "create", *args).stdout


def step(se: RealSe, wanted: Step, result: StepResult) -> str:
    """The text of a step with that result, else ""."""
    health = se.health()
    found = [link for link in health.steps if link.step is wanted and link.result is result] if health else []
    return " ".join((found[0].text, found[0].code, found[0].hint)).strip() if found else ""


def number(at: Site, se: RealSe) -> int:
    return at.controller.operator.se(se.name).summary.number


# Policies.


def test_an_open_image_key_and_a_hook_let_in(at: Site, tmp_path: Path) -> None:
    for se in (newcomer(at, tmp_path, Policy.OPEN), newcomer(at, tmp_path, Policy.HOOK, "by-hook")):
        se.start()
        at.until_up(se)
    refused = newcomer(at, tmp_path, Policy.HOOK).start()
    until(lambda: "ENROLL-036" in refused.failed(Step.GRANT), what="the hook's refusal is told on the console")


def test_who_waits_for_approval_shows_a_fingerprint_and_comes_up_by_itself(at: Site, tmp_path: Path) -> None:
    se = newcomer(at, tmp_path, Policy.APPROVE).start()
    text = until(lambda: step(se, Step.GRANT, StepResult.WAITING), what="it waits")
    (waiting,) = at.controller.operator.pending()
    assert waiting.fingerprint in text
    until(lambda: (told := se.health()) and waiting.fingerprint in told.reason, what="the state line shows it")
    until(lambda: waiting.fingerprint in se.logged(), what="the log shows it")
    se.kill()
    se.start()
    until(lambda: step(se, Step.GRANT, StepResult.WAITING), what="it waits again, as the same SE")
    assert [each.fingerprint for each in at.controller.operator.pending()] == [waiting.fingerprint]
    at.controller.command("se", "approve", waiting.fingerprint)
    at.until_up(se, deadline_s=30)


def test_a_token_typed_at_the_console_lets_in_without_a_restart(at: Site, tmp_path: Path) -> None:
    se = newcomer(at, tmp_path, Policy.TOKEN).start()
    until(lambda: "ENROLL-025" in se.failed(Step.GRANT), what="the missing token is told")
    pid = se.pid
    key = json.loads((seed(se) / "seed.json").read_text())["image_key_id"]
    given = give(se, "--token", "-", typed=token(at, "--image-key", key))
    assert given.returncode == 0, given.stderr
    assert "UP" in given.stdout
    at.until_up(se)
    assert se.pid == pid
    assert not (se.paths.se_state / "given.json").exists(), "what was given is destroyed once it served"


def test_a_token_in_the_seed_lets_in(at: Site, tmp_path: Path) -> None:
    """Under the name, and with the labels, that stand beside it."""
    se = newcomer(at, tmp_path, Policy.TOKEN)
    document = json.loads((seed(se) / "seed.json").read_text())
    document["token"] = token(at, "--image-key", document["image_key_id"]).strip()
    document["hints"]["labels"] = {"rack": "7"}
    (seed(se) / "seed.json").write_text(json.dumps(document))
    se.start()
    at.until_up(se)
    summary = at.controller.operator.se(se.name).summary
    assert (summary.name, summary.labels) == (se.name, {"rack": "7"})


# State that is lost.


def lose(se: RealSe) -> None:
    shutil.rmtree(se.paths.se_state)
    se.paths.se_state.mkdir(mode=0o700)


def truncate(se: RealSe) -> None:
    path = se.paths.se_state / "identity.json"
    path.write_bytes(path.read_bytes()[:100])


def per_vm_seed(text: str, directory: Path) -> Path:
    """A seed disk of one VM: a token, and nothing that could replace an anchor."""
    directory.mkdir()
    document = {"schema": 1, "cluster_id": "", "image_key_id": "", "image_id": "", "baked_at": 0, "controllers": []}
    (directory / "seed.json").write_text(json.dumps({**document, "token": text.strip()}))
    return directory


@pytest.mark.parametrize("damage", [lose, truncate])
@pytest.mark.parametrize("way", ["typed", "disk"])
def test_an_se_that_lost_its_state_takes_its_place_again(
    at: Site, tmp_path: Path, damage: Callable[[RealSe], None], way: str
) -> None:
    se = veteran(at)
    before, uses = number(at, se), at.uses()
    se.kill()
    (seed(se) / "image-key.pem").unlink()  # as on a real SE, whose copy was destroyed when it was spent
    (se.paths.se_state / "image-key.pem").unlink(missing_ok=True)
    damage(se)
    se.start()
    told = until(lambda: step(se, Step.BOOT, StepResult.FAILED), what="it waits, and says so")
    assert "rejoin token" in told
    assert "ENROLL-030" in told
    assert "rejoin" in " ".join(link.hint for link in se.why().steps)
    pid = se.pid
    text = token(at, "--rejoin", se.name)
    if way == "typed":
        given = give(se, "--token", "-", typed=text)
    else:
        given = give(se, "--seed", str(per_vm_seed(text, tmp_path / "disk")))
    assert given.returncode == 0, given.stderr
    at.until_up(se)
    assert (number(at, se), at.uses(), se.pid) == (before, uses, pid)
    actions = [entry.action for entry in at.controller.operator.audit(limit=10_000)]
    assert "enroll.rejoined" in actions
    assert at.controller.operator.verify_audit().intact
    again = give(se, "--token", "-", typed=text)
    assert (again.returncode, "is enrolled" in again.stderr) == (2, True)


def test_a_power_cut_between_rejoin_and_grant_strands_nobody(at: Site, tmp_path: Path) -> None:
    """The controller put the new key in place; the SE lost power before the answer was on disk."""
    se = veteran(at)
    before = number(at, se)
    se.kill()
    (seed(se) / "image-key.pem").unlink()
    lose(se)
    se.start()
    until(lambda: step(se, Step.BOOT, StepResult.FAILED), what="it waits")
    give(se, "--token", "-", typed=token(at, "--rejoin", se.name))
    at.until_up(se)
    se.kill()
    # Back to the moment before: key on disk, no grant, tickets of later; the token is used, and gone.
    document = Document(se.paths.se_state / "identity.json", IdentityRecord)
    record = document.load()
    assert record is not None
    document.save(msgspec.structs.replace(record, grant=None))
    se.start()
    at.until_up(se)
    assert number(at, se) == before


def test_the_same_se_id_with_another_key_never_touches_the_existing_se(at: Site, tmp_path: Path) -> None:
    """A VM that was made anew from an image that carries an SE's id."""
    se = veteran(at)
    before = at.controller.operator.se(se.name)
    copy = newcomer(at, tmp_path, Policy.OPEN)
    copy.paths.se_state.mkdir(parents=True, mode=0o700, exist_ok=True)
    record = IdentityRecord(
        se_id=before.summary.se_id, key=Identity.create().pkcs8().reveal().decode(), attempt_id="0123456789abcdef"
    )
    Document(copy.paths.se_state / "identity.json", IdentityRecord).save(record)
    copy.start()
    until(lambda: "ENROLL-012" in copy.failed(Step.GRANT), what="the conflict is told")
    refused = [e for e in at.controller.operator.audit(limit=10_000) if e.action == "enroll.refused"]
    assert (refused[-1].subject, refused[-1].detail) == (before.summary.se_id, "ENROLL-012")
    assert at.is_up(se)
    assert at.controller.operator.se(se.name).thumbprint == before.thumbprint


# Mistakes.


def test_a_revoked_se_is_up_again_by_itself_when_reinstated(at: Site) -> None:
    se = veteran(at)
    pid, before = se.pid, number(at, se)
    at.controller.command("se", "revoke", se.name, "--reason", "the wrong one")
    until(lambda: se.state == "DOWN", what="its links are closed")
    at.controller.command("se", "reinstate", se.name)
    at.until_up(se)
    assert (se.pid, number(at, se)) == (pid, before)


def test_a_rejected_se_is_up_by_itself_when_reinstated_and_approved(at: Site, tmp_path: Path) -> None:
    se = newcomer(at, tmp_path, Policy.APPROVE).start()
    until(lambda: step(se, Step.GRANT, StepResult.WAITING), what="it waits")
    at.controller.command("se", "reject", se.name, "--reason", "the wrong one")
    until(lambda: "ENROLL-015" in se.failed(Step.GRANT), what="it is told", deadline_s=40)
    at.controller.command("se", "reinstate", se.name)
    at.controller.command("se", "approve", se.name)
    at.until_up(se, deadline_s=60)


def test_a_deleted_se_comes_back_as_another_one(at: Site) -> None:
    se = veteran(at)
    before, se_id = number(at, se), se.stored("identity.json")["se_id"]
    at.controller.command("se", "delete", se.name, "--yes")
    until(lambda: se.state == "DOWN", what="its links are closed")
    given = give(se, "--anew", "--seed", str(seed(se)))
    assert given.returncode == 0, given.stderr
    at.until_up(se)
    assert number(at, se) > before
    assert se.stored("identity.json")["se_id"] != se_id
    assert list(se.paths.se_state.glob("identity.json.broken-*")), "the old identity is set aside, not lost"


# The console.


def test_what_makes_no_sense_on_the_console_changes_nothing(at: Site, tmp_path: Path) -> None:
    se = newcomer(at, tmp_path, Policy.TOKEN)
    se.start()
    text = token(at, "--image-key", json.loads((seed(se) / "seed.json").read_text())["image_key_id"]).strip()
    for args, typed, words in (
        (["--token", text], "", "consider it lost"),
        (["--token", "-"], "not a token", "no token"),
        (["--token", "-"], text[:-1], "no token"),
        ([], "", "nothing to give"),
        (["--seed", str(tmp_path / "nowhere")], "", "is not there"),
        (["--seed", str(tmp_path)], "", "that is no seed"),
    ):
        given = give(se, *args, typed=typed)
        assert given.returncode in {2, 6}, given.stderr
        assert words in given.stderr
        assert text not in given.stderr + given.stdout
    assert not (se.paths.se_state / "given.json").exists()
    on_controller = at.controller.command("enroll", "--token", "-", check=False)
    assert (on_controller.returncode, "is no SE" in on_controller.stderr) == (8, True)


def test_a_token_is_in_no_log_and_no_process_list(at: Site, tmp_path: Path) -> None:
    se = newcomer(at, tmp_path, Policy.TOKEN).start()
    made = at.controller.operator.create_token(
        TokenWish(image_key_id=json.loads((seed(se) / "seed.json").read_text())["image_key_id"])
    )
    line = [sys.executable, "-m", "appliance", "--root", str(se.paths.root), "enroll", "--token", "-"]
    pipe = subprocess.PIPE
    with subprocess.Popen(line, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as console:
        assert console.stdin is not None
        console.stdin.write(made.token)
        console.stdin.close()
        shown = ""
        while console.poll() is None:
            shown += subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True, check=True).stdout
            time.sleep(0.05)
    assert console.returncode == 0
    at.until_up(se)
    secret = made.token.removeprefix("enroll-")
    for path in [se.log, at.controller.log, *se.paths.root.rglob("*")]:
        if path.is_file():
            assert secret.encode() not in path.read_bytes(), path
    assert secret not in shown
