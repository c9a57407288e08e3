"""Clones: an alarm where two machines are one SE, a notice where one came back older, nothing where one only moved.

Each sentence of the take-over table (docs/stages/tunnel.md) against a real controller, as an operator sees it. Real
SEs whose state is copied are in `tests/scenarios`.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable

import msgspec
import pytest
from rig import Machine, RunningController, linked, machine, twin_of, until_async

from appliance.controller.channel import ALARMS_PER_H
from appliance.lab.simulated import SimulatedSe
from appliance.protocol.enroll import InstanceFacts
from appliance.protocol.operator import SeDetail

Work = Callable[[Machine], Awaitable[None]]


def run(work: Work) -> None:
    async def go() -> None:
        async with machine() as stand:
            await work(stand)

    asyncio.run(go())


def told(controller: RunningController, se: SimulatedSe) -> list[str]:
    """Which alarms of this SE are in the audit, oldest first."""
    alarms = {"se.clone", "se.rolled-back"}
    entries = controller.operator.audit(limit=10_000)
    return [entry.action for entry in entries if entry.subject == se.se_id and entry.action in alarms]


def on(se: SimulatedSe, **facts: object) -> SimulatedSe:
    """Puts an SE on hardware of its own."""
    se.facts = msgspec.structs.replace(InstanceFacts(boot_id=str(uuid.uuid4())), **facts)
    return se


async def pair(stand: Machine, controller: RunningController, name: str, *, ticket: bool) -> tuple[SimulatedSe, ...]:
    """An SE that is up, and what copied its disk, or its key alone: on other hardware, with another boot id."""
    first = on(stand.se(controller.bundle, name), macs=["02:00:00:00:00:01"])
    await first.enroll()
    await first.link()
    await first.beat()
    copy = on(twin_of(stand, controller, first), macs=["02:00:00:00:00:02"])
    if not ticket:
        copy.ticket = ""
    return first, copy


@pytest.mark.parametrize("ticket", [True, False], ids=["copied disk", "copied key alone"])
def test_a_copy_is_quarantined_and_both_machines_are_named(controller: RunningController, ticket: bool) -> None:
    name = f"pair-{ticket}"

    async def work(stand: Machine) -> None:
        first, copy = await pair(stand, controller, name, ticket=ticket)
        assert (await copy.link()).quarantined
        await first.beat()
        await until_async(lambda: controller.state(name) == "UP CLONE", what="the alarm")
        # Both come from one address, as behind a NAT: what tells them apart is named, wherever an operator looks.
        detail: SeDetail = controller.operator.se(name)
        places = {
            "why": next(step.text for step in controller.operator.why(name).steps if step.code == "CLONE"),
            "state": detail.summary.text,
            "event": next(e.text for e in controller.operator.events() if e.kind == "se.clone" and name in e.text),
            "audit": next(e.detail for e in controller.operator.audit(limit=10_000) if e.subject == first.se_id
                          and e.action == "se.clone"),
            "why, printed": " ".join(controller.command("why", name, check=False).stdout.split()),
        }  # fmt: skip
        for place, text in places.items():
            for se in (first, copy):
                assert f"boot {se.facts.boot_id[:8]}" in text, f"{place}: {text}"
        assert copy.facts.macs[0] in detail.alarms[0]
        assert told(controller, first) == ["se.clone"]

    run(work)


def test_a_copied_key_that_comes_while_the_first_is_off_betrays_itself_when_that_comes_back(
    controller: RunningController,
) -> None:
    async def work(stand: Machine) -> None:
        first, copy = await pair(stand, controller, "key-alone", ticket=False)
        first.close()
        answer = await copy.link()
        assert not answer.quarantined
        await copy.beat()
        assert told(controller, first) == ["se.rolled-back"]
        assert controller.operator.se("key-alone").alarms
        # The copy is off by now. The first one shows the ticket that was current before it: so there are two.
        copy.close()
        await until_async(lambda: controller.operator.se("key-alone").summary.rtt_s is None, what="the copy is off")
        assert (await first.link()).quarantined
        await until_async(lambda: controller.state("key-alone") == "QUARANTINED CLONE", what="the alarm")
        assert told(controller, first) == ["se.rolled-back", "se.clone"]
        # The operator finds out which is the copy, and releases: the first to come back is the SE.
        first.close()
        controller.command("se", "release", "key-alone", "--reason", "the copy is off")
        assert not (await first.link()).quarantined
        await first.beat()
        await until_async(lambda: controller.state("key-alone") == "UP OK", what="UP", deadline_s=60)
        assert not controller.operator.se("key-alone").alarms

    run(work)


def test_a_reboot_is_nothing(controller: RunningController) -> None:
    async def work(stand: Machine) -> None:
        se = await linked(stand, controller, "rebooted")
        for _ in range(2):
            se.close()
            on(se, instance_id=se.facts.instance_id)
            assert not (await se.link()).quarantined
            await se.beat()
        detail = controller.operator.se("rebooted")
        assert (told(controller, se), detail.alarms, detail.drift) == ([], [], [])

    run(work)


def test_a_live_migration_is_nothing(controller: RunningController) -> None:
    """The same memory, so the same boot id, on another host: its TCP connections died with the old one's address."""

    async def work(stand: Machine) -> None:
        se = on(await linked(stand, controller, "migrated"), dmi_uuid="6f7d2f9e-1111-4111-8111-000000000001")
        assert se.conn is not None
        older = se.conn
        older._transport.pause_reading()  # type: ignore[union-attr]
        se._channel = None
        assert not (await se.link()).quarantined
        await se.beat()
        older._transport.resume_reading()  # type: ignore[union-attr]
        await asyncio.wait_for(older.wait_closed(), 3)
        assert (told(controller, se), controller.operator.se("migrated").alarms) == ([], [])

    run(work)


def test_changed_hardware_is_drift_and_no_alarm(controller: RunningController) -> None:
    """A cold migration or a rescue: the disk, with its current ticket, in another machine."""

    async def work(stand: Machine) -> None:
        se = on(stand.se(controller.bundle, "moved"), macs=["02:00:00:00:00:03"])
        await se.enroll()
        await se.link()
        se.close()
        on(se, macs=["02:00:00:00:00:04"])
        await se.link()
        await se.beat()
        detail = controller.operator.se("moved")
        assert (told(controller, se), detail.alarms) == ([], [])
        assert detail.drift == ["macs was ['02:00:00:00:00:03'], is ['02:00:00:00:00:04']"]

    run(work)


def test_two_ses_of_one_image_with_one_dmi_uuid_are_two_ses(controller: RunningController) -> None:
    """Some hypervisors give every copy of a template the same one."""

    async def work(stand: Machine) -> None:
        same = {"dmi_uuid": "6f7d2f9e-1111-4111-8111-000000000002", "instance_id": "i-1", "image_digest": "sha256:1"}
        both = [on(stand.se(controller.bundle, f"dmi-{number}"), **same) for number in range(2)]
        for se in both:
            await se.enroll()
            assert not (await se.link()).quarantined
        for se in both:
            await se.beat()
            await until_async(lambda name=se.name: controller.state(name) == "UP OK", what="UP")
            assert (told(controller, se), controller.operator.se(se.name).alarms) == ([], [])
        assert both[0].grant is not None
        assert both[1].grant is not None
        assert both[0].grant.number != both[1].grant.number

    run(work)


def test_a_copy_that_comes_again_and_again_does_not_fill_the_audit(controller: RunningController) -> None:
    async def work(stand: Machine) -> None:
        first, copy = await pair(stand, controller, "insistent", ticket=True)
        for _ in range(3 * ALARMS_PER_H):
            assert (await copy.link()).quarantined
            copy.close()
        assert told(controller, first) == ["se.clone"] * ALARMS_PER_H
        # The same for who shows an old ticket each time while the first is off.
        older = copy.ticket
        first.close()
        for _ in range(3):
            copy.ticket = older
            await copy.link()
            copy.close()
        assert told(controller, first) == ["se.clone"] * ALARMS_PER_H

    run(work)
