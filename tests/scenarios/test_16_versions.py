"""16: an old agent with a new controller and the other way round, as two real daemons.

Protocol N-1 here is this program told to speak it: it says its older number and knows nothing newer. That what an agent
of protocol 1 itself said is still understood is held in tests/integration/test_self_test_controller.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from lab_rig import Site
from rig import until
from rough import environment, judged

from appliance.protocol.tunnel import OLDEST_PROTOCOL_NUMBER, PROTOCOL_NUMBER
from appliance.protocol.why import Step


@pytest.mark.parametrize(
    ("agent", "controller"),
    [
        pytest.param(OLDEST_PROTOCOL_NUMBER, PROTOCOL_NUMBER, id="an old agent"),
        pytest.param(PROTOCOL_NUMBER, OLDEST_PROTOCOL_NUMBER, id="an old controller", marks=pytest.mark.slow),
    ],
)
def test_neighbours_understand_each_other(tmp_path: Path, agent: int, controller: int) -> None:
    """Enrolls, links, is UP, and is upgraded to the same number without a trace."""
    at = Site(tmp_path / "site")
    try:
        at.controller.start(wrap=environment(tmp_path / "c", TEST_PROTOCOL=str(controller)))
        se = at.se("se-1").start(wrap=environment(tmp_path / "s", TEST_PROTOCOL=str(agent)))
        at.until_up(se)
        with judged(at, se, back_s=15.0, restarts=True, samples_apart_s=15.0):
            if agent < controller:
                se.stop()
                se.start()
            else:
                assert at.controller.stop() == 0
                at.controller.start()
            at.until_up(se)
    finally:
        at.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("agent", "controller", "whom"),
    [(PROTOCOL_NUMBER, PROTOCOL_NUMBER + 2, "agent"), (PROTOCOL_NUMBER + 2, PROTOCOL_NUMBER, "controller")],
    ids=["a far newer controller", "a far newer agent"],
)
def test_who_is_further_apart_is_told_what_to_upgrade(tmp_path: Path, agent: int, controller: int, whom: str) -> None:
    """First at enrolling; then as an upgrade of one side that skips a number, which is taken back."""
    at = Site(tmp_path / "site")
    try:
        at.controller.start(wrap=environment(tmp_path / "c", TEST_PROTOCOL=str(controller)))
        se = at.se("se-1").start(wrap=environment(tmp_path / "s", TEST_PROTOCOL=str(agent)))
        told = until(lambda: se.failed(Step.NONCE), what="the SE says why it doesn't enroll")
        assert "(ENROLL-042)" in told
        assert str(agent) in told
        assert at.controller.stop() == 0
        at.controller.start(wrap=environment(tmp_path / "c", TEST_PROTOCOL=str(agent)))
        se.stop()  # it was told to come back later, and would
        se.start(wrap=environment(tmp_path / "s", TEST_PROTOCOL=str(agent)))
        at.until_up(se)
        with judged(at, se, back_s=20.0, restarts=True, samples_apart_s=60.0):
            assert at.controller.stop() == 0
            at.controller.start(wrap=environment(tmp_path / "c", TEST_PROTOCOL=str(controller)))
            told = until(lambda: "(TUNNEL-022)" in (text := se.failed(Step.LINK)) and text, what="the SE says why")
            assert f"Protocol {agent} is not spoken here" in told
            until(lambda: f"Upgrade the {whom}" in se.logged(), what="the SE says whom to upgrade")
            chain = until(
                lambda: "speaks protocol" in (chain := at.controller.operator.why("se-1")).verdict and chain,
                what="the controller says why",
            )
            assert f"speaks protocol {agent}" in chain.verdict
            assert at.controller.stop() == 0
            at.controller.start(wrap=environment(tmp_path / "c", TEST_PROTOCOL=str(agent)))
    finally:
        at.close()
