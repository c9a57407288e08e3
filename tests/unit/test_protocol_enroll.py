"""The decision table of enrollment, cell by cell."""

from __future__ import annotations

import itertools

import pytest

from appliance.protocol.enroll import (
    Decision,
    Evidence,
    Hook,
    ImageKeyTerms,
    InstanceFacts,
    Known,
    Policy,
    Refusals,
    SeStatus,
    Verdict,
    check_facts,
    decide,
    decide_refresh,
    decide_rejoin,
    decide_unknown,
    is_attempt_id,
    is_se_id,
)
from appliance.protocol.source import check_networks

NOW = 1_700_000_000
SE = "6f6b4c1e-0a6b-4f6c-9d55-0d7c0a3f3a01"
OTHER_SE = "6f6b4c1e-0a6b-4f6c-9d55-0d7c0a3f3a02"
KEY = "SHA256:one"
OTHER_KEY = "SHA256:two"

TERMS = ImageKeyTerms(policy=Policy.OPEN, revoked=False, expires_at=NOW + 1, max_uses=1, uses=0)

REFUSED_STATUS = {
    SeStatus.REVOKED: Refusals.REVOKED,
    SeStatus.REJECTED: Refusals.REJECTED,
    SeStatus.QUARANTINED: Refusals.QUARANTINED,
    SeStatus.DELETED: Refusals.DELETED,
}


def refused(refusal: Refusals) -> Verdict:
    return Verdict(Decision.REFUSE, refusal)


def expected(status: SeStatus, *, same_key: bool, confirmed: bool) -> Verdict:
    """DESIGN section 7's table for an se_id that is known."""
    if status in REFUSED_STATUS:
        return refused(REFUSED_STATUS[status])
    if not same_key:
        return refused(Refusals.CONFLICT)
    if status is SeStatus.PENDING:
        return Verdict(Decision.PENDING)
    return refused(Refusals.SPENT) if confirmed else Verdict(Decision.GRANT_AGAIN)


def ask(*, by_id: Known | None, by_key: Known | None, terms: ImageKeyTerms = TERMS) -> Verdict:
    return decide(SE, KEY, by_id=by_id, by_key=by_key, terms=terms, source="192.0.2.7", now=NOW)


CELLS = list(itertools.product(SeStatus, [True, False], [True, False]))


@pytest.mark.parametrize(("status", "same_key", "confirmed"), CELLS)
def test_a_known_se_is_judged_by_status_key_and_hello(status: SeStatus, same_key: bool, confirmed: bool) -> None:
    known = Known(SE, KEY if same_key else OTHER_KEY, status, confirmed)
    assert ask(by_id=known, by_key=known if same_key else None) == expected(
        status, same_key=same_key, confirmed=confirmed
    )


@pytest.mark.parametrize(("status", "same_key", "confirmed"), CELLS)
def test_a_known_se_is_judged_alike_by_a_bad_image_key(status: SeStatus, same_key: bool, confirmed: bool) -> None:
    """An image key's terms open the door to newcomers only; they must not strand an SE whose answer got lost."""
    known = Known(SE, KEY if same_key else OTHER_KEY, status, confirmed)
    worn = TERMS._replace(revoked=True, expires_at=0, uses=9, networks=("198.51.100.0/24",))
    assert ask(by_id=known, by_key=None, terms=worn) == ask(by_id=known, by_key=None)


@pytest.mark.parametrize(
    ("own", "twin", "confirmed"), list(itertools.product([None, *SeStatus], SeStatus, [True, False]))
)
def test_a_key_known_under_another_se_id_is_a_clone_whatever_else_is_known(
    own: SeStatus | None, twin: SeStatus, confirmed: bool
) -> None:
    by_id = None if own is None else Known(SE, OTHER_KEY, own, confirmed)
    assert ask(by_id=by_id, by_key=Known(OTHER_SE, KEY, twin, confirmed)) == refused(Refusals.CLONED_KEY)


@pytest.mark.parametrize(("status", "confirmed"), list(itertools.product(SeStatus, [True, False])))
def test_an_index_that_lost_the_se_id_does_not_enroll_it_again(status: SeStatus, confirmed: bool) -> None:
    known = Known(SE, KEY, status, confirmed)
    assert ask(by_id=None, by_key=known) == expected(status, same_key=True, confirmed=confirmed)


GRANTED, WAITS = Verdict(Decision.GRANT_NEW), Verdict(Decision.PENDING)
TOKENS = [None, Refusals.TOKEN_MISSING, Refusals.TOKEN_USED]
BY_HOOK = {
    None: Verdict(Decision.ASK_HOOK),
    Hook.ALLOW: GRANTED,
    Hook.REFUSE: refused(Refusals.HOOK),
    Hook.SILENT: WAITS,
}


@pytest.mark.parametrize(("policy", "token", "hook"), list(itertools.product(Policy, TOKENS, BY_HOOK)))
def test_an_unknown_se_is_judged_by_the_policy(policy: Policy, token: Refusals | None, hook: Hook | None) -> None:
    """Each policy looks at its own evidence only."""
    verdict = decide(
        SE, KEY, by_id=None, by_key=None, terms=TERMS._replace(policy=policy), source="192.0.2.7", now=NOW,
        evidence=Evidence(token, hook),
    )  # fmt: skip
    assert (
        verdict
        == {
            Policy.OPEN: GRANTED,
            Policy.TOKEN: refused(token) if token else GRANTED,
            Policy.APPROVE: WAITS,
            Policy.HOOK: BY_HOOK[hook],
        }[policy]
    )


def test_without_evidence_only_an_open_key_grants() -> None:
    verdicts = {policy: ask(by_id=None, by_key=None, terms=TERMS._replace(policy=policy)) for policy in Policy}
    assert [policy for policy, verdict in verdicts.items() if verdict == GRANTED] == [Policy.OPEN]


@pytest.mark.parametrize("policy", Policy)
@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        ({"revoked": True}, Refusals.IMAGE_KEY_REVOKED),
        ({"expires_at": NOW}, Refusals.IMAGE_KEY_EXPIRED),
        ({"uses": 1}, Refusals.IMAGE_KEY_USED_UP),
        ({"networks": ("198.51.100.0/24", "2001:db8::/32")}, Refusals.SOURCE),
    ],
)
def test_no_policy_overrules_the_image_keys_terms(policy: Policy, change: dict[str, object], refusal: Refusals) -> None:
    terms = TERMS._replace(policy=policy, **change)  # type: ignore[arg-type]
    assert decide_unknown(terms, source="192.0.2.7", now=NOW) == refused(refusal)


@pytest.mark.parametrize(
    ("source", "networks", "allowed"),
    [
        ("192.0.2.7", (), True),
        ("192.0.2.7", ("198.51.100.0/24", "192.0.2.0/24"), True),
        ("192.0.3.7", ("192.0.2.0/24",), False),
        ("::ffff:192.0.2.7", ("192.0.2.0/24",), True),
        ("::ffff:192.0.3.7", ("192.0.2.0/24",), False),
        ("2001:db8::7", ("2001:db8::/32",), True),
        ("2001:db9::7", ("2001:db8::/32", "0.0.0.0/0"), False),
        ("no address", ("0.0.0.0/0",), False),
    ],
)
def test_source_networks(source: str, networks: tuple[str, ...], allowed: bool) -> None:
    verdict = decide_unknown(TERMS._replace(networks=networks), source=source, now=NOW)
    assert verdict == (Verdict(Decision.GRANT_NEW) if allowed else refused(Refusals.SOURCE))


def test_a_revoked_image_lets_nobody_new_in_whatever_else_holds() -> None:
    barred = Evidence(None, Hook.ALLOW, image_revoked=True)
    for policy in Policy:
        assert decide_unknown(TERMS._replace(policy=policy), source="", now=NOW, evidence=barred) == refused(
            Refusals.IMAGE_REVOKED
        )
    known = Known(SE, KEY, SeStatus.ENROLLED, confirmed=False)
    verdict = decide(SE, KEY, by_id=known, by_key=known, terms=TERMS, source="", now=NOW, evidence=barred)
    assert verdict == Verdict(Decision.GRANT_AGAIN), "who is in stays in: its answer was lost"


def test_a_refusal_may_name_a_longer_wait_than_its_table() -> None:
    assert Refusals.IMAGE_KEY_RATE.problem().retry_after_s == 1
    assert Refusals.IMAGE_KEY_RATE.problem(retry_after_s=7).retry_after_s == 7


def test_networks_are_checked_when_the_key_is_made() -> None:
    assert check_networks(["192.0.2.0/24", "2001:db8::/32", "192.0.2.7"]) == []
    problems = check_networks(["192.0.2.7/24", "everywhere", "10.0.0.0/8"])
    assert [text.split("'")[1] for text in problems] == ["192.0.2.7/24", "everywhere"]


@pytest.mark.parametrize(("status", "confirmed"), list(itertools.product(SeStatus, [True, False])))
def test_refresh_asks_for_the_status_alone(status: SeStatus, confirmed: bool) -> None:
    verdict = decide_refresh(Known(SE, KEY, status, confirmed))
    if status in REFUSED_STATUS:
        assert verdict == refused(REFUSED_STATUS[status])
    elif status is SeStatus.PENDING:
        assert verdict == Verdict(Decision.PENDING)
    else:
        assert verdict == Verdict(Decision.GRANT_AGAIN)


def test_refresh_of_an_unknown_se_is_refused() -> None:
    assert decide_refresh(None) == refused(Refusals.SE_UNKNOWN)


@pytest.mark.parametrize(
    ("status", "same_key", "confirmed", "token"),
    list(itertools.product(SeStatus, [True, False], [True, False], TOKENS)),
)
def test_a_rejoin_takes_the_place_of_an_enrolled_se_only(
    status: SeStatus, same_key: bool, confirmed: bool, token: Refusals | None
) -> None:
    known = Known(SE, KEY if same_key else OTHER_KEY, status, confirmed)
    verdict = decide_rejoin(SE, KEY, by_id=known, by_key=known if same_key else None, token=token)
    if status in REFUSED_STATUS:
        assert verdict == refused(REFUSED_STATUS[status])
    elif status is SeStatus.PENDING:
        # A conflict is audited; who brings no token is a stranger, and may not write into the audit.
        assert verdict == refused(token or Refusals.CONFLICT)
    elif same_key:
        # Whatever became of the token: the answer that put the key in place may have been lost.
        assert verdict == (refused(Refusals.SPENT) if confirmed else Verdict(Decision.GRANT_AGAIN))
    else:
        assert verdict == (refused(token) if token else Verdict(Decision.REPLACE_KEY))


@pytest.mark.parametrize("token", TOKENS)
def test_a_rejoin_makes_no_new_se_and_no_copy(token: Refusals | None) -> None:
    assert decide_rejoin(SE, KEY, by_id=None, by_key=None, token=token) == refused(Refusals.SE_UNKNOWN)
    twin = Known(OTHER_SE, KEY, SeStatus.ENROLLED, True)
    own = Known(SE, OTHER_KEY, SeStatus.ENROLLED, True)
    assert decide_rejoin(SE, KEY, by_id=own, by_key=twin, token=token) == refused(Refusals.CLONED_KEY)


def test_every_refusal_has_a_code_of_its_own_and_says_what_to_do() -> None:
    codes = [refusal.value.code for refusal in Refusals]
    assert len(set(codes)) == len(codes) == len(Refusals.__members__)
    for refusal in Refusals:
        assert refusal.value.title
        assert refusal.value.advice.endswith(".")
        assert 400 <= refusal.value.status < 600


@pytest.mark.parametrize("refusal", [each for each in Refusals if each.value.status in {408, 429, 503}])
def test_a_refusal_that_may_pass_says_when_to_come_back(refusal: Refusals) -> None:
    assert refusal.value.retry_after_s > 0


def test_a_refusal_becomes_a_problem_document() -> None:
    problem = Refusals.NONCE_STALE.problem(detail="301 s old", nonce="fresh")
    assert problem.type == f"/problems/{problem.code}" == "/problems/ENROLL-005"
    assert (problem.status, problem.title) == (409, "The nonce is stale")
    assert (problem.detail, problem.nonce, problem.retry_after_s) == ("301 s old", "fresh", 1)
    assert problem.advice


@pytest.mark.parametrize(
    ("text", "good"),
    [
        (SE, True),
        (SE.upper(), False),
        (SE.replace("-", ""), False),
        (SE + "\n", False),
        ("6f6b4c1e-0a6b-1f6c-9d55-0d7c0a3f3a01", False),
        ("6f6b4c1e-0a6b-4f6c-cd55-0d7c0a3f3a01", False),
        ("", False),
    ],
)
def test_an_se_id_has_one_spelling(text: str, good: bool) -> None:
    assert is_se_id(text) is good


@pytest.mark.parametrize(
    ("text", "good"), [("0123456789abcdef", True), ("0123456789ABCDEF", False), ("0123456789abcde", False), ("", False)]
)
def test_an_attempt_id_has_one_spelling(text: str, good: bool) -> None:
    assert is_attempt_id(text) is good


@pytest.mark.parametrize(
    ("facts", "problems"),
    [
        (InstanceFacts(), 0),
        (InstanceFacts(dmi_uuid="x" * 128, macs=["00:00:00:00:00:00"] * 32), 0),
        (InstanceFacts(macs=[""] * 33), 1),
        (InstanceFacts(macs=["x" * 129]), 1),
        (InstanceFacts(boot_id="x" * 129), 1),
        (InstanceFacts(instance_id="\x1b[2J"), 1),
        (InstanceFacts(image_digest="\n" * 129, macs=["x"] * 33), 3),
    ],
)
def test_facts_are_bounded_and_printable(facts: InstanceFacts, problems: int) -> None:
    assert len(check_facts(facts, "1.0")) == problems
    assert len(check_facts(facts, "1.0" * 100)) == problems + (not any("longer" in p for p in check_facts(facts, "")))
