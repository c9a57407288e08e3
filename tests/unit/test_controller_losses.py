"""How often a link was lost lately."""

from __future__ import annotations

from appliance.controller.losses import MANY, WITHIN_S, Losses


def test_few_losses_are_no_news() -> None:
    losses = Losses()
    for at in range(MANY - 1):
        losses.note("a", "reset", float(at))
    losses.note("b", "reset", 2.0)
    assert losses.told("a", 3.0) == losses.told("b", 3.0) == losses.told("unknown", 3.0) == ""


def test_many_within_a_while_are_told_with_the_last_one() -> None:
    losses = Losses()
    for at, text in enumerate(("cut", "reset", "silence")):
        losses.note("a", text, 100.0 * at)
    expected = "its link was lost 3 times within 10 minutes, the last time: silence"
    assert losses.told("a", WITHIN_S) == expected
    assert losses.told("a", WITHIN_S + 1.0) == "", "the first is out of sight"
    losses.note("a", "reset", WITHIN_S + 1.0)
    assert losses.told("a", WITHIN_S + 1.0) == expected.replace("silence", "reset")


def test_losses_without_end_fill_no_memory() -> None:
    losses = Losses()
    for at in range(1000):
        losses.note("a", "reset", at / 10)
    assert "lost 100 times or more within" in losses.told("a", 100.0)


def test_what_is_forgotten_is_gone() -> None:
    losses = Losses()
    for at in range(MANY):
        losses.note("a", "reset", float(at))
    losses.forget("a")
    losses.forget("a")
    assert losses.told("a", 3.0) == ""
