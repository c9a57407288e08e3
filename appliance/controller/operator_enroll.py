"""The operator API's part about enrollment: approve, reject, revoke, reinstate and delete SEs; tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from appliance.controller.admission import Admission
from appliance.controller.events import Events
from appliance.controller.fleet import Fleet
from appliance.controller.records import SeRecord, TokenRecord
from appliance.controller.registry import Registry
from appliance.controller.tokens import Tokens
from appliance.controller.web import Endpoint, ProblemError, Request, simple_problem
from appliance.errors import ApplianceError, NotFoundError, UsageError
from appliance.protocol.enroll import Policy, SeStatus
from appliance.protocol.operator import (
    Approval,
    PendingView,
    Reasoned,
    SeDetail,
    TokenCreated,
    TokenView,
    TokenWish,
)
from appliance.protocol.standing import Act
from appliance.protocol.token import token_id

_EVENTS = {
    Act.APPROVE: "enroll.granted",
    Act.REJECT: "se.rejected",
    Act.REVOKE: "se.revoked",
    Act.REINSTATE: "se.reinstated",
    Act.DELETE: "se.deleted",
}


@contextlib.contextmanager
def _refused(status: int = 400) -> Iterator[None]:
    """Turns what is asked wrongly into an answer: 404, or `status`."""
    try:
        yield
    except NotFoundError as error:
        raise _problem(404, error) from None
    except UsageError as error:
        raise _problem(status, error) from None


def _problem(status: int, error: ApplianceError) -> ProblemError:
    return ProblemError(simple_problem(status, error.code, error.message, advice=error.hint))


class AdmissionApi:
    """Answers operators. One loop only."""

    def __init__(
        self,
        registry: Registry,
        admission: Admission,
        tokens: Tokens,
        fleet: Fleet,
        events: Events,
        *,
        on_granted: Callable[[], None],
    ) -> None:
        """`on_granted` is called for each SE that an approval lets in."""
        self._registry = registry
        self._admission = admission
        self._tokens = tokens
        self._fleet = fleet
        self._events = events
        self._on_granted = on_granted

    def endpoints(self) -> list[Endpoint]:
        """The table of this part."""
        no = (400, 404, 409)
        one = {200: SeDetail}
        return [
            Endpoint("GET", "/v1/pending", self.pending, "SEs that wait for approval", {200: list[PendingView]}),
            Endpoint("POST", "/v1/ses/{se}/approve", self.approve, "Let an SE in", one, Approval, errors=no),
            Endpoint("POST", "/v1/ses/{se}/reject", self.reject, "Keep an SE out", one, Reasoned, errors=no),
            Endpoint("POST", "/v1/ses/{se}/revoke", self.revoke, "Revoke an SE", one, Reasoned, errors=no),
            Endpoint(
                "POST", "/v1/ses/{se}/reinstate", self.reinstate, "Undo revoke or reject", one, Reasoned, errors=no
            ),
            Endpoint("POST", "/v1/ses/{se}/delete", self.delete, "Delete an SE", one, Reasoned, errors=no),
            Endpoint("GET", "/v1/tokens", self.tokens, "All tokens", {200: list[TokenView]}),
            Endpoint("POST", "/v1/tokens", self.create, "Make a token", {201: TokenCreated}, TokenWish, errors=no),
            Endpoint(
                "POST", "/v1/tokens/{token}/revoke", self.revoke_token, "Revoke a token", {200: TokenView}, Reasoned,
                errors=no,
            ),
        ]  # fmt: skip

    # SEs.

    async def pending(self, _request: Request, _body: None) -> list[PendingView]:
        """SEs that wait for approval, oldest first."""
        waiting = [record for record in self._registry.ses() if record.status is SeStatus.PENDING]
        return [self._pending_view(record) for record in sorted(waiting, key=lambda record: record.enrolled_at)]

    def _pending_view(self, record: SeRecord) -> PendingView:
        key = self._registry.image_key(record.image_key_id)
        return PendingView(
            se_id=record.se_id,
            number=record.number,
            name=record.name,
            fingerprint=record.thumbprint,
            labels=record.labels,
            source=record.source,
            image_key_id=record.image_key_id,
            policy=key.policy if key else Policy.APPROVE,
            token_id=token_id(record.token) if record.token else "",
            asked_at=record.enrolled_at,
            lapses_at=self._admission.lapses_at(record),
            facts=record.facts,
            receipt_epoch=record.receipt_epoch,
            receipt_fault=record.receipt_fault,
        )

    async def _act(self, request: Request, doing: Act, reason: str) -> SeDetail:
        with _refused():
            found = self._registry.find(request.path_params["se"])
        return await self._do(found, doing, actor=request.state.actor, reason=reason)

    async def _do(self, found: SeRecord, doing: Act, *, actor: str, reason: str) -> SeDetail:
        with _refused(409):
            record, changed = await self._admission.act(found.se_id, doing, actor=actor, reason=reason)
        if changed:
            text = f"{record.name} (number {record.number}) is {record.status.value}"
            if record.status in {SeStatus.REVOKED, SeStatus.REJECTED, SeStatus.DELETED}:
                closed = self._fleet.close_se(record, f"{record.status.value} by an operator")
                text += f"; {closed} links closed"
            self._events.emit("enroll", _EVENTS[doing], record.se_id, text + (f": {reason}" if reason else ""))
            if doing is Act.APPROVE:
                self._on_granted()
        return self._fleet.detail(record)

    async def approve(self, request: Request, body: Approval) -> SeDetail:
        """Lets in an SE that waits for approval."""
        with _refused():
            found = self._registry.find(request.path_params["se"])
        if body.fingerprint and body.fingerprint != found.thumbprint:
            title = f"{found.name} has another key: its fingerprint is {found.thumbprint}"
            advice = "compare it with the one on the VM's console; if they differ, reject the SE"
            raise ProblemError(simple_problem(409, UsageError.code, title, advice=advice))
        return await self._do(found, Act.APPROVE, actor=request.state.actor, reason=body.reason)

    async def approve_record(self, record: SeRecord, actor: str, reason: str) -> SeDetail:
        """Lets in one of many."""
        return await self._do(record, Act.APPROVE, actor=actor, reason=reason)

    async def reject(self, request: Request, body: Reasoned) -> SeDetail:
        """Keeps out an SE that waits for approval; what its request took is free again."""
        return await self._act(request, Act.REJECT, body.reason)

    async def revoke(self, request: Request, body: Reasoned) -> SeDetail:
        """Revokes an SE: its links close at once and it gets no new ones."""
        return await self._act(request, Act.REVOKE, body.reason)

    async def reinstate(self, request: Request, body: Reasoned) -> SeDetail:
        """Undoes a revocation, a rejection or a quarantine."""
        return await self._act(request, Act.REINSTATE, body.reason)

    async def delete(self, request: Request, body: Reasoned) -> SeDetail:
        """Deletes an SE; a tombstone keeps its id, key and number from being used again."""
        return await self._act(request, Act.DELETE, body.reason)

    # Tokens.

    def _token_view(self, record: TokenRecord) -> TokenView:
        return TokenView(
            token_id=token_id(record.digest),
            status=self._tokens.status(record),
            image_key_id=record.image_key_id,
            rejoin=record.rejoin,
            instance_id=record.instance_id,
            created_at=record.created_at,
            expires_at=record.expires_at,
            taken_by=record.taken_by,
            taken_at=record.taken_at,
            note=record.note,
        )

    async def tokens(self, _request: Request, _body: None) -> list[TokenView]:
        """All tokens, oldest first."""
        return [self._token_view(record) for record in self._registry.tokens()]

    async def create(self, request: Request, wish: TokenWish) -> TokenCreated:
        """Makes a token; its text is in the answer and nowhere else."""
        with _refused():
            record, text = await self._tokens.create(
                image_key_id=wish.image_key_id,
                rejoin=self._registry.find(wish.rejoin) if wish.rejoin else None,
                instance_id=wish.instance_id,
                expires_in_s=wish.expires_in_s,
                note=wish.note,
                actor=request.state.actor,
            )
        return TokenCreated(token=text, view=self._token_view(record))

    async def revoke_token(self, request: Request, body: Reasoned) -> TokenView:
        """Revokes a token; an SE that came by it is left alone."""
        with _refused():
            found = self._tokens.find(request.path_params["token"])
            record = await self._tokens.revoke(found.digest, actor=request.state.actor, reason=body.reason)
        return self._token_view(record)
