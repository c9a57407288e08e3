"""`controller backup|restore|recovery`, `se approve --receipts`, `audit verify` with witnesses."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
from controller_parts import HandClock
from operator_double import OperatorDouble, serve, summary

from appliance.cli import doctor, root
from appliance.controller import init
from appliance.paths import Paths
from appliance.pki import sealed
from appliance.pki.authority import Authority
from appliance.protocol import strict_json
from appliance.protocol.operator import ReceiptsApproved, RecoveryView
from appliance.protocol.trust import AUDIT_HEAD_TYPE, AuditHead, Envelope
from appliance.runtime.mode import Mode

PASSPHRASE = "correct horse battery staple"
Cli = Callable[..., tuple[int, str, str]]

VIEW = RecoveryView(
    is_active=True, epoch=1_800_000_000, began_at=1.0, backup_made_at=1.0, backup_epoch=1, numbers_from=65_537,
    waiting=["se-7"], warnings=["image keys revoked after the backup can't be known: active are ik-1"],
)  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealed, "SCRYPT_LOG2_N", 4)


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(tmp_path / "r")


@pytest.fixture
def cli(paths: Paths, capsys: pytest.CaptureFixture[str]) -> Cli:
    def run(*args: str, at: Path | None = None) -> tuple[int, str, str]:
        code = root.main(["--root", str(at or paths.root), *args])
        told = capsys.readouterr()
        return code, told.out, told.err

    return run


@pytest.fixture
def double(paths: Paths) -> Iterator[OperatorDouble]:
    paths.run.mkdir(parents=True)
    with serve(paths.controller_socket) as found:
        yield found


@pytest.fixture
def controller(paths: Paths) -> Paths:
    init.initialise(paths, addresses=["192.0.2.1"], enroll_port=8443, ssh_port=22, clock=HandClock())
    return paths


def stdin(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


# ------------------------------------------------------------------------------------------------ backup, restore


def test_a_backup_by_the_command_line_is_restored_by_it(
    controller: Paths, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, secret = tmp_path / "b", tmp_path / "passphrase"
    secret.write_text(PASSPHRASE + "\nsecond line\n")
    code, text, err = cli("controller", "backup", "--out", str(out), "--passphrase-file", str(secret))
    assert code == 0, err
    assert "is written and verified" in text
    assert out.stat().st_mode & 0o777 == 0o600
    stdin(monkeypatch, PASSPHRASE + "\n")
    code, text, _ = cli("controller", "backup", "verify", str(out), "--passphrase-file", "-")
    assert code == 0
    assert f"{out} holds" in text
    elsewhere = tmp_path / "other"
    args = ("controller", "restore", str(out), "--passphrase-file", str(secret), "--date", "2031-01-01T00:00Z")
    code, text, err = cli(*args, "--address", "198.51.100.1", at=elsewhere)
    assert code == 0, err
    for word in ("in RECOVERY", "from 65537", "must never run again", "recovery status"):
        assert word in text
    code, _, err = cli(*args, at=elsewhere)
    assert code == 4
    assert "holds a controller" in err


def test_json_tells_the_same(controller: Paths, cli: Cli, tmp_path: Path) -> None:
    secret = tmp_path / "p"
    secret.write_text(PASSPHRASE)
    code, text, _ = cli(
        "controller", "backup", "--json", "--out", str(tmp_path / "b"), "--passphrase-file", str(secret)
    )
    assert code == 0
    assert json.loads(text)["ses"] == 0
    code, text, _ = cli(
        "controller", "restore", "--json", str(tmp_path / "b"), "--passphrase-file", str(secret), "--date",
        "2031-01-01T00:00Z", at=tmp_path / "other",
    )  # fmt: skip
    assert json.loads(text)["epoch"] == int(datetime(2031, 1, 1, tzinfo=UTC).timestamp())


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("controller", "backup"), 2, "--out FILE"),
        (("controller", "backup", "--out", "/tmp/x"), 2, "--passphrase-file"),
        (("controller", "backup", "--out", "/tmp/x", "--passphrase-file", "/none"), 4, "can't be read"),
        (("controller", "backup", "verify", "/none", "--passphrase-file", "/none"), 4, "can't be read"),
        (("controller", "restore", "/none"), 2, "no terminal"),
    ],
)
def test_what_is_missing_is_said(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...], code: int, words: str
) -> None:
    stdin(monkeypatch, "")
    got, _, err = cli(*args)
    assert got == code
    assert words in err


def test_a_wrong_passphrase_is_said_and_not_shown(controller: Paths, cli: Cli, tmp_path: Path) -> None:
    secret = tmp_path / "p"
    secret.write_text(PASSPHRASE)
    cli("controller", "backup", "--out", str(tmp_path / "b"), "--passphrase-file", str(secret))
    secret.write_text("another passphrase")
    code, out, err = cli("controller", "backup", "verify", str(tmp_path / "b"), "--passphrase-file", str(secret))
    assert code == 6
    assert "passphrase is wrong" in err
    assert "another passphrase" not in out + err


# ------------------------------------------------------------------------------------------------------ RECOVERY


def test_recovery_status_and_end(double: OperatorDouble, cli: Cli) -> None:
    double.answers["GET /v1/recovery"] = VIEW
    _, out, _ = cli("controller", "recovery", "status")
    for word in ("receipts are taken", "1 SE: se-7", "from 65537", "! image keys revoked"):
        assert word in out
    double.answers["POST /v1/recovery/end"] = msgspec.structs.replace(VIEW, is_active=False, ended_at=5.0, waiting=[])
    _, out, _ = cli("controller", "recovery", "end", "--reason", "all back")
    assert "ended" in out
    assert "nobody waits" in out
    double.answers["POST /v1/recovery/begin"] = VIEW
    code, out, _ = cli("controller", "recovery", "begin", "--json")
    assert code == 0
    assert json.loads(out)["is_active"]
    double.answers["GET /v1/recovery"] = RecoveryView()
    assert "never restored" in cli("controller", "recovery", "status")[1]


def test_receipts_are_approved_together(double: OperatorDouble, cli: Cli) -> None:
    double.answers["POST /v1/recovery/approve"] = ReceiptsApproved(approved=[summary(7)], warnings=["look at x"])
    code, out, _ = cli("se", "approve", "--receipts")
    assert code == 0
    assert "1 SE let in by their receipts" in out
    assert "! look at x" in out
    assert json.loads(cli("se", "approve", "--receipts", "--json")[1])["warnings"] == ["look at x"]
    for args in ((), ("--receipts", "7")):
        code, _, err = cli("se", "approve", *args)
        assert code == 2
        assert "name SEs, or pass --receipts" in err


def test_the_doctor_tells_of_recovery(double: OperatorDouble, paths: Paths) -> None:
    double.answers["GET /v1/recovery"] = VIEW
    (finding,) = doctor.check_answers(paths, Mode.CONTROLLER)
    assert finding.result is doctor.Result.WARN
    assert "1 SEs wait" in finding.text
    double.answers["GET /v1/recovery"] = RecoveryView()
    assert list(doctor.check_answers(paths, Mode.CONTROLLER)) == []
    assert list(doctor.check_answers(paths, Mode.SE)) == []


def test_the_doctor_asks_nobody_where_nothing_runs(paths: Paths) -> None:
    assert list(doctor.check_answers(paths, Mode.CONTROLLER)) == []


# ---------------------------------------------------------------------------------------------- audit, witnesses


def head_of(controller: Paths, **changes: Any) -> Envelope:
    state = controller.controller_state
    authority = Authority.load((state / "root-ca.pem").read_bytes(), (state / "root-ca.key").read_bytes())
    head = AuditHead(
        cluster_id=authority.cluster_id, node=1, epoch=1, sequence=2, hash=newest_hash(controller), time=1
    )  # fmt: skip
    return authority.sign(AUDIT_HEAD_TYPE, strict_json.encode(msgspec.structs.replace(head, **changes)))


def newest_hash(controller: Paths) -> str:
    from appliance.controller.store.copy import StoreCopy

    with StoreCopy(controller.store_file.read_bytes(), name=controller.store_file) as store:
        found = store.get("audit-head/1")
    assert found is not None
    return found.value.decode().split()[0]


def test_a_copied_store_is_verified_with_a_witness(controller: Paths, cli: Cli, tmp_path: Path) -> None:
    copy, head = tmp_path / "copy.sqlite", tmp_path / "head.json"
    copy.write_bytes(controller.store_file.read_bytes())
    assert cli("audit", "verify", "--file", str(copy), "--head", newest_hash(controller))[0] == 0
    head.write_bytes(strict_json.encode(head_of(controller)))
    code, out, err = cli("audit", "verify", "--file", str(copy), "--head", str(head))
    assert code == 0, out + err
    assert "2 entries hold" in out
    # What an SE keeps is as good, and is checked where there is no controller, with its root.
    kept = {"version": 1, "sha256": "", "value": {"heads": [msgspec.to_builtins(head_of(controller))]}}
    head.write_text(json.dumps(kept).replace("payload_type", "payloadType"))
    certificate = str(controller.controller_state / "root-ca.pem")
    elsewhere = tmp_path / "elsewhere"
    args = ("audit", "verify", "--file", str(copy), "--head", str(head))
    assert cli(*args, "--root", certificate, at=elsewhere)[0] == 0
    code, _, err = cli(*args, at=elsewhere)
    assert code == 2
    assert "pass --root" in err
    assert copy.read_bytes() == controller.store_file.read_bytes()


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"sequence": 3}, "remembers entry 3"), ({"hash": "0" * 64}, "another one than the witness remembers")],
)
def test_a_witness_finds_truncation_and_forgery(
    controller: Paths, cli: Cli, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    head = tmp_path / "head.json"
    head.write_bytes(strict_json.encode(head_of(controller, **changes)))
    code, out, _ = cli("audit", "verify", "--file", str(controller.store_file), "--head", str(head))
    assert code == 1
    assert words in out


def test_a_head_that_nobody_signed_is_no_witness(controller: Paths, cli: Cli, tmp_path: Path) -> None:
    head = tmp_path / "head.json"
    forger = Authority.create("c-other", now=1_790_000_000)
    head.write_bytes(strict_json.encode(forger.sign(AUDIT_HEAD_TYPE, b"{}")))
    code, _, err = cli("audit", "verify", "--file", str(controller.store_file), "--head", str(head))
    assert code == 6
    assert "isn't signed by a root" in err
    head.write_text("{}")
    code, _, err = cli("audit", "verify", "--file", str(controller.store_file), "--head", str(head))
    assert code == 2
    assert "holds no signed audit head" in err


def test_a_head_is_signed_on_demand(double: OperatorDouble, cli: Cli) -> None:
    envelope = Envelope(payload="e30=", payload_type="t", signatures=[])
    double.answers["POST /v1/audit/head"] = envelope
    for args in ((), ("--json",)):
        code, out, _ = cli("audit", "head", *args)
        assert code == 0
        assert msgspec.json.decode(out, type=Envelope) == envelope
