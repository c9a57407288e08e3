"""The operator API's part about trust: changing root, host key and log-in key."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from appliance.controller.events import Events
from appliance.controller.registry import Registry
from appliance.controller.rotation import Kind, Rotation
from appliance.controller.web import Endpoint, ProblemError, Request, simple_problem
from appliance.errors import UsageError
from appliance.protocol.operator import Finish, Reasoned, RotationView


@contextlib.contextmanager
def refused() -> Iterator[None]:
    """Turns what can't be done now into an answer."""
    try:
        yield
    except UsageError as error:
        raise ProblemError(simple_problem(400, error.code, error.message, advice=error.hint)) from None


class TrustApi:
    """Answers operators. One loop only."""

    def __init__(self, rotation: Rotation, registry: Registry, events: Events) -> None:
        self._rotation = rotation
        self._registry = registry
        self._events = events

    def endpoints(self) -> list[Endpoint]:
        """The table of this part."""
        no = (400, 404)
        one = {200: RotationView}
        path = "/v1/rotations/{kind}"
        return [
            Endpoint("GET", "/v1/rotations", self.rotations, "Changes under way", {200: list[RotationView]}),
            Endpoint("POST", f"{path}/begin", self.begin, "Announce a successor", one, Reasoned, errors=no),
            Endpoint("POST", f"{path}/finish", self.finish, "Let the successor take over", one, Finish, errors=no),
            Endpoint("POST", f"{path}/abort", self.abort, "Take an announcement back", one, Reasoned, errors=no),
            Endpoint("POST", f"{path}/forget", self.forget, "Destroy the former root key", one, Reasoned, errors=no),
        ]

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
