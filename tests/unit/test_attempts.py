"""What the controller remembers of those who never got in."""

from __future__ import annotations

import tracemalloc

import pytest

from appliance.controller.attempts import MAX_PER_SOURCE, MAX_TEXT, MAX_TRACKS, Attempts
from appliance.protocol.why import Step, StepResult, verdict

OK, FAILED, WAITING, UNSEEN = StepResult.OK, StepResult.FAILED, StepResult.WAITING, StepResult.UNSEEN


def results(attempts: Attempts, subject: str) -> list[StepResult]:
    chain = attempts.chain(subject)
    assert chain is not None
    assert [link.step for link in chain] == list(Step)
    return [link.result for link in chain]


def test_an_unknown_subject_has_no_chain() -> None:
    attempts = Attempts()
    assert attempts.chain("10.0.0.1") is None
    attempts.note("10.0.0.1", Step.TLS, OK, at=1.0)
    assert attempts.chain("") is None
    assert attempts.chain("10.0.0.2") is None


def test_a_refused_image_key_is_told_by_source_attempt_and_se_id() -> None:
    attempts = Attempts()
    attempts.note("10.0.0.1", Step.TLS, OK, at=1.0, attempt_id="a" * 16)
    attempts.note("10.0.0.1", Step.NONCE, OK, at=2.0, attempt_id="a" * 16)
    attempts.note(
        "10.0.0.1",
        Step.GRANT,
        FAILED,
        at=3.0,
        attempt_id="a" * 16,
        se_id="se-x",
        code="ENROLL-007",
        text="revoked",
        hint="bake anew",
    )
    for subject in ("10.0.0.1", "a" * 16, "se-x"):
        assert results(attempts, subject) == [UNSEEN, OK, OK, FAILED, UNSEEN, WAITING, WAITING, WAITING, WAITING]
        chain = attempts.chain(subject)
        assert chain is not None
        assert verdict(chain) == "stopped at grant: revoked (ENROLL-007)"
        assert (chain[3].at, chain[3].hint) == (3.0, "bake anew")


def test_the_newest_word_on_a_step_counts() -> None:
    attempts = Attempts()
    attempts.note("10.0.0.1", Step.GRANT, FAILED, at=1.0, attempt_id="b" * 16, se_id="se-x")
    attempts.note("10.0.0.1", Step.GRANT, OK, at=2.0, attempt_id="b" * 16)
    assert results(attempts, "se-x")[3] is OK


def test_a_newer_attempt_of_an_se_is_the_one_told() -> None:
    attempts = Attempts()
    attempts.note("10.0.0.2", Step.GRANT, OK, at=5.0, attempt_id="d" * 16, se_id="se-x")
    attempts.note("10.0.0.1", Step.GRANT, FAILED, at=1.0, attempt_id="c" * 16, se_id="se-x")
    assert results(attempts, "se-x")[3] is OK


def test_behind_a_nat_the_failing_attempt_is_told_and_ids_tell_them_apart() -> None:
    attempts = Attempts()
    attempts.note("10.0.0.1", Step.GRANT, FAILED, at=1.0, attempt_id="a" * 16, text="used up")
    attempts.note("10.0.0.1", Step.GRANT, OK, at=2.0, attempt_id="b" * 16)
    assert results(attempts, "10.0.0.1")[3] is FAILED
    assert results(attempts, "b" * 16)[3] is OK


def test_a_nameless_failure_is_forgotten_once_the_source_gets_further() -> None:
    attempts = Attempts()
    attempts.note("10.0.0.1", Step.TLS, FAILED, at=1.0, text="unknown CA")
    assert results(attempts, "10.0.0.1")[1] is FAILED
    attempts.note("10.0.0.1", Step.NONCE, OK, at=2.0, attempt_id="a" * 16)
    assert results(attempts, "10.0.0.1")[1:3] == [UNSEEN, OK]
    attempts.note("10.0.0.1", Step.TLS, OK, at=3.0)
    assert results(attempts, "10.0.0.1")[1] is OK


def test_steps_without_an_attempt_id_fill_the_gaps() -> None:
    attempts = Attempts()
    attempts.note("10.0.0.1", Step.TLS, OK, at=1.0)
    attempts.note("10.0.0.1", Step.NONCE, OK, at=2.0, attempt_id="a" * 16)
    attempts.note("10.0.0.1", Step.GRANT, OK, at=3.0, attempt_id="a" * 16)
    assert results(attempts, "a" * 16)[1:4] == [OK, OK, OK]
    attempts.note("10.0.0.1", Step.LINK, OK, at=4.0, se_id="se-x")
    assert results(attempts, "10.0.0.1")[1:6] == [OK, OK, OK, UNSEEN, OK]
    assert results(attempts, "se-x")[1:6] == [OK, UNSEEN, UNSEEN, UNSEEN, OK], "nobody said that they belong together"
    attempts.note("10.0.0.1", Step.GRANT, OK, at=3.0, attempt_id="a" * 16, se_id="se-x")
    assert results(attempts, "se-x")[1:6] == [OK, OK, OK, UNSEEN, OK]
    attempts.note("10.0.0.1", Step.TLS, FAILED, at=5.0)
    assert results(attempts, "a" * 16)[1] is UNSEEN, "another machine's failure is not this attempt's"


def test_ses_behind_one_address_are_told_apart_when_linked() -> None:
    attempts = Attempts()
    attempts.note("10.0.0.1", Step.LINK, OK, at=1.0, se_id="se-x")
    attempts.note("10.0.0.1", Step.LINK, FAILED, at=2.0, se_id="se-y", text="nothing heard")
    attempts.note("10.0.0.1", Step.HELLO, OK, at=3.0, se_id="se-x")
    assert results(attempts, "se-x")[5:7] == [OK, OK]
    assert results(attempts, "se-y")[5:7] == [FAILED, WAITING]
    assert results(attempts, "10.0.0.1")[5] is FAILED


def test_a_failure_is_overtaken_by_the_same_ses_next_attempt() -> None:
    attempts = Attempts()
    attempts.note("10.0.0.1", Step.GRANT, FAILED, at=1.0, attempt_id="a" * 16, se_id="se-x")
    attempts.note("10.0.0.1", Step.GRANT, OK, at=2.0, attempt_id="b" * 16, se_id="se-x")
    assert results(attempts, "10.0.0.1")[3] is OK
    assert results(attempts, "a" * 16)[3] is FAILED


def test_a_mapped_ipv4_source_is_the_address_one_would_type() -> None:
    attempts = Attempts()
    attempts.note("::FFFF:10.0.0.1", Step.TLS, OK, at=1.0)
    attempts.note("2001:db8::ffff:1", Step.TLS, FAILED, at=1.0)
    assert results(attempts, "10.0.0.1")[1] is OK
    assert results(attempts, "::ffff:10.0.0.1")[1] is OK
    assert results(attempts, "2001:db8::ffff:1")[1] is FAILED


def test_the_quietest_source_is_forgotten_first() -> None:
    attempts = Attempts(max_tracks=2)
    attempts.note("10.0.0.1", Step.TLS, OK, at=1.0)
    attempts.note("10.0.0.2", Step.TLS, OK, at=2.0)
    attempts.note("10.0.0.1", Step.NONCE, OK, at=3.0)
    attempts.note("10.0.0.3", Step.TLS, OK, at=4.0)
    assert attempts.chain("10.0.0.2") is None
    assert attempts.chain("10.0.0.1") is not None
    assert len(attempts) == 2


def test_a_source_with_many_tracks_loses_its_oldest() -> None:
    attempts = Attempts(max_tracks=3)
    for number in range(3):
        attempts.note("10.0.0.1", Step.TLS, OK, at=number, attempt_id=f"{number:016x}")
    attempts.note("10.0.0.2", Step.TLS, OK, at=9.0)
    assert attempts.chain(f"{0:016x}") is None
    assert attempts.chain(f"{1:016x}") is not None


def test_a_flood_of_attempt_ids_from_one_source_costs_only_its_own() -> None:
    attempts = Attempts()
    attempts.note("10.0.0.1", Step.TLS, FAILED, at=0.0)
    for number in range(20_000):
        attempts.note("10.6.6.6", Step.NONCE, OK, at=1.0 + number, attempt_id=f"{number:016x}")
    assert attempts.chain("10.0.0.1") is not None
    assert len(attempts) == MAX_PER_SOURCE + 1


def test_a_flood_of_addresses_from_one_ipv6_network_costs_only_its_own() -> None:
    attempts = Attempts()
    attempts.note("2001:db8:0:1::1", Step.TLS, FAILED, at=0.0)
    for number in range(MAX_TRACKS + 1):
        attempts.note(f"2001:db8:0:2::{number:x}", Step.TLS, FAILED, at=1.0 + number)
    assert attempts.chain("2001:db8:0:1::1") is not None
    assert attempts.chain(f"2001:db8:0:2::{MAX_TRACKS:x}") is not None
    assert attempts.chain("2001:db8:0:2::0") is None
    assert len(attempts) == MAX_PER_SOURCE + 1


@pytest.mark.parametrize(("char", "sources"), [("x", 30_000), ("\N{GRINNING FACE}", 3 * MAX_TRACKS)])
def test_a_flood_of_sources_keeps_less_than_10_mb(char: str, sources: int) -> None:
    attempts = Attempts()
    try:
        for number in range(sources):
            if number == sources - 2 * MAX_TRACKS:  # tracing is slow, and what came before will be forgotten
                tracemalloc.start()
            source = f"2001:db8:{number >> 16:x}:{number & 0xFFFF:x}::1"
            for step in (Step.TLS, Step.NONCE, Step.GRANT):
                text = f"{number} {step} " + char * MAX_TEXT
                attempts.note(source, step, FAILED, at=float(number), attempt_id=f"{number:016x}", text=text)
        kept, _peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(attempts) == MAX_TRACKS
    assert kept < 10_000_000, f"{kept} bytes kept"
    chain = attempts.chain(f"{sources - 1:016x}")
    assert chain is not None
    assert len(chain[1].text) <= MAX_TEXT
