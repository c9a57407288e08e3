"""The operator API's part about RECOVERY and signed audit heads."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from appliance.controller.events import Events
from appliance.controller.operator_trust import refused
from appliance.controller.records import SeRecord
from appliance.controller.recovery import Recovery
from appliance.controller.web import Endpoint, Request
from appliance.controller.witness import Witness
from appliance.protocol.operator import Reasoned, ReceiptsApproved, RecoveryView, SeDetail
from appliance.protocol.trust import Envelope


class RecoveryApi:
    """Answers operators. One loop only."""

    def __init__(
        self,
        recovery: Recovery,
        witness: Witness,
        events: Events,
        *,
        approve: Callable[[SeRecord, str, str], Awaitable[SeDetail]],
    ) -> None:
        """`approve` lets in an SE that waits: record, actor, reason."""
        self._recovery = recovery
        self._witness = witness
        self._events = events
        self._approve = approve

    def endpoints(self) -> list[Endpoint]:
        """The table of this part."""
        one = {200: RecoveryView}
        no = (400, 409)
        return [
            Endpoint("GET", "/v1/recovery", self.show, "How far RECOVERY is", one),
            Endpoint("POST", "/v1/recovery/begin", self.begin, "Take receipts again", one, Reasoned, errors=no),
            Endpoint("POST", "/v1/recovery/end", self.end, "Take receipts no more", one, Reasoned, errors=no),
            Endpoint(
                "POST", "/v1/recovery/approve", self.approve, "Let in all whose receipts hold", {200: ReceiptsApproved},
                Reasoned, errors=no,
            ),
            Endpoint("POST", "/v1/audit/head", self.head, "Sign the newest audit entry", {200: Envelope}),
        ]  # fmt: skip

    def _view(self) -> RecoveryView:
        record, recovery = self._recovery.record, self._recovery
        if record is None:
            return RecoveryView()
        return RecoveryView(
            is_active=recovery.is_active,
            epoch=record.epoch,
            began_at=record.began_at,
            ended_at=record.ended_at,
            backup_made_at=record.backup_made_at,
            backup_epoch=record.backup_epoch,
            numbers_from=record.numbers_from,
            waiting=[entry.name for entry in recovery.approvable()],
            warnings=recovery.warnings(),
        )

    async def show(self, _request: Request, _body: None) -> RecoveryView:
        """How far RECOVERY is."""
        return self._view()

    async def begin(self, request: Request, body: Reasoned) -> RecoveryView:
        """Takes receipts again."""
        with refused():
            await self._recovery.begin(actor=request.state.actor, reason=body.reason)
        self._events.emit("enroll", "controller.recovery", "begin", "RECOVERY begins again: receipts are taken")
        return self._view()

    async def end(self, request: Request, body: Reasoned) -> RecoveryView:
        """Takes receipts no more."""
        with refused():
            await self._recovery.end(actor=request.state.actor, reason=body.reason)
        self._events.emit("enroll", "controller.recovery", "end", "RECOVERY has ended: receipts are taken no more")
        return self._view()

    async def approve(self, request: Request, body: Reasoned) -> ReceiptsApproved:
        """Lets in all SEs whose receipts hold without a reservation."""
        actor = request.state.actor
        found = list(self._recovery.approvable())
        approved = [(await self._approve(record, actor, body.reason)).summary for record in found]
        return ReceiptsApproved(approved=approved, warnings=self._recovery.warnings())

    async def head(self, _request: Request, _body: None) -> Envelope:
        """Signs the newest audit entry; SEs get it with their next heartbeat."""
        return self._witness.sign()
