"""Renewal of the node certificate under a live listener, and warnings before anything expires."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable, Mapping

from appliance.controller.events import Events
from appliance.controller.material import Material
from appliance.errors import ApplianceError
from appliance.pki import tls

_log = logging.getLogger(__name__)

LOOK_S = 3600.0
WARN_DAYS = (30, 7, 2)
"""How many days before its end something is warned of, once each."""
DAY_S = 86400


class Warnings:
    """Decides which warnings are due: each threshold of each thing once, the nearest one only. Pure."""

    def __init__(self) -> None:
        self._told: set[tuple[str, int]] = set()

    def due(self, expiries: Mapping[str, float], now: float) -> list[str]:
        """Returns the sentences to tell now.

        Args:
            expiries: what expires when, seconds since 1970.
            now: seconds since 1970.
        """
        sentences = []
        for what, expires_at in expiries.items():
            left_s = expires_at - now
            reached = [days for days in WARN_DAYS if left_s <= days * DAY_S]
            if not reached:
                self._told -= {(what, days) for days in WARN_DAYS}
                continue
            nearest = min(reached)
            if (what, nearest) not in self._told:
                left = f"in {left_s / DAY_S:.0f} days" if left_s > 0 else "now: it has expired"
                sentences.append(f"the {what} expires {left}")
            self._told |= {(what, days) for days in reached}
        return sentences


class Renewal:
    """The service. One loop only.

    Args:
        material: whose node certificate is renewed in place.
        context: of the live listener.
        events: told of renewals and warnings.
        expiries: what expires when.
        wall: seconds since 1970.
    """

    def __init__(
        self,
        material: Material,
        context: ssl.SSLContext,
        events: Events,
        *,
        expiries: Callable[[], Mapping[str, float]],
        wall: Callable[[], float],
    ) -> None:
        self._material = material
        self._context = context
        self._events = events
        self._expiries = expiries
        self._wall = wall
        self._warnings = Warnings()
        self.recheck = asyncio.Event()
        """Set to have it look now."""

    def look(self) -> None:
        """Renews the certificate where two thirds of its life are over, else takes what lies on disk; warns."""
        files = self._material.files
        try:
            is_due = self._material.renewal_due(self._wall())
            if is_due:
                self._material.renew_node_certificate(int(self._wall()))
            tls.reload(self._context, files.node_certificate, files.node_key)
        except ApplianceError as error:
            _log.error("the node certificate could not be renewed: %s", error.message)
        else:
            if is_due:
                text = "the node certificate was renewed on the live listener"
                self._events.emit("enroll", "node.renewed", str(self._material.cluster.node), text)
        for sentence in self._warnings.due(self._expiries(), self._wall()):
            self._events.emit("enroll", "trust.expires", self._material.cluster.cluster_id, sentence)

    async def run(self) -> None:
        """Looks every hour, and when asked to, until cancelled."""
        while True:
            self.look()
            try:
                async with asyncio.timeout(LOOK_S):
                    await self.recheck.wait()
            except TimeoutError:
                pass
            self.recheck.clear()
