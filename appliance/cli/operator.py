"""Client of the operator API: HTTP/1.1 over the controller's unix socket, in the shapes of `protocol.operator`.

Every request has one deadline over all of it. What can go wrong ends here as an error of our tree that says what to
do: no daemon, no permission, no answer in time, a refusal (a problem document becomes the error class its code
belongs to, with its advice as hint), an answer of another version.
"""

from __future__ import annotations

import grp
import http.client
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Literal, TypeVar
from urllib.parse import quote, urlencode

import msgspec

from appliance.cli import this_machine
from appliance.errors import ApplianceError, NotFoundError, UnreachableError, UsageError
from appliance.paths import Paths
from appliance.protocol import strict_json
from appliance.protocol.fleet import SeSummary
from appliance.protocol.image import ImageReport
from appliance.protocol.operator import (
    Approval,
    AuditEntry,
    AuditVerdict,
    ControllerView,
    Drained,
    Event,
    Forced,
    ImageDetail,
    ImageKeyCreated,
    ImageKeyRevoked,
    ImageKeyTermsWish,
    ImageKeyView,
    ImageList,
    ImageRevocation,
    ImageRevoked,
    ImageView,
    IssuingRenewal,
    NewPassphrase,
    PendingView,
    Reasoned,
    ReceiptsApproved,
    RecoveryView,
    RotationView,
    SeDetail,
    StatusView,
    TokenCreated,
    TokenView,
    TokenWish,
    Unlocking,
)
from appliance.protocol.problem import Problem
from appliance.protocol.telemetry import Sample
from appliance.protocol.trust import Envelope
from appliance.protocol.why import Chain

T = TypeVar("T")

NO_ANSWER = "REACH-004"
"""Code: it runs, and doesn't answer in time."""
DEADLINE_S = 15.0
PATIENCE_S = 2.0
"""After so long whoever waits is told for what."""
MAX_ANSWER_BYTES = 64 * 1024 * 1024
"""20,000 SEs are 15 MB."""

_MAX_SOCKET_PATH = 107
"""sun_path of unix(7) less its closing NUL."""


class Operator:
    """The controller on this machine, as its operator sees it.

    All methods raise `UnreachableError` where no controller answers, `NotFoundError` and `UsageError` for a subject it
    doesn't know or can't tell apart, and other errors of the tree for other refusals.

    Args:
        paths: of the instance.
        deadline_s: of most requests.
        say: is told a sentence where an answer takes longer than `PATIENCE_S`.
    """

    def __init__(
        self, paths: Paths, *, deadline_s: float = DEADLINE_S, say: Callable[[str], None] | None = None
    ) -> None:
        self._paths = paths
        self._path = paths.controller_socket
        self._deadline_s = deadline_s
        self._say = say

    def controller(self) -> ControllerView:
        """This controller."""
        return self._get("/v1/controller", ControllerView)

    def status(self) -> StatusView:
        """The fleet in one look."""
        return self._get("/v1/status", StatusView)

    def ses(self) -> list[SeSummary]:
        """All SEs."""
        return self._get("/v1/ses", list[SeSummary])

    def se(self, subject: str) -> SeDetail:
        """One SE by number, name, se_id or address."""
        return self._get(f"/v1/ses/{_part(subject)}", SeDetail)

    def revoke_se(self, subject: str, *, reason: str) -> SeDetail:
        """Closes the SE's links and admits no new one."""
        return self._post(f"/v1/ses/{_part(subject)}/revoke", SeDetail, Reasoned(reason=reason))

    def pending(self) -> list[PendingView]:
        """SEs that wait for approval, oldest first."""
        return self._get("/v1/pending", list[PendingView])

    def approve_se(self, subject: str, *, fingerprint: str = "", reason: str = "") -> SeDetail:
        """Lets an SE in; with a `fingerprint` only where its key has that one."""
        wish = Approval(fingerprint=fingerprint, reason=reason)
        return self._post(f"/v1/ses/{_part(subject)}/approve", SeDetail, wish)

    def reject_se(self, subject: str, *, reason: str) -> SeDetail:
        """Keeps out an SE that waits for approval."""
        return self._post(f"/v1/ses/{_part(subject)}/reject", SeDetail, Reasoned(reason=reason))

    def reinstate_se(self, subject: str, *, reason: str) -> SeDetail:
        """Undoes a revocation, rejection or quarantine."""
        return self._post(f"/v1/ses/{_part(subject)}/reinstate", SeDetail, Reasoned(reason=reason))

    def delete_se(self, subject: str, *, reason: str) -> SeDetail:
        """Revokes the SE for good; a tombstone stays."""
        return self._post(f"/v1/ses/{_part(subject)}/delete", SeDetail, Reasoned(reason=reason))

    def telemetry(self, subject: str, *, since: float = 0.0) -> list[Sample]:
        """An SE's recent history, oldest first. `since` is seconds since 1970."""
        return self._get(f"/v1/ses/{_part(subject)}/telemetry", list[Sample], since=since)

    def why(self, subject: str) -> Chain:
        """The causal chain of an SE, source address or attempt id."""
        return self._get(f"/v1/why/{_part(subject)}", Chain)

    def image_keys(self) -> list[ImageKeyView]:
        """All image keys."""
        return self._get("/v1/image-keys", list[ImageKeyView])

    def create_image_key(self, wish: ImageKeyTermsWish) -> ImageKeyCreated:
        """A new image key; the answer is the one time that its private half is seen."""
        return self._post("/v1/image-keys", ImageKeyCreated, wish)

    def revoke_image_key(self, image_key_id: str, *, reason: str) -> ImageKeyRevoked:
        """Nobody new comes in by this key; tells who did."""
        return self._post(f"/v1/image-keys/{_part(image_key_id)}/revoke", ImageKeyRevoked, Reasoned(reason=reason))

    def images(self) -> ImageList:
        """The ledger of images, and what SEs name beside it."""
        return self._get("/v1/images", ImageList)

    def image(self, subject: str) -> ImageDetail:
        """One image by id, name or the SHA-256 of one of its files, with the SEs that name it."""
        return self._get(f"/v1/images/{_part(subject)}", ImageDetail)

    def add_image(self, report: ImageReport) -> ImageView:
        """Takes an image into the ledger."""
        return self._post("/v1/images", ImageView, report)

    def revoke_image(self, subject: str, *, key: Literal["ask", "revoke", "keep"], reason: str) -> ImageRevoked:
        """Nobody new comes in by this image; tells who did."""
        wish = ImageRevocation(reason=reason, key=key)
        return self._post(f"/v1/images/{_part(subject)}/revoke", ImageRevoked, wish)

    def tokens(self) -> list[TokenView]:
        """All tokens, oldest first."""
        return self._get("/v1/tokens", list[TokenView])

    def create_token(self, wish: TokenWish) -> TokenCreated:
        """A new token; the answer is the one time that it is seen."""
        return self._post("/v1/tokens", TokenCreated, wish)

    def revoke_token(self, token_id: str, *, reason: str) -> TokenView:
        """Nobody comes in by this token any more."""
        return self._post(f"/v1/tokens/{_part(token_id)}/revoke", TokenView, Reasoned(reason=reason))

    def events(self, *, after: int = 0, wait_s: float = 0.0) -> list[Event]:
        """Events with an id above `after`; held open up to `wait_s` seconds where there is none yet."""
        return self._get("/v1/events", list[Event], after=after, wait_s=wait_s)

    def audit(self, *, after: int = 0, limit: int = 1000) -> list[AuditEntry]:
        """At most `limit` audit entries with a sequence above `after`, oldest first."""
        return self._get("/v1/audit", list[AuditEntry], after=after, limit=limit)

    def verify_audit(self) -> AuditVerdict:
        """What the controller finds when it checks its own chain; reads all of it, so it may take a minute."""
        return self._ask("GET", "/v1/audit/verify", AuditVerdict, deadline_s=max(self._deadline_s, 120.0))

    def release(self, subject: str, *, reason: str) -> SeDetail:
        """Ends a quarantine: whoever comes back first is the SE."""
        return self._post(f"/v1/ses/{_part(subject)}/release", SeDetail, Reasoned(reason=reason))

    def rotate_se_key(self, subject: str, *, reason: str) -> SeDetail:
        """Asks an SE for a new key."""
        return self._post(f"/v1/ses/{_part(subject)}/rotate-key", SeDetail, Reasoned(reason=reason))

    def sign_audit_head(self) -> Envelope:
        """The newest audit entry, signed now; SEs get it with their next heartbeat."""
        return self._post("/v1/audit/head", Envelope, None)

    def recovery(self) -> RecoveryView:
        """What a restore left to do."""
        return self._get("/v1/recovery", RecoveryView)

    def set_recovery(self, verb: str, *, reason: str) -> RecoveryView:
        """Begins or ends RECOVERY."""
        return self._post(f"/v1/recovery/{_part(verb)}", RecoveryView, Reasoned(reason=reason))

    def approve_receipts(self, *, reason: str) -> ReceiptsApproved:
        """Lets in all SEs whose receipts hold; thousands take their time."""
        body = msgspec.json.encode(Reasoned(reason=reason))
        deadline_s = max(self._deadline_s, 600.0)
        return self._ask("POST", "/v1/recovery/approve", ReceiptsApproved, deadline_s=deadline_s, body=body)

    def rotations(self) -> list[RotationView]:
        """Changes of root, host key and log-in key."""
        return self._get("/v1/rotations", list[RotationView])

    def rotate(
        self, kind: str, verb: str, *, force: bool = False, reason: str = "", passphrase: str = ""
    ) -> RotationView:
        """Begins, finishes or aborts a change, or forgets the former root; `passphrase` is that of the root key."""
        body: object = Unlocking(passphrase=passphrase, reason=reason)
        if verb == "finish":
            body = Forced(force=force, passphrase=passphrase, reason=reason)
        elif verb == "forget":
            body = Reasoned(reason=reason)
        return self._unlocking(f"/v1/rotations/{_part(kind)}/{verb}", RotationView, body)

    def set_passphrase(self, new: str, *, reason: str) -> ControllerView:
        """Puts the root key under a passphrase."""
        return self._unlocking("/v1/passphrase/set", ControllerView, NewPassphrase(new=new, reason=reason))

    def change_passphrase(self, old: str, new: str, *, reason: str) -> ControllerView:
        """Puts the root key under another passphrase."""
        wish = NewPassphrase(passphrase=old, new=new, reason=reason)
        return self._unlocking("/v1/passphrase/change", ControllerView, wish)

    def remove_passphrase(self, passphrase: str, *, reason: str, force: bool = True) -> ControllerView:
        """Leaves the root key without a passphrase; refused without `force`."""
        wish = Forced(passphrase=passphrase, force=force, reason=reason)
        return self._unlocking("/v1/passphrase/remove", ControllerView, wish)

    def renew_issuing(self, passphrase: str, *, revoke: bool = False, reason: str) -> ControllerView:
        """Replaces the issuing CA."""
        wish = IssuingRenewal(passphrase=passphrase, revoke=revoke, reason=reason)
        return self._unlocking("/v1/issuing-ca/renew", ControllerView, wish)

    def _unlocking(self, path: str, kind: type[T], body: object) -> T:
        """What derives keys of a passphrase may take seconds on a busy machine."""
        deadline_s = max(self._deadline_s, 60.0)
        return self._ask("POST", path, kind, deadline_s=deadline_s, body=msgspec.json.encode(body))

    def drain(self) -> Drained:
        """Stops admitting links and enrollments."""
        return self._post("/v1/drain", Drained, None)

    def _get(self, path: str, kind: type[T], **query: float) -> T:
        target = f"{path}?{urlencode(query)}" if query else path
        wait_s = query.get("wait_s", 0.0)
        return self._ask("GET", target, kind, deadline_s=self._deadline_s + wait_s, patience_s=PATIENCE_S + wait_s)

    def _post(self, path: str, kind: type[T], body: object) -> T:
        raw = b"" if body is None else msgspec.json.encode(body)
        return self._ask("POST", path, kind, deadline_s=self._deadline_s, body=raw)

    def _ask(
        self,
        method: str,
        target: str,
        kind: type[T],
        *,
        deadline_s: float,
        patience_s: float | None = None,
        body: bytes | None = None,
    ) -> T:
        with self._patient(PATIENCE_S if patience_s is None else patience_s, deadline_s):
            status, raw = self._exchange(method, target, deadline_s=deadline_s, body=body)
        if not 200 <= status < 300:
            raise _refusal(status, raw)
        try:
            return msgspec.json.decode(raw, type=kind)
        except strict_json.UNDECODABLE as error:
            raise ApplianceError(
                f"the controller's answer to {method} {target} is of another shape: {error}",
                hint="the daemon runs another version than this command; restart it after an upgrade",
                code="REACH-002",
            ) from None

    def _exchange(self, method: str, target: str, *, deadline_s: float, body: bytes | None) -> tuple[int, bytes]:
        until = time.monotonic() + deadline_s
        with self._explained(deadline_s), _connected(self._path, deadline_s) as connection:
            headers = {"Content-Type": "application/json"} if body else {}
            connection.request(method, target, body=body, headers=headers)
            response = connection.getresponse()
            raw = bytearray()
            while chunk := response.read1(1 << 16):
                raw += chunk
                if len(raw) > MAX_ANSWER_BYTES:
                    raise http.client.HTTPException(f"an answer of more than {MAX_ANSWER_BYTES} bytes")
                if time.monotonic() > until:
                    raise TimeoutError
            if response.length:
                raise http.client.IncompleteRead(bytes(raw), response.length)
            return response.status, bytes(raw)

    @contextmanager
    def _patient(self, patience_s: float, deadline_s: float) -> Iterator[None]:
        """Says for what somebody waits, once it takes long."""
        if self._say is None:
            yield
            return
        say = self._say

        def tell() -> None:
            say(f"waiting for the controller, at most {deadline_s:g} s{this_machine.why_slow(self._paths)}")

        timer = threading.Timer(patience_s, tell)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    @contextmanager
    def _explained(self, deadline_s: float) -> Iterator[None]:
        """Turns what the socket says into an error that says what to do."""
        try:
            yield
        except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
            if this_machine.is_se(self._paths):
                raise UnreachableError(
                    "this machine is an SE, and what was asked for only a controller knows",
                    hint="ask there; `appliance why` and `appliance status` tell this SE's own half",
                    code="REACH-007",
                    retryable=False,
                ) from None
            raise UnreachableError(
                f"no controller runs here: nobody listens at {self._path}", hint=this_machine.how_to_start(self._paths)
            ) from None
        except PermissionError:
            raise UnreachableError(
                f"{self._path} may not be opened by this user",
                hint=f"be root, or join its group: `sudo usermod -aG {_group(self._path)} $USER` and log in again",
                code="REACH-003",
                retryable=False,
            ) from None
        except TimeoutError:
            raise UnreachableError(
                f"the controller did not answer within {deadline_s:g} s{this_machine.why_slow(self._paths)}",
                hint=f"`appliance doctor` and {this_machine.log_of(self._paths)} show what it is busy with",
                code=NO_ANSWER,
            ) from None
        except (OSError, http.client.HTTPException) as error:
            raise UnreachableError(
                f"the controller broke the connection off: {str(error) or type(error).__name__}",
                hint=f"it was stopped or has failed; see {this_machine.log_of(self._paths)}",
                code="REACH-005",
            ) from None


def _part(text: str) -> str:
    """One path segment; a subject is somebody's word and may hold anything."""
    if text in {"", ".", ".."}:
        raise UsageError(f"{text!r} names nothing", hint="give a number, name, se_id, address or attempt id")
    return quote(text, safe="")


def _group(path: Path) -> str:
    try:
        return grp.getgrgid(path.stat().st_gid).gr_name
    except (OSError, KeyError):
        return "appliance"


@contextmanager
def _connected(path: Path, timeout_s: float) -> Iterator[http.client.HTTPConnection]:
    """An HTTP connection over the unix socket at `path`. Raises `OSError`."""
    connection = http.client.HTTPConnection("controller", timeout=timeout_s)
    directory = -1
    try:
        name = str(path)
        if len(os.fsencode(name)) > _MAX_SOCKET_PATH:  # an instance with a deep root
            directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            name = f"/proc/self/fd/{directory}/{path.name}"
        connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.sock.settimeout(timeout_s)
        connection.sock.connect(name)
        yield connection
    finally:
        connection.close()
        if directory >= 0:
            os.close(directory)


def _classes(root: type[ApplianceError]) -> Iterator[type[ApplianceError]]:
    yield root
    for child in root.__subclasses__():
        yield from _classes(child)


def _refusal(status: int, raw: bytes) -> ApplianceError:
    """Returns the error for an answer that isn't a success: its class by code, by the code's prefix, or by status."""
    try:
        problem = msgspec.json.decode(raw, type=Problem)
    except strict_json.UNDECODABLE:
        problem = Problem(type="", title=f"the controller answered {status}", status=status, code=f"HTTP-{status}")
    prefix = problem.code.partition("-")[0] + "-"
    found: type[ApplianceError] = ApplianceError
    if status == HTTPStatus.NOT_FOUND:
        found = NotFoundError
    elif status in {HTTPStatus.BAD_REQUEST, HTTPStatus.CONFLICT}:
        found = UsageError
    for kind in reversed(list(_classes(ApplianceError))):
        if kind.code == problem.code:
            found = kind
            break
        if kind.code.startswith(prefix):
            found = kind
    message = f"{problem.title}: {problem.detail}" if problem.detail else problem.title
    retryable = problem.retry_after_s > 0 or status == HTTPStatus.SERVICE_UNAVAILABLE
    return found(message, hint=problem.advice, code=problem.code, retryable=retryable)


__all__ = ["DEADLINE_S", "Operator"]
