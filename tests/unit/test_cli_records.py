"""`image-key`, `events`, `audit` and `controller` against an operator API on a real unix socket."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import operator_double as doubles
import pytest
from operator_double import OperatorDouble, Request

from appliance.cli.root import main
from appliance.errors import StorageError
from appliance.protocol import audit
from appliance.protocol.enroll import Policy
from appliance.protocol.operator import (
    AuditEntry,
    AuditVerdict,
    ControllerView,
    Event,
    ImageKeyCreated,
    ImageKeyRevoked,
)
from appliance.protocol.seed import Bundle
from appliance.protocol.trust import Envelope

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def run(*args: str) -> tuple[int, str, str]:
        code = main(["--root", str(tmp_path), *args])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def double(tmp_path: Path) -> Iterator[OperatorDouble]:
    with doubles.serve(tmp_path / "run/appliance/controller.sock") as served:
        yield served


# image-key

PRIVATE = "-----BEGIN PRIVATE KEY-----"


@pytest.fixture
def creating(double: OperatorDouble) -> OperatorDouble:
    bundle = Bundle(
        schema=1,
        cluster_id="c",
        root_ca="pem",
        trust=Envelope(payload="", payload_type="t", signatures=[]),
        image_key_id="ik-0123456789ab",
        image_key=PRIVATE,
        controllers=["controller.example:8443"],
    )
    double.answers["POST /v1/image-keys"] = ImageKeyCreated(key=doubles.image_key(), bundle=bundle)
    return double


def test_create_writes_the_bundle_for_its_owner_only(creating: OperatorDouble, cli: Cli, tmp_path: Path) -> None:
    code, out, _ = cli(
        "image-key", "create", "--expires", "2w", "--max-uses", "7", "--network", "192.0.2.0/24", "--network",
        "2001:db8::/32", "--note", "edge", "--rate-per-s", "2.5", "--burst", "40",
    )  # fmt: skip
    file = tmp_path / "work/ik-0123456789ab.bundle.json"
    assert code == 0
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert msgspec.json.decode(file.read_bytes(), type=Bundle).image_key == PRIVATE
    assert PRIVATE not in out
    assert "image-builder seed --bundle ik-0123456789ab.bundle.json" in out
    assert json.loads(creating.requests[-1].body) == {
        "policy": "open",
        "expires_in_s": 14 * 86400,
        "max_uses": 7,
        "networks": ["192.0.2.0/24", "2001:db8::/32"],
        "note": "edge",
        "rate_per_s": 2.5,
        "burst": 40,
    }


@pytest.mark.parametrize("policy", Policy)
def test_create_asks_for_the_policy_and_tells_what_it_means(creating: OperatorDouble, cli: Cli, policy: Policy) -> None:
    created = creating.answers["POST /v1/image-keys"]
    created.key = doubles.image_key(policy=policy)
    _, out, _ = cli("image-key", "create", "--policy", policy.value)
    assert json.loads(creating.requests[-1].body)["policy"] == policy.value
    told = {"token": "appliance token create", "approve": "appliance se approve", "hook": "enroll_hook"}
    assert told.get(policy.value, "gets in") in out


def test_create_as_json_names_the_file_and_never_the_key(creating: OperatorDouble, cli: Cli, tmp_path: Path) -> None:
    _, out, _ = cli("image-key", "create", "--json", "--out", "x.json")
    assert json.loads(out)["file"] == str(tmp_path / "work/x.json")
    assert PRIVATE not in out


def test_create_to_a_pipe(creating: OperatorDouble, cli: Cli) -> None:
    _, out, _ = cli("image-key", "create", "--out", "-")
    assert msgspec.json.decode(out, type=Bundle).image_key_id == "ik-0123456789ab"


def test_create_never_prints_the_key_on_a_terminal(
    creating: OperatorDouble, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    code, out, err = cli("image-key", "create", "--out", "-")
    assert (code, out, creating.requests) == (2, "", [])
    assert "not printed on a terminal" in err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--policy", "everybody"], "'everybody' is not one of"),
        (["--out", "there"], "exists already"),
        (["--out", "nowhere/x"], "nothing can be written"),
        (["--expires", "0d"], "no duration"),
        (["--expires", "30"], "no duration"),
        (["--network", "192.0.2.1/24"], "192.0.2.1/24"),
        (["--max-uses", "0"], "max-uses"),
    ],
)
def test_what_would_lose_the_key_is_refused_before_it_is_made(
    creating: OperatorDouble, cli: Cli, tmp_path: Path, args: list[str], words: str
) -> None:
    (tmp_path / "work/there").write_text("mine")
    code, _, err = cli("image-key", "create", *args)
    assert code == 2
    assert words in err
    assert creating.requests == []
    assert (tmp_path / "work/there").read_text() == "mine"


@pytest.mark.parametrize("revocable", [True, False])
def test_a_key_whose_bundle_cannot_be_written_is_revoked(
    creating: OperatorDouble, cli: Cli, monkeypatch: pytest.MonkeyPatch, revocable: bool
) -> None:
    def full(*_args: object, **_more: object) -> None:
        raise OSError(28, "No space left on device")

    if revocable:
        creating.answers["POST /v1/image-keys/ik-0123456789ab/revoke"] = ImageKeyRevoked(
            key=doubles.image_key(status="revoked"), ses=[]
        )
    monkeypatch.setattr("os.fsync", full)
    code, _, err = cli("image-key", "create")
    assert code == StorageError.exit_code
    assert creating.requests[-1].path.endswith("/revoke")
    assert ("was revoked again" if revocable else "could not be revoked") in err


def test_list(double: OperatorDouble, cli: Cli) -> None:
    double.answers["GET /v1/image-keys"] = [
        doubles.image_key(),
        doubles.image_key("ik-2", status="used-up", networks=[]),
    ]
    _, out, _ = cli("image-key", "list")
    for word in ("ik-0123456789ab", "active", "3/500", "192.0.2.0/24", "edge", "used-up", "any"):
        assert word in out
    assert len(json.loads(cli("image-key", "list", "--json")[1])) == 2
    double.answers["GET /v1/image-keys"] = []
    assert "image-key create" in cli("image-key", "list")[1]


def test_revoke_lists_who_came_by_it(double: OperatorDouble, cli: Cli) -> None:
    revoked = ImageKeyRevoked(key=doubles.image_key(status="revoked"), ses=[doubles.summary(4)])
    double.answers["POST /v1/image-keys/ik-0123456789ab/revoke"] = revoked
    code, out, _ = cli("image-key", "revoke", "ik-0123456789ab", "--reason", "leaked")
    assert code == 0
    assert "1 SE came by it" in out
    assert "se-4" in out
    assert double.requests[-1].body == b'{"reason":"leaked"}'
    assert json.loads(cli("image-key", "revoke", "ik-0123456789ab", "--json")[1])["ses"][0]["number"] == 4
    revoked.ses = []
    assert "no SE came by it" in cli("image-key", "revoke", "ik-0123456789ab")[1]


# events


def event(number: int, kind: str = "se.state", text: str = "se-1 is UP", subject: str = "se-1") -> Event:
    return Event(id=number, time=time.time(), stage="tunnel", kind=kind, subject=subject, text=text)


def test_events_show_the_newest(double: OperatorDouble, cli: Cli) -> None:
    double.answers["GET /v1/events"] = [event(number, text=f"event {number}.") for number in range(1, 61)]
    _, out, _ = cli("events")
    assert "event 60." in out
    assert "event 11." in out
    assert "event 10." not in out
    _, out, _ = cli("events", "--after", "3")
    assert double.requests[-1].query["after"] == "3"
    assert "event 1." in out
    assert len(json.loads(cli("events", "--json")[1])) == 50
    double.answers["GET /v1/events"] = []
    assert "nothing has happened yet" in cli("events")[1]


def test_events_are_followed_over_a_restart_of_the_controller(tmp_path: Path) -> None:
    """A real process follows; the controller goes away, comes back with ids far above, and nothing is missed."""
    socket = tmp_path / "run/appliance/controller.sock"

    def once(served: OperatorDouble, *events: Event) -> None:
        def answer(request: Request) -> list[Event]:
            found = [entry for entry in events if entry.id > int(request.query["after"])]
            if not found and float(request.query["wait_s"]) > 0:
                raise ConnectionAbortedError
            return found

        served.answers["GET /v1/events"] = answer

    with doubles.serve(socket) as served:
        once(served, event(1, text="one"), event(2, text="two"))
        process = subprocess.Popen(
            [sys.executable, "-m", "appliance", "--root", str(tmp_path), "events", "--follow", "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            told = [json.loads(process.stdout.readline())["text"] for _ in range(2)]
            assert "waiting for it" in process.stderr.readline()
            once(served, event(1001, text="anew"))
            told.append(json.loads(process.stdout.readline())["text"])
        finally:
            process.terminate()
            process.communicate(timeout=10)
    assert told == ["one", "two", "anew"]


def test_following_without_permission_or_daemon_ends_at_once(cli: Cli) -> None:
    code, _, err = cli("events", "--follow")
    assert code == 5
    assert "no controller runs here" in err


# audit

CLUSTER = "0f7c2c56-6f35-4a52-9d09-3d4c4a0e8a11"


def chain(length: int) -> list[AuditEntry]:
    entries: list[AuditEntry] = []
    for sequence in range(1, length + 1):
        previous = entries[-1].hash if entries else audit.genesis(CLUSTER, 1, 1)
        entry = AuditEntry(
            sequence=sequence,
            time=1000.0 + sequence,
            node=1,
            epoch=1,
            actor="uid 0",
            action="se.revoked",
            subject=f"se-{sequence}",
            detail="x",
            previous=previous,
        )
        entries.append(audit.seal(entry))
    return entries


@pytest.fixture
def recorded(double: OperatorDouble) -> list[AuditEntry]:
    entries = chain(2500)

    def page(request: Request) -> list[AuditEntry]:
        after, limit = int(request.query["after"]), int(request.query["limit"])
        return entries[after : after + limit]

    double.answers["GET /v1/audit"] = page
    return entries


def shown(out: str) -> list[int]:
    return [entry["sequence"] for entry in json.loads(out)]


def test_show_pages(recorded: list[AuditEntry], cli: Cli) -> None:
    assert shown(cli("audit", "show", "--json")[1]) == list(range(2451, 2501))
    assert shown(cli("audit", "show", "--json", "--after", "10", "--limit", "3")[1]) == [11, 12, 13]
    assert shown(cli("audit", "show", "--json", "--after", "10", "--limit", "1500")[1]) == list(range(11, 1511))
    assert len(shown(cli("audit", "show", "--json", "--limit", "0")[1])) == 2500
    _, out, _ = cli("audit", "show", "--limit", "1")
    assert "se.revoked" in out
    assert "se-2500" in out
    del recorded[:]
    assert "no entry" in cli("audit", "show")[1]


def test_an_export_verifies_offline(recorded: list[AuditEntry], cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "export.json"
    file.write_text(cli("audit", "show", "--limit", "0", "--json")[1])
    code, out, _ = cli("audit", "verify", "--file", str(file), "--cluster", CLUSTER, "--head", recorded[-1].hash)
    assert code == 0
    assert "intact" in out
    assert f"2,500 entries hold; head\n{recorded[-1].hash}" in out
    assert "not checked" not in out
    _, out, _ = cli("audit", "verify", "--file", str(file))
    assert "not checked without --cluster and --head" in out


def test_a_changed_export_is_found(cli: Cli, tmp_path: Path) -> None:
    entries = chain(3)
    entries[1] = msgspec.structs.replace(entries[1], actor="mallory")
    file = tmp_path / "export.json"
    file.write_bytes(msgspec.json.encode(entries))
    code, out, _ = cli("audit", "verify", "--file", str(file))
    assert code == 1
    assert "BROKEN" in out
    assert "entry 2 was changed" in out
    code, out, _ = cli("audit", "verify", "--json", "--file", str(file))
    assert (code, json.loads(out)["intact"]) == (1, False)


@pytest.mark.parametrize("raw", [b"", b"{}", b"[{}]", b"[1,", b"\xff"])
def test_a_file_that_is_no_export_is_refused(cli: Cli, tmp_path: Path, raw: bytes) -> None:
    file = tmp_path / "export.json"
    file.write_bytes(raw)
    code, _, err = cli("audit", "verify", "--file", str(file))
    assert code == 6
    assert "PROTOCOL-001" in err
    assert cli("audit", "verify", "--file", str(tmp_path / "none"))[0] == 4


def test_the_controller_verifies_its_own(double: OperatorDouble, cli: Cli) -> None:
    double.answers["GET /v1/audit/verify"] = AuditVerdict(
        entries=1, intact=True, text="the chain is unbroken", head="ab"
    )
    code, out, _ = cli("audit", "verify")
    assert code == 0
    assert "1 entry holds; head\nab" in out
    double.answers["GET /v1/audit/verify"] = AuditVerdict(
        entries=4, intact=False, text="entry 5 was changed", head="ab"
    )
    assert cli("audit", "verify")[0] == 1
    assert cli("audit", "verify", "--head", "ab")[0] == 2


# controller


def test_controller_show(double: OperatorDouble, cli: Cli) -> None:
    in_12_days = int(time.time()) + 12 * 86400 + 600
    double.answers["GET /v1/controller"] = doubles.controller_view(node_certificate_expires_at=in_12_days)
    _, out, _ = cli("controller", "show")
    for word in ("controller.example:8443", "[2001:db8::1]:22", "port 5097", "version 3", "ab" * 32, "(in 12d)"):
        assert word in out
    assert list(json.loads(cli("controller", "show", "--json")[1])) == list(ControllerView.__struct_fields__)


def test_init_makes_a_cluster_once(cli: Cli, tmp_path: Path) -> None:
    init = ["controller", "init", "--address", "192.0.2.1", "--date", "2026-01-31T12:00Z"]
    code, out, _ = cli("--set", "clock.synchronised=no", *init, "--json")
    assert code == 0
    made = json.loads(out)
    bundle = Path(made["bundle"])
    assert stat.S_IMODE(bundle.stat().st_mode) == 0o600
    assert msgspec.json.decode(bundle.read_bytes(), type=Bundle).controllers == ["192.0.2.1:8443"]
    assert (tmp_path / "var/lib/appliance/controller/root-ca.pem").exists()
    code, _, err = cli(*init)
    assert code == 4
    assert "initialised" in err


def test_init_tells_what_is_next(cli: Cli) -> None:
    code, out, _ = cli("controller", "init", "--address", "c.example", "--enroll-port", "9443", "--date", "now")
    assert code == 0
    for word in ("appliance mode set controller", "image-builder seed --bundle", "controller backup"):
        assert word in out


def test_init_refuses_a_clock_that_is_not_synchronised(cli: Cli, tmp_path: Path) -> None:
    code, _, err = cli("--set", "clock.synchronised=no", "controller", "init", "--address", "192.0.2.1")
    assert code != 0
    assert "synchronised" in err
    assert "--date" in err
    assert not (tmp_path / "var/lib/appliance/controller").exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "--address"),
        (["--address", "a", "--date", "yesterday"], "no date"),
        (["--address", "a", "--ssh-port", "0"], "ssh-port"),
    ],
)
def test_init_refuses_nonsense(cli: Cli, args: list[str], words: str) -> None:
    code, _, err = cli("controller", "init", *args)
    assert code == 2
    assert words in err


def test_init_wants_to_know_a_port_that_the_system_chooses(cli: Cli) -> None:
    code, _, err = cli(
        "--set", "controller.ssh_listen=127.0.0.1:0", "controller", "init", "--address", "a", "--date", "now"
    )
    assert code == 2
    assert "--ssh-port" in err


def test_a_date_without_a_zone_is_utc() -> None:
    from appliance.cli.backup import Date

    at = int(datetime(2026, 1, 31, 12, tzinfo=UTC).timestamp())
    convert = Date().convert
    assert convert("2026-01-31T12:00", None, None) == at
    assert convert("2026-01-31T13:00+01:00", None, None) == at
