"""Keeps one link to each node that the trust document names, for ever.

One thread per node: dial, live, wait, dial again, at the address that worked last, else at the next one. The back-off
starts over only after a link that lived (`protocol.tunnel.STEADY_AFTER_S`). A changed trust document is followed at
once: new nodes are dialled, nodes that are gone, moved or have other host keys are hung up on.

Who needs a link (the forward side, the refresh) asks here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from appliance.errors import ApplianceError, TunnelError
from appliance.protocol.trust import TrustDocument, TrustNode
from appliance.protocol.tunnel import STEADY_AFTER_S, LinkState
from appliance.protocol.why import Step, StepResult
from appliance.runtime import log
from appliance.runtime.backoff import Backoff
from appliance.runtime.clock import Clock
from appliance.runtime.stop import StopToken
from appliance.se.caller import Caller
from appliance.se.channel_api import ByteChannel
from appliance.se.ssh import KEY_REFUSED
from appliance.se.tunnel import THERE, Link

JOIN_TIMEOUT_S = 2.0
MOST_SLOTS = 5
"""Slots in a row that an address may give; after that it counts as one that doesn't answer."""


class _Line:
    """What is kept for one node: its token, its thread, its current link."""

    def __init__(self, node: TrustNode, stop: StopToken) -> None:
        self.node = node
        """As the current link was dialled."""
        self.newest = node
        """As it is dialled next."""
        self.stop = stop
        self.link: Link | None = None
        self.thread: threading.Thread | None = None


class Links:
    """The service. `run` blocks until stopped.

    Args:
        caller: makes the caller as it is now; asked at each dial, since a refresh may change the grant.
        wanted: the trust document in force.
        most: links at a time; nodes of low number first.
        clock: monotonic time.
        on_change: called after each move of any link.
    """

    def __init__(
        self,
        caller: Callable[[], Caller],
        wanted: Callable[[], TrustDocument],
        *,
        most: int,
        clock: Clock,
        on_change: Callable[[], None],
    ) -> None:
        self._log = log.bind("tunnel")
        self._caller = caller
        self._wanted = wanted
        self._most = most
        self._on_change = on_change
        self._changed = threading.Condition()
        self._stale = True
        self._lines: dict[int, _Line] = {}
        self._made = 0
        self._clock = clock
        self._there_at = self._clock.monotonic()

    def follow(self, _document: TrustDocument | None = None) -> None:
        """The trust document or the grant changed: looks anew. For any thread; doesn't wait."""
        with self._changed:
            self._stale = True
            self._changed.notify_all()

    def states(self) -> dict[int, LinkState]:
        """Node number to the state of its link."""
        with self._changed:
            lines = list(self._lines.values())
        return {line.node.number: line.link.state if line.link else LinkState.IDLE for line in lines}

    def down_for_s(self) -> float:
        """How long no link has been there, seconds; 0 while one is."""
        if any(state in THERE for state in self.states().values()):
            return 0.0
        return self._clock.monotonic() - self._there_at

    def open_channel(self, host: str, port: int) -> ByteChannel:
        """Opens a channel over the first link that is up. Raises `TunnelError` where none is."""
        with self._changed:
            links = [line.link for _, line in sorted(self._lines.items()) if line.link is not None]
        for link in links:
            if link.state is LinkState.UP:
                return link.open_channel(host, port)
        raise TunnelError("no link to a controller is up", hint="see `appliance why`")

    def run(self, stop: StopToken) -> None:
        """Keeps links until stopped."""
        withdraw = stop.on_stop(self.follow)
        try:
            while not stop.stopped:
                with self._changed:
                    while not self._stale:
                        self._changed.wait()
                    self._stale = False
                if not stop.stopped:
                    self._reconcile(stop)
        finally:
            withdraw()
            self._end(list(self._lines.values()), stop.reason or "the links end")

    def _reconcile(self, stop: StopToken) -> None:
        nodes = sorted(self._wanted().nodes, key=lambda node: node.number)[: self._most]
        wanted = {node.number: node for node in nodes if node.ssh}
        gone = [line for number, line in self._lines.items() if not _still_holds(line, wanted.get(number))]
        self._end(gone, "the trust document changed")
        for number, node in wanted.items():
            with self._changed:
                if number in self._lines:
                    self._lines[number].newest = node
                    continue
                line = self._lines[number] = _Line(node, stop.child())
            line.thread = threading.Thread(target=self._keep, args=(line,), name=f"link {number}", daemon=True)
            line.thread.start()

    def _end(self, lines: list[_Line], reason: str) -> None:
        for line in lines:
            self._log.info("hanging up on node %d: %s", line.node.number, reason)
            line.stop.stop(reason)
        for line in lines:
            if line.thread is not None:
                line.thread.join(JOIN_TIMEOUT_S)
            with self._changed:
                if self._lines.get(line.node.number) is line:
                    del self._lines[line.node.number]

    def _carries(self, number: int) -> bool:
        """Telemetry goes over one link only: that of the lowest node that is up."""
        return number == min((node for node, state in self.states().items() if state is LinkState.UP), default=0)

    def _keep(self, line: _Line) -> None:
        """Body of a node's thread."""
        settings = self._caller().settings
        backoff = Backoff(first_s=settings.redial_first_s, most_s=settings.redial_most_s)
        turn = slots = 0
        while not line.stop.stopped:
            node = line.node = line.newest
            endpoint = node.ssh[turn % len(node.ssh)]
            link = line.link = Link(
                self._caller(),
                node,
                endpoint,
                earlier_links=self._made,
                carries=lambda: self._carries(line.node.number),
                on_state=lambda _state: self._on_change(),
            )
            started = self._clock.monotonic()
            try:
                link.run(line.stop)
            except ApplianceError as error:
                line.link = None
                if error.code == KEY_REFUSED:
                    link.keys.key_refused()
                self._lost(link, node, error)
            except OSError as error:
                line.link = None
                text = f"this SE's own system refuses what a link needs: {error.strerror or error}"
                hint = "the next try may do; see open files (`ls /proc/PID/fd`), memory and disk of this machine"
                self._lost(link, node, TunnelError(text, hint=hint, code="TUNNEL-047"))
            except Exception:  # noqa: BLE001 - top of a thread: what is a defect of one try is told, and tried again
                self._log.exception("link to node %d: a defect ended it", node.number)
            line.link = None
            if link.was_there:
                self._made += 1
                self._there_at = self._clock.monotonic()
                if self._clock.monotonic() - started >= STEADY_AFTER_S:
                    backoff.reset()
            slots = 0 if link.slot_s is None else slots + 1
            keeps_slot = 0 < slots <= MOST_SLOTS
            if not link.was_there and not keeps_slot:
                turn, slots = turn + 1, 0
            # A slot is no failure: it is obeyed as it is, and the back-off doesn't grow. But nobody has proved anything
            # who gives one: whoever gives no end of them keeps this SE from no other address.
            line.stop.wait(link.slot_s if keeps_slot and link.slot_s is not None else backoff.next_s())

    def _lost(self, link: Link, node: TrustNode, error: ApplianceError) -> None:
        self._log.warning(
            "link to node %d at %s %s: %s",
            node.number,
            link.endpoint,
            "lost" if link.was_there else "did not come up",
            error.message,
            extra={"code": error.code, "hint": error.hint, "node": node.number},
        )
        if not any(state in THERE for state in self.states().values()):
            self._caller().tell(Step.LINK, StepResult.FAILED, error.message, error.code, error.hint)


def _still_holds(line: _Line, node: TrustNode | None) -> bool:
    """Whether a line may stay: the same addresses, and no host key taken away."""
    return node is not None and node.ssh == line.node.ssh and set(line.node.host_keys) <= set(node.host_keys)
