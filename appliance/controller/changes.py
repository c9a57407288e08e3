"""Audited changes of SEs, in groups: what waits for its turn is committed together with whoever has it.

Each entry of the audit holds the hash of the one before it, so there is one at a time. A first boot of thousands brings
two of them an SE (its hello is confirmed, its image key is destroyed), and each alone would take a commit and a turn of
a busy loop: thirty a second, while SEs come at two hundred, wait too long, give up and come again. In a group all of
them take one commit, and each still gets an answer of its own.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from appliance.controller.audit import Note
from appliance.controller.records import SeRecord
from appliance.errors import NotFoundError, StoreError

if TYPE_CHECKING:
    from appliance.controller.registry import Registry

GROUP = 24
"""Changes in one commit at most: a change of key takes four operations, a transaction 100 (`port.MAX_OPERATIONS`)."""


class _Change(NamedTuple):
    se_id: str
    change: Callable[[SeRecord], SeRecord]
    note: Note
    done: asyncio.Future[SeRecord]

    def fails(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)

    def happened(self, record: SeRecord) -> None:
        if not self.done.done():
            self.done.set_result(record)


class Changes:
    """What waits for its turn in one registry. One loop only."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._waiting: deque[_Change] = deque()

    async def make(self, se_id: str, change: Callable[[SeRecord], SeRecord], note: Note) -> SeRecord:
        """Changes an SE as it stands when its turn has come; see `Registry.change_se`.

        A caller that is cancelled takes its change back, unless it is being committed.
        """
        wish = _Change(se_id, change, note, asyncio.get_running_loop().create_future())
        self._waiting.append(wish)
        try:
            async with self._registry.turn():
                while not wish.done.done():
                    await self._commit(self._next())
        finally:
            wish.done.cancel()
        return wish.done.result()

    def _next(self) -> list[_Change]:
        """The first of those that wait, none of an SE twice: its second change is one of what the first made."""
        group: list[_Change] = []
        while self._waiting and len(group) < GROUP and all(each.se_id != self._waiting[0].se_id for each in group):
            wish = self._waiting.popleft()
            if not wish.done.cancelled():
                group.append(wish)
        return group

    async def _commit(self, group: Sequence[_Change]) -> None:
        try:
            is_over = await self._commit_together(group)
            for wish in () if is_over else group:  # one of them may be what failed
                await self._commit_together([wish])
        finally:
            # Where this caller was cancelled, or the store can't be read: the others' turns come.
            self._waiting.extendleft(wish for wish in reversed(group) if not wish.done.done())

    async def _commit_together(self, group: Sequence[_Change]) -> bool:
        """Returns whether each of them is answered."""
        async with self._registry.alone(wish.se_id for wish in group):
            made = {wish: record for wish in group if (record := self._made(wish)) is not None}
            try:
                if made:
                    await self._registry.commit_noted(list(made.values()), [wish.note for wish in made])
            except StoreError as error:
                if len(group) > 1:
                    return False
                group[0].fails(error)
            for wish, record in made.items():
                wish.happened(record)
            return True

    def _made(self, wish: _Change) -> SeRecord | None:
        """What an SE becomes; None where that is answered."""
        if wish.done.done():  # at the first try, or its caller was cancelled
            return None
        was = self._registry.se(wish.se_id)
        if was is None:
            wish.fails(NotFoundError(f"no SE {wish.se_id!r} is known", hint="see `appliance se list`"))
            return None
        try:
            record = wish.change(was)
        except Exception as error:  # noqa: BLE001 - a defect, too, is its own caller's
            wish.fails(error)
            return None
        if record == was:
            wish.happened(record)
            return None
        return record
