"""Who hasn't logged in: never more than may be, and nobody's crowd keeps another network out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from appliance.controller.crowd import Crowd

MOST, MOST_PER_NETWORK = 12, 5
NETWORKS = [f"192.0.2.{host}" for host in range(1, 16)]


def come(crowd: Crowd[int], network: str, who: int, there: dict[int, str]) -> bool:
    """As the gateway does it."""
    if (gone := crowd.gives_way(network)) is not None:
        crowd.remove(there.pop(gone), gone)
    if not crowd.has_room(network):
        return False
    crowd.add(network, who)
    there[who] = network
    return True


@given(st.lists(st.tuples(st.sampled_from(NETWORKS), st.booleans()), max_size=80))
def test_nobody_has_more_than_a_share_while_others_have_less(steps: list[tuple[str, bool]]) -> None:
    crowd: Crowd[int] = Crowd(MOST, MOST_PER_NETWORK)
    there: dict[int, str] = {}
    for who, (network, goes) in enumerate(steps):
        if goes and there:
            gone = min(there)
            crowd.remove(there.pop(gone), gone)
            continue
        held = list(there.values())
        let_in = come(crowd, network, who, there)
        assert len(crowd) == len(there) <= MOST
        assert all(crowd.of(name) == list(there.values()).count(name) <= MOST_PER_NETWORK for name in NETWORKS)
        if not let_in:
            share = len(held) / len(set(held))
            assert held.count(network) == MOST_PER_NETWORK or held.count(network) + 1 >= share


def test_the_one_that_waits_the_longest_of_the_largest_crowd_goes() -> None:
    crowd: Crowd[str] = Crowd(6, 5)
    for who, network in (("a1", "a"), ("b1", "b"), ("b2", "b"), ("b3", "b"), ("b4", "b"), ("a2", "a")):
        assert crowd.gives_way(network) is None
        crowd.add(network, who)
    assert crowd.gives_way("b") is None, "it has the most"
    assert crowd.gives_way("a") is None, "an equal share"
    assert crowd.gives_way("c") == "b1"


def test_a_crowd_of_as_many_networks_as_places_keeps_its_places() -> None:
    crowd: Crowd[str] = Crowd(3, 3)
    for network in "abc":
        crowd.add(network, network)
    assert crowd.gives_way("d") is None
    assert not crowd.has_room("d")
    crowd.remove("b", "b")
    assert (crowd.has_room("d"), crowd.of("b"), len(crowd)) == (True, 0, 2)
