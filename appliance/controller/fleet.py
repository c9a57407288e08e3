"""The fleet as this node sees it: which links are up, what state each SE is in since when, and who went silent.

State is derived by `protocol.fleet.derive` whenever something changed; a change of state becomes an event. The
watch over silence keeps links ordered by when they were last heard, so each look costs only what is overdue.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import msgspec

from appliance import settings
from appliance.controller.events import Events
from appliance.controller.link import Link
from appliance.controller.losses import Lately, Losses
from appliance.controller.pace import paced
from appliance.controller.records import SeRecord
from appliance.controller.registry import Registry, drift
from appliance.controller.telemetry import History
from appliance.errors import NotFoundError
from appliance.protocol import tunnel
from appliance.protocol.address import se_address
from appliance.protocol.enroll import SeStatus
from appliance.protocol.fleet import Derived, Reason, SeSummary, SeView, State, derive, is_rtt_high, unconfined
from appliance.protocol.operator import SeDetail

_log = logging.getLogger(__name__)

SWEEP_S = 0.25
"""How often the fleet looks for overdue links."""
BURDEN_SWEEP_S = 0.5
"""How often it looks for links that burden the controller."""


@dataclass(slots=True)
class _Memo:
    """The state last derived, since when it holds (seconds since 1970), and the record it was derived from."""

    derived: Derived
    since: float
    record: SeRecord


async def ping(link: Link, deadline_s: float = tunnel.DEADLINE_S) -> bool:
    """Whether the peer answers a keep-alive request in time (any answer counts, RFC 4254 section 4).

    False also where the connection ended meanwhile: asyncssh then answers in the peer's place.
    """
    if link.is_gone:
        return False
    try:
        # asyncssh has no public call for one ping with a deadline; tests/contract holds this one in place.
        await asyncio.wait_for(link.conn._make_global_request(b"keepalive@openssh.com"), deadline_s)  # noqa: SLF001
    except (TimeoutError, OSError):
        return False
    return not (link.is_gone or link.conn.is_closed())


def _pair(held: Collection[Link], admitted: Link | None) -> str:
    """Names those in quarantine, and whom they are copies of."""
    copies = ", ".join(sorted(entry.machine for entry in held))
    return f"{copies}; the first is {admitted.machine if admitted else 'not linked'}"


class Fleet:
    """Live state of all SEs at this node. One loop only."""

    def __init__(
        self,
        registry: Registry,
        history: History,
        events: Events,
        *,
        terms: settings.Controller,
        wall: Callable[[], float],
        monotonic: Callable[[], float],
    ) -> None:
        self.registry = registry
        self.history = history
        self.events = events
        self._wall = wall
        self._monotonic = monotonic
        self._terms = terms
        self.refusals: Counter[str] = Counter()
        """Links closed because they burden the controller, by how."""
        self._open: dict[str, dict[int, Link]] = {}
        """SE to all its connections that logged in, admitted or not, oldest first."""
        self._links: dict[str, Link] = {}
        self._by_last_seen: OrderedDict[int, Link] = OrderedDict()
        self._quarantined: dict[str, set[Link]] = {}
        self._memo: dict[str, _Memo] = {}
        self._lost: dict[str, tuple[Reason, str]] = {}
        self._losses = Losses()
        self._last_heartbeat: dict[str, float] = {}
        self._pinging: set[asyncio.Task[None]] = set()
        self._asked: set[int] = set()
        """Ids of links that were pinged and not heard of since; they are not in line meanwhile."""
        self.started_at = wall()
        self.heartbeats = 0
        """Answered since start."""
        self.missed = 0
        """Links given up because of silence."""

    # What links do.

    @property
    def interval_s(self) -> float:
        """The heartbeat interval for a fleet of this size."""
        return tunnel.heartbeat_interval(len(self._links), self._terms.heartbeat_interval_s)

    @property
    def links(self) -> int:
        """Admitted links."""
        return len(self._links)

    def link(self, se_id: str) -> Link | None:
        """The admitted link of an SE."""
        return self._links.get(se_id)

    def age_s(self, link: Link) -> float:
        """Seconds since a link logged in."""
        return self._monotonic() - link.opened_at

    def lately(self, se_id: str) -> Lately:
        """What befell an SE's link in the last minutes."""
        return self._losses.lately(se_id, self._monotonic())

    def last_heartbeat_at(self, se_id: str) -> float:
        """When an SE's newest heartbeat came, seconds since 1970; 0 where none came."""
        return self._last_heartbeat.get(se_id, 0.0)

    def quarantined(self, se_id: str) -> list[Link]:
        """Links held in quarantine with that SE's key."""
        return list(self._quarantined.get(se_id, ()))

    def holds(self, link: Link) -> bool:
        """Whether `link` was admitted or is in quarantine; nobody watches others."""
        return self._links.get(link.se_id) is link or link in self._quarantined.get(link.se_id, ())

    def opened(self, link: Link) -> None:
        """A connection logged in and will say hello; where its SE has too many, the oldest spare one is closed."""
        links = self._open.setdefault(link.se_id, {})
        links[link.link_id] = link
        staying = [entry for entry in links.values() if not entry.is_gone]
        most = self._terms.max_links_per_se
        if len(staying) > most:
            spare = next(entry for entry in staying if entry is not self._links.get(link.se_id))
            self.refusals["copies"] += 1
            spare.close(Reason.LINK_LOST, f"more than {most} links with one SE's key")

    def admit(self, link: Link) -> None:
        """Makes `link` the SE's link, unless it is gone meanwhile; an older one is closed."""
        if link.is_gone:
            return
        older = self._links.get(link.se_id)
        self._links[link.se_id] = link
        self._lost.pop(link.se_id, None)
        self._by_last_seen[link.link_id] = link
        if older is not None and older is not link:
            self._by_last_seen.pop(older.link_id, None)
            self._asked.discard(older.link_id)
            text = f"the SE came back from {link.source}"
            self._losses.note(link.se_id, text, self._monotonic())
            older.close(Reason.LINK_LOST, text)
        self.look(link.se_id)

    def quarantine(self, link: Link) -> None:
        """Holds `link` as a suspected copy, unless it is gone meanwhile."""
        if link.is_gone:
            return
        link.quarantined = True
        self._quarantined.setdefault(link.se_id, set()).add(link)
        self._by_last_seen[link.link_id] = link
        self.look(link.se_id)

    def seen(self, link: Link) -> None:
        """A sign of life."""
        link.last_seen = self._monotonic()
        if link.link_id in self._by_last_seen:
            self._by_last_seen.move_to_end(link.link_id)
        elif link.link_id in self._asked:
            self._asked.discard(link.link_id)
            self._by_last_seen[link.link_id] = link

    def heartbeat(self, link: Link, *, rtt_s: float, lag_s: float, spool_bytes: int) -> None:
        """A heartbeat arrived, `lag_s` after the wall time that it carries."""
        now = self._monotonic()
        self.seen(link)
        link.heartbeats += 1
        if link.heartbeats == 1:
            link.on_up()
        self.heartbeats += 1
        if rtt_s > 0:
            link.rtt.add(rtt_s, now)
        link.lags.add(lag_s)
        link.spool_bytes = spool_bytes
        if not link.quarantined:
            self._last_heartbeat[link.se_id] = self._wall()
            self.look(link.se_id)

    def overdone_s(self, link: Link) -> float:
        """Takes a heartbeat of a link's share; 0 where it may be answered, else the seconds it should wait."""
        rate_per_s = self._terms.heartbeats_per_interval / self.interval_s
        if link.beats.take(self._monotonic(), rate_per_s=rate_per_s, burst=self._terms.heartbeat_burst):
            return 0.0
        self.seen(link)
        self.refusals["heartbeat"] += 1
        return link.beats.wait_s(rate_per_s=rate_per_s)

    def reverse_checked(self, link: Link, error: str) -> None:
        """The reverse path was tried; `error` is "" where an SE's own sshd answered."""
        link.reverse_ok, link.reverse_error, link.reverse_at = not error, error, self._wall()
        self.look(link.se_id)

    async def release(self, record: SeRecord, *, actor: str, reason: str) -> int:
        """Ends a quarantine: all links with this SE's key are closed and its tickets count no more.

        Whoever comes first from now on is the SE; the operator has switched the wrong one off. Returns how many links
        were closed. Raises as `Registry.change_se`.
        """
        async with self.registry.turn(record.se_id):
            kept = self.registry.se(record.se_id)
            if kept is None:
                raise NotFoundError(f"no SE {record.se_id!r} is known", hint="see `appliance se list`")
            released = msgspec.structs.replace(
                kept, ticket=tunnel.UNKNOWN_TICKET, ticket_pending="", ticket_superseded=""
            )
            # Also where that changes nothing: it closes links each time, and each time there is an entry.
            await self.registry.commit(released, actor=actor, action="se.released", subject=record.se_id, detail=reason)
        # One that is about to be admitted is nobody's yet, and may be the wrong one's.
        links = [entry for entry in self._open.get(record.se_id, {}).values() if not entry.is_gone]
        for entry in links:
            entry.close(Reason.LINK_LOST, "released by an operator: the first to come back is this SE")
        return len(links)

    def lost(self, link: Link) -> None:
        """The connection is gone."""
        link.is_gone = True
        still_open = self._open.get(link.se_id, {})
        still_open.pop(link.link_id, None)
        if not still_open:
            self._open.pop(link.se_id, None)
        self._by_last_seen.pop(link.link_id, None)
        self._asked.discard(link.link_id)
        held = self._quarantined.get(link.se_id)
        if held is not None:
            held.discard(link)
            if not held:
                del self._quarantined[link.se_id]
        if self._links.get(link.se_id) is link:
            del self._links[link.se_id]
            self._lost[link.se_id] = (link.lost_reason, link.lost_text)
            self._losses.note(link.se_id, link.lost_text, self._monotonic())
        self.look(link.se_id)

    # The watch over silence.

    async def watch(self) -> None:
        """Pings links that are overdue, gives up those that don't answer or burden us; runs until cancelled."""
        burdens_at = 0.0
        while True:
            await asyncio.sleep(SWEEP_S)
            self._sweep()
            now = self._monotonic()
            if now >= burdens_at:
                burdens_at = now + BURDEN_SWEEP_S
                self._drop_burdens(now)

    def _drop_burdens(self, now: float) -> None:
        """Closes links whose peers together make us keep what they don't read, or begin a key exchange and leave it."""
        most_of_all, rekey_s = self._terms.unsent_max_bytes, self._terms.rekey_timeout_s
        waiting: list[tuple[int, Link]] = []
        # Ten thousand links rest each second: what is done for each is done here, in one expression.
        burdens = [
            link
            for links in self._open.values()
            for link in links.values()
            if link.rekeys_since or link.is_rekeying or paced(link.conn).unsent_bytes
        ]
        for link in burdens:
            unsent = paced(link.conn).unsent_bytes
            if unsent:
                waiting.append((unsent, link))
            if not link.is_rekeying:
                link.rekeys_since = 0.0
            elif not link.rekeys_since:
                link.rekeys_since = now
            elif now - link.rekeys_since > rekey_s:
                self.refusals["rekey"] += 1
                link.close(Reason.LINK_LOST, f"no new keys within {rekey_s:g} s")
        total = sum(unsent for unsent, link in waiting if not link.is_gone)
        for unsent, link in sorted(waiting, key=lambda entry: -entry[0]):
            if total <= most_of_all:
                break
            if not link.is_gone:
                total -= unsent
                self._unread(link, f"more than {most_of_all >> 20} MiB wait for all links, the most for it")

    def unread(self, link: Link) -> None:
        """More waits for one link than may."""
        if not link.is_gone:
            self._unread(link, f"more than {self._terms.link_unsent_max_bytes >> 20} MiB wait for it")

    def _unread(self, link: Link, what: str) -> None:
        self.refusals["unread"] += 1
        link.close(Reason.LINK_LOST, f"{what}, and it doesn't read")

    def _sweep(self) -> None:
        now = self._monotonic()
        allowed_s = self.interval_s + tunnel.DEADLINE_S
        for link in list(self._by_last_seen.values()):
            if now - link.last_seen < allowed_s:
                break
            del self._by_last_seen[link.link_id]
            self._asked.add(link.link_id)
            task = asyncio.create_task(self._last_call(link))
            self._pinging.add(task)
            task.add_done_callback(self._pinging.discard)

    async def _last_call(self, link: Link) -> None:
        silent_since = link.last_seen
        answered = await ping(link, tunnel.DEADLINE_S - SWEEP_S)
        if link.link_id not in self._asked:
            return  # heard of meanwhile, or lost
        if answered:
            self.seen(link)
            return
        self._asked.discard(link.link_id)
        self.missed += 1
        silence_s = self._monotonic() - silent_since
        link.close(Reason.HEARTBEAT_MISSED, f"nothing heard for {silence_s:.1f} s, and a ping went unanswered")

    # What an operator sees.

    def _view(self, record: SeRecord) -> SeView:
        link = self._links.get(record.se_id)
        held = self._quarantined.get(record.se_id)
        default = (Reason.CONTROLLER_RESTARTED, "no link since the controller started")
        reason, text = self._lost.get(record.se_id, default)
        return SeView(
            status=record.status,
            ever_confirmed=record.confirmed_at > 0,
            link=link.view() if link else None,
            lost_reason=reason,
            lost_text=text,
            was_rtt_high=link.was_rtt_high if link else False,
            clone_of=_pair(held, link) if held else "",
        )

    def look(self, se_id: str) -> Derived | None:
        """Derives an SE's state; a change becomes an event."""
        record = self.registry.se(se_id)
        if record is None:
            return None
        view, link = self._view(record), self._links.get(se_id)
        derived = derive(view)
        if link is not None and view.link is not None:
            link.was_rtt_high = is_rtt_high(view.link.rtt_s, was_high=view.was_rtt_high)
        memo = self._memo.get(se_id)
        if memo is not None and memo.derived[:2] == derived[:2]:
            memo.derived, memo.record = derived, record
        else:
            since = self._wall() if memo is not None or link is not None else record.status_at or record.enrolled_at
            if derived.reason is Reason.CONTROLLER_RESTARTED:
                since = self.started_at
            self._memo[se_id] = _Memo(derived, since, record)
            if memo is not None:
                was = memo.derived.state.value
                text = f"{record.name} {was} -> {derived.state.value} ({derived.reason.value}): {derived.text}"
                self.events.emit("tunnel", "se.state", record.se_id, text)
        return derived

    def state(self, record: SeRecord) -> tuple[Derived, float]:
        """An SE's state and since when."""
        # Whatever changes a link looks anew at once; a changed record is another object.
        memo = self._memo.get(record.se_id)
        if memo is None or memo.record is not record:
            self.look(record.se_id)
            memo = self._memo[record.se_id]
        return memo.derived, memo.since

    def counts(self) -> Counter[str]:
        """Number of SEs by state."""
        return Counter(self.state(record)[0].state.value for record in self.registry.ses())

    def summary(self, record: SeRecord) -> SeSummary:
        """One line of the fleet."""
        derived, since = self.state(record)
        link = self._links.get(record.se_id)
        figures = self.history
        return SeSummary(
            se_id=record.se_id,
            name=record.name,
            number=record.number,
            address=se_address(record.number),
            state=derived.state,
            reason=derived.reason,
            text=derived.text,
            since=since,
            rtt_s=link.rtt.value if link else None,
            cpu_pct=figures.cpu_pct(record.se_id),
            memory_used_bytes=figures.memory_used_bytes(record.se_id),
            memory_total_bytes=figures.memory_total_bytes(record.se_id),
            uptime_s=figures.uptime_s(record.se_id),
            labels=record.labels,
            agent_version=(link.agent_version if link else "") or record.agent_version,
            image_key_id=record.image_key_id,
            enrolled_at=record.enrolled_at,
            source=link.source if link else record.source,
        )

    def detail(self, record: SeRecord) -> SeDetail:
        """One SE, whole."""
        held, link = self.quarantined(record.se_id), self._links.get(record.se_id)
        alarms = [f"a copy with this SE's key is linked from {entry.machine}, in quarantine" for entry in held]
        if record.ticket_superseded:
            alarms.append("the SE came back with an older link ticket (snapshot or restored disk)")
        if link is not None and link.open_doors:
            alarms.append(unconfined(link.open_doors))
        image = self.registry.image(record.facts.image_digest)
        return SeDetail(
            summary=self.summary(record),
            status=record.status.value,
            thumbprint=record.thumbprint,
            se_key=record.se_key,
            host_keys=record.host_keys,
            facts=record.seen_facts if record.confirmed_at else record.facts,
            confirmed_at=record.confirmed_at,
            image_key_gone_at=record.image_key_gone_at,
            last_heartbeat_at=self.last_heartbeat_at(record.se_id),
            drift=drift(record),
            alarms=alarms,
            image=f"{image.name}{', revoked' * bool(image.revoked_at)}" if image else "",
        )

    def close_se(self, record: SeRecord, text: str) -> int:
        """Closes every link of an SE that was revoked or deleted; returns how many."""
        links = list(self._open.get(record.se_id, {}).values())
        for entry in links:
            entry.close(Reason.REVOKED, text)
        if record.status is SeStatus.DELETED:
            self.history.drop(record.se_id)
        self.look(record.se_id)
        return len(links)

    def replaced(self, record: SeRecord) -> None:
        """A new key took an SE's place: links that the old one opened end."""
        links = self.quarantined(record.se_id)
        if (link := self._links.get(record.se_id)) is not None:
            links.append(link)
        for entry in links:
            entry.close(Reason.LINK_LOST, "the SE came back with a new key")
        self.look(record.se_id)

    def forget(self, se_id: str) -> None:
        """An SE is no more, not even as a tombstone."""
        self._memo.pop(se_id, None)
        self._lost.pop(se_id, None)
        self._losses.forget(se_id)
        self._last_heartbeat.pop(se_id, None)
        self.history.drop(se_id)

    def close_all(self, text: str) -> None:
        """Closes every link, for a stop."""
        for link in [link for links in self._open.values() for link in links.values()]:
            link.close(Reason.LINK_LOST, text)

    def __iter__(self) -> Iterator[tuple[SeRecord, Link | None]]:
        """Iterates over (record, link or None) of all SEs."""
        for record in self.registry.ses():
            yield record, self._links.get(record.se_id)

    def is_up(self, record: SeRecord) -> bool:
        """Whether the reverse path may be used: linked, confirmed, not in quarantine."""
        return self.state(record)[0].state in {State.UP, State.DEGRADED, State.UPGRADING}
