"""The one sentence that `appliance why` ends with."""

from __future__ import annotations

import pytest

from appliance.protocol.why import Link, Step, StepResult, verdict

OK, FAILED, WAITING, UNSEEN = StepResult.OK, StepResult.FAILED, StepResult.WAITING, StepResult.UNSEEN


def chain(code: str = "", **results: StepResult) -> list[Link]:
    return [
        Link(step=step, result=results.get(step.name, OK), text=f"{step.value} text", code=code * (step is Step.TLS))
        for step in Step
    ]


@pytest.mark.parametrize(
    ("steps", "sentence"),
    [
        (chain(), "all steps happened"),
        (chain(BOOT=UNSEEN, STORED=UNSEEN), "all steps happened"),
        (chain("X-1"), "all steps happened, with a reservation at tls: tls text (X-1)"),
        (chain("X-1", TLS=UNSEEN), "all steps happened"),
        (chain("X-1", HELLO=WAITING), "waiting for hello: hello text"),
        (chain("X-1", TLS=FAILED, NONCE=WAITING), "stopped at tls: tls text (X-1)"),
        (chain(BOOT=WAITING, LINK=FAILED, HELLO=FAILED), "stopped at link: link text"),
        (chain(GRANT=WAITING, LINK=WAITING), "waiting for grant: grant text"),
        (chain(**{step.name: UNSEEN for step in Step}), "nothing of it was seen on this side"),
        ([], "nothing of it was seen on this side"),
    ],
)
def test_the_first_failed_step_is_named(steps: list[Link], sentence: str) -> None:
    assert verdict(steps) == sentence
