"""04: no room on the disk, on either side, at the worst moments; and room again."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest
from disks import SmallDisk, needs_mount, small_disk
from lab_rig import NOTICE_S, SLACK_S, RealSe, Site, no_leak, site
from rig import until

from appliance.errors import ApplianceError
from appliance.pki import tls
from appliance.protocol.operator import ImageKeyTermsWish
from appliance.protocol.why import Step

pytestmark = needs_mount

SE_DISK_BYTES = 1 << 20
CONTROLLER_DISK_BYTES = 24 << 20
RESERVE_BYTES = 2 << 20


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, SmallDisk]]:
    """A controller whose state lies on a small disk."""
    root = tmp_path_factory.mktemp("full")
    with (
        small_disk(root / "site/controller/var/lib/appliance", size_bytes=CONTROLLER_DISK_BYTES) as disk,
        site(
            root / "site", settings={"disk_reserve_bytes": RESERVE_BYTES, "audit_reserve_bytes": RESERVE_BYTES}
        ) as found,
    ):
        yield found, disk


@pytest.fixture
def se(place: tuple[Site, SmallDisk], request: pytest.FixtureRequest) -> Iterator[tuple[RealSe, SmallDisk]]:
    """An SE whose state lies on a small disk; not started."""
    at, controller_disk = place
    name = f"se-{len(at.ses) + 1}"
    with small_disk(at.layout.se(name).state, size_bytes=SE_DISK_BYTES) as disk:
        made = at.se(name)
        yield made, disk
        made.end()
        controller_disk.empty()
        at.enroll.mend()
        at.ssh.mend()


def test_the_ses_disk_is_full_when_the_grant_comes(place: tuple[Site, SmallDisk], se: tuple[RealSe, SmallDisk]) -> None:
    at, _ = place
    engine, disk = se
    uses = at.uses()
    at.enroll.cut()
    engine.start()
    until(lambda: (engine.paths.se_state / "authorized_keys").exists(), what="seed and keys are on disk")
    until(lambda: (engine.paths.se_state / "identity.json").exists(), what="the identity is on disk")
    disk.fill()
    at.enroll.mend()
    told = until(lambda: engine.failed(Step.STORED), what="the full disk is told")
    assert "identity.json" in told
    assert "No space left on device" in told
    assert "stopped at stored: " in engine.why().verdict
    # The controller has granted; its half says that the SE hasn't confirmed it.
    chain = at.controller.operator.why(engine.name)
    assert chain.verdict.startswith("waiting for link")
    assert engine.stored("identity.json")["grant"] is None
    se_id = engine.stored("identity.json")["se_id"]
    disk.empty()
    at.until_up(engine)
    assert engine.stored("identity.json")["se_id"] == se_id
    assert at.uses() == uses + 1


def test_the_ses_disk_is_full_when_a_ticket_comes(place: tuple[Site, SmallDisk], se: tuple[RealSe, SmallDisk]) -> None:
    at, _ = place
    engine, disk = se
    engine.start()
    at.until_up(engine)
    tickets = engine.stored("tickets.json")
    with no_leak(lambda: engine.pid):
        disk.fill()
        # A live link needs no disk.
        beats = at.controller.operator.se(engine.name).last_heartbeat_at
        until(
            lambda: at.controller.operator.se(engine.name).last_heartbeat_at > beats + 2.0, what="the link lives on",
            deadline_s=NOTICE_S + SLACK_S,
        )  # fmt: skip
        at.ssh.reset()
        told = until(lambda: "tickets.json" in (text := engine.failed(Step.LINK)) and text, what="the SE says why")
        assert "No space left on device" in told
        until(lambda: "No space left on device" in engine.why().verdict, what="its console tells")
        assert engine.stored("tickets.json") == tickets
        disk.empty()
        at.until_up(engine, deadline_s=5.0)
    assert engine.stored("tickets.json") != tickets
    assert at.controller.operator.se(engine.name).alarms == []


def test_the_ses_disk_is_full_while_nobody_takes_its_telemetry(
    place: tuple[Site, SmallDisk], se: tuple[RealSe, SmallDisk]
) -> None:
    """What is measured waits in memory, then in the spool, then arrives: all of it, once there is room and a link."""
    at, _ = place
    engine, disk = se
    engine.start()
    at.until_up(engine)
    since = time.time()
    with no_leak(lambda: engine.pid):
        at.ssh.cut()
        until(lambda: engine.state == "DOWN", what="the SE notices", deadline_s=NOTICE_S + SLACK_S)
        disk.fill()
        until(lambda: "No space left on device" in engine.logged(), what="a sample finds no room")
        assert "the controller is silent" in engine.why().verdict
        disk.empty()
        at.ssh.mend()
        at.until_up(engine, deadline_s=15.0)
        until(lambda: at.samples_without_gap(engine, since, most_s=2.0), what="all telemetry arrives")


def enroll_answer(at: Site) -> str:
    """What the controller answers to any enrollment, head and body."""
    context = tls.client_context([at.controller.bundle.root_ca])
    with (
        socket.create_connection(("127.0.0.1", at.controller.enroll_port), timeout=10) as plain,
        context.wrap_socket(plain) as secure,
    ):
        secure.sendall(b"POST /v1/enroll HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")
        answer = b""
        while received := secure.recv(4096):
            answer += received
    return answer.decode()


def test_the_controllers_disk_is_nearly_full(place: tuple[Site, SmallDisk], se: tuple[RealSe, SmallDisk]) -> None:
    """Below the reserve: nobody new, with a reason; who is linked stays, and whoever reconnects may."""
    at, disk = place
    engine, _ = se
    engine.start()
    at.until_up(engine)
    disk.fill(leave_bytes=RESERVE_BYTES // 2)
    answer = enroll_answer(at)
    assert answer.startswith("HTTP/1.1 503")
    assert "ENROLL-023" in answer
    assert "retry-after:" in answer.lower()
    assert any("enrollments are refused" in text for text in at.controller.operator.status().problems)
    late = at.se(f"late-{len(at.ses)}").start()
    told = until(lambda: late.failed(Step.GRANT), what="the new SE is told")
    assert "(ENROLL-023)" in told
    assert "disk" in told
    assert "(ENROLL-023)" in late.why().verdict
    assert at.is_up(engine)
    links = engine.logged().count("linked -> up")
    at.ssh.reset()
    until(lambda: engine.logged().count("linked -> up") > links, what="the SE is linked anew", deadline_s=5.0)
    at.until_up(engine)
    disk.empty()
    assert "ENROLL-023" not in enroll_answer(at)
    late.stop()  # it was told to come back later, and would
    late.start()
    at.until_up(late)
    late.stop()


def use_up(at: Site) -> None:
    """Commits until nothing goes into the store any more: a full disk leaves it its log and its reserve."""
    end = time.monotonic() + 60.0
    with pytest.raises(ApplianceError, match="full"):
        while time.monotonic() < end:
            at.controller.operator.create_image_key(ImageKeyTermsWish(note="n" * 200))


def test_the_controllers_disk_is_full_to_the_last_byte(
    place: tuple[Site, SmallDisk], se: tuple[RealSe, SmallDisk]
) -> None:
    """Nothing can be stored: live links live on, a revocation says that it failed, reconnects wait; all heals."""
    at, disk = place
    engine, _ = se
    engine.start()
    at.until_up(engine)
    pid = at.controller.process.pid if at.controller.process else 0
    audited = at.controller.operator.verify_audit().entries
    with no_leak(lambda: pid), no_leak(lambda: engine.pid):
        disk.fill()
        assert "ENROLL-023" in enroll_answer(at)
        beats = at.controller.operator.se(engine.name).last_heartbeat_at
        until(
            lambda: at.controller.operator.se(engine.name).last_heartbeat_at > beats + 2.0, what="the link lives on",
            deadline_s=NOTICE_S + SLACK_S,
        )  # fmt: skip
        use_up(at)
        refused = at.controller.command("se", "revoke", engine.name, "--reason", "no room", check=False)
        assert refused.returncode != 0
        assert "full" in refused.stderr
        assert at.controller.operator.se(engine.name).status == "enrolled"
        at.ssh.reset()
        until(lambda: "(TUNNEL-026)" in engine.failed(Step.LINK), what="the SE is told", deadline_s=5.0)
        told = until(lambda: "not admitted" in (text := at.controller.operator.why(engine.name).verdict) and text,
            what="the controller's half names the store", deadline_s=5.0)  # fmt: skip
        assert told.startswith("stopped at link: not admitted: the store ")
        assert "full" in told
        disk.empty()
        at.until_up(engine, deadline_s=10.0)
    verdict = at.controller.operator.verify_audit()
    assert verdict.intact
    assert verdict.entries >= audited
    assert at.controller.operator.se(engine.name).alarms == []
    at.controller.kill()
    at.controller.start()
    at.until_up(engine)


def test_a_grant_given_before_the_disk_filled_up_is_kept(
    place: tuple[Site, SmallDisk], se: tuple[RealSe, SmallDisk]
) -> None:
    at, disk = place
    engine, _ = se
    at.ssh.cut()
    engine.start()
    until(lambda: engine.paths.se_state.joinpath("identity.json").exists(), what="the identity is on disk")
    until(lambda: engine.stored("identity.json")["grant"], what="the grant is on disk")
    number = engine.stored("identity.json")["grant"]["number"]
    disk.fill()
    at.controller.kill()
    disk.empty()
    at.controller.start()
    at.ssh.mend()
    at.until_up(engine, deadline_s=30.0)
    assert at.controller.operator.se(engine.name).summary.number == number


def test_what_an_operator_does_on_a_full_disk_is_stored_and_audited(
    place: tuple[Site, SmallDisk], se: tuple[RealSe, SmallDisk]
) -> None:
    """Space is held back for it: a thief's SE must be revocable although a log has filled the disk."""
    at, disk = place
    engine, _ = se
    engine.start()
    at.until_up(engine)
    operator = at.controller.operator
    reserve = at.controller.paths.controller_state / "disk-reserve"
    until(reserve.exists, what="space is held back")
    disk.fill()
    while reserve.exists():  # what SQLite's files have room for
        operator.create_image_key(ImageKeyTermsWish(note="n" * 200))
    assert any("held back for the audit is used up" in text for text in operator.status().problems)
    detail = operator.revoke_se(engine.name, reason="stolen")
    assert detail.status == "revoked"
    assert operator.audit(after=operator.verify_audit().entries - 1)[0].action == "se.revoked"
    at.controller.kill()
    disk.empty()
    at.controller.start()
    assert operator.se(engine.name).status == "revoked"
    assert operator.verify_audit().intact
    until(reserve.exists, what="space is held back again")
    operator.reinstate_se(engine.name, reason="found")
    at.until_up(engine, deadline_s=40.0)
