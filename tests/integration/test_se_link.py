"""One link against a real SSH server: what is said in which order, and every way in which a link ends."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from se_stand import Answer, Cluster, Gateway, dripping, echo, garbage, gateway, listener, silent, until

from appliance.errors import ApplianceError, StorageError, TrustError, TunnelError, UnreachableError
from appliance.paths import Paths
from appliance.pki import ssh_keys
from appliance.protocol import tunnel as said
from appliance.protocol.enroll import InstanceFacts
from appliance.protocol.trust import TrustNode
from appliance.protocol.tunnel import LinkState
from appliance.protocol.why import Step, StepResult
from appliance.runtime.clock import SystemClock
from appliance.runtime.stop import StopToken
from appliance.se.believed import Beliefs
from appliance.se.caller import Caller
from appliance.se.identity import SeState
from appliance.se.receipt import Receipts
from appliance.se.tunnel import Link
from appliance.se.witness import Witness
from appliance.settings import Se

CLOCK = SystemClock()


class Samples:
    """Telemetry that waits."""

    def __init__(self) -> None:
        self.waiting: list[str] = []
        self.told: list[int] = []
        self.size_bytes = self.dropped = 0

    def pending(self) -> tuple[list[str], int]:
        return list(self.waiting), len(self.waiting)

    def delivered(self, last_id: int) -> None:
        self.told.append(last_id)
        del self.waiting[:last_id]


class Stand:
    """An enrolled SE in this process, and one link of it at a time."""

    def __init__(self, root: Path, cluster: Cluster, **settings: Any) -> None:
        self.paths = Paths(root)
        self.cluster = cluster
        self.state = SeState(self.paths)
        self.state.create(image_id="img-1")
        self.state.keep_image_key(cluster.image_key)
        self.state.save_grant(cluster.grant(self.state.require().se_id, self.state.identity.public_line))
        self.beliefs = Beliefs(self.state.trust_document, authorized_keys=self.state.authorized_keys_path)
        self.beliefs.load(self.state.require().grant.trust)  # type: ignore[union-attr]
        self.samples = Samples()
        self.told: list[tuple[Step, StepResult, str]] = []
        self.states: list[LinkState] = []
        self.settings = Se(connect_timeout_s=1.0, telemetry_interval_s=0.5, **settings)
        self.stop = StopToken()
        self.error: ApplianceError | None = None
        self.host_keys = [cluster.host_line]
        self.thread: threading.Thread | None = None

    def caller(self) -> Caller:
        grant = self.state.require().grant
        assert grant is not None
        return Caller(
            user="aviseuser",
            identity=self.state.identity,
            is_next_key=False,
            keys=self.state,
            grant=grant,
            receipts=Receipts(self.state, self.beliefs),
            tickets=self.state,
            beliefs=self.beliefs,
            witness=Witness(self.state.directory / "witness.json", self.beliefs),
            facts=InstanceFacts,
            host_keys=lambda: ["ssh-ed25519 AAAA"],
            spent=lambda: self.state.scrub_image_key(self.paths)[0],
            telemetry=self.samples,
            spool=self.samples,
            tell=lambda step, result, text, _code, _hint: self.told.append((step, result, text)),
            settings=self.settings,
            clock=CLOCK,
        )

    def dial(self, address: str) -> Link:
        """Starts a link in a thread of its own."""
        node = TrustNode(number=1, enroll=[], ssh=[address], host_keys=self.host_keys)
        link = Link(self.caller(), node, address, earlier_links=0, carries=lambda: True, on_state=self.states.append)

        def live() -> None:
            try:
                link.run(self.stop)
            except ApplianceError as error:
                self.error = error

        self.error = None
        self.thread = threading.Thread(target=live)
        self.thread.start()
        return link

    def up(self, address: str) -> Link:
        """Starts a link and waits until it is up."""
        link = self.dial(address)
        until(lambda: link.state is LinkState.UP or self.error, what="the link is up")
        assert self.error is None, self.error
        return link

    def lost(self, *, within_s: float = 20.0) -> ApplianceError:
        """Waits until the link is over, and returns why."""
        assert self.thread is not None
        self.thread.join(within_s)
        assert not self.thread.is_alive(), f"the link still lives after {within_s} s"
        self.thread = None
        assert self.error is not None
        return self.error

    def end(self) -> None:
        self.stop.stop("the test ends")
        if self.thread is not None:
            self.thread.join(10)
            assert not self.thread.is_alive()


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path / "cluster")


@pytest.fixture
def ssh(cluster: Cluster) -> Iterator[Gateway]:
    with gateway(cluster) as found:
        yield found


@pytest.fixture
def stand(tmp_path: Path, cluster: Cluster) -> Iterator[Stand]:
    with standing(tmp_path, cluster) as found:
        yield found


def _descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@contextlib.contextmanager
def standing(tmp_path: Path, cluster: Cluster, **settings: Any) -> Iterator[Stand]:
    """An SE that leaves neither a thread nor a descriptor behind."""
    threads, descriptors = threading.active_count(), _descriptors()
    found = Stand(tmp_path / "se", cluster, **settings)
    try:
        yield found
    finally:
        found.end()
    until(lambda: threading.active_count() <= threads, what="all threads ended")
    # The gateway in this process gives its ends back a moment later.
    until(lambda: _descriptors() <= descriptors, what="all descriptors are closed")


def test_a_link_comes_up_in_order(ssh: Gateway, stand: Stand) -> None:
    stand.samples.waiting = ["a", "b"]
    stand.up(ssh.address)
    until(lambda: stand.samples.told == [2], what="the telemetry is delivered")
    assert stand.states == [LinkState.DIALING, LinkState.GREETING, LinkState.LINKED, LinkState.UP]
    assert ssh.asked[:4] == ["channel channel:80", said.HELLO_PATH, "forward 127.1.0.1:5097", said.CONFIRM_PATH]
    assert set(ssh.asked[4:7]) == {"session", "channel 127.0.0.1:22", "forward 127.1.0.2:5097"}, "the self-test"
    assert ssh.asked[7] == said.HEARTBEAT_PATH
    assert ssh.beats[0].open_doors == []
    assert ssh.hellos[0].ticket == ""
    assert ssh.channels == 1, "one channel is kept"
    until(lambda: len(ssh.beats) >= 4, what="it goes on beating")
    assert ssh.beats[-1].rtt_s > 0
    assert [beat.sequence for beat in ssh.beats] == list(range(1, len(ssh.beats) + 1))
    assert sum(bool(beat.telemetry) for beat in ssh.beats) == 1
    connection = ssh.connections[0]
    assert connection.get_extra_info("send_cipher") in said.CIPHERS


def test_the_ticket_is_on_disk_before_confirm(ssh: Gateway, stand: Stand) -> None:
    seen: list[str] = []

    def confirm(_body: bytes, _channel: Any) -> Answer:
        fresh = SeState(stand.paths)
        fresh.load()
        seen.append(fresh.ticket(1))
        return 200, said.ConfirmAnswer(spent=True)

    ssh.answers[said.CONFIRM_PATH] = confirm
    assert stand.state.image_key() is not None
    stand.up(ssh.address)
    assert seen == ["ticket-1"]
    assert stand.state.image_key() is None, "spent"


def test_a_ticket_that_cannot_be_stored_is_not_confirmed(
    ssh: Gateway, stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    from appliance.storage import atomic

    def full(fd: int, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic, "write_all", full)
    stand.dial(ssh.address)
    error = stand.lost()
    assert isinstance(error, StorageError)
    assert said.CONFIRM_PATH not in ssh.asked


def test_what_became_of_the_image_key_is_told_once_a_link(ssh: Gateway, stand: Stand) -> None:
    stand.up(ssh.address)
    until(lambda: len(ssh.beats) > 1, what="a second heartbeat")
    assert [beat.image_key for beat in ssh.beats[:2]] == [said.ImageKeyCopies.DESTROYED, said.ImageKeyCopies.UNTOLD]


def test_an_image_key_that_is_not_spent_stays(ssh: Gateway, stand: Stand) -> None:
    ssh.spent = False
    stand.up(ssh.address)
    assert stand.state.image_key() is not None
    assert ssh.beats[0].image_key is said.ImageKeyCopies.UNTOLD


def test_a_controller_of_protocol_1_hears_nothing_of_the_image_key(ssh: Gateway, stand: Stand) -> None:
    ssh.protocol = said.IMAGE_KEY_TOLD_SINCE - 1
    stand.up(ssh.address)
    assert stand.state.image_key() is None
    assert ssh.beats[0].image_key is said.ImageKeyCopies.UNTOLD


def test_a_wrong_host_key_is_refused_before_log_in(cluster: Cluster, stand: Stand) -> None:
    with gateway(cluster, host_key=ssh_keys.generate()[0].reveal()) as impostor:
        stand.dial(impostor.address)
        error = stand.lost()
        assert isinstance(error, TrustError)
        assert ssh_keys.fingerprint(cluster.host_line) in error.message
        assert impostor.logins == [], "it never learned whose key this SE has"


def test_an_unknown_host_key_is_refused(ssh: Gateway, stand: Stand) -> None:
    stand.host_keys = []
    stand.dial(ssh.address)
    assert "none known" in stand.lost().message
    assert ssh.logins == []


def test_the_second_host_key_of_a_node_is_good_too(ssh: Gateway, stand: Stand, cluster: Cluster) -> None:
    stand.host_keys = [ssh_keys.generate()[1], cluster.host_line]
    stand.up(ssh.address)


def test_a_refused_key_is_told(ssh: Gateway, stand: Stand) -> None:
    ssh.admits = False
    stand.dial(ssh.address)
    assert stand.lost().code == "TUNNEL-032"


def test_classical_key_exchange_needs_the_setting(cluster: Cluster, tmp_path: Path) -> None:
    with gateway(cluster, kex=said.KEX_FALLBACK) as old:
        with standing(tmp_path / "a", cluster) as strict:
            strict.dial(old.address)
            assert strict.lost().code == "TUNNEL-030"
        with standing(tmp_path / "b", cluster, allow_curve25519=True) as lenient:
            lenient.up(old.address)


@pytest.mark.parametrize("serve", [silent, garbage, dripping], ids=lambda serve: serve.__name__)
def test_a_gateway_that_is_none(cluster: Cluster, tmp_path: Path, serve: Callable[[socket.socket], None]) -> None:
    with standing(tmp_path, cluster, login_timeout_s=1.0) as stand, listener(serve) as bad:
        stand.dial(bad.address)
        assert isinstance(stand.lost(within_s=5.0), TunnelError)


def test_a_false_packet_length_takes_no_memory(stand: Stand) -> None:
    def endless(sock: socket.socket) -> None:
        sock.sendall(b"SSH-2.0-x\r\n\x7f\xff\xff\xfc")
        while True:
            sock.sendall(b"\0" * 65536)

    with listener(endless) as bad:
        stand.dial(bad.address)
        assert "before log-in" in stand.lost().message


def test_nobody_there(stand: Stand) -> None:
    with listener(silent) as gone:
        pass
    stand.dial(gone.address)
    assert isinstance(stand.lost(), UnreachableError)


@pytest.mark.parametrize("path", [said.HELLO_PATH, said.CONFIRM_PATH])
@pytest.mark.parametrize(
    "answer",
    [
        (200, b"{}"),
        (200, b"not json"),
        (500, b""),
        (409, b'{"type":"/problems/TUNNEL-021","title":"no","status":409,"code":"TUNNEL-021"}'),
    ],
    ids=["empty", "garbage", "500", "problem"],
)
def test_a_greeting_that_goes_wrong_ends_the_link(ssh: Gateway, stand: Stand, path: str, answer: Answer) -> None:
    ssh.answers[path] = lambda _body, _channel: answer
    stand.dial(ssh.address)
    assert isinstance(stand.lost(), TunnelError)


def test_the_channel_api_says_no_http(ssh: Gateway, stand: Stand) -> None:
    def babble(_body: bytes, channel: Any) -> None:
        channel._chan.write(b"220 mail.example ESMTP\r\n\r\n")

    ssh.answers[said.HELLO_PATH] = babble
    stand.dial(ssh.address)
    assert stand.lost().code == "TUNNEL-036"


def test_another_node_answers(ssh: Gateway, stand: Stand) -> None:
    right = ssh.answers[said.HELLO_PATH]

    def other(body: bytes, channel: Any) -> Answer:
        status, answer = right(body, channel)  # type: ignore[misc]
        return status, said.HelloAnswer(**{f: getattr(answer, f) for f in answer.__struct_fields__} | {"node": 2})

    ssh.answers[said.HELLO_PATH] = other
    stand.dial(ssh.address)
    assert stand.lost().code == "TUNNEL-040"


def test_a_refused_forward_ends_the_link(ssh: Gateway, stand: Stand) -> None:
    ssh.grants_forward = False
    stand.dial(ssh.address)
    assert stand.lost().code == "TUNNEL-038"


S = said.Door


@pytest.mark.parametrize(
    "doors",
    [
        {S.SESSION}, {S.SESSION, S.SHELL}, {S.SESSION, S.EXEC}, {S.SESSION, S.SFTP}, {S.SESSION, S.AGENT},
        {S.CONNECT}, {S.LISTEN}, set(S) - {S.X11},
    ],
    ids=lambda doors: "+".join(sorted(doors)),
)  # fmt: skip
def test_a_gateway_that_grants_too_much_is_found_out(cluster: Cluster, stand: Stand, doors: set[said.Door]) -> None:
    """The link stays, says what is open with each heartbeat, and never becomes UP."""
    with gateway(cluster, agent=S.AGENT in doors) as careless:
        careless.doors = doors
        link = stand.dial(careless.address)
        until(lambda: len(careless.beats) >= 3 or stand.error, what="it pings")
        assert stand.error is None
        assert [set(beat.open_doors) for beat in careless.beats[:3]] == [doors] * 3
        assert link.state is LinkState.LINKED
        result, text = next((result, text) for step, result, text in reversed(stand.told) if step is Step.HELLO)
        assert result is StepResult.FAILED
        assert all(door in text for door in doors)
        assert LinkState.UP not in stand.states
        with pytest.raises(TunnelError, match="is not up"):
            link.open_channel("service", 1)


def test_a_link_that_ends_during_the_self_test_found_nothing_open(ssh: Gateway, stand: Stand) -> None:
    """No answer is no refusal: the link is lost, and the next one tries again."""

    def confirm(_body: bytes, channel: Any) -> Answer:
        ssh.loop.call_soon(ssh.connections[-1].abort)
        return 200, said.ConfirmAnswer(spent=True)

    ssh.answers[said.CONFIRM_PATH] = confirm
    stand.dial(ssh.address)
    assert stand.lost().code == "TUNNEL-035"
    assert LinkState.UP not in stand.states


@pytest.mark.parametrize(("spoken", "doors"), [(1, []), (2, [S.LISTEN])])
def test_nothing_is_said_that_an_older_controller_does_not_know(
    ssh: Gateway, stand: Stand, spoken: int, doors: list[said.Door]
) -> None:
    ssh.protocol, ssh.doors = spoken, {S.LISTEN}
    link = stand.dial(ssh.address)
    until(lambda: len(ssh.beats) >= 2 or stand.error, what="it pings")
    assert ssh.hellos[0].protocol == said.PROTOCOL_NUMBER
    assert ssh.beats[0].open_doors == doors
    assert link.state is LinkState.LINKED, "not up with either"


@pytest.mark.parametrize("spoken", [said.OLDEST_PROTOCOL_NUMBER - 1, said.PROTOCOL_NUMBER + 1])
def test_a_controller_of_another_protocol_is_told(ssh: Gateway, stand: Stand, spoken: int) -> None:
    ssh.protocol = spoken
    stand.dial(ssh.address)
    error = stand.lost()
    assert error.code == "TUNNEL-043"
    assert f"speaks protocol {spoken}" in error.message
    assert "upgrade the controller" in error.hint
    assert said.CONFIRM_PATH not in ssh.asked


def test_quarantine_only_pings(ssh: Gateway, stand: Stand) -> None:
    ssh.quarantines = True
    stand.samples.waiting = ["secret"]
    link = stand.dial(ssh.address)
    until(lambda: len(ssh.beats) >= 4, what="it pings")
    assert link.state is LinkState.QUARANTINED
    assert said.CONFIRM_PATH not in ssh.asked
    assert not any(entry.startswith(("forward", "session")) for entry in ssh.asked)
    assert not any(beat.telemetry for beat in ssh.beats)
    assert stand.state.ticket(1) == ""


def test_a_frozen_gateway_is_noticed(ssh: Gateway, stand: Stand) -> None:
    """The gateway's loop stands still, as a process under SIGSTOP does: the kernel still takes bytes."""
    stand.up(ssh.address)
    thaw = threading.Event()
    ssh.loop.call_soon_threadsafe(thaw.wait)
    begun = time.monotonic()
    error = stand.lost()
    taken_s = time.monotonic() - begun
    thaw.set()
    assert "silent" in error.message
    assert taken_s <= ssh.interval_s + 2 * said.DEADLINE_S + 2.0
    assert taken_s >= 2 * said.DEADLINE_S - ssh.interval_s


def test_a_frozen_gateway_is_noticed_while_bulk_fills_the_way(ssh: Gateway, stand: Stand) -> None:
    """The socket takes nothing any more, so even the ping can't be sent; that must not hold up the verdict."""
    link = stand.up(ssh.address)
    flood = link.open_channel("bulk", 1)
    thaw = threading.Event()

    def pour() -> None:
        with contextlib.suppress(OSError, EOFError):
            while True:
                flood.sendall(b"\0" * 30_000)

    pouring = threading.Thread(target=pour)
    pouring.start()
    ssh.loop.call_soon_threadsafe(thaw.wait)
    begun = time.monotonic()
    error = stand.lost()
    taken_s = time.monotonic() - begun
    thaw.set()
    pouring.join()
    assert "silent" in error.message
    assert taken_s <= ssh.interval_s + 2 * said.DEADLINE_S + 2.0


def test_a_slow_answer_is_no_death(ssh: Gateway, stand: Stand) -> None:
    """An answer after three seconds: the second ping's deadline isn't over yet, and both are answered in the end."""
    stand.up(ssh.address)
    right = ssh.answers[said.HEARTBEAT_PATH]
    slow: list[float] = []
    # Answers must keep their order, as HTTP's do: the second waits for the first.
    ordered: list[tuple[Any, Answer]] = []

    def in_order(body: bytes, channel: Any) -> None:
        slow.append(time.monotonic())
        ordered.append((channel, right(body, channel)))  # type: ignore[arg-type]
        if len(slow) == 1:
            ssh.loop.call_later(3.0, flush)
        elif len(slow) > 2:
            flush()

    def flush() -> None:
        while ordered:
            channel, answer = ordered.pop(0)
            channel.say(*answer)

    ssh.answers[said.HEARTBEAT_PATH] = in_order
    until(lambda: len(slow) >= 5, what="it goes on after the slow answer")
    assert 1.9 < slow[1] - slow[0] < 4.0, "the second ping went out when the first one's deadline was over"
    assert stand.error is None


def test_a_channel_that_the_controller_closes_is_opened_again(ssh: Gateway, stand: Stand) -> None:
    link = stand.up(ssh.address)
    right = ssh.answers[said.HEARTBEAT_PATH]
    closed: list[int] = []

    def close_once(body: bytes, channel: Any) -> Answer | None:
        if not closed:
            closed.append(1)
            channel.close()
            return None
        return right(body, channel)

    ssh.answers[said.HEARTBEAT_PATH] = close_once
    until(lambda: closed and len(ssh.beats) > 3 and ssh.channels == 2, what="another channel carries heartbeats")
    assert link.state is LinkState.UP


def test_a_controller_that_wants_fewer_heartbeats_keeps_the_link(ssh: Gateway, stand: Stand) -> None:
    refused = 0

    def too_many(body: bytes, channel: Any) -> Any:
        nonlocal refused
        if refused < 5:
            refused += 1
            return 429, b"{}"
        return ssh.heartbeat(body, channel)

    link = stand.up(ssh.address)
    ssh.answers[said.HEARTBEAT_PATH] = too_many
    beats = len(ssh.beats)
    until(lambda: refused == 5 and len(ssh.beats) > beats + 2, what="it goes on with heartbeats")
    assert link.state is LinkState.UP
    assert len(ssh.connections) == 1


def test_heartbeats_without_answers_end_a_link_that_lives_otherwise(
    ssh: Gateway, stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(said, "DEADLINE_S", 0.2)
    stand.up(ssh.address)

    def dead_channel(_body: bytes, channel: Any) -> None:
        channel.close()

    ssh.answers[said.HEARTBEAT_PATH] = dead_channel
    assert stand.lost().code == "TUNNEL-042"


def test_a_cut_is_noticed_at_once(ssh: Gateway, stand: Stand) -> None:
    ssh.interval_s = 60.0  # not at the next heartbeat
    stand.up(ssh.address)
    begun = time.monotonic()
    ssh.loop.call_soon_threadsafe(ssh.connections[0].abort)
    error = stand.lost()
    assert time.monotonic() - begun < 5
    assert isinstance(error, TunnelError)
    assert (error.code, error.message) == ("TUNNEL-035", "the link ended: the peer closed the connection")


def test_a_stop_says_goodbye(ssh: Gateway, stand: Stand) -> None:
    lost: list[Exception | None] = []
    stand.up(ssh.address)
    ssh.connections[0]._owner.connection_lost = lost.append
    begun = time.monotonic()
    stand.end()
    assert time.monotonic() - begun < 3
    until(lambda: lost, what="the gateway notices")
    assert lost == [None], "meant, not broken"
    assert stand.error is None


def test_a_new_trust_document_is_followed(ssh: Gateway, stand: Stand, cluster: Cluster) -> None:
    stand.up(ssh.address)
    key = ssh_keys.generate()[1]
    ssh.new_trust = cluster.trust(version=2, login_keys=[key])
    until(lambda: stand.beliefs.version == 2, what="the new document is in force")
    until(lambda: key in stand.state.authorized_keys_path.read_text(), what="its log-in key is written")
    assert cluster.login_line not in stand.state.authorized_keys_path.read_text()
    until(lambda: ssh.beats[-1].trust_version == 2, what="the controller hears of it")


def test_an_older_trust_document_changes_nothing(ssh: Gateway, stand: Stand, cluster: Cluster) -> None:
    """Rightly signed, and worth nothing any more: it may name what was revoked since."""
    stand.up(ssh.address)
    key, older = ssh_keys.generate()[1], ssh_keys.generate()[1]
    ssh.new_trust = cluster.trust(version=3, login_keys=[key])
    until(lambda: ssh.beats[-1].trust_version == 3, what="the newest one is in force")
    ssh.new_trust = cluster.trust(version=2, login_keys=[older])
    beats = len(ssh.beats)
    until(lambda: len(ssh.beats) > beats + 2, what="answers brought the older one, and the link lives")
    assert stand.beliefs.version == ssh.beats[-1].trust_version == 3
    assert older not in stand.state.authorized_keys_path.read_text()
    # A restart reads the newest, too.
    again = Beliefs(stand.state.trust_document, authorized_keys=stand.state.authorized_keys_path)
    again.load(cluster.trust(version=2, login_keys=[older]))
    assert again.version == 3


def test_a_forged_trust_document_ends_the_link(ssh: Gateway, stand: Stand, cluster: Cluster, tmp_path: Path) -> None:
    stand.up(ssh.address)
    ssh.new_trust = Cluster(tmp_path / "evil").trust(version=2)
    assert isinstance(stand.lost(), TrustError)
    assert stand.beliefs.version == 1


def test_the_reverse_path_carries_both_ways(cluster: Cluster, ssh: Gateway, tmp_path: Path) -> None:
    content = os.urandom(1_000_000)
    with listener(echo) as sshd, standing(tmp_path, cluster, sshd_host="127.0.0.1", sshd_port=sshd.port) as stand:
        stand.up(ssh.address)
        assert ssh.through_reverse(content) == content
        assert (Step.REVERSE, StepResult.OK) in {(step, result) for step, result, _ in stand.told}


def test_the_reverse_path_without_an_sshd_closes(ssh: Gateway, cluster: Cluster, tmp_path: Path) -> None:
    with listener(silent) as gone:
        pass
    with standing(tmp_path, cluster, sshd_port=gone.port) as stand:
        stand.up(ssh.address)
        assert ssh.through_reverse(b"SSH-2.0-x\r\n") == b""
        assert (Step.REVERSE, StepResult.FAILED) in {(step, result) for step, result, _ in stand.told}


def test_reverse_connections_end_with_the_link(ssh: Gateway, cluster: Cluster, tmp_path: Path) -> None:
    """sshd and its client would wait for ever: both are let go, with all threads and descriptors."""
    with listener(silent) as sshd, standing(tmp_path, cluster, sshd_port=sshd.port) as stand:
        stand.up(ssh.address)

        async def hold() -> None:
            await ssh.connections[-1].create_connection(_Quiet, "127.1.0.1", 5097)

        for _ in range(5):
            ssh.run(hold())
        until(lambda: len(sshd.accepted) == 5, what="five connections are open")
        ssh.loop.call_soon_threadsafe(ssh.connections[0].abort)
        stand.lost()


def _quiet() -> Any:
    import asyncssh

    class Quiet(asyncssh.SSHTCPSession[bytes]):
        """Says nothing."""

    return Quiet


_Quiet = _quiet()


def test_a_slot_is_told_and_kept(stand: Stand) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gateway:

        def turn_away() -> None:
            connection, _ = gateway.accept()
            with connection:
                connection.sendall(said.slot_line(12.5))

        busy = threading.Thread(target=turn_away)
        busy.start()
        link = stand.dial(f"127.0.0.1:{gateway.getsockname()[1]}")
        assert stand.lost().code == "TUNNEL-046"
        busy.join(10)
        assert link.slot_s == 12.5
