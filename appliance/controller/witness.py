"""Signed audit heads: handed to SEs, and judged when an SE shows one again.

Who holds the controller's disk can cut its audit off, or set the whole node back to a snapshot; a chain alone can't
show that. So the root signs the chain's newest entry, SEs keep it, and each hello brings the newest that an SE has. A
head that the chain doesn't have is told as a problem, an event and an audit entry, once for each. Heads are signed at
the start, each `SIGN_S` where something was added, and on demand.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from appliance.controller.audit import Audit
from appliance.controller.events import Events
from appliance.controller.material import Material
from appliance.controller.recovery import Recovery
from appliance.controller.registry import Registry
from appliance.errors import ApplianceError
from appliance.pki.trust import MAX_HEAD_BYTES, verify_audit_head
from appliance.protocol import strict_json
from appliance.protocol.audit import HeadVerdict, judge_head
from appliance.protocol.trust import AUDIT_HEAD_TYPE, AuditHead, Envelope
from appliance.protocol.tunnel import MAX_AUDIT_HEADS

_log = logging.getLogger(__name__)

SIGN_S = 300.0
MAX_TOLD = 16
"""Different heads that are told; more would say nothing new."""


class Witness:
    """One node's heads. One loop only."""

    def __init__(
        self,
        material: Material,
        registry: Registry,
        recovery: Recovery,
        events: Events,
        *,
        wall: Callable[[], float],
    ) -> None:
        self._material = material
        self._registry = registry
        self._recovery = recovery
        self._events = events
        self._wall = wall
        self._signed_at = 0.0
        self.head: AuditHead | None = None
        """The newest that was signed since the start."""
        self.envelope: Envelope | None = None
        self._told: dict[tuple[int, int, str], str] = {}

    @property
    def _audit(self) -> Audit:
        return self._registry.audit

    def sign(self) -> Envelope:
        """Signs the chain's newest entry; SEs get it with their next hello or heartbeat."""
        cluster, now = self._material.cluster, self._wall()
        head = AuditHead(
            cluster_id=cluster.cluster_id,
            node=cluster.node,
            epoch=cluster.epoch,
            sequence=self._audit.count,
            hash=self._audit.head,
            time=int(now),
        )
        envelope = self._material.issuer.sign(AUDIT_HEAD_TYPE, strict_json.encode(head))
        self.head, self.envelope, self._signed_at = head, envelope, now
        return envelope

    def keep_fresh(self) -> None:
        """Signs where something was added and the newest head is old enough."""
        is_stale = self.head is None or self.head.hash != self._audit.head
        if is_stale and not 0 <= self._wall() - self._signed_at < SIGN_S:
            self.sign()

    def newer_than(self, sequence: int) -> Envelope | None:
        """The newest head, where an SE has only seen one of `sequence`."""
        return self.envelope if self.head is not None and self.head.sequence > sequence else None

    @property
    def problems(self) -> list[str]:
        """What heads have shown, one sentence each."""
        return list(self._told.values())

    async def shown(self, envelopes: Sequence[Envelope], *, by: str, source: str) -> None:
        """Judges heads that an SE brought with its hello. `by` is its name."""
        for envelope in envelopes[:MAX_AUDIT_HEADS]:
            try:
                head = verify_audit_head(envelope, self._material.anchors, self._material.trust.revoked_node_keys)
            except ApplianceError as error:
                _log.warning("%s shows an audit head that doesn't hold: %s", by, error.message)
                if self._is_of_lost_time(envelope):
                    self._recovery.root_unknown(by)
                continue
            if head.node == self._material.cluster.node:
                await self._judge(head, by, source)

    def _is_of_lost_time(self, envelope: Envelope) -> bool:
        """Whether a head whose signer isn't known says that it is from between the backup and its restore."""
        record, cluster = self._recovery.record, self._material.cluster
        try:
            head = strict_json.decode(envelope.body(), AuditHead, max_bytes=MAX_HEAD_BYTES)
        except ApplianceError:
            return False
        is_ours = (head.cluster_id, head.node) == (cluster.cluster_id, cluster.node)
        if record is None or not is_ours or not record.backup_epoch <= head.epoch < record.epoch:
            return False
        # An older one may be of a root that was replaced before the backup: its SE slept since.
        return head.time >= record.backup_made_at

    async def _judge(self, head: AuditHead, by: str, source: str) -> None:
        entry = await self._audit.entry(head.sequence)
        verdict = judge_head(head, entry, epoch=self._material.cluster.epoch)
        if verdict is HeadVerdict.LOST:
            self._recovery.head_lost(head)
        key = (head.epoch, head.sequence, head.hash)
        if verdict in {HeadVerdict.HOLDS, HeadVerdict.LOST} or key in self._told or len(self._told) >= MAX_TOLD:
            return
        text = (
            f"the audit was set back: {by} remembers entry {head.sequence} of epoch {head.epoch} ({head.hash[:12]}…), "
            f"{verdict.value}; this chain ends with entry {self._audit.count} of epoch {self._material.cluster.epoch}"
        )
        self._told[key] = (
            f"{text}. If this node was set back to a snapshot: back it up and restore that into a fresh root, so that "
            "numbers and trust jump ahead"
        )
        self._events.emit("tunnel", "audit.set-back", f"node {head.node}", text)
        await self._registry.note(
            actor=f"se {source}", action="audit.set-back", subject=f"node {head.node}",
            detail=f"{by}: entry {head.sequence} of epoch {head.epoch}, hash {head.hash}",
        )  # fmt: skip
