"""What happened to whom before an SE was known: the memory behind `why SOURCE` and `why ATTEMPT`.

A *track* is what one peer did from one address, named by its attempt id, else its se_id, else "" (a handshake is over
before its peer can say a name), and holds the newest word on each step. Little of it was authenticated, and anybody
may come with new addresses and ids, so all of it is bounded: `MAX_TRACKS` in all (out goes the oldest of the source
that was quiet longest), `MAX_PER_SOURCE` for one IPv4 address or IPv6 /64 (out goes its oldest: a flood from one of
them costs nobody else's tracks), and clipped texts.

A source stands for many SEs where they share a NAT. `chain(source)` then tells of the track that fails, since that is
why somebody asks; the attempt id, which the SE prints on its console, tells them apart.

Pure: no clock, no I/O. One loop only.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, OrderedDict

from appliance.controller.rate import network_of
from appliance.protocol.why import Link, Step, StepResult

MAX_TRACKS = 4096
MAX_PER_SOURCE = 1024
"""A thousand VMs behind one address are a normal day."""
MAX_TEXT = 120
"""Characters kept of a text or id, a third of it where it isn't ASCII: such characters take up to four bytes."""

_STEPS = tuple(Step)
_SE_ONLY = frozenset({Step.BOOT, Step.STORED})
"""Steps that no packet shows the controller."""


@dataclasses.dataclass(slots=True)
class _Track:
    name: str
    se_id: str = ""
    at: float = 0.0
    links: dict[Step, Link] = dataclasses.field(default_factory=dict)

    @property
    def fails(self) -> bool:
        return any(link.result is StepResult.FAILED for link in self.links.values())


class Attempts:
    """Bounded record of attempts. `at` is wall time, seconds since 1970; sources are IP addresses as text."""

    def __init__(self, *, max_tracks: int = MAX_TRACKS, max_per_source: int = MAX_PER_SOURCE) -> None:
        self._max_tracks = max_tracks
        self._max_per_source = max_per_source
        self._sources: OrderedDict[str, OrderedDict[str, _Track]] = OrderedDict()
        """Source to its tracks by name; both quietest first."""
        self._networks: dict[str, OrderedDict[str, None]] = {}
        """IPv4 address or IPv6 /64 to its sources, quietest first."""
        self._in_network: Counter[str] = Counter()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def note(
        self,
        source: str,
        step: Step,
        result: StepResult,
        *,
        at: float,
        attempt_id: str = "",
        se_id: str = "",
        code: str = "",
        text: str = "",
        hint: str = "",
    ) -> None:
        """Keeps the newest word on `step` of a track; where it failed, later steps aren't true any more.

        Args:
            source: the peer's address, without port.
            step: which step of the causal chain.
            result: how it went.
            at: when, seconds since 1970.
            attempt_id: as the peer says; `protocol.enroll.is_attempt_id` is the caller's to check.
            se_id: as far as known or claimed.
            code: of the error, "" where there is none.
            text: what happened; may quote the peer, and is clipped.
            hint: what to do next; one of our own texts, never a quotation.
        """
        source, name = _clip(_plain(source)), _clip(attempt_id or se_id)
        tracks = self._sources.setdefault(source, OrderedDict())
        network = network_of(source)
        members = self._networks.setdefault(network, OrderedDict())
        members[source] = None
        track = tracks.get(name)
        if track is None:
            track = tracks[name] = _Track(name)
            self._count += 1
            self._in_network[network] += 1
        track.at = at
        track.se_id = _clip(se_id) or track.se_id
        track.links[step] = Link(step=step, result=result, at=at, text=_clip(text), code=_clip(code), hint=hint)
        if result is StepResult.FAILED:
            for later in _STEPS[_STEPS.index(step) + 1 :]:
                track.links.pop(later, None)
        tracks.move_to_end(name)
        self._sources.move_to_end(source)
        members.move_to_end(source)
        if self._in_network[network] > self._max_per_source:
            self._forget_oldest(next(iter(members)))
        elif self._count > self._max_tracks:
            self._forget_oldest(next(iter(self._sources)))

    def _forget_oldest(self, source: str) -> None:
        """Forgets the oldest track of a source."""
        network, tracks = network_of(source), self._sources[source]
        tracks.popitem(last=False)
        self._count -= 1
        self._in_network[network] -= 1
        if not tracks:
            del self._sources[source], self._networks[network][source]
        if not self._in_network[network]:
            del self._networks[network], self._in_network[network]

    def chain(self, subject: str) -> list[Link] | None:
        """Returns all steps of an attempt id, source address or se_id in their order, or None where it isn't known.

        Steps that nobody noted are WAITING behind the last noted one, and UNSEEN before it or where only the SE can
        know.
        """
        links = self._find(subject)
        if links is None:
            return None
        last = max(_STEPS.index(step) for step in links)
        chain = []
        for index, step in enumerate(_STEPS):
            unseen = index < last or step in _SE_ONLY
            blank = Link(step=step, result=StepResult.UNSEEN if unseen else StepResult.WAITING)
            chain.append(links.get(step, blank))
        return chain

    def _find(self, subject: str) -> dict[Step, Link] | None:
        source = self._sources.get(_plain(subject))
        if source is not None:
            newest_first = list(reversed(source.values()))
            return _filled(_troubled(newest_first) or newest_first[0], newest_first)
        named = [
            (track, tracks)
            for tracks in self._sources.values()
            for track in tracks.values()
            if subject and subject in (track.name, track.se_id)
        ]
        if not named:
            return None
        newest, tracks = max(named, key=lambda entry: entry[0].at)
        links = sorted((link for track, _ in named for link in track.links.values()), key=lambda link: link.at)
        merged = _Track(newest.name, links={link.step: link for link in links})
        return _filled(merged, [tracks[""]] if "" in tracks else [])


def _troubled(newest_first: list[_Track]) -> _Track | None:
    """Returns the newest track of a source that fails and hasn't been overtaken.

    A failure without a name counts only while nothing newer came from its address, one of an SE only while that SE
    hasn't come again under another name.
    """
    overtaken = set()
    for at, track in enumerate(newest_first):
        if track.fails and track.se_id not in overtaken and (track.name or at == 0):
            return track
        if track.se_id:
            overtaken.add(track.se_id)
    return None


def _filled(track: _Track, others: list[_Track]) -> dict[Step, Link]:
    """A track's links, and for steps before its last one those of `others` where they went well.

    One SE's way leaves marks on several tracks: TLS before it can say its attempt id, the link when it no longer does.
    """
    links = dict(track.links)
    last = max(_STEPS.index(step) for step in links)
    for step in _STEPS[:last]:
        if step not in links:
            noted = (other.links[step] for other in others if step in other.links)
            found = next((link for link in noted if link.result is StepResult.OK), None)
            if found is not None:
                links[step] = found
    return links


def _plain(address: str) -> str:
    """IPv4 as a dual-stack socket shows it (RFC 4291 section 2.5.5.2) becomes what an operator would type."""
    mapped = address.lower().removeprefix("::ffff:")
    return mapped if "." in mapped else address


def _clip(text: str) -> str:
    return text[: MAX_TEXT if text.isascii() else MAX_TEXT // 3]
