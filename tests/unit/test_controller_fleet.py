"""The fleet's live state: each change told once, and who went silent is pinged, then given up."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any, cast

import asyncssh
import msgspec
import pytest
from controller_parts import NOW, Book, LoopClock, book, request, run_jumping

from appliance import settings
from appliance.controller.events import Events
from appliance.controller.fleet import BURDEN_SWEEP_S, SWEEP_S, Fleet, ping
from appliance.controller.link import Link
from appliance.controller.records import SeRecord
from appliance.controller.telemetry import History
from appliance.errors import NotFoundError
from appliance.protocol.fleet import Reason, State
from appliance.protocol.seed import Hints
from appliance.protocol.standing import Act
from appliance.protocol.tunnel import DEADLINE_S, LARGE_FLEET, UNKNOWN_TICKET

TERMS = settings.Controller()
INTERVAL_S = TERMS.heartbeat_interval_s
NOTICE_S = INTERVAL_S + 2 * DEADLINE_S
"""The watchdog's promise."""

_ids = itertools.count(1)


class Conn:
    """A peer at asyncssh's border: answers pings, keeps silent, or goes away while it is asked."""

    def __init__(self, behaviour: str = "answers") -> None:
        self.behaviour = behaviour
        self.pings: list[float] = []
        self.closed_at: float | None = None
        self.on_close: Callable[[], None] = lambda: None
        self.unsent_bytes = 0
        self._kex_complete = True

    async def _make_global_request(self, name: bytes) -> tuple[int, None]:
        assert name == b"keepalive@openssh.com"
        loop = asyncio.get_running_loop()
        self.pings.append(loop.time())
        if self.behaviour == "silent":
            await loop.create_future()
        if self.behaviour == "goes away":
            await asyncio.sleep(1.0)
            self._close()
        return 82, None

    def _close(self) -> None:
        self.closed_at = asyncio.get_running_loop().time()
        self.on_close()

    def is_closed(self) -> bool:
        return self.closed_at is not None

    def abort(self) -> None:
        if self.closed_at is None:
            self._close()


class Stand:
    """A fleet on a real registry."""

    def __init__(self, found: Book) -> None:
        self.book = found
        self.clock = found.clock
        self.restart()

    def restart(self) -> None:
        self.events = Events(self.clock.now)
        self.fleet = Fleet(
            self.book.registry, History(history_s=3600), self.events, terms=TERMS, wall=self.clock.now,
            monotonic=self.clock.monotonic,
        )  # fmt: skip

    async def se(self, name: str = "", *, confirmed: bool = True) -> SeRecord:
        if not self.book.registry.image_keys():
            await self.book.image_key()
        outcome = await self.book.enroll(self.book.registry.image_keys()[0], request(hints=Hints(name=name)))
        assert outcome.record is not None
        record = outcome.record
        if confirmed:
            changed = msgspec.structs.replace(record, confirmed_at=self.clock.now())
            await self.book.registry.update_se(record, changed)
            record = changed
        return record

    def link(self, se_id: str, behaviour: str = "answers", source: str = "192.0.2.1") -> tuple[Link, Conn]:
        conn = Conn(behaviour)
        record = self.book.registry.se(se_id)
        link = Link(
            cast("asyncssh.SSHServerConnection", conn), link_id=next(_ids), se_id=se_id,
            thumbprint=record.thumbprint if record else "", source=source, terms=TERMS, now=self.clock.monotonic(),
        )  # fmt: skip
        conn.on_close = lambda: self.fleet.lost(link)
        self.fleet.opened(link)
        return link, conn

    def up(self, se_id: str, behaviour: str = "answers", source: str = "192.0.2.1") -> tuple[Link, Conn]:
        link, conn = self.link(se_id, behaviour, source)
        self.fleet.admit(link)
        link.confirmed = True
        self.beat(link)
        self.fleet.reverse_checked(link, "")
        return link, conn

    def beat(self, link: Link, *, rtt_s: float = 0.01, skew_s: float = 0.0, spool_bytes: int = 0) -> None:
        self.fleet.heartbeat(link, rtt_s=rtt_s, lag_s=-skew_s, spool_bytes=spool_bytes)

    def told(self) -> list[str]:
        """The changes of state told so far, without the name and the sentence."""
        return [event.text.split(":")[0].split(" ", 1)[1] for event in self.events.after(0) if event.kind == "se.state"]

    @contextlib.asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        watch = asyncio.create_task(self.fleet.watch())
        try:
            yield
        finally:
            watch.cancel()
            pings = list(self.fleet._pinging)
            for task in pings:
                task.cancel()
            await asyncio.gather(watch, *pings, return_exceptions=True)


def run(path: Path, act: Callable[[Stand], Coroutine[Any, Any, None]]) -> None:
    async def go() -> None:
        async with book(path, LoopClock()) as found:
            await act(Stand(found))

    run_jumping(go())


def state(stand: Stand, se_id: str) -> tuple[State, Reason, float]:
    record = stand.book.registry.se(se_id)
    assert record is not None
    derived, since = stand.fleet.state(record)
    return derived.state, derived.reason, since - NOW


# States, told once.


def test_an_se_comes_up_step_by_step_and_each_step_is_told_once(tmp_path: Path) -> None:
    async def act(stand: Stand) -> None:
        record = await stand.se("db", confirmed=False)
        fleet, seen = stand.fleet, []

        def look() -> None:
            for _ in range(3):
                now = state(stand, record.se_id)
            seen.append(now)

        look()
        await asyncio.sleep(10)
        link, _ = stand.link(record.se_id)
        fleet.admit(link)
        look()
        await asyncio.sleep(1)
        link.confirmed = True
        stand.beat(link)
        look()
        await asyncio.sleep(1)
        fleet.reverse_checked(link, "")
        look()
        await asyncio.sleep(100)
        stand.beat(link)
        look()
        assert seen == [
            (State.ENROLLED, Reason.NO_LINK_YET, 0.0),
            (State.ENROLLED, Reason.COMING_UP, 10.0),
            (State.ENROLLED, Reason.COMING_UP, 10.0),
            (State.UP, Reason.OK, 12.0),
            (State.UP, Reason.OK, 12.0),
        ]
        assert stand.told() == ["ENROLLED -> ENROLLED (COMING_UP)", "ENROLLED -> UP (OK)"]
        assert fleet.is_up(record)

    run(tmp_path, act)


@pytest.mark.parametrize(
    ("worse", "better", "reason"),
    [
        ({"spool_bytes": 2**20 + 1}, {}, Reason.SPOOL_GROWING),
    ],
)
def test_a_degraded_se_is_told_once_and_once_more_when_it_is_well(
    tmp_path: Path, worse: dict[str, Any], better: dict[str, Any], reason: Reason
) -> None:
    async def act(stand: Stand) -> None:
        record = await stand.se()
        link, _ = stand.up(record.se_id)
        before = len(stand.told())
        for figures in (worse, worse, better, better):
            await asyncio.sleep(5)
            stand.beat(link, **figures)
        assert stand.told()[before:] == [f"UP -> DEGRADED ({reason})", "DEGRADED -> UP (OK)"]
        assert state(stand, record.se_id) == (State.UP, Reason.OK, 15.0)

    run(tmp_path, act)


def test_a_high_rtt_needs_to_fall_clearly(tmp_path: Path) -> None:
    async def act(stand: Stand) -> None:
        record = await stand.se()
        link, _ = stand.up(record.se_id)
        before = len(stand.told())
        for rtt_s in (0.075, 0.065, 0.071, 0.066, 0.055, 0.065):
            # Often enough that the minimum is of this round trip alone.
            for _ in range(30):
                await asyncio.sleep(5)
                stand.beat(link, rtt_s=rtt_s)
        assert stand.told()[before:] == ["UP -> DEGRADED (RTT_HIGH)", "DEGRADED -> UP (OK)"]

    run(tmp_path, act)


def test_one_slow_round_trip_is_no_high_rtt_wherever_it_comes(tmp_path: Path) -> None:
    async def act(stand: Stand) -> None:
        record = await stand.se()
        link, _ = stand.link(record.se_id)
        stand.fleet.admit(link)
        link.confirmed = True
        stand.fleet.reverse_checked(link, "")
        before = len(stand.told())
        # At its begin, when the whole fleet comes, and later; 300 s is the longest interval that a setting allows.
        for rtt_s in (0.5, 0.01, 0.01, 0.5, 0.01, 0.5, 0.01, 0.01, 0.5):
            stand.beat(link, rtt_s=rtt_s)
            await asyncio.sleep(300)
        assert stand.told()[before:] == ["ENROLLED -> UP (OK)"]

    run(tmp_path, act)


def test_a_heartbeat_that_was_held_up_is_no_wrong_clock_and_a_wrong_clock_is_told(tmp_path: Path) -> None:
    async def act(stand: Stand) -> None:
        record = await stand.se()
        link, _ = stand.up(record.se_id)
        before = len(stand.told())
        for skew_s in (0.0, -70.0, 0.0):  # this process stood still for 70 s
            await asyncio.sleep(5)
            stand.beat(link, skew_s=skew_s)
        assert stand.told()[before:] == []
        told = ["UP -> DEGRADED (CLOCK_SKEW)", "DEGRADED -> UP (OK)"]
        for wrong_s in (-70.0, 70.0):  # the SE's clock is set back, and right again, then ahead
            for skew_s in [wrong_s] * 3 + [-1.0] * 3:
                await asyncio.sleep(5)
                stand.beat(link, skew_s=skew_s)
            assert stand.told()[before:] == told
            before = len(stand.told())

    run(tmp_path, act)


def test_the_reverse_path_down_and_up_again(tmp_path: Path) -> None:
    async def act(stand: Stand) -> None:
        record = await stand.se()
        link, _ = stand.up(record.se_id)
        await asyncio.sleep(7)
        stand.fleet.reverse_checked(link, "connection refused")
        assert state(stand, record.se_id) == (State.DEGRADED, Reason.REVERSE_DOWN, 7.0)
        assert link.reverse_at == NOW + 7
        assert stand.fleet.is_up(record)
        stand.fleet.reverse_checked(link, "")
        assert stand.told()[-2:] == ["UP -> DEGRADED (REVERSE_DOWN)", "DEGRADED -> UP (OK)"]

    run(tmp_path, act)


def test_after_a_restart_everybody_is_down_since_then_and_nothing_is_told(tmp_path: Path) -> None:
    async def act(stand: Stand) -> None:
        confirmed, fresh = await stand.se(), await stand.se(confirmed=False)
        await asyncio.sleep(50)
        stand.restart()
        await asyncio.sleep(5)
        assert state(stand, confirmed.se_id) == (State.DOWN, Reason.CONTROLLER_RESTARTED, 50.0)
        assert state(stand, fresh.se_id) == (State.ENROLLED, Reason.NO_LINK_YET, 0.0)
        assert stand.told() == []
        stand.up(confirmed.se_id)
        assert stand.told() == ["DOWN -> DOWN (COMING_UP)", "DOWN -> ENROLLED (COMING_UP)", "ENROLLED -> UP (OK)"]

    run(tmp_path, act)


@pytest.mark.parametrize(
    ("reason", "text"), [(Reason.LINK_LOST, "the connection broke"), (Reason.CLOSED_BY_SE, "the SE closed the link")]
)
def test_why_a_link_was_lost_is_kept_until_the_next_one(tmp_path: Path, reason: Reason, text: str) -> None:
    async def act(stand: Stand) -> None:
        record = await stand.se("db")
        link, conn = stand.up(record.se_id)
        await asyncio.sleep(30)
        link.close(reason, text)
        link.close(Reason.REVOKED, "said later")  # the first word counts
        assert conn.is_closed()
        assert state(stand, record.se_id) == (State.DOWN, reason, 30.0)
        assert stand.told()[-1] == f"UP -> DOWN ({reason})"
        assert text in stand.events.after(0)[-1].text
        stand.up(record.se_id)
        assert state(stand, record.se_id)[0] is State.UP

    run(tmp_path, act)


def test_a_take_over_leaves_the_newer_link_alone(tmp_path: Path) -> None:
    async def act(stand: Stand) -> None:
        record = await stand.se()
        older, old_conn = stand.up(record.se_id)
        newer, new_conn = stand.up(record.se_id, source="192.0.2.2")
        assert old_conn.is_closed()
        assert not new_conn.is_closed()
        assert "came back from 192.0.2.2" in older.lost_text
        assert stand.fleet.link(record.se_id) is newer
        assert stand.fleet.links == 1
        stand.fleet.lost(older)  # told twice: nothing more happens
        assert state(stand, record.se_id)[0] is State.UP
        assert stand.fleet.summary(record).source == "192.0.2.2"

    run(tmp_path, act)


def test_a_copy_in_quarantine_is_an_alarm_and_no_state(tmp_path: Path) -> None:
    async def act(stand: Stand) -> None:
        record = await stand.se("db")
        stand.up(record.se_id)
        copy, conn = stand.link(record.se_id, source="198.51.100.7")
        stand.fleet.quarantine(copy)
        assert state(stand, record.se_id)[:2] == (State.UP, Reason.CLONE)
        assert stand.fleet.quarantined(record.se_id) == [copy]
        detail = stand.fleet.detail(record)
        assert len(detail.alarms) == 1
        assert "198.51.100.7" in detail.alarms[0]
        # A copy's heartbeat is not the SE's.
        before = stand.fleet.last_heartbeat_at(record.se_id)
        await asyncio.sleep(3)
        stand.beat(copy)
        assert stand.fleet.last_heartbeat_at(record.se_id) == before
        conn.abort()
        assert stand.fleet.quarantined(record.se_id) == []
        assert state(stand, record.se_id)[:2] == (State.UP, Reason.OK)
        assert stand.fleet.detail(record).alarms == []

    run(tmp_path, act)


def test_an_se_that_came_back_with_an_older_ticket_says_so(tmp_path: Path) -> None:
    async def act(stand: Stand) -> None:
        record = await stand.se()
        link, _ = stand.link(record.se_id)
        link.rolled_back = True
        stand.fleet.admit(link)
        link.confirmed = True
        stand.beat(link)
        stand.fleet.reverse_checked(link, "")
        assert state(stand, record.se_id)[:2] == (State.UP, Reason.ROLLED_BACK)
        stand.up(record.se_id)
        assert state(stand, record.se_id)[:2] == (State.UP, Reason.OK)

    run(tmp_path, act)


@pytest.mark.parametrize("doing", [Act.REVOKE, Act.DELETE])
def test_ending_an_se_closes_all_its_links(tmp_path: Path, doing: Act) -> None:
    async def act(stand: Stand) -> None:
        record, other = await stand.se(), await stand.se()
        (_, one), (copy, two), (_, third) = (
            stand.up(record.se_id), stand.link(record.se_id), stand.up(other.se_id)
        )  # fmt: skip
        stand.fleet.quarantine(copy)
        ended, _ = await stand.book.admission.act(record.se_id, doing, actor="a", reason="r")
        assert stand.fleet.close_se(ended, "ended by an operator") == 2
        assert one.is_closed()
        assert two.is_closed()
        assert not third.is_closed()
        assert state(stand, record.se_id)[0] is State.REVOKED
        assert not stand.fleet.is_up(ended)
        assert stand.told()[-1].startswith("UP -> REVOKED")

    run(tmp_path, act)


def test_a_link_that_beats_too_often_is_told_to_wait_and_stays(tmp_path: Path) -> None:
    async def act(stand: Stand) -> None:
        record, other = await stand.se(), await stand.se()
        (link, conn), (quiet, _) = stand.up(record.se_id), stand.up(other.se_id)
        waits = [stand.fleet.overdone_s(link) for _ in range(1000)]
        burst = TERMS.heartbeat_burst
        assert [wait_s == 0 for wait_s in waits] == [True] * burst + [False] * (1000 - burst)
        share_s = INTERVAL_S / TERMS.heartbeats_per_interval
        assert waits[-1] == pytest.approx(share_s)
        assert stand.fleet.refusals["heartbeat"] == 1000 - burst
        assert not conn.is_closed()
        assert stand.fleet.overdone_s(quiet) == 0.0, "another's share is its own"
        await asyncio.sleep(share_s)
        assert stand.fleet.overdone_s(link) == 0.0
        assert stand.fleet.overdone_s(link) > 0.0
        for _ in range(200):  # the pace that is asked for, and twice that, as after a lost answer
            await asyncio.sleep(INTERVAL_S / 2)
            assert stand.fleet.overdone_s(link) == 0.0

    run(tmp_path, act)


def test_counts_and_the_interval_follow_the_fleet(tmp_path: Path) -> None:
    async def act(stand: Stand) -> None:
        for _ in range(3):
            record = await stand.se()
        stand.up(record.se_id)
        assert stand.fleet.counts() == {"UP": 1, "DOWN": 2}
        assert stand.fleet.interval_s == INTERVAL_S
        conns = []
        for number in range(LARGE_FLEET):
            link, conn = stand.link(f"se-{number}")
            stand.fleet.admit(link)
            conns.append(conn)
        assert stand.fleet.links == LARGE_FLEET + 1
        assert stand.fleet.interval_s == 2 * INTERVAL_S
        stand.fleet.close_all("the controller stops")
        assert stand.fleet.links == 0
        assert all(conn.is_closed() for conn in conns)

    run(tmp_path, act)


# The watch over silence.


def test_a_silent_peer_is_given_up_in_time_and_told_why(tmp_path: Path) -> None:
    async def act(stand: Stand) -> None:
        record = await stand.se()
        link, conn = stand.up(record.se_id, "silent")
        async with stand.watched():
            await asyncio.sleep(3600)
        assert len(conn.pings) == 1
        assert INTERVAL_S + DEADLINE_S <= conn.pings[0] - 1000.0 <= INTERVAL_S + DEADLINE_S + SWEEP_S
        assert conn.closed_at is not None
        assert conn.closed_at - 1000.0 <= NOTICE_S + SWEEP_S
        at = conn.closed_at - 1000.0
        assert state(stand, record.se_id) == (State.DOWN, Reason.HEARTBEAT_MISSED, at)
        assert re.search(r"nothing heard for (8\.\d|9\.0) s", link.lost_text)
        assert stand.fleet.missed == 1
        assert stand.fleet._by_last_seen == {}

    run(tmp_path, act)


def test_who_beats_is_never_pinged(tmp_path: Path) -> None:
    async def act(stand: Stand) -> None:
        ses = [await stand.se() for _ in range(20)]
        pairs = [stand.up(record.se_id) for record in ses]
        silent, late = stand.up((await stand.se()).se_id, "silent")
        async with stand.watched():
            for _ in range(100):
                await asyncio.sleep(INTERVAL_S + 1.5)  # late, but within what is allowed
                for link, _ in pairs:
                    stand.beat(link)
        assert all(conn.pings == [] for _, conn in pairs)
        assert late.is_closed()
        assert stand.fleet.links == 20
        assert silent.lost_reason is Reason.HEARTBEAT_MISSED

    run(tmp_path, act)


def test_a_quiet_peer_that_answers_is_kept_and_asked_again_each_time(tmp_path: Path) -> None:
    async def act(stand: Stand) -> None:
        record = await stand.se()
        _, conn = stand.up(record.se_id, "answers")
        async with stand.watched():
            await asyncio.sleep(700)
        assert not conn.is_closed()
        gaps = [later - earlier for earlier, later in itertools.pairwise(conn.pings)]
        assert 90 <= len(conn.pings) <= 100
        assert min(gaps) >= INTERVAL_S + DEADLINE_S
        assert stand.fleet.missed == 0

    run(tmp_path, act)


def test_any_byte_while_a_ping_is_open_counts_as_life(tmp_path: Path) -> None:
    async def act(stand: Stand) -> None:
        link, conn = stand.up((await stand.se()).se_id, "silent")
        async with stand.watched():
            for _ in range(40):
                await asyncio.sleep(8.5)  # always overdue, always within the ping's deadline
                stand.fleet.seen(link)
            assert not conn.is_closed()
            assert len(conn.pings) == 40
            await asyncio.sleep(NOTICE_S + SWEEP_S)
            assert conn.is_closed()

    run(tmp_path, act)


def test_a_connection_that_ends_while_it_is_asked_leaves_nothing_behind(tmp_path: Path) -> None:
    """asyncssh answers an open request in the peer's place when a connection ends; that is no sign of life."""

    async def act(stand: Stand) -> None:
        record = await stand.se()
        _, conn = stand.up(record.se_id, "goes away")
        async with stand.watched():
            await asyncio.sleep(600)
        assert len(conn.pings) == 1
        assert stand.fleet._by_last_seen == {}
        assert stand.fleet._pinging == set()
        assert stand.fleet.missed == 0
        assert state(stand, record.se_id)[1] is Reason.LINK_LOST

    run(tmp_path, act)


def test_links_in_quarantine_are_watched_too(tmp_path: Path) -> None:
    async def act(stand: Stand) -> None:
        record = await stand.se()
        copy, conn = stand.link(record.se_id, "silent")
        stand.fleet.quarantine(copy)
        async with stand.watched():
            await asyncio.sleep(NOTICE_S + SWEEP_S)
        assert conn.is_closed()
        assert stand.fleet.quarantined(record.se_id) == []

    run(tmp_path, act)


def test_a_thousand_that_freeze_at_once_are_all_given_up_in_time(tmp_path: Path) -> None:
    async def act(stand: Stand) -> None:
        conns = []
        for number in range(1000):
            link, conn = stand.link(f"se-{number}", "silent" if number % 2 else "answers")
            stand.fleet.admit(link)
            conns.append(conn)
        async with stand.watched():
            await asyncio.sleep(NOTICE_S + SWEEP_S)
        assert sum(conn.is_closed() for conn in conns) == 500
        assert stand.fleet.links == 500
        assert all(len(conn.pings) == 1 for conn in conns)

    run(tmp_path, act)


# The end of a quarantine.


def test_each_release_that_closes_links_has_an_entry_of_its_own(tmp_path: Path) -> None:
    async def act(stand: Stand) -> None:
        record = await stand.se()
        entries = []
        for reason in ("the copy is off", "now it is"):
            # The one that is up, its copy, and one that said no hello yet; none shows a ticket in between.
            _, first = stand.up(record.se_id)
            copy, second = stand.link(record.se_id)
            stand.fleet.quarantine(copy)
            _, third = stand.link(record.se_id)
            assert await stand.fleet.release(record, actor="ann", reason=reason) == 3
            assert all(conn.is_closed() for conn in (first, second, third))
            audited = await stand.book.registry.audit.read()
            entries.append([entry.detail for entry in audited if entry.action == "se.released"])
        assert entries == [["the copy is off"], ["the copy is off", "now it is"]]
        released = stand.book.registry.se(record.se_id)
        assert released is not None
        assert released.ticket == UNKNOWN_TICKET
        with pytest.raises(NotFoundError):
            await stand.fleet.release(msgspec.structs.replace(record, se_id="nobody"), actor="ann", reason="")

    run(tmp_path, act)


# One ping.


def test_a_ping_tells_answer_silence_and_end_apart(tmp_path: Path) -> None:
    async def act(stand: Stand) -> None:
        loop = asyncio.get_running_loop()
        for behaviour, wanted, took_s in (("answers", True, 0.0), ("silent", False, 2.0), ("goes away", False, 1.0)):
            link, _ = stand.link("se", behaviour)
            began = loop.time()
            assert await ping(link) is wanted
            assert loop.time() - began == pytest.approx(took_s)

    run(tmp_path, act)


MIB = 1 << 20


@pytest.mark.parametrize(
    ("waiting_mib", "closed"),
    [
        ((0, 1, 1), ()),
        ((3, 3, 4), ()),  # all that may wait
        ((3, 3, 5), (2,)),  # one byte more is the greediest's end
        ((4, 1, 6), (2,)),
        ((6, 6, 6), (0, 1)),  # as many as it takes
    ],
)
def test_what_waits_unread_for_all_is_bounded(
    tmp_path: Path, waiting_mib: tuple[int, ...], closed: tuple[int, ...]
) -> None:
    async def act(stand: Stand) -> None:
        terms = msgspec.structs.replace(TERMS, unsent_max_bytes=10 * MIB)
        stand.fleet = Fleet(
            stand.book.registry, History(history_s=3600), stand.events, terms=terms, wall=stand.clock.now,
            monotonic=stand.clock.monotonic,
        )  # fmt: skip
        made = [stand.up((await stand.se()).se_id) for _ in waiting_mib]
        for (_, conn), mib in zip(made, waiting_mib, strict=True):
            conn.unsent_bytes = mib * MIB
        async with stand.watched():
            await asyncio.sleep(BURDEN_SWEEP_S + 2 * SWEEP_S)
        assert tuple(index for index, (_, conn) in enumerate(made) if conn.is_closed()) == closed
        assert stand.fleet.refusals["unread"] == len(closed)
        for index in closed:
            assert "doesn't read" in made[index][0].lost_text

    run(tmp_path, act)
