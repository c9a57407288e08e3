"""Turns of the loop: one piece of work in each, in order, and a cancelled one costs nobody else's."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop

from appliance.controller.turns import Turns


@pytest.fixture(params=[uvloop.run, asyncio.run], ids=["uvloop", "asyncio"])
def run(request: pytest.FixtureRequest) -> Callable[[Coroutine[Any, Any, None]], None]:
    chosen: Callable[[Coroutine[Any, Any, None]], None] = request.param
    return chosen


class Clock:
    """Counts the loop's turns."""

    def __init__(self) -> None:
        self.turn = 0
        self.tick()

    def tick(self) -> None:
        self.turn += 1
        self.handle = asyncio.get_running_loop().call_soon(self.tick)


def test_no_two_pieces_share_a_turn_and_the_first_comes_first(run: Callable[..., None]) -> None:
    async def go() -> None:
        turns, clock, done = Turns(), Clock(), list[tuple[int, int]]()

        async def piece(number: int) -> None:
            await turns.mine()
            done.append((number, clock.turn))

        await asyncio.gather(*(piece(number) for number in range(20)))
        await piece(20)
        clock.handle.cancel()
        assert [number for number, _ in done] == list(range(21))
        assert max(Counter(turn for _, turn in done).values()) == 1

    run(go())


def test_one_that_is_given_up_keeps_nobody_waiting(run: Callable[..., None]) -> None:
    async def go() -> None:
        turns = Turns()
        given_up = [asyncio.create_task(turns.mine()) for _ in range(3)]
        await asyncio.sleep(0)
        for task in given_up:
            task.cancel()
        async with asyncio.timeout(10):
            await turns.mine()
        last = asyncio.create_task(turns.mine())
        await asyncio.sleep(0)
        last.cancel()
        await asyncio.gather(last, return_exceptions=True)
        async with asyncio.timeout(10):
            await turns.mine()

    run(go())
