"""The channel API where an SE's record is changed while its hello is judged."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from controller_parts import Book, book, request, turns

from appliance import settings
from appliance.controller import material
from appliance.controller.attempts import Attempts
from appliance.controller.channel import MAX_JUDGED, ChannelApi
from appliance.controller.events import Events
from appliance.controller.fleet import Fleet
from appliance.controller.link import Link
from appliance.controller.material import Files, Material
from appliance.controller.records import SeRecord
from appliance.controller.registry import Registry
from appliance.controller.safekeeping import Safekeeping
from appliance.controller.telemetry import History
from appliance.controller.trust import Publication
from appliance.controller.web import ProblemError, Request
from appliance.protocol import tunnel
from appliance.protocol.enroll import InstanceFacts
from appliance.protocol.fleet import Reason
from appliance.protocol.standing import Act
from appliance.protocol.tunnel import Hello, HelloAnswer

TERMS = settings.Controller()


class Conn:
    """A peer at asyncssh's border that is only ever closed."""

    def abort(self) -> None:
        pass


@dataclasses.dataclass
class Stand:
    """A channel API on a real registry, and an SE whose link is about to say hello."""

    book: Book
    fleet: Fleet
    api: ChannelApi
    se_id: str
    link: Link

    async def hello(self) -> HelloAnswer:
        said = Hello(
            protocol=tunnel.PROTOCOL_NUMBER, agent_version="0.1.0", facts=InstanceFacts(), ticket="", trust_version=1,
            time=self.book.clock.now(), host_keys=[],
        )  # fmt: skip
        return await self.api.hello(cast("Request", SimpleNamespace(state=SimpleNamespace(link=self.link))), said)

    @property
    def record(self) -> SeRecord:
        record = self.book.registry.se(self.se_id)
        assert record is not None
        return record

    async def while_it_is_judged(self, change: Coroutine[Any, Any, Any]) -> HelloAnswer:
        """Says hello while `change` is being committed; what its judgement began with is no more when it ends."""
        store = self.book.store
        store.gate, before = asyncio.Event(), store.txns
        changing = asyncio.create_task(change)
        await turns(lambda: store.txns > before)
        greeting = asyncio.create_task(self.hello())
        await turns(lambda: self.link.hello_done)
        await turns(lambda: self.book.registry._alone(self.se_id)._waiters)
        store.gate.set()
        await changing
        return await greeting


def run(path: Path, act: Callable[[Stand], Coroutine[Any, Any, None]], kind: type[Registry] = Registry) -> None:
    async def go() -> None:
        async with book(path) as found:
            found.registry = kind(found.store, found.registry.audit, wall=found.clock.now)
            files = Files(path / "state")
            material.create(
                files, cluster_id="c-1", addresses=["127.0.0.1"], enroll_port=8443, ssh_port=22,
                now=int(found.clock.now()),
            )  # fmt: skip
            loaded, events = Material(files), Events(found.clock.now)
            history = History(history_s=3600)
            fleet = Fleet(
                found.registry, history, events, terms=TERMS, wall=found.clock.now, monotonic=found.clock.monotonic
            )
            kept = Safekeeping(loaded, found.registry, found.store, events, terms=TERMS, wall=found.clock.now)
            api = ChannelApi(
                fleet, history, Attempts(), kept=kept, node=1, reverse_port=lambda: 5097,
                trust=Publication(loaded, on_publish=lambda _: None, wall=found.clock.now),
                check_reverse=lambda _: None, wall=found.clock.now,
            )  # fmt: skip
            record = (await found.enroll(await found.image_key(), request())).record
            assert record is not None
            link = Link(
                cast("Any", Conn()), link_id=1, se_id=record.se_id, thumbprint=record.thumbprint, source="192.0.2.1",
                terms=TERMS, now=found.clock.monotonic(),
            )  # fmt: skip
            fleet.opened(link)
            await act(Stand(found, fleet, api, record.se_id, link))

    asyncio.run(go())


def test_a_hello_whose_record_was_changed_meanwhile_is_judged_anew(tmp_path: Path) -> None:
    async def act(stand: Stand) -> None:
        def due(record: SeRecord) -> SeRecord:
            return msgspec.structs.replace(record, key_due=True)

        answer = await stand.while_it_is_judged(
            stand.book.registry.change_se(stand.se_id, due, actor="ann", action="se.key-due")
        )
        assert stand.fleet.link(stand.se_id) is stand.link
        assert (stand.record.key_due, stand.record.ticket_pending) == (True, answer.ticket)

    run(tmp_path, act)


def test_a_revocation_meanwhile_is_the_answer(tmp_path: Path) -> None:
    async def act(stand: Stand) -> None:
        with pytest.raises(ProblemError) as refused:
            await stand.while_it_is_judged(
                stand.book.admission.act(stand.se_id, Act.REVOKE, actor="ann", reason="stolen")
            )
        assert refused.value.code == "TUNNEL-020"
        assert stand.fleet.link(stand.se_id) is None

    run(tmp_path, act)


def test_a_link_that_was_being_judged_when_its_se_was_released_is_closed(tmp_path: Path) -> None:
    """Whoever comes back first is the SE: this one came before."""

    async def act(stand: Stand) -> None:
        with pytest.raises(ProblemError) as refused:
            await stand.while_it_is_judged(stand.fleet.release(stand.record, actor="ann", reason="the copy is off"))
        assert refused.value.code == "TUNNEL-027"
        assert stand.link.is_gone
        assert stand.link.lost_reason is Reason.LINK_LOST
        assert stand.fleet.link(stand.se_id) is None

    run(tmp_path, act)


class Restless(Registry):
    """A registry in which somebody is quicker each time."""

    tried = 0

    async def update_se(self, was: SeRecord, record: SeRecord) -> None:
        self.tried += 1
        labels = {"tried": str(self.tried)}

        def change(now: SeRecord) -> SeRecord:
            return msgspec.structs.replace(now, labels=labels)

        await self.change_se(was.se_id, change, actor="ann", action="se.labelled")
        await super().update_se(was, record)


def test_a_hello_is_judged_so_often_and_no_more(tmp_path: Path) -> None:
    async def act(stand: Stand) -> None:
        with pytest.raises(ProblemError) as refused:
            await stand.hello()
        assert (refused.value.code, refused.value.problem.status) == ("TUNNEL-026", 503)
        assert "changed meanwhile" in stand.link.lost_text
        assert cast("Restless", stand.book.registry).tried == MAX_JUDGED

    run(tmp_path, act, Restless)
