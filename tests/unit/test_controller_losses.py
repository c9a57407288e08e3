"""How and how often a link was lost lately."""

from __future__ import annotations

from appliance.controller.losses import MANY, WITHIN_S, Lately, Losses

NOTHING = Lately("", comes_and_goes=False)


def test_each_loss_is_told_with_its_cause() -> None:
    losses = Losses()
    losses.note("a", "reset", 0.0)
    assert losses.lately("a", 1.0) == Lately("its link was lost once within 10 minutes: reset", comes_and_goes=False)
    losses.note("a", "cut", 2.0)
    told = "its link was lost twice within 10 minutes, the last time: cut"
    assert losses.lately("a", 3.0) == Lately(told, comes_and_goes=False)
    assert losses.lately("b", 3.0) == NOTHING


def test_many_within_a_while_come_and_go() -> None:
    losses = Losses()
    for at, text in enumerate(("cut", "reset", "silence")):
        losses.note("a", text, 100.0 * at)
    many = Lately("its link was lost 3 times within 10 minutes, the last time: silence", comes_and_goes=True)
    assert losses.lately("a", WITHIN_S) == many
    few = losses.lately("a", WITHIN_S + 1.0)
    assert few == Lately("its link was lost twice within 10 minutes, the last time: silence", comes_and_goes=False)
    assert losses.lately("a", 200.0 + WITHIN_S + 1.0) == NOTHING, "all are out of sight"
    losses.note("a", "reset", WITHIN_S + 1.0)
    assert losses.lately("a", WITHIN_S + 1.0) == many._replace(text=many.text.replace("silence", "reset"))


def test_losses_without_end_fill_no_memory() -> None:
    losses = Losses()
    for at in range(1000):
        losses.note("a", "reset", at / 10)
    assert "lost 100 times or more within" in losses.lately("a", 100.0).text


def test_what_is_forgotten_is_gone() -> None:
    losses = Losses()
    for at in range(MANY):
        losses.note("a", "reset", float(at))
    losses.forget("a")
    losses.forget("a")
    assert losses.lately("a", 3.0) == NOTHING
