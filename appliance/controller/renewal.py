"""Renewal of the node certificate under a live listener, and warnings before anything expires."""

from __future__ import annotations

import asyncio
import logging
import math
import ssl
from collections.abc import Callable, Iterable
from typing import NamedTuple

from appliance.controller.events import Events
from appliance.controller.material import Material
from appliance.errors import ApplianceError
from appliance.pki import tls

_log = logging.getLogger(__name__)

LOOK_S = 3600.0
WARN_DAYS = (30, 7, 2)
"""How many days before its end something is warned of, once each."""
DAY_S = 86400


class Expiry(NamedTuple):
    """What ends when. Times are seconds since 1970; where nothing is known of it, it ended with 1970's first."""

    what: str
    expires_at: float
    began_at: float
    advice: str
    """What to do, for people."""

    def days(self) -> list[int]:
        """Thresholds of `WARN_DAYS` that count: what lives for a month isn't warned of from its first day on."""
        return [days for days in WARN_DAYS if days * DAY_S <= (self.expires_at - self.began_at) / 2]

    def reached(self, now: float) -> list[int]:
        """Those that are reached at `now`."""
        return [days for days in self.days() if self.expires_at - now <= days * DAY_S]

    def sentence(self, now: float) -> str:
        """What to tell of it."""
        left_s = self.expires_at - now
        days = round(left_s / DAY_S)
        left = f"expires in {days} {'day' if days == 1 else 'days'}" if left_s > 0 else "has expired"
        return f"the {self.what} {left}: {self.advice}"


class Warnings:
    """Decides which warnings are due: each threshold of each thing once, the nearest one only. Pure."""

    def __init__(self) -> None:
        self._told: set[tuple[str, int]] = set()

    def due(self, expiries: Iterable[Expiry], now: float) -> list[str]:
        """Returns the sentences to tell now.

        Args:
            expiries: what expires when.
            now: seconds since 1970.
        """
        sentences = []
        for expiry in expiries:
            what, reached = expiry.what, expiry.reached(now)
            if not reached:
                self._told -= {(what, days) for days in (*WARN_DAYS, 0)}
                continue
            nearest = min(reached) if now < expiry.expires_at else 0
            if (what, nearest) not in self._told:
                sentences.append(expiry.sentence(now))
            self._told |= {(what, days) for days in (*reached, nearest)}
        return sentences


def of_material(material: Material) -> list[Expiry]:
    """What the certificates of a controller say."""
    root, issuing, terms = material.authority, material.issuing, material.node_terms()
    found = [Expiry("root CA", root.expires_at, root.not_before, "`appliance controller rotate-ca begin` replaces it")]
    if issuing is not None:
        advice = "`appliance controller issuing-ca renew` replaces it"
        found.append(Expiry("issuing CA", issuing.expires_at, issuing.not_before, advice))
    if terms is not None and terms.not_after == material.issuer.expires_at:
        advice = f"it ends with the {'issuing' if issuing else 'root'} CA"
    else:
        advice = "it renews itself; the log says why it could not"
    ends, began = (terms.not_after, terms.not_before) if terms else (0.0, -math.inf)
    return [*found, Expiry("node certificate", ends, began, advice)]


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
        expiries: Callable[[], Iterable[Expiry]],
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
        """Renews the certificate where that is due, else takes what lies on disk; warns."""
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
