"""Who is connected and hasn't logged in yet, by network: how many may be, and who goes where all places are taken.

A place is a network's own up to an equal share of all. Whoever comes from a network that has less takes the place of
the one that waits the longest, of the network that holds the most; so however many silent connections two or three of
them hold, an SE of another one gets in. Pure.
"""

from __future__ import annotations

from typing import Generic, TypeVar

Who = TypeVar("Who")


class Crowd(Generic[Who]):
    """`most` of them may be, `most_per_network` from one network."""

    def __init__(self, most: int, most_per_network: int) -> None:
        self._most = most
        self._most_per_network = most_per_network
        self._networks: dict[str, dict[Who, None]] = {}
        """Who came first stands first."""
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def of(self, network: str) -> int:
        """How many there are from one network."""
        return len(self._networks.get(network, ()))

    def has_room(self, network: str) -> bool:
        """Whether one more may come from there without another one going."""
        return self._count < self._most and self.of(network) < self._most_per_network

    def gives_way(self, network: str) -> Who | None:
        """Who has to go for one from there; None where nobody has, also where there is room."""
        if self._count < self._most or self.of(network) >= self._most_per_network:
            return None
        # Most are turned away here, while a crowd of as many networks comes: that must cost nothing.
        if (self.of(network) + 1) * len(self._networks) >= self._count:
            return None
        largest = max(self._networks, key=self.of)
        return next(iter(self._networks[largest]))

    def add(self, network: str, who: Who) -> None:
        """One more, which isn't there yet."""
        self._networks.setdefault(network, {})[who] = None
        self._count += 1

    def remove(self, network: str, who: Who) -> None:
        """One less. Raises `KeyError` where it isn't there."""
        there = self._networks[network]
        del there[who]
        if not there:
            del self._networks[network]
        self._count -= 1
