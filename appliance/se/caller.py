"""Who dials, and the ports of what a link needs of this SE; `se.daemon` fills them, `se.tunnel` uses them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

from appliance.pki.identity import Identity
from appliance.protocol import tunnel as said
from appliance.protocol.enroll import Grant, InstanceFacts
from appliance.protocol.trust import Envelope
from appliance.protocol.why import Step, StepResult
from appliance.runtime.clock import Clock
from appliance.se.believed import Beliefs
from appliance.settings import Se


class Tickets(Protocol):
    """Where link tickets survive."""

    def ticket(self, node: int) -> str:
        """The last one of `node`, or ""."""
        ...

    def save_ticket(self, node: int, ticket: str) -> None:
        """Stores it durably."""
        ...


class KeyBook(Protocol):
    """Where this SE's keys survive."""

    def next_identity(self) -> Identity:
        """The key that is to take the place of this SE's, stored durably."""
        ...

    def promote_key(self, receipt: Envelope | None = None) -> None:
        """The next key is the key from now on, and `receipt` is for it."""
        ...

    @property
    def identity(self) -> Identity:
        """The key that counts."""
        ...

    def key_refused(self) -> None:
        """The key was refused; where there are two, the other one is next."""
        ...


class ReceiptBook(Protocol):
    """This SE's receipt (`se.receipt`)."""

    @property
    def is_due(self) -> bool:
        """Whether a new one is to be asked for."""
        ...

    def checked(self, envelope: Envelope | None, thumbprint: str) -> Envelope | None:
        """A receipt, where it holds and is for that key."""
        ...

    def keep(self, envelope: Envelope | None) -> None:
        """Stores one durably, where it holds."""
        ...


class AuditWitness(Protocol):
    """Where signed audit heads survive."""

    def heads(self, node: int) -> list[Envelope]:
        """Those of a node."""
        ...

    def keep(self, envelope: Envelope) -> None:
        """Keeps one where it holds and is the newest."""
        ...


class TelemetrySource(Protocol):
    """What waits to be sent."""

    def pending(self) -> tuple[list[str], int]:
        """Encoded samples, oldest first, and the id to hand to `delivered`."""
        ...

    def delivered(self, last_id: int) -> None:
        """They are answered."""
        ...


class SpoolFigures(Protocol):
    """How full the spool is."""

    @property
    def size_bytes(self) -> int:
        """Bytes that wait."""
        ...

    @property
    def dropped(self) -> int:
        """Samples that fell out."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Caller:
    """Who dials, and what a link of it needs: the same for all links of this SE."""

    user: str
    identity: Identity
    """The key to log in with."""
    is_next_key: bool
    """Whether that is the key which is to take the place of this SE's."""
    keys: KeyBook
    grant: Grant
    receipts: ReceiptBook
    tickets: Tickets
    beliefs: Beliefs
    witness: AuditWitness
    facts: Callable[[], InstanceFacts]
    host_keys: Callable[[], list[str]]
    spent: Callable[[], said.ImageKeyCopies]
    """Called when the controller says that the image key is spent; returns what became of its copies."""
    telemetry: TelemetrySource
    spool: SpoolFigures
    tell: Callable[[Step, StepResult, str, str, str], None]
    """Takes a step of the causal chain: step, result, text, code, hint."""
    settings: Se
    clock: Clock
