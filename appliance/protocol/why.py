"""The causal chain that `appliance why` prints: which step happened when, and which one failed first."""

from __future__ import annotations

import enum

import msgspec


class Step(enum.StrEnum):
    """Steps in their order; each needs the one before it."""

    BOOT = "boot"
    TLS = "tls"
    NONCE = "nonce"
    GRANT = "grant"
    STORED = "stored"
    LINK = "link"
    HELLO = "hello"
    HEARTBEAT = "heartbeat"
    REVERSE = "reverse path"


class StepResult(enum.StrEnum):
    """How a step went."""

    OK = "ok"
    FAILED = "failed"
    WAITING = "waiting"
    UNSEEN = "unseen"
    """This side can't know (the SE's half on the controller and the other way round)."""


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """One step of the chain as it stands. `at` is seconds since 1970, 0 where it has not happened."""

    step: Step
    result: StepResult
    at: float = 0.0
    text: str = ""
    code: str = ""
    hint: str = ""


class Chain(msgspec.Struct, frozen=True, kw_only=True):
    """The whole chain of one SE, source address or attempt id."""

    subject: str
    side: str
    """`controller` or `se`: who tells."""
    steps: list[Link]
    verdict: str
    """One sentence: all is well, or the first step that failed and why."""


def verdict(steps: list[Link]) -> str:
    """Returns the sentence for a chain: the first failed step, else the first that waits, else that all happened, with
    the first reservation (a code on a step that went well).

    Steps that the other side alone sees say nothing; where there are only such, so does the verdict.
    """
    for wanted in (StepResult.FAILED, StepResult.WAITING):
        for link in steps:
            if link.result is wanted:
                lead = "stopped at" if wanted is StepResult.FAILED else "waiting for"
                return f"{lead} {link.step.value}: {link.text}" + (f" ({link.code})" if link.code else "")
    if all(link.result is StepResult.UNSEEN for link in steps):
        return "nothing of it was seen on this side"
    noted = next((link for link in steps if link.result is StepResult.OK and link.code), None)
    if noted is None:
        return "all steps happened"
    return f"all steps happened, with a reservation at {noted.step.value}: {noted.text} ({noted.code})"
