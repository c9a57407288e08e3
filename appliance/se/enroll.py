"""Stage enroll on the SE: what follows on what. Pure: no socket, no file, no clock; `se.first_boot` drives it.

    phase      does                                     then
    SEED       finds and verifies the seed              IDENTITY
    IDENTITY   image key and identity are on disk       NONCE
    NONCE      TLS to the next address, nonce           ENROLL, REJOIN or REFRESH, whichever is due
    ENROLL     JWS by image key and SE key              STORE; 202: NONCE with REFRESH due, later
    REJOIN     JWS by the SE key and a rejoin token     STORE
    REFRESH    JWS by the SE key alone                  STORE; 202: as for ENROLL
    STORE      the grant is on disk                     DONE

What a refusal leads to:

    nonce stale or used   the same request at once with the fresh nonce, three times; after that as any other
    SPENT                 the image key is used up for this SE: REFRESH at once
    a token               that is missing or isn't good: from SEED, since there may be another one by then
    SE_UNKNOWN            to a refresh: ENROLL where an image key is there (a controller restored from an old backup)
    any other             the same again after Retry-After and the back-off; never given up, nothing is ever deleted

A failure (unreachable, garbage, not ours, disk full) repeats its phase; what failed with an address goes on with the
next one from NONCE.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

from appliance.errors import StateMachineError
from appliance.protocol.enroll import Refusals

MAX_FRESH_NONCES = 3
"""Times that a fresh nonce is used at once: a controller that calls each one stale isn't asked in a tight loop."""


class Phase(enum.StrEnum):
    """What is to be done next."""

    SEED = "seed"
    IDENTITY = "identity"
    NONCE = "nonce"
    ENROLL = "enroll"
    REJOIN = "rejoin"
    REFRESH = "refresh"
    STORE = "store"
    DONE = "done"


class Done(NamedTuple):
    """The phase did what it is for. `nonce` counts where it was NONCE, the other two where it was IDENTITY."""

    nonce: str = ""
    has_image_key: bool = True
    rejoins: bool = False
    """Whether a rejoin token is there."""


class Awaiting(NamedTuple):
    """202: an operator must approve."""

    retry_after_s: float


class Refused(NamedTuple):
    """The controller said no."""

    code: str
    retry_after_s: float = 0.0
    nonce: str = ""


class Failed(NamedTuple):
    """It could not be done, and may be done by trying again."""


Event = Done | Awaiting | Refused | Failed


class Progress(NamedTuple):
    """Where an SE is on its way."""

    phase: Phase
    due: Phase = Phase.ENROLL
    """ENROLL, REJOIN or REFRESH: what follows on NONCE."""
    can_enroll: bool = True
    """Whether there is an image key to sign with."""
    nonce: str = ""
    fresh_nonces: int = 0
    """Fresh nonces used at once in a row."""
    wait_s: float | None = 0.0
    """Before the phase is begun: at least so long and the back-off; 0 at once; None the back-off alone."""


def first_boot() -> Progress:
    """Where an SE without a grant starts."""
    return Progress(Phase.SEED)


def refresh(*, can_enroll: bool) -> Progress:
    """Where an enrolled SE starts that asks for its grant again."""
    return Progress(Phase.NONCE, due=Phase.REFRESH, can_enroll=can_enroll)


_AFTER_DONE = {
    Phase.SEED: Phase.IDENTITY,
    Phase.ENROLL: Phase.STORE,
    Phase.REJOIN: Phase.STORE,
    Phase.REFRESH: Phase.STORE,
    Phase.STORE: Phase.DONE,
}
_LOCAL = {Phase.SEED, Phase.IDENTITY, Phase.STORE}
_ASKING = {Phase.ENROLL, Phase.REJOIN, Phase.REFRESH}
_BY_TOKEN = {
    refusal.value.code
    for refusal in (
        Refusals.TOKEN_MISSING,
        Refusals.TOKEN_UNKNOWN,
        Refusals.TOKEN_USED,
        Refusals.TOKEN_EXPIRED,
        Refusals.TOKEN_REVOKED,
        Refusals.TOKEN_BOUND,
    )
}
_STALE = {Refusals.NONCE_STALE.value.code, Refusals.NONCE_USED.value.code}


def advance(progress: Progress, event: Event) -> Progress:
    """Returns what is to be done after `event` happened in `progress.phase`.

    Raises:
        StateMachineError: an event that the phase can't have.
    """
    phase = progress.phase
    if phase is Phase.DONE:
        raise StateMachineError(f"enroll: {event!r} after the end")
    match event:
        case Done() if phase is Phase.NONCE:
            return progress._replace(phase=progress.due, nonce=event.nonce, fresh_nonces=0, wait_s=0.0)
        case Done() if phase is Phase.IDENTITY:
            due = Phase.ENROLL if event.has_image_key else Phase.REFRESH
            due = Phase.REJOIN if event.rejoins else due
            return progress._replace(phase=Phase.NONCE, due=due, can_enroll=event.has_image_key, wait_s=0.0)
        case Done():
            return progress._replace(phase=_AFTER_DONE[phase], nonce="", wait_s=0.0)
        case Failed() if phase in _LOCAL:
            # IDENTITY starts over from the seed: without an image key it waits for one.
            back = Phase.SEED if phase is Phase.IDENTITY else phase
            return progress._replace(phase=back, wait_s=None)
        case Failed():
            return progress._replace(phase=Phase.NONCE, nonce="", wait_s=None)
        case Awaiting() if phase in _ASKING:
            return progress._replace(phase=Phase.NONCE, due=Phase.REFRESH, nonce="", wait_s=event.retry_after_s)
        case Refused() if phase in _ASKING or phase is Phase.NONCE:
            return _after_refusal(progress, event)
    raise StateMachineError(f"enroll: {event!r} can't happen in phase {phase.value!r}")


def _after_refusal(progress: Progress, refused: Refused) -> Progress:
    asked = progress.phase
    if asked is Phase.NONCE:
        return progress._replace(wait_s=refused.retry_after_s or None)
    if refused.code in _STALE and refused.nonce and progress.fresh_nonces < MAX_FRESH_NONCES:
        return progress._replace(nonce=refused.nonce, fresh_nonces=progress.fresh_nonces + 1, wait_s=0.0)
    again = progress._replace(phase=Phase.NONCE, nonce="", wait_s=refused.retry_after_s or None)
    if asked is not Phase.REFRESH and refused.code == Refusals.SPENT.value.code:
        return again._replace(due=Phase.REFRESH, wait_s=0.0)
    if asked is not Phase.REFRESH and refused.code in _BY_TOKEN:
        return again._replace(phase=Phase.SEED)
    if asked is Phase.REFRESH and refused.code == Refusals.SE_UNKNOWN.value.code and progress.can_enroll:
        return again._replace(due=Phase.ENROLL)
    return again
