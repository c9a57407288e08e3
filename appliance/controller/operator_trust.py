"""The operator API's part about trust: changing root, host key, log-in key and SE keys; ending a quarantine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import msgspec

from appliance.controller.events import Events
from appliance.controller.fleet import Fleet
from appliance.controller.records import SeRecord
from appliance.controller.rotation import Kind, Rotation
from appliance.controller.web import Endpoint, ProblemError, Request, simple_problem
from appliance.errors import NotFoundError, UsageError
from appliance.protocol.enroll import SeStatus
from appliance.protocol.operator import Finish, Reasoned, RotationView, SeDetail


@contextlib.contextmanager
def refused() -> Iterator[None]:
    """Turns what can't be done now into an answer."""
    try:
        yield
    except UsageError as error:
        raise ProblemError(simple_problem(400, error.code, error.message, advice=error.hint)) from None


class TrustApi:
    """Answers operators. One loop only."""

    def __init__(self, rotation: Rotation, fleet: Fleet, events: Events) -> None:
        self._rotation = rotation
        self._fleet = fleet
        self._registry = fleet.registry
        self._events = events

    def endpoints(self) -> list[Endpoint]:
        """The table of this part."""
        no = (400, 404)
        one = {200: RotationView}
        se = {200: SeDetail}
        path = "/v1/rotations/{kind}"
        return [
            Endpoint("GET", "/v1/rotations", self.rotations, "Changes under way", {200: list[RotationView]}),
            Endpoint("POST", f"{path}/begin", self.begin, "Announce a successor", one, Reasoned, errors=no),
            Endpoint("POST", f"{path}/finish", self.finish, "Let the successor take over", one, Finish, errors=no),
            Endpoint("POST", f"{path}/abort", self.abort, "Take an announcement back", one, Reasoned, errors=no),
            Endpoint("POST", "/v1/ses/{se}/release", self.release, "End a quarantine", se, Reasoned, errors=(400, 404)),
            Endpoint("POST", "/v1/ses/{se}/rotate-key", self.rotate_key, "New SE key", se, Reasoned, errors=no),
            Endpoint("POST", f"{path}/forget", self.forget, "Destroy the former root key", one, Reasoned, errors=no),
        ]

    def _se(self, request: Request) -> SeRecord:
        try:
            return self._registry.find(request.path_params["se"])
        except NotFoundError as error:
            raise ProblemError(simple_problem(404, error.code, error.message, advice=error.hint)) from None

    async def release(self, request: Request, body: Reasoned) -> SeDetail:
        """Ends a quarantine: whoever comes back first is the SE."""
        with refused():
            record = self._se(request)
        closed = await self._fleet.release(record, actor=request.state.actor, reason=body.reason)
        self._events.emit("tunnel", "se.released", record.se_id, f"{record.name} was released; {closed} links closed")
        return self._fleet.detail(self._registry.se(record.se_id) or record)

    async def rotate_key(self, request: Request, body: Reasoned) -> SeDetail:
        """Asks an SE for a new key of its own; it sends one with its next heartbeat, or when it is back."""

        def due(record: SeRecord) -> SeRecord:
            if record.status is not SeStatus.ENROLLED:
                raise UsageError(
                    f"{record.name} is {record.status.value}", hint="only an enrolled SE has a key to change"
                )
            return msgspec.structs.replace(record, key_due=True)

        with refused():
            found = self._se(request)
            record = await self._registry.change_se(
                found.se_id, due, actor=request.state.actor, action="se.key-due", detail=body.reason
            )
        return self._fleet.detail(record)

    def _kind(self, request: Request) -> Kind:
        try:
            return Kind(request.path_params["kind"])
        except ValueError:
            known = ", ".join(kind.value for kind in Kind)
            problem = simple_problem(404, "NOTFOUND-001", "There is no such thing to change", advice=f"one of {known}")
            raise ProblemError(problem) from None

    async def _done(self, request: Request, kind: Kind, verb: str, reason: str) -> RotationView:
        view = self._rotation.view(kind)
        detail = f"trust document version {self._rotation.version}" + (f": {reason}" if reason else "")
        await self._registry.note(
            actor=request.state.actor, action=f"trust.{kind.value}.{verb}", subject=kind.value, detail=detail
        )
        self._events.emit("tunnel", f"trust.{kind.value}", kind.value, f"change of the {kind.value}: {verb}, {detail}")
        return view

    async def rotations(self, _request: Request, _body: None) -> list[RotationView]:
        """All kinds."""
        return [self._rotation.view(kind) for kind in Kind]

    async def begin(self, request: Request, body: Reasoned) -> RotationView:
        """Makes the successor and announces it."""
        kind = self._kind(request)
        with refused():
            self._rotation.begin(kind)
        return await self._done(request, kind, "begin", body.reason)

    async def finish(self, request: Request, body: Finish) -> RotationView:
        """Lets the successor take over."""
        kind = self._kind(request)
        with refused():
            self._rotation.finish(kind, force=body.force)
        return await self._done(request, kind, "finish", body.reason)

    async def abort(self, request: Request, body: Reasoned) -> RotationView:
        """Takes an announcement back."""
        kind = self._kind(request)
        with refused():
            self._rotation.abort(kind)
        return await self._done(request, kind, "abort", body.reason)

    async def forget(self, request: Request, body: Reasoned) -> RotationView:
        """Destroys the former root's key."""
        kind = self._kind(request)
        self._rotation.forget()
        return await self._done(request, kind, "forget", body.reason)
