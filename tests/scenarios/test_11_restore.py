"""11: a controller restored from a backup that is older than some SEs, numbers, keys and revocations."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from lab_rig import RealSe, Site, site
from rig import until

from appliance.controller import backup
from appliance.pki.secret import Secret
from appliance.protocol.operator import TokenWish
from appliance.protocol.why import Step
from image_builder import output
from image_builder import seed as baking

PASSPHRASE = "correct horse battery staple"
QUICK_REFRESH = {"refresh_after_s": 1.0}


def take_backup(at: Site, out: Path) -> dict[str, Any]:
    """Backs the running controller up by the command line, the passphrase on stdin."""
    done = appliance(at, "controller", "backup", "--out", str(out), "--passphrase-file", "-", "--json")
    assert done.returncode == 0, done.stderr
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary


def appliance(at: Site, *args: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "appliance", "--root", str(at.controller.root), *args]
    return subprocess.run(line, input=PASSPHRASE + "\n", capture_output=True, text=True, timeout=60, check=False)


def remembered(se: RealSe) -> int:
    """The newest audit entry of which an SE keeps a head."""
    try:
        heads = se.stored("witness.json")["heads"]
    except FileNotFoundError:
        return 0
    bodies = [json.loads(base64.b64decode(head["payload"])) for head in heads]
    return max(body["sequence"] for body in bodies)


def lose(at: Site) -> None:
    """The disk of the controller dies."""
    at.controller.kill()
    shutil.rmtree(at.controller.paths.controller_state)


def restore(at: Site, out: Path, *, root_word: str = "") -> dict[str, Any]:
    """Restores the backup and starts the controller; `root_word` is the root key's passphrase, where it has one."""
    line = ["controller", "restore", str(out), "--date", "now", "--passphrase-file", "-", "--json"]
    if root_word:
        word = out.with_name("word")
        word.write_text(root_word + "\n")
        line += ["--root-passphrase-file", str(word)]
    done = appliance(at, *line)
    assert done.returncode == 0, done.stderr
    at.controller.start()
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def test_a_restored_controller_finds_its_fleet_again(tmp_path: Path) -> None:
    with site(tmp_path / "s") as at:
        out, operator = tmp_path / "controller.backup", at.controller.operator
        known = [at.se(f"known-{n}", settings=QUICK_REFRESH).start() for n in range(2)]
        for se in known:
            at.until_up(se)
        unused = operator.create_token(TokenWish(rejoin="known-0")).token
        summary = take_backup(at, out)
        assert summary["ses"] == 2
        assert out.stat().st_mode & 0o777 == 0o600
        assert PASSPHRASE.encode() not in out.read_bytes()
        assert b"PRIVATE KEY" not in out.read_bytes()

        # What the backup doesn't know: two SEs, one new key, one revocation.
        newer = [at.se(f"newer-{n}", settings=QUICK_REFRESH).start() for n in range(2)]
        for se in newer:
            at.until_up(se)
        numbers = {se.name: operator.se(se.name).summary.number for se in [*known, *newer]}
        first_key = operator.se("known-1").thumbprint
        operator.rotate_se_key("known-1", reason="test")
        until(lambda: operator.se("known-1").thumbprint != first_key, what="known-1 has a new key")
        rotated = operator.se("known-1").thumbprint
        operator.sign_audit_head()
        written = operator.verify_audit().entries
        until(lambda: remembered(newer[0]) >= written, what="an SE keeps the audit's head")
        newer[1].stop()
        operator.revoke_se("known-0", reason="stolen")
        lose(at)
        told = restore(at, out)

        assert told["numbers_from"] == told["backup"]["next_number"] + 65_536
        view = operator.recovery()
        assert view.is_active
        assert any("revoked" in text for text in view.warnings)
        assert any(text.startswith("RECOVERY") for text in operator.status().problems)
        at.until_up(known[0])  # its revocation is lost, which the warning says
        until(lambda: len(operator.recovery().waiting) == 2, what="two SEs show receipts")
        assert {entry.name for entry in operator.pending()} == {"newer-0", "known-1"}
        done = appliance(at, "se", "approve", "--receipts", "--json")
        assert done.returncode == 0, done.stderr
        for se in (known[1], newer[0]):
            at.until_up(se, deadline_s=40)
        assert operator.se("known-1").thumbprint == rotated

        # One that was off during all of it comes late, even after RECOVERY was ended.
        operator.set_recovery("end", reason="")
        assert not any(text.startswith("RECOVERY") for text in operator.status().problems)
        newer[1].start()
        until(lambda: operator.status().refusals.get("ENROLL-022"), what="it is refused as unknown", deadline_s=40)
        operator.set_recovery("begin", reason="")
        until(lambda: operator.recovery().waiting == ["newer-1"], what="it shows its receipt", deadline_s=100)
        operator.approve_receipts(reason="")
        at.until_up(newer[1], deadline_s=60)

        assert {name: operator.se(name).summary.number for name in numbers} == numbers
        assert at.events("se.clone") == at.events("se.rolled-back") == []
        fresh = at.se("fresh").start()
        at.until_up(fresh)
        assert operator.se("fresh").summary.number >= told["numbers_from"]
        assert [token.status for token in operator.tokens()] == ["revoked"], unused
        assert operator.verify_audit().intact
        # The witness remembers audit entries that the backup did not have, and takes none of it for an attack.
        assert any("audit entries" in text for text in operator.recovery().warnings)
        assert not any("set back" in text for text in operator.status().problems)
        export = at.controller.command("audit", "show", "--limit", "0", "--json").stdout
        (tmp_path / "audit.json").write_text(export)
        at.controller.command("audit", "verify", "--file", str(tmp_path / "audit.json"))


def test_a_controller_set_back_to_a_snapshot_is_told_on(tmp_path: Path) -> None:
    with site(tmp_path / "s") as at:
        operator, state = at.controller.operator, at.controller.paths.controller_state
        se = at.se("se-1", settings=QUICK_REFRESH).start()
        at.until_up(se)
        assert at.controller.stop() == 0
        shutil.copytree(state, tmp_path / "snapshot")
        at.controller.start()
        at.until_up(se)
        operator.revoke_se("se-1", reason="a")
        operator.reinstate_se("se-1", reason="b")
        at.until_up(se, deadline_s=60)
        newest = operator.verify_audit().entries

        operator.sign_audit_head()
        until(lambda: remembered(se) >= newest, what="the SE keeps the newest head")
        at.controller.kill()
        shutil.rmtree(state)
        shutil.copytree(tmp_path / "snapshot", state)
        at.controller.start()
        until(lambda: at.events("audit.set-back"), what="the SE tells on it")
        assert any("set back" in text for text in operator.status().problems)
        until(lambda: any(entry.action == "audit.set-back" for entry in operator.audit()), what="the audit has it")
        # The way back: a backup of it as it is, restored in a new epoch.
        out = tmp_path / "as-it-is.backup"
        take_backup(at, out)
        lose(at)
        restore(at, out)
        at.until_up(se, deadline_s=60)
        assert not any("set back" in text for text in operator.status().problems)


CUT = """
import os, sys
from pathlib import Path
from appliance.controller import restore
from appliance.paths import Paths
from appliance.pki.secret import Secret
from appliance.runtime.clock import SystemClock

root, file, passphrase, cut = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
left = cut
real = os.rename, os.replace, os.unlink, os.mkdir

def counting(which):
    def step(*args, **more):
        global left
        left -= 1
        if left < 0:
            os._exit(9)
        return which(*args, **more)
    return step

os.rename, os.replace, os.unlink, os.mkdir = map(counting, real)
restore.restore(Paths(root), file, Secret(passphrase.encode()), clock=SystemClock(0.0, True))
"""


@pytest.mark.slow
def test_a_restore_that_is_cut_at_any_step_can_be_repeated(tmp_path: Path) -> None:
    """Each rename, unlink and mkdir is a step; after a cut there is no controller, or a whole one."""
    with site(tmp_path / "s") as at:
        at.until_up(at.se("se-1").start())
        out = tmp_path / "b"
        backup.make(at.controller.paths, out, Secret(PASSPHRASE.encode()), now=int(time.time()))
    steps = 0
    for cut in range(0, 200, 3):
        root = tmp_path / f"cut-{cut}"
        line = [sys.executable, "-c", CUT, str(root), str(out), PASSPHRASE]
        ended = subprocess.run([*line, str(cut)], capture_output=True, text=True, timeout=60, check=False)
        assert ended.returncode in {0, 9}, ended.stderr
        state = root / "var/lib/appliance/controller"
        if ended.returncode == 9 and not (state / "initialised").exists():
            assert not state.exists(), "half a controller"
            again = subprocess.run([*line, "100000"], capture_output=True, text=True, timeout=60, check=False)
            assert again.returncode == 0, again.stderr
        assert (state / "initialised").exists()
        assert not (root / "var/lib/appliance/controller.restoring").exists()
        steps += 1
        if ended.returncode == 0:
            break
    assert steps > 5


# ------------------------------------------------------------------------- a change of root and a backup around it

ROOT_WORD = "a word for the root key"


def test_a_backup_taken_in_a_change_of_root_brings_the_fleet_back_after_its_end(tmp_path: Path) -> None:
    """One SE follows to the end of the change, one sleeps through all of it: the restore brings back both."""
    with site(tmp_path / "s") as at:
        out, operator = tmp_path / "controller.backup", at.controller.operator
        operator.set_passphrase(ROOT_WORD, reason="")
        awake, asleep = (at.se(name, settings=QUICK_REFRESH).start() for name in ("awake", "asleep"))
        for se in (awake, asleep):
            at.until_up(se, deadline_s=90)
        asleep.stop()
        operator.rotate("ca", "begin", passphrase=ROOT_WORD)
        assert any("no backup was taken" in text for text in operator.status().problems)
        summary = take_backup(at, out)
        assert (summary["root_change"], summary["root_is_locked"]) == (True, True)
        assert not any("no backup was taken" in text for text in operator.status().problems)
        former = operator.controller().root_fingerprint
        operator.rotate("ca", "finish", force=True, passphrase=ROOT_WORD)
        version = operator.controller().trust_version
        until(lambda: trusts(awake) >= version, what="the SE that is awake trusts the new root alone", deadline_s=60)
        lose(at)

        # Both passphrases are asked for, and nothing is made without the second.
        done = appliance(at, "controller", "restore", str(out), "--date", "now", "--passphrase-file", "-")
        assert done.returncode == 2, done.stderr
        assert "--root-passphrase-file" in done.stderr
        assert not at.controller.paths.controller_state.exists()
        restore(at, out, root_word=ROOT_WORD)
        view = operator.controller()
        assert view.root_fingerprint != former
        assert view.root_is_locked
        asleep.start()
        for se in (awake, asleep):
            at.until_up(se, deadline_s=90)
        assert not any("root CA was changed" in text for text in operator.status().problems)


def trusts(se: RealSe) -> int:
    """The version of the trust document that an SE stored."""
    version: int = json.loads(base64.b64decode(se.stored("trust.json")["payload"]))["version"]
    return version


def test_a_backup_from_before_a_change_of_root_is_told_to_be_too_old(tmp_path: Path) -> None:
    with site(tmp_path / "s") as at:
        out, operator = tmp_path / "controller.backup", at.controller.operator
        se = at.se("se-1", settings=QUICK_REFRESH).start()
        at.until_up(se, deadline_s=90)
        take_backup(at, out)
        operator.rotate("ca", "begin")
        operator.rotate("ca", "finish", force=True)
        version = operator.controller().trust_version
        until(lambda: trusts(se) >= version, what="the SE trusts the new root alone", deadline_s=60)
        assert any("no backup was taken" in text for text in operator.status().problems)
        operator.sign_audit_head()
        lose(at)
        restore(at, out)
        until(
            lambda: any("root CA was changed after this backup" in text for text in operator.status().problems),
            what="the controller says that the backup is too old", deadline_s=90,
        )  # fmt: skip
        until(
            lambda: any(f"seen version {version}" in text for text in operator.recovery().warnings),
            what="it says which trust document the fleet has seen", deadline_s=90,
        )  # fmt: skip
        assert any("rotate-ca begin" in text for text in operator.recovery().warnings)

        # There is no other backup: a person at the SE's console gives it the restored controller's word, and its place.
        number = operator.se("se-1").summary.number
        told = until(lambda: refusal_of(se), what="the SE says what it refuses")
        assert "--anew --seed" in told
        bundle, disk = tmp_path / "bundle.json", tmp_path / "disk"
        at.controller.command("image-key", "create", "--out", str(bundle))
        now = int(time.time())
        baked = baking.bake(bundle.read_bytes(), baking.Wishes(), baked_at=now, now=now)
        output.place(baked.files, directory=disk, iso=None, iso_content=b"")
        token = at.controller.command("token", "create", "--rejoin", "se-1").stdout
        given = typed(se, token, "enroll", "--anew", "--seed", str(disk), "--token", "-", "--wait", "30")
        assert given.returncode == 0, given.stdout + given.stderr
        at.until_up(se, deadline_s=60)
        assert operator.se("se-1").summary.number == number


def refusal_of(se: RealSe) -> str:
    """What an SE advises that doesn't believe its controller, "" in the moments when it tries again."""
    health = se.health()
    link = next((link for link in health.steps if link.step is Step.LINK), None) if health else None
    return link.hint if link is not None and "isn't signed by a root" in link.text else ""


def typed(se: RealSe, text: str, *args: str) -> subprocess.CompletedProcess[str]:
    """A command on an SE's console, with what is typed there."""
    line = [sys.executable, "-m", "appliance", "--root", str(se.paths.root), *args]
    return subprocess.run(line, input=text, capture_output=True, text=True, timeout=90, check=False)


# --------------------------------------------------------------------------------- receipts of who counts no more


def test_a_receipt_outlives_the_issuing_ca_that_signed_it(tmp_path: Path) -> None:
    """An SE that the backup doesn't know came by a receipt of an issuing CA that was revoked later: it took a new one,
    on the link that it had. So the restored controller, which must revoke that CA once more, finds it all the same."""
    with site(tmp_path / "s") as at:
        out, operator = tmp_path / "controller.backup", at.controller.operator
        operator.set_passphrase(ROOT_WORD, reason="")
        take_backup(at, out)
        se = at.se("newer", settings=QUICK_REFRESH).start()
        at.until_up(se, deadline_s=90)
        number, first = operator.se("newer").summary.number, receipt_of(se)
        operator.renew_issuing(ROOT_WORD, revoke=True, reason="stolen")
        until(lambda: receipt_of(se) != first, what="the SE takes another receipt", deadline_s=60)
        assert se.logged().count("linked -> up") == 1, "the link lived through it"
        lose(at)
        restore(at, out, root_word=ROOT_WORD)
        operator.renew_issuing(ROOT_WORD, revoke=True, reason="stolen")
        until(lambda: operator.recovery().waiting == ["newer"], what="it shows its receipt", deadline_s=90)
        operator.approve_receipts(reason="")
        at.until_up(se, deadline_s=60)
        assert operator.se("newer").summary.number == number


def receipt_of(se: RealSe) -> dict[str, Any]:
    """The receipt that an SE has stored."""
    receipt: dict[str, Any] = se.stored("identity.json")["grant"]["receipt"]
    return receipt
