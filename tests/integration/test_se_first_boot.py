"""First boot of a real SE process against a real TLS door: the good way, and each way in which it can go wrong."""

from __future__ import annotations

import json
import os
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from se_stand import (
    NOW,
    Answer,
    Cluster,
    EnrollDoor,
    Gateway,
    Se,
    dripping,
    enroll_door,
    garbage,
    gateway,
    listener,
    problem,
    service_engine,
    silent,
    until,
)

from appliance.pki.authority import Authority, Issuer
from appliance.protocol import strict_json
from appliance.protocol.enroll import ENROLL_PATH, NONCE_PATH, REFRESH_PATH, NonceAnswer, Pending, Refusals
from appliance.protocol.token import compose
from appliance.protocol.trust import TRUST_PATH, TrustAnswer, TrustRequest
from appliance.protocol.why import Step, StepResult

DAY_S = 86_400


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path / "cluster")


@pytest.fixture
def door(cluster: Cluster) -> Iterator[EnrollDoor]:
    with enroll_door(cluster) as found:
        yield found


@pytest.fixture
def ssh(cluster: Cluster, door: EnrollDoor) -> Iterator[Gateway]:
    """A gateway that the trust document names."""
    with gateway(cluster) as found:
        cluster.enroll, cluster.ssh = [door.address], [found.address]
        yield found


@pytest.fixture
def se(tmp_path: Path) -> Iterator[Se]:
    with service_engine(tmp_path / "se") as found:
        yield found


def failed(se: Se, step: Step) -> Callable[[], str]:
    """Whether the SE tells that `step` failed: a condition for `until`, which gives the text."""

    def told() -> str:
        link = next(link for link in se.health().steps if link.step is step)
        return f"{link.text} {link.code}" if link.result is StepResult.FAILED else ""

    return told


def test_from_a_seed_to_a_link(cluster: Cluster, door: EnrollDoor, ssh: Gateway, se: Se) -> None:
    cluster.write_seed(se.seed, controllers=[door.address])
    se.start().until_up()
    (wish,) = door.requests
    assert door.asked == [NONCE_PATH, ENROLL_PATH]
    assert wish.host_keys == [se.host_line]
    assert wish.facts.image_digest == "img-1"
    assert ssh.hellos[0].facts == wish.facts, "the same facts in both, or the controller reports drift"
    assert ssh.logins[-1] == "aviseuser"
    until(lambda: not (se.seed / "image-key.pem").exists(), what="the image's copy of the spent image key is gone")
    assert not (se.paths.se_state / "image-key.pem").exists()
    keys = (se.paths.se_state / "authorized_keys").read_text()
    assert keys.startswith(f'from="127.0.0.1,::1" {cluster.login_line} ')
    assert (se.paths.se_state / "identity.json").stat().st_mode & 0o777 == 0o600
    assert [link.result for link in se.health().steps][:5] == [StepResult.OK] * 5, "first boot's steps are still told"
    assert se.stop() < 3


def test_the_grant_survives_a_restart(cluster: Cluster, door: EnrollDoor, ssh: Gateway, se: Se) -> None:
    cluster.write_seed(se.seed, controllers=[door.address])
    se.start().until_up()
    first = se.identity()["se_id"]
    se.stop()
    se.start().until_up()
    assert se.identity()["se_id"] == first
    assert len(door.requests) == 1
    assert ssh.hellos[-1].ticket == f"ticket-{len(ssh.hellos) - 1}", "the ticket of the last link"


@pytest.mark.parametrize("serve", [silent, garbage, dripping], ids=lambda serve: serve.__name__)
def test_a_bad_address_is_passed_over(
    cluster: Cluster, door: EnrollDoor, ssh: Gateway, tmp_path: Path, serve: Callable[[Any], None]
) -> None:
    settings = {"connect_timeout_s": 0.5}
    with listener(serve) as bad, service_engine(tmp_path / "se", settings=settings) as se:
        cluster.enroll = [bad.address]
        cluster.write_seed(se.seed, controllers=[door.address])
        cluster.enroll = [door.address]
        se.start().logged(f"no TLS with {bad.address}")
        se.until_up()


def test_a_stop_is_quick_while_a_silent_peer_is_waited_for(cluster: Cluster, tmp_path: Path) -> None:
    settings = {"connect_timeout_s": 10.0}
    with listener(silent) as bad, service_engine(tmp_path / "se", settings=settings) as se:
        cluster.write_seed(se.seed, controllers=[bad.address])
        se.start()
        until(lambda: bad.accepted, what="the SE dialled")
        assert se.stop() < 3


def _after_tls(cluster: Cluster, serve: Callable[[ssl.SSLSocket], None]) -> Callable[[Any], None]:
    """Serves a right TLS handshake, and then what is said."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cluster.certificate, cluster.key)

    def go(sock: Any) -> None:
        with context.wrap_socket(sock, server_side=True) as secured:
            serve(secured)

    return go


def test_a_flooding_controller_is_cut_off(cluster: Cluster, se: Se) -> None:
    def flood(sock: ssl.SSLSocket) -> None:
        sock.recv(4096)
        sock.sendall(b"HTTP/1.1 200 OK\r\n")
        while True:
            sock.sendall(b"x: " + b"y" * 60_000 + b"\r\n")

    with listener(_after_tls(cluster, flood)) as bad:
        cluster.write_seed(se.seed, controllers=[bad.address])
        se.start()
        told = until(failed(se, Step.NONCE), what="the flood is told")
        assert "longer than" in told or "got more than 100 headers" in told or "line" in told, told


def test_a_wrong_root_is_refused_before_any_request(cluster: Cluster, door: EnrollDoor, se: Se, tmp_path: Path) -> None:
    other = Cluster(tmp_path / "other")
    other.write_seed(se.seed, controllers=[door.address])
    se.start()
    assert "isn't signed by a root CA this SE trusts" in until(failed(se, Step.TLS), what="the wrong root is told")
    assert door.asked == []


def test_what_leads_to_a_later_root_is_verified_step_by_step(cluster: Cluster, se: Se) -> None:
    """The root was changed twice while the image lay there. Each document on the way must be signed by a root of the
    one before it; a root that only the TLS chain leads to signs nothing that counts yet."""
    first, stranger = cluster.authority, Authority.create(cluster.cluster_id, now=NOW)
    second, third = (Authority.create(cluster.cluster_id, now=NOW) for _ in range(2))
    issued = first.issue_issuing(now=NOW)
    issuing = Issuer.load(issued.certificate_pem, issued.key.reveal())
    node = third.issue_node(node=1, addresses=["127.0.0.1"], now=NOW)
    crossed = second.cross_sign(third, now=NOW) + first.cross_sign(second, now=NOW)
    cluster.certificate.write_bytes(node.certificate_pem + crossed)
    cluster.key.write_bytes(node.key.reveal())
    answers: dict[int, TrustAnswer] = {}
    asked: list[int] = []

    def trust(body: bytes) -> tuple[int, TrustAnswer]:
        version = strict_json.decode(body, TrustRequest, max_bytes=1000).version
        asked.append(version)
        return 200, answers[version]

    def signed(by: Issuer, version: int, root: Authority) -> TrustAnswer:
        return TrustAnswer(trust=cluster.trust(by=by, version=version, roots=[root.certificate_pem.decode()]))

    with enroll_door(cluster) as door, gateway(cluster) as found:
        cluster.enroll, cluster.ssh = [door.address], [found.address]
        cluster.write_seed(se.seed, controllers=[door.address])
        door.answers[TRUST_PATH] = trust
        good = {1: signed(first, 5, second), 5: signed(second, 9, third), 9: signed(third, 9, third)}
        bad = {
            "the next root alone": {1: signed(second, 5, second)},
            "the last root": {1: signed(third, 9, third)},
            "a stranger": {1: signed(stranger, 5, stranger)},
            "an issuing CA": {1: signed(issuing, 5, second)},
            "a root that counts no more": {1: good[1], 5: signed(first, 9, third)},
        }
        for name, wrong in bad.items():
            answers.clear()
            answers.update(wrong)
            asked.clear()
            if se.process is None:
                se.start()
            until(lambda: len(asked) > 2, what=f"it asks again after a document by {name}")
            assert "isn't signed by a root" in until(failed(se, Step.TLS), what="it tells why")
        assert set(door.asked) == {TRUST_PATH}
        answers.update(good)
        cluster.authority, cluster.root_pem, cluster.version = third, third.certificate_pem.decode(), 9
        se.until_up()
        assert len(door.requests) == 1


def test_the_right_root_of_another_cluster_is_refused(cluster: Cluster, se: Se) -> None:
    """One root key that signed for two clusters: the name in the certificate decides."""
    cluster.write_seed(se.seed, controllers=[])
    cluster.authority.cluster_id = "c-2"
    node = cluster.authority.issue_node(node=1, addresses=["127.0.0.1"], now=NOW)
    cluster.certificate.write_bytes(node.certificate_pem)
    cluster.key.write_bytes(node.key.reveal())
    with enroll_door(cluster) as wrong:
        cluster.authority.cluster_id = "c-1"
        cluster.write_seed(se.seed, controllers=[wrong.address])
        se.start()
        assert "'c-2', expected 'c-1'" in until(failed(se, Step.TLS), what="the other cluster is told")
        assert wrong.asked == []


@pytest.mark.parametrize(
    ("clock", "expired", "accepted"),
    [
        ({"synchronised": "yes"}, False, True),
        ({"synchronised": "yes"}, True, False),
        ({"synchronised": "no", "offset_s": -float(NOW)}, False, True),
        ({"synchronised": "no", "offset_s": -float(NOW)}, True, False),
        ({"synchronised": "no", "offset_s": 73 * 365.0 * DAY_S}, False, True),
        ({"synchronised": "no", "offset_s": 73 * 365.0 * DAY_S}, True, False),
        ({"synchronised": "yes", "offset_s": 73 * 365.0 * DAY_S}, False, False),
    ],
    ids=["right", "right-expired", "1970", "1970-expired", "2099", "2099-expired", "2099-believed"],
)
def test_clocks(tmp_path: Path, clock: dict[str, Any], expired: bool, accepted: bool) -> None:
    """A machine that doesn't know the time goes by the controller's; a certificate that expired is refused by both."""
    made_at = NOW - 100 * DAY_S if expired else NOW
    cluster = Cluster(tmp_path / "cluster", now=made_at)
    with enroll_door(cluster) as door, gateway(cluster) as ssh, service_engine(tmp_path / "se", clock=clock) as se:
        cluster.enroll, cluster.ssh = [door.address], [ssh.address]
        cluster.write_seed(se.seed, controllers=[])
        se.start()
        if accepted:
            se.until_up()
        else:
            assert "TRUST-006" in until(failed(se, Step.NONCE), what="the expired certificate is told")
            assert ENROLL_PATH not in door.asked


def test_a_controller_before_the_floor_is_not_believed(cluster: Cluster, door: EnrollDoor, tmp_path: Path) -> None:
    """A stolen old certificate would be valid at an old time: none before the seed was baked counts."""
    door.time = NOW - 3600
    with service_engine(tmp_path / "se", clock={"synchronised": "no"}) as se:
        cluster.write_seed(se.seed, controllers=[door.address])
        se.start()
        assert "but what this SE trusts is of" in until(failed(se, Step.NONCE), what="the old time is told")


def test_a_stale_nonce_is_replaced_at_once(cluster: Cluster, door: EnrollDoor, ssh: Gateway, se: Se) -> None:
    right = door.answers[ENROLL_PATH]
    seen: list[str] = []

    def stale_twice(body: bytes) -> Answer:
        seen.append(msgspec.json.decode(body)["payload"])
        return problem(Refusals.NONCE_STALE, nonce=f"fresh-{len(seen)}") if len(seen) < 3 else right(body)

    door.answers[ENROLL_PATH] = stale_twice
    cluster.write_seed(se.seed, controllers=[door.address])
    se.start().until_up()
    assert door.asked[:4] == [NONCE_PATH, ENROLL_PATH, ENROLL_PATH, ENROLL_PATH], "no new nonce was asked for"
    assert door.requests[0].nonce == "fresh-2"


def test_a_spent_image_key_leads_to_refresh(cluster: Cluster, door: EnrollDoor, ssh: Gateway, se: Se) -> None:
    right = door.answers[ENROLL_PATH]

    def granted_but_lost(body: bytes) -> Answer:
        right(body)
        return problem(Refusals.SPENT)

    door.answers[ENROLL_PATH] = granted_but_lost
    cluster.write_seed(se.seed, controllers=[door.address])
    se.start().until_up()
    assert REFRESH_PATH in door.asked


@pytest.mark.parametrize(
    "refusal",
    [
        refusal
        for refusal in Refusals
        if refusal not in {Refusals.NONCE_STALE, Refusals.NONCE_USED, Refusals.SPENT, Refusals.SE_UNKNOWN}
    ],
    ids=lambda refusal: refusal.name,
)
@pytest.mark.slow
def test_every_refusal_is_told_and_tried_again(
    cluster: Cluster, door: EnrollDoor, ssh: Gateway, se: Se, refusal: Refusals
) -> None:
    _refused_twice(cluster, door, se, refusal)


def test_a_refusal_is_told_and_tried_again(cluster: Cluster, door: EnrollDoor, ssh: Gateway, se: Se) -> None:
    _refused_twice(cluster, door, se, Refusals.REVOKED)


def _refused_twice(cluster: Cluster, door: EnrollDoor, se: Se, refusal: Refusals) -> None:
    right = door.answers[ENROLL_PATH]
    may = threading.Event()
    door.answers[ENROLL_PATH] = lambda body: right(body) if may.is_set() else problem(refusal)
    cluster.write_seed(se.seed, controllers=[door.address])
    se.start()
    told = until(failed(se, Step.GRANT), what="the refusal is told")
    assert refusal.value.title in told
    assert refusal.value.code in told
    first = se.identity()["se_id"]
    until(lambda: door.asked.count(ENROLL_PATH) >= 2, what="it is tried again")
    may.set()
    se.until_up()
    assert se.identity()["se_id"] == first, "no refusal makes an SE forget who it is"


def test_an_operator_approves(cluster: Cluster, door: EnrollDoor, ssh: Gateway, se: Se) -> None:
    right = door.answers[ENROLL_PATH]

    def pending(body: bytes) -> Answer:
        right(body)
        (wish,) = door.requests
        return 202, Pending(se_id=wish.se_id, fingerprint="SHA256:x", retry_after_s=1)

    door.answers[ENROLL_PATH] = pending
    cluster.write_seed(se.seed, controllers=[door.address])
    se.start()
    se.logged("an operator must approve this SE; its key is SHA256:")
    se.until_up()
    assert door.asked.count(ENROLL_PATH) == 1, "the image key signs once, then the SE's own key asks"


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda grant, _cluster: msgspec.structs.replace(grant, se_id="0" * 36), "grant for SE"),
        (lambda grant, _cluster: msgspec.structs.replace(grant, address="127.1.0.2"), "address '127.1.0.2'"),
        (lambda grant, cluster: cluster.grant(grant.se_id, cluster.login_line), "receipt is for another"),
        (lambda grant, _cluster: msgspec.structs.replace(grant, receipt=grant.trust), "receipt"),
        (lambda _grant, _cluster: b"{}", "Grant"),
        (lambda _grant, _cluster: b"<html>", "not JSON"),
    ],
    ids=["other-se", "other-address", "other-key", "no-receipt", "empty", "html"],
)
def test_a_grant_that_does_not_hold_is_not_kept(
    cluster: Cluster, door: EnrollDoor, ssh: Gateway, se: Se, spoil: Callable[..., Any], told: str
) -> None:
    right = door.answers[ENROLL_PATH]
    may = threading.Event()
    door.answers[ENROLL_PATH] = lambda body: right(body) if may.is_set() else (201, spoil(right(body)[1], cluster))
    cluster.write_seed(se.seed, controllers=[door.address])
    se.start()
    assert told in until(failed(se, Step.GRANT), what="it is told")
    assert se.identity()["grant"] is None
    may.set()
    se.until_up()


def test_the_second_address_serves_when_the_first_is_gone(
    cluster: Cluster, door: EnrollDoor, ssh: Gateway, se: Se
) -> None:
    with listener(silent) as gone:
        pass
    cluster.write_seed(se.seed, controllers=[gone.address, door.address])
    se.start().until_up()


def test_a_per_vm_disk_adds_an_address_a_token_and_hints_but_no_anchor(
    cluster: Cluster, door: EnrollDoor, ssh: Gateway, se: Se, tmp_path: Path
) -> None:
    cluster.enroll = []
    cluster.write_seed(se.seed, controllers=[], hints={"name": "baked", "labels": {"a": "1"}})
    evil = Cluster(tmp_path / "evil")
    disk = se.paths.root / "dev/disk/by-label/cidata"
    token = compose(os.urandom(32))
    evil.write_seed(
        disk, controllers=[door.address], token=token, image_key=False, hints={"name": "vm-7", "labels": {"b": "2"}}
    )
    cluster.enroll = [door.address]
    se.start().until_up()
    (wish,) = door.requests
    assert wish.token == token
    assert wish.hints.name == "vm-7"
    assert wish.hints.labels == {"a": "1", "b": "2"}


def test_a_truncated_identity_is_set_aside_and_a_new_one_made(
    cluster: Cluster, door: EnrollDoor, ssh: Gateway, se: Se
) -> None:
    cluster.write_seed(se.seed, controllers=[door.address])
    ssh.spent = False
    se.start().until_up()
    first = se.identity()["se_id"]
    se.stop()
    document = se.paths.se_state / "identity.json"
    document.write_bytes(document.read_bytes()[:100])
    se.start()
    se.logged("is broken and was set aside as")
    se.until_up()
    assert se.identity()["se_id"] != first
    assert (se.paths.se_state / "identity.json.broken-1").exists()


def test_a_broken_identity_without_an_image_key_waits_and_says_so(
    cluster: Cluster, door: EnrollDoor, ssh: Gateway, se: Se
) -> None:
    cluster.write_seed(se.seed, controllers=[door.address])
    se.start().until_up()
    until(lambda: not (se.seed / "image-key.pem").exists(), what="the image key is spent")
    se.stop()
    (se.paths.se_state / "identity.json").write_bytes(b"{")
    se.start()
    assert "ENROLL-030" in until(failed(se, Step.BOOT), what="it says so")
    assert len(door.requests) == 1
    assert se.stop() < 3


def test_a_full_disk_while_the_grant_is_stored(
    cluster: Cluster, door: EnrollDoor, ssh: Gateway, se: Se, tmp_path: Path
) -> None:
    """The disk has no room for the grant; once there is, it is stored without being asked for again."""
    cluster.write_seed(se.seed, controllers=[door.address])
    script, room = tmp_path / "full.py", tmp_path / "room"
    script.write_text(
        f"""
import errno, os, pathlib, runpy, sys
from appliance.storage import atomic
write_all = atomic.write_all
def full(fd, content):
    if b'"grant":{{' in content and not pathlib.Path({str(room)!r}).exists():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    write_all(fd, content)
atomic.write_all = full
sys.argv = ["appliance", *sys.argv[1:]]
runpy.run_module("appliance", run_name="__main__")
"""
    )
    se.start(str(script), *se.command[2:])
    told = until(failed(se, Step.STORED), what="the full disk is told")
    assert "No space left on device" in told
    assert se.identity()["grant"] is None
    room.touch()
    se.until_up()
    assert door.asked.count(ENROLL_PATH) == 1


CUT = """
import os, runpy, signal, sys
from appliance.storage import atomic
left, sync = [int(os.environ["CUT_AFTER"])], atomic.sync_directory
def cut(directory):
    sync(directory)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
atomic.sync_directory = cut
def start_over(program, command, environment, execve=os.execve):
    # What follows on first boot lives under the same knife.
    execve(program, [program, os.path.abspath(sys.argv[0]), *sys.argv[1:]], {**environment, "CUT_AFTER": str(left[0])})
os.execve = start_over
runpy.run_module("appliance", run_name="__main__", alter_sys=False)
"""


def test_cut_after_each_durable_step(
    cluster: Cluster, door: EnrollDoor, ssh: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the n-th durable step of its life, for each n, an SE goes on at the next start as the one it was."""
    script = tmp_path / "cut.py"
    script.write_text(CUT)
    cuts = 0
    for step in range(1, 40):
        with service_engine(tmp_path / f"se-{step}") as se:
            cluster.write_seed(se.seed, controllers=[door.address])
            was_cut = _live_until_cut(se, script, step, monkeypatch)
            document = se.paths.se_state / "identity.json"
            before = se.identity()["se_id"] if document.exists() else None
            se.start().until_up()
            assert before in {None, se.identity()["se_id"]}, f"cut after step {step}: another SE came back"
            assert not list(se.paths.se_state.glob("*.broken-*"))
            se.stop()
            cuts += was_cut
            if not was_cut:
                break
    assert cuts >= 12, (
        "directories, trust, keys, image key, identity, grant; then spool, ticket, both image keys destroyed"
    )


def _live_until_cut(se: Se, script: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """First boot, and then tunnel mode, each under the knife. Returns whether it fell."""
    monkeypatch.setenv("CUT_AFTER", str(step))
    se.start(str(script), *se.command[2:])
    process = se.process
    assert process is not None

    def over() -> str:
        if process.poll() is not None:
            return "cut"
        return "up" if "linked -> up" in se.log.read_text() else ""

    fell = until(over, what="it is cut or up") == "cut"
    se.end()
    return bool(fell)


def test_two_daemons_on_one_root(cluster: Cluster, door: EnrollDoor, ssh: Gateway, se: Se) -> None:
    cluster.write_seed(se.seed, controllers=[door.address])
    se.start().until_up()
    first = se.process
    se.start()
    assert se.process is not None
    assert se.process.wait(20) == 4
    assert "another daemon works on this root" in se.log.read_text()
    se.process = first


def test_it_waits_for_a_seed(cluster: Cluster, door: EnrollDoor, ssh: Gateway, se: Se) -> None:
    se.start()
    assert "SEED-001" in until(failed(se, Step.BOOT), what="the missing seed is told")
    cluster.write_seed(se.seed, controllers=[door.address])
    se.until_up()


def test_the_state_file_of_a_newer_version_is_left_alone(
    cluster: Cluster, door: EnrollDoor, ssh: Gateway, se: Se
) -> None:
    cluster.write_seed(se.seed, controllers=[door.address])
    se.start().until_up()
    se.stop()
    document = se.paths.se_state / "identity.json"
    sealed = json.loads(document.read_text())
    document.write_text(json.dumps({**sealed, "version": 99}))
    se.start()
    assert se.process is not None
    assert se.process.wait(20) == 4
    se.process = None
    assert json.loads(document.read_text())["version"] == 99


def test_no_nonce_but_a_problem(cluster: Cluster, door: EnrollDoor, ssh: Gateway, se: Se) -> None:
    calls: list[int] = []

    def busy(body: bytes) -> Answer:
        calls.append(1)
        if len(calls) < 3:
            return problem(Refusals.RATE)
        return 200, NonceAnswer(nonce="n-1", time=NOW)

    door.answers[NONCE_PATH] = busy
    cluster.write_seed(se.seed, controllers=[door.address])
    se.start().until_up()
