"""This SE as a witness of the controllers' audits: keeps the newest signed head of each node, durably, and shows it.

`witness.json` holds at most `MAX_AUDIT_HEADS` epochs of each of `MAX_NODES` nodes. A head that a root didn't sign, or
that is older than the one kept for its node and epoch, is passed over: a controller that was set back must be shown
what it said before. A broken file was set aside by `storage`; losing it costs a witness, nothing else.
"""

from __future__ import annotations

import threading
from pathlib import Path

import msgspec

from appliance.errors import ApplianceError, DocumentBrokenError
from appliance.pki.trust import verify_audit_head
from appliance.protocol import strict_json
from appliance.protocol.trust import AuditHead, Envelope
from appliance.protocol.tunnel import MAX_AUDIT_HEADS
from appliance.runtime import log
from appliance.se.believed import Beliefs
from appliance.storage.document import Document

MAX_NODES = 16
_MAX_BODY_BYTES = 1024


class WitnessBook(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`witness.json`: newest epochs last, node by node."""

    heads: list[Envelope] = []


class Witness:
    """The heads that are kept. Thread-safe."""

    def __init__(self, path: Path, beliefs: Beliefs) -> None:
        self._log = log.bind("tunnel")
        self._document = Document(path, WitnessBook)
        self._beliefs = beliefs
        self._lock = threading.Lock()
        self._heads: dict[tuple[int, int], tuple[AuditHead, Envelope]] = {}

    def load(self) -> None:
        """Reads what is kept. Raises `StorageError` where it can't be read, or is of a newer version."""
        try:
            book = self._document.load() or WitnessBook()
        except DocumentBrokenError as error:
            self._log.error("%s", error.message, extra={"code": error.code})
            book = WitnessBook()
        for envelope in book.heads:
            head = strict_json.decode(envelope.body(), AuditHead, max_bytes=_MAX_BODY_BYTES)
            self._heads[head.node, head.epoch] = (head, envelope)

    def heads(self, node: int) -> list[Envelope]:
        """Those of a node, newest epoch first."""
        with self._lock:
            found = sorted((key for key in self._heads if key[0] == node), reverse=True)
            return [self._heads[key][1] for key in found]

    def keep(self, envelope: Envelope) -> None:
        """Keeps a head where it is the newest; what goes wrong is told and costs no link."""
        try:
            current = self._beliefs.current
            head = verify_audit_head(envelope, current.roots, current.revoked_node_keys)
            with self._lock:
                self._keep(head, envelope)
        except ApplianceError as error:
            self._log.warning("the controller's audit head is not kept: %s", error.message)

    def _keep(self, head: AuditHead, envelope: Envelope) -> None:
        key = (head.node, head.epoch)
        known = self._heads.get(key)
        if known is not None and head.sequence <= known[0].sequence:
            return
        heads = {**self._heads, key: (head, envelope)}
        epochs = sorted(epoch for node, epoch in heads if node == head.node)
        for epoch in epochs[:-MAX_AUDIT_HEADS]:
            del heads[head.node, epoch]
        if key not in heads or len({node for node, _ in heads}) > MAX_NODES:
            return
        self._document.save(WitnessBook(heads=[kept for _, (_, kept) in sorted(heads.items())]))
        self._heads = heads
