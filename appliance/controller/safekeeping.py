"""What keeps a controller's memory whole, put together: RECOVERY, witnessed audit heads, disk space for the audit, and
the ways on which events leave the node."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from appliance.controller.backup import RESERVE_FILE
from appliance.controller.events import Events
from appliance.controller.material import Material
from appliance.controller.operator_recovery import RecoveryApi
from appliance.controller.outlets import outlets
from appliance.controller.receipts import Receipts
from appliance.controller.records import SeRecord
from appliance.controller.recovery import Recovery
from appliance.controller.registry import Registry
from appliance.controller.store.port import Store
from appliance.controller.web import Endpoint
from appliance.controller.witness import Witness
from appliance.errors import StorageError
from appliance.protocol.operator import SeDetail
from appliance.settings import Controller as Terms
from appliance.storage.reserve import Reserve

_log = logging.getLogger(__name__)

LOOK_S = 10.0


class Safekeeping:
    """One loop only; `load`, then `run`, `close` at the end."""

    def __init__(
        self,
        material: Material,
        registry: Registry,
        store: Store,
        events: Events,
        *,
        terms: Terms,
        wall: Callable[[], float],
    ) -> None:
        cluster = material.cluster
        self._events = events
        self.receipts = Receipts(material)
        self.recovery = Recovery(registry, store, wall=wall)
        self.witness = Witness(material, registry, self.recovery, events, wall=wall)
        self.reserve = Reserve(material.files.state / RESERVE_FILE, size_bytes=terms.audit_reserve_bytes)
        registry.reserve_space = self.reserve
        self.outlets = outlets(
            program=terms.events_hook, url=terms.events_webhook, cluster_id=cluster.cluster_id, node=cluster.node
        )

    def endpoints(self, approve: Callable[[SeRecord, str, str], Awaitable[SeDetail]]) -> list[Endpoint]:
        """The operator API's part."""
        return RecoveryApi(self.recovery, self.witness, self._events, approve=approve).endpoints()

    async def load(self) -> None:
        """Reads what the store has of it, signs the first head, takes its space."""
        await self.recovery.load()
        self.witness.sign()
        self._fill()
        for outlet in self.outlets:
            outlet.start()
            self._events.listeners.append(outlet.offer)
        if text := self.recovery.problem():
            self._events.emit("enroll", "controller.recovery", "begin", text)

    def _fill(self) -> None:
        try:
            self.reserve.fill()
        except StorageError as error:
            _log.warning("no disk space is held back for the audit: %s", error.message)

    async def run(self) -> None:
        """Looks again and again until cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            self._fill()
            self.witness.keep_fresh()

    def problems(self) -> list[str]:
        """What an operator should look at."""
        found = [self.recovery.problem(), *self.witness.problems, *(outlet.problem for outlet in self.outlets)]
        if not self.reserve.is_held:
            found.append("the disk space held back for the audit is used up: free space, it is taken again by itself")
        return [text for text in found if text]

    def close(self) -> None:
        """Ends what runs beside the loop."""
        for outlet in self.outlets:
            outlet.close()
