"""The operator API's part about trust: changing root, host key, log-in key, passphrase, issuing CA and SE keys;
ending a quarantine.

A passphrase comes in the body of the request that needs it, over a unix socket whose peer the kernel names, and is
forgotten with it. A wrong one is audited.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncIterator, Callable, Iterator

import msgspec

from appliance.controller.audit import Note
from appliance.controller.events import Events
from appliance.controller.fleet import Fleet
from appliance.controller.intents import Intents
from appliance.controller.records import SeRecord
from appliance.controller.rotation import Kind, NextRoot, Rotation, make_root
from appliance.controller.vault import Prepare, Vault
from appliance.controller.web import Endpoint, ProblemError, Request, simple_problem
from appliance.errors import NotFoundError, PassphraseError, TooSoonError, UsageError, WrongPassphraseError
from appliance.pki.secret import Secret
from appliance.protocol.enroll import SeStatus
from appliance.protocol.operator import (
    ControllerView,
    Forced,
    IssuingRenewal,
    NewPassphrase,
    Reasoned,
    RotationView,
    SeDetail,
    Unlocking,
)


@contextlib.contextmanager
def refused() -> Iterator[None]:
    """Turns what can't be done now into an answer."""
    try:
        yield
    except UsageError as error:
        raise ProblemError(simple_problem(400, error.code, error.message, advice=error.hint)) from None


def _secret(text: str) -> Secret | None:
    return Secret(text.encode()) if text else None


def _needed(text: str) -> Secret:
    if not text:
        raise PassphraseError(
            "the root key's passphrase is needed", hint="pass --passphrase-file FILE, or type it when asked"
        )
    return Secret(text.encode())


class TrustApi:
    """Answers operators. One loop only."""

    def __init__(
        self,
        rotation: Rotation,
        vault: Vault,
        fleet: Fleet,
        events: Events,
        *,
        intents: Intents,
        view: Callable[[], ControllerView],
        wall: Callable[[], float],
    ) -> None:
        self._rotation = rotation
        self._vault = vault
        self._intents = intents
        self._view = view
        self._wall = wall
        self._fleet = fleet
        self._registry = fleet.registry
        self._events = events

    def endpoints(self) -> list[Endpoint]:
        """The table of this part."""
        no = (400, 404)
        locked = (400, 403, 404, 429)
        one = {200: RotationView}
        controller = {200: ControllerView}
        se = {200: SeDetail}
        path = "/v1/rotations/{kind}"
        return [
            Endpoint("GET", "/v1/rotations", self.rotations, "Changes under way", {200: list[RotationView]}),
            Endpoint("POST", f"{path}/begin", self.begin, "Announce a successor", one, Unlocking, errors=locked),
            Endpoint("POST", f"{path}/finish", self.finish, "Let the successor take over", one, Forced, errors=locked),
            Endpoint("POST", f"{path}/abort", self.abort, "Take an announcement back", one, Unlocking, errors=locked),
            Endpoint(
                "POST", "/v1/passphrase/set", self.set_passphrase, "Put the root key under a passphrase", controller,
                NewPassphrase, errors=locked,
            ),
            Endpoint(
                "POST", "/v1/passphrase/change", self.change_passphrase, "Change the root key's passphrase",
                controller, NewPassphrase, errors=locked,
            ),
            Endpoint(
                "POST", "/v1/passphrase/remove", self.remove_passphrase, "Leave the root key without a passphrase",
                controller, Forced, errors=locked,
            ),
            Endpoint(
                "POST", "/v1/issuing-ca/renew", self.renew_issuing, "Replace the issuing CA", controller,
                IssuingRenewal, errors=locked,
            ),
            Endpoint("POST", "/v1/ses/{se}/release", self.release, "End a quarantine", se, Reasoned, errors=(400, 404)),
            Endpoint("POST", "/v1/ses/{se}/rotate-key", self.rotate_key, "New SE key", se, Reasoned, errors=no),
            Endpoint("POST", f"{path}/forget", self.forget, "Destroy the former root key", one, Reasoned, errors=no),
        ]  # fmt: skip

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

    @contextlib.asynccontextmanager
    async def _rotating(self, request: Request, kind: Kind, verb: str, reason: str) -> AsyncIterator[None]:
        """Has a change carried out within it: audited, then told."""

        def detail() -> str:
            return f"trust document version {self._rotation.version}" + (f": {reason}" if reason else "")

        wish = Note(request.state.actor, f"trust.{kind.value}.{verb}", kind.value, reason)
        async with self._intents.audited(wish, detail):
            yield
        text = f"change of the {kind.value}: {verb}, {detail()}"
        self._events.emit("tunnel", f"trust.{kind.value}", kind.value, text)

    async def rotations(self, _request: Request, _body: None) -> list[RotationView]:
        """All kinds."""
        return [self._rotation.view(kind) for kind in Kind]

    @contextlib.asynccontextmanager
    async def _unlocked(
        self, request: Request, body: Unlocking, prepare: Prepare | None = None
    ) -> AsyncIterator[NextRoot | None]:
        """Has the root open within it; no `await` within. As `Vault.opened`."""
        async with self._refused(request), self._vault.opened(_secret(body.passphrase), prepare) as made:
            yield made

    @contextlib.asynccontextmanager
    async def _refused(self, request: Request) -> AsyncIterator[None]:
        """Turns what can't be done now into an answer, and writes wrong passphrases into the audit."""
        try:
            with refused():
                yield
        except TooSoonError as error:
            wait_s = max(1, math.ceil(self._vault.wait_s))
            problem = simple_problem(429, error.code, error.message, advice=error.hint)
            raise ProblemError(msgspec.structs.replace(problem, retry_after_s=wait_s)) from None
        except WrongPassphraseError as error:
            await self._registry.note(
                actor=request.state.actor, action="passphrase.wrong", subject="root CA", detail=""
            )
            self._events.emit("tunnel", "passphrase.wrong", "root CA", f"a wrong passphrase from {request.state.actor}")
            raise ProblemError(simple_problem(403, error.code, error.message, advice=error.hint)) from None
        except PassphraseError as error:
            raise ProblemError(simple_problem(403, error.code, error.message, advice=error.hint)) from None

    async def begin(self, request: Request, body: Unlocking) -> RotationView:
        """Makes the successor and announces it."""
        kind = self._kind(request)
        cluster_id, now = self._view().cluster_id, int(self._wall())

        def next_root(passphrase: Secret | None) -> NextRoot:
            return make_root(cluster_id, now=now, passphrase=passphrase)

        async with (
            self._rotating(request, kind, "begin", body.reason),
            self._unlocked(request, body, next_root if kind is Kind.CA else None) as root,
        ):
            return self._rotation.begin(kind, root)

    async def finish(self, request: Request, body: Forced) -> RotationView:
        """Lets the successor take over."""
        kind = self._kind(request)
        async with self._rotating(request, kind, "finish", body.reason), self._unlocked(request, body):
            return self._rotation.finish(kind, force=body.force)

    async def abort(self, request: Request, body: Unlocking) -> RotationView:
        """Takes an announcement back."""
        kind = self._kind(request)
        async with self._rotating(request, kind, "abort", body.reason), self._unlocked(request, body):
            return self._rotation.abort(kind)

    @contextlib.asynccontextmanager
    async def _changing(self, request: Request, action: str, reason: str) -> AsyncIterator[None]:
        """Has an act of the vault carried out within it: audited, then told; refusals are answers."""

        def detail() -> str:
            fingerprint = self._view().issuing_fingerprint or "none"
            return f"issuing CA {fingerprint}" + (f": {reason}" if reason else "")

        wish = Note(request.state.actor, action, "root CA", reason)
        async with self._intents.audited(wish, detail), self._refused(request):
            yield
        self._events.emit("tunnel", action, "root CA", f"{action}, {detail()}")

    async def set_passphrase(self, request: Request, body: NewPassphrase) -> ControllerView:
        """Puts the root key under a passphrase."""
        async with self._changing(request, "passphrase.set", body.reason):
            await self._vault.set(_needed(body.new))
        return self._view()

    async def change_passphrase(self, request: Request, body: NewPassphrase) -> ControllerView:
        """Changes the passphrase."""
        async with self._changing(request, "passphrase.changed", body.reason):
            await self._vault.change(_needed(body.passphrase), _needed(body.new))
        return self._view()

    async def remove_passphrase(self, request: Request, body: Forced) -> ControllerView:
        """Leaves the root key without one."""
        async with self._changing(request, "passphrase.removed", body.reason):
            if not body.force:
                raise UsageError(
                    "without a passphrase, whoever reads this disk has the root key",
                    hint="pass --force if that is meant",
                )
            await self._vault.remove(_needed(body.passphrase))
        return self._view()

    async def renew_issuing(self, request: Request, body: IssuingRenewal) -> ControllerView:
        """Replaces the issuing CA."""
        action = f"issuing-ca.{'revoked' if body.revoke else 'renewed'}"
        async with self._changing(request, action, body.reason):
            await self._vault.renew_issuing(_needed(body.passphrase), revoke=body.revoke)
        return self._view()

    async def forget(self, request: Request, body: Reasoned) -> RotationView:
        """Destroys the former root's key."""
        kind = self._kind(request)
        async with self._rotating(request, kind, "forget", body.reason), self._vault.turn():
            self._rotation.forget()
        return self._rotation.view(kind)
