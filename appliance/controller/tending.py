"""What time does to the door: requests for approval lapse, ended tokens are forgotten, floods by image keys told."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from appliance.controller.admission import Admission
from appliance.controller.events import Events
from appliance.controller.fleet import Fleet
from appliance.controller.rate import KeyRates
from appliance.controller.tokens import Tokens
from appliance.errors import StoreError

_log = logging.getLogger(__name__)

MOST_S = 60.0
"""Longest time between two looks."""


async def tend(
    admission: Admission,
    tokens: Tokens,
    fleet: Fleet,
    events: Events,
    *,
    key_rates: KeyRates,
    pending_life_s: float,
    monotonic: Callable[[], float],
) -> None:
    """Looks again and again until cancelled; a store that fails is tried at the next look."""
    while True:
        await asyncio.sleep(min(MOST_S, max(0.2, pending_life_s / 10)))
        try:
            for record in await admission.lapse():
                fleet.forget(record.se_id)
                text = f"{record.name} (number {record.number}) waited in vain; nobody approved {record.thumbprint}"
                events.emit("enroll", "enroll.lapsed", record.se_id, text)
            await tokens.forget_ended()
            for key, count in key_rates.tell(monotonic()).items():
                text = f"{count} requests by the image key {key} were refused: more than its rate allows"
                events.emit("enroll", "enroll.limited", key, text)
                await fleet.registry.note(actor="controller", action="enroll.limited", subject=key, detail=text)
        except StoreError as error:
            _log.error("the door can't be tended: %s", error.message, extra={"stage": "enroll"})
