"""The stop token: reasons, children, callbacks, signals."""

from __future__ import annotations

import gc
import os
import signal
import threading

import pytest

from appliance.runtime.stop import StopToken, stop_on_signals


def test_the_first_reason_stays() -> None:
    token = StopToken()
    assert (token.stopped, token.reason, token.wait(0)) == (False, "", False)
    token.stop("first")
    token.stop("second")
    assert (token.stopped, token.reason, token.wait(None)) == (True, "first", True)


def test_a_child_stops_with_its_parent_and_not_the_other_way_round() -> None:
    parent = StopToken()
    child, sibling = parent.child(), parent.child()
    sibling.stop("its own")
    assert not parent.stopped
    assert not child.stopped
    parent.stop("all")
    assert (child.reason, sibling.reason) == ("all", "its own")


def test_a_child_of_what_has_stopped_is_stopped() -> None:
    parent = StopToken()
    parent.stop("over")
    assert parent.child().reason == "over"


def test_a_grandchild_is_reached_though_nobody_holds_the_child() -> None:
    parent = StopToken()
    grandchild = parent.child().child()
    gc.collect()
    parent.stop("all")
    assert grandchild.stopped


def test_dropped_children_are_forgotten() -> None:
    parent = StopToken()
    for _ in range(100):
        parent.child()
    gc.collect()
    assert len(parent._children) == 0


def test_callbacks_run_once_and_can_be_taken_back() -> None:
    token, calls = StopToken(), []
    token.on_stop(lambda: calls.append("kept"))
    withdraw = token.on_stop(lambda: calls.append("withdrawn"))
    withdraw()
    withdraw()
    token.stop("now")
    token.stop("again")
    assert calls == ["kept"]
    token.on_stop(lambda: calls.append("late"))()
    assert calls == ["kept", "late"]


def test_waiting_ends_when_another_thread_stops() -> None:
    token = StopToken()
    thread = threading.Thread(target=token.stop, args=("by thread",))
    thread.start()
    assert token.wait(10.0)
    thread.join()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_stop_it_and_the_old_dispositions_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    token = StopToken()
    with stop_on_signals(token):
        os.kill(os.getpid(), number)
        assert token.wait(10.0)
    assert token.reason == f"got {number.name}"
    assert signal.getsignal(number) == before
