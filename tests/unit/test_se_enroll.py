"""The step machine of first boot: every phase with every event, and the ways through it."""

from __future__ import annotations

import itertools

import pytest

from appliance.errors import StateMachineError
from appliance.protocol.enroll import Refusals
from appliance.se.enroll import (
    MAX_FRESH_NONCES,
    Awaiting,
    Done,
    Event,
    Failed,
    Phase,
    Progress,
    Refused,
    advance,
    first_boot,
    refresh,
)

EVENTS: tuple[Event, ...] = (Done("n"), Done(has_image_key=False), Awaiting(5.0), Refused("X", 7.0), Failed())
ASKING = {Phase.ENROLL, Phase.REJOIN, Phase.REFRESH}
LOCAL = {Phase.SEED, Phase.IDENTITY, Phase.STORE}
STALE, USED = Refusals.NONCE_STALE.value.code, Refusals.NONCE_USED.value.code
BY_TOKEN = {refusal for refusal in Refusals if refusal.name.startswith("TOKEN_")}
SPENT, UNKNOWN = Refusals.SPENT.value.code, Refusals.SE_UNKNOWN.value.code


def may(phase: Phase, event: Event) -> bool:
    """Which events a phase can have."""
    if phase is Phase.DONE:
        return False
    if isinstance(event, Awaiting):
        return phase in ASKING
    return not (isinstance(event, Refused) and phase in LOCAL)


@pytest.mark.parametrize(("phase", "event"), list(itertools.product(Phase, EVENTS)))
def test_every_phase_with_every_event(phase: Phase, event: Event) -> None:
    progress = Progress(phase)
    if not may(phase, event):
        with pytest.raises(StateMachineError):
            advance(progress, event)
        return
    following = advance(progress, event)
    if isinstance(event, Failed):
        assert following.wait_s is None, "what failed is tried again, after a wait"
    assert (following.phase is Phase.DONE) == (phase is Phase.STORE and isinstance(event, Done))


def walk(progress: Progress, *events: Event) -> list[Phase]:
    """The phases one comes through."""
    phases = []
    for event in events:
        progress = advance(progress, event)
        phases.append(progress.phase)
    return phases


def test_the_good_way() -> None:
    way = walk(first_boot(), Done(), Done(), Done("n"), Done(), Done())
    assert way == [Phase.IDENTITY, Phase.NONCE, Phase.ENROLL, Phase.STORE, Phase.DONE]


def test_without_an_image_key_the_own_key_asks() -> None:
    assert walk(first_boot(), Done(), Done(has_image_key=False), Done("n"))[-1] is Phase.REFRESH


@pytest.mark.parametrize("has_image_key", [True, False])
def test_a_rejoin_token_goes_first(has_image_key: bool) -> None:
    way = walk(first_boot(), Done(), Done(has_image_key=has_image_key, rejoins=True), Done("n"), Done(), Done())
    assert way == [Phase.IDENTITY, Phase.NONCE, Phase.REJOIN, Phase.STORE, Phase.DONE]


def test_a_lost_answer_to_a_rejoin_asks_with_the_same_token_again() -> None:
    assert walk(Progress(Phase.REJOIN, due=Phase.REJOIN), Failed(), Done("n")) == [Phase.NONCE, Phase.REJOIN]


@pytest.mark.parametrize("refusal", sorted(BY_TOKEN, key=lambda refusal: refusal.name))
@pytest.mark.parametrize("phase", [Phase.ENROLL, Phase.REJOIN])
def test_another_token_is_looked_for_where_one_does_not_serve(phase: Phase, refusal: Refusals) -> None:
    progress = advance(Progress(phase, due=phase), Refused(refusal.value.code, 60.0))
    assert (progress.phase, progress.wait_s) == (Phase.SEED, 60.0)


def test_a_refresh_needs_no_seed() -> None:
    assert walk(refresh(can_enroll=False), Done("n"), Done(), Done()) == [Phase.REFRESH, Phase.STORE, Phase.DONE]


@pytest.mark.parametrize("code", [STALE, USED])
@pytest.mark.parametrize("phase", sorted(ASKING))
def test_a_fresh_nonce_is_used_at_once_but_not_for_ever(code: str, phase: Phase) -> None:
    progress = Progress(phase, due=phase, nonce="old")
    for turn in range(MAX_FRESH_NONCES):
        progress = advance(progress, Refused(code, 1.0, f"fresh-{turn}"))
        assert (progress.phase, progress.nonce, progress.wait_s) == (phase, f"fresh-{turn}", 0.0)
    progress = advance(progress, Refused(code, 1.0, "fresh"))
    assert (progress.phase, progress.nonce, progress.wait_s) == (Phase.NONCE, "", 1.0)
    assert advance(progress, Done("n")).fresh_nonces == 0


def test_a_stale_nonce_without_a_fresh_one() -> None:
    assert advance(Progress(Phase.ENROLL), Refused(STALE)).phase is Phase.NONCE


@pytest.mark.parametrize("phase", [Phase.ENROLL, Phase.REJOIN])
def test_spent_leads_to_refresh_at_once(phase: Phase) -> None:
    progress = advance(Progress(phase, due=phase), Refused(SPENT, 0.0))
    assert (progress.phase, progress.due, progress.wait_s) == (Phase.NONCE, Phase.REFRESH, 0.0)
    assert advance(progress, Done("n")).phase is Phase.REFRESH


def test_an_unknown_se_enrolls_where_it_can() -> None:
    asked = Progress(Phase.REFRESH, due=Phase.REFRESH)
    assert advance(asked, Refused(UNKNOWN, 60.0)).due is Phase.ENROLL
    assert advance(asked, Refused(UNKNOWN, 60.0)).wait_s == 60.0, "no ping-pong with SPENT"
    assert advance(asked._replace(can_enroll=False), Refused(UNKNOWN, 60.0)).due is Phase.REFRESH


@pytest.mark.parametrize("refusal", Refusals, ids=lambda refusal: refusal.name)
@pytest.mark.parametrize("phase", sorted(ASKING | {Phase.NONCE}))
def test_no_refusal_is_an_end(phase: Phase, refusal: Refusals) -> None:
    progress = advance(Progress(phase, due=phase), Refused(refusal.value.code, 3.0))
    by_enrolling = phase in {Phase.ENROLL, Phase.REJOIN}
    assert progress.phase is (Phase.SEED if by_enrolling and refusal in BY_TOKEN else Phase.NONCE)
    assert progress.wait_s == (0.0 if refusal is Refusals.SPENT and by_enrolling else 3.0)


def test_a_refusal_without_a_time_waits_by_the_back_off() -> None:
    assert advance(Progress(Phase.ENROLL), Refused("X", 0.0)).wait_s is None
    assert advance(Progress(Phase.NONCE), Refused("X", 0.0)).wait_s is None


def test_pending_polls_with_the_own_key() -> None:
    progress = advance(Progress(Phase.ENROLL), Awaiting(10.0))
    assert (progress.phase, progress.due, progress.wait_s) == (Phase.NONCE, Phase.REFRESH, 10.0)


def test_a_grant_that_could_not_be_stored_is_kept() -> None:
    assert advance(Progress(Phase.STORE), Failed()).phase is Phase.STORE


def test_an_identity_that_could_not_be_made_starts_from_the_seed() -> None:
    assert advance(Progress(Phase.IDENTITY), Failed()).phase is Phase.SEED
