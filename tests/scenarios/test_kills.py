"""The controller is killed at random moments while SEs enroll. What it acknowledged holds, and nothing is given twice.

An SE that got no answer can't know whether it is enrolled: it asks again, as a real one does, before and after it has
its grant. APPLIANCE_KILLS_SEED repeats the moments of an earlier run, as far as two processes can be repeated.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import ssl
import uuid
from collections import Counter
from pathlib import Path

import pytest
from rig import RunningController, machine, running

from appliance.lab.simulated import SimulatedSe
from appliance.protocol import audit
from appliance.protocol.operator import AuditEntry, ImageKeyTermsWish

NO_ANSWER = (OSError, EOFError, ssl.SSLError, TimeoutError)
ASK_AGAIN = 8
"""SEs that have their grant and ask for it again, in each round."""


class Field:
    """The SEs, and every grant that one of them was ever given."""

    def __init__(self, ses: list[SimulatedSe]) -> None:
        self.ses = ses
        self.numbers: dict[str, int] = {}
        self.waiting: list[SimulatedSe] = []
        self.again = 0
        self.cut_off = 0

    async def ask(self, se: SimulatedSe) -> None:
        try:
            grant = await se.enroll()
        except NO_ANSWER:
            self.cut_off += 1
            return
        if se.se_id in self.numbers:
            self.again += 1
        number = self.numbers.setdefault(se.se_id, grant.number)
        assert grant.number == number, f"{se.name} had number {number} and was given {grant.number}"

    async def round(self, newcomers: list[SimulatedSe], chance: random.Random) -> None:
        """Newcomers, all that were cut off, and some that want their grant once more."""
        granted = [se for se in self.ses if se.se_id in self.numbers]
        again = chance.sample(granted, min(ASK_AGAIN, len(granted)))
        asking = [*self.waiting, *newcomers]
        await asyncio.gather(*(self.ask(se) for se in (*asking, *again)))
        self.waiting = [se for se in asking if se.se_id not in self.numbers]


async def kill_while_they_enroll(
    controller: RunningController, *, kills: int, fleet: int, chance: random.Random
) -> Field:
    # Exactly as many uses as there are SEs: one that counts twice shuts another out.
    bundle = controller.operator.create_image_key(ImageKeyTermsWish(max_uses=fleet)).bundle
    async with machine() as stand:
        field = Field([stand.se(bundle, f"kill-{number}") for number in range(fleet)])
        for kill in itertools.count():
            # On a fast machine the answers may have gone before each of so few kills.
            if kill >= kills and field.cut_off >= kills // 2:
                break
            assert kill < 10 * kills, "the kills miss the requests"
            newcomers = field.ses[kill * fleet // kills : (kill + 1) * fleet // kills]
            asking = asyncio.create_task(field.round(newcomers, chance))
            # The random moment: from before the first request arrives until after the last answer has gone.
            await asyncio.wait([asking], timeout=chance.uniform(0, 0.5))
            await asyncio.to_thread(controller.kill)
            await asking
            await asyncio.to_thread(controller.start)
        while len(field.numbers) < fleet:
            before = field.cut_off
            await field.round([], chance)
            assert field.cut_off == before, "nobody kills it any more"
        for se in field.ses:
            # By its own key alone: the key in the store is the one of the SE that was given the number.
            assert (await se.refresh()).number == field.numbers[se.se_id]
        return field


def check(controller: RunningController, field: Field, seed: int) -> None:
    told = f"seed {seed}"
    fleet = len(field.ses)
    by_id = {summary.se_id: summary.number for summary in controller.operator.ses()}
    assert field.numbers.items() <= by_id.items(), told
    assert by_id.keys() == {se.se_id for se in field.ses}, told
    assert len(set(by_id.values())) == fleet, told
    (key,) = (
        entry for entry in controller.operator.image_keys() if entry.image_key_id == field.ses[0].bundle.image_key_id
    )
    assert key.uses == fleet, told
    entries: list[AuditEntry] = []
    while page := controller.operator.audit(after=len(entries)):
        entries += page
    assert controller.operator.verify_audit().intact, told
    start = audit.genesis(field.ses[0].bundle.cluster_id, entries[0].node, entries[0].epoch)
    verdict = audit.verify(entries, start=start, head=entries[-1].hash)
    assert verdict.intact, f"{told}: {verdict.text}"
    granted = Counter(entry.subject for entry in entries if entry.action == "enroll.granted")
    assert granted == Counter(by_id.keys()), told


def run(tmp_path: Path, *, kills: int, fleet: int) -> None:
    seed = int(os.environ.get("APPLIANCE_KILLS_SEED", uuid.uuid4().int % 2**32))
    print(f"APPLIANCE_KILLS_SEED={seed}")
    with running(tmp_path / "root") as controller:
        field = asyncio.run(kill_while_they_enroll(controller, kills=kills, fleet=fleet, chance=random.Random(seed)))
        print(f"{kills} kills: {field.cut_off} requests got no answer, {field.again} grants were given again")
        check(controller, field, seed)


def test_a_few_kills_lose_nothing(tmp_path: Path) -> None:
    run(tmp_path, kills=5, fleet=30)


@pytest.mark.slow
def test_a_hundred_kills_lose_nothing(tmp_path: Path) -> None:
    run(tmp_path, kills=100, fleet=200)
