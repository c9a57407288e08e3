"""What this SE believes about its cluster: the newest verified trust document, and what follows from it on disk.

A document is accepted when a root of the document in force signed it (at first boot: the seed's root), it is of the
same cluster, and its version is higher. It is stored before anybody acts on it. The keys it names may log in to this
SE's sshd from the reverse path alone, which ends on this machine: `from="127.0.0.1,::1"`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from appliance.errors import DocumentBrokenError, TrustError
from appliance.pki.trust import verify_trust
from appliance.protocol import strict_json
from appliance.protocol.trust import MAX_TRUST_BYTES, Envelope, TrustDocument, replaces
from appliance.runtime import log
from appliance.storage.atomic import read_limited, write_atomic
from appliance.storage.document import Document

_MAX_KEYS_BYTES = 1 << 20


class Beliefs:
    """The trust document in force. Thread-safe."""

    def __init__(self, document: Document[Envelope], *, authorized_keys: Path) -> None:
        self._log = log.bind("tunnel")
        self._file = document
        self._authorized_keys = authorized_keys
        self._lock = threading.RLock()
        self._current: TrustDocument | None = None
        self._listeners: list[Callable[[TrustDocument], None]] = []

    @property
    def current(self) -> TrustDocument:
        """The document in force. Raises `TrustError` where there is none yet."""
        if self._current is None:
            raise TrustError("this SE has no trust document", hint="it comes with the seed; bake one")
        return self._current

    @property
    def version(self) -> int:
        """The version in force, 0 where there is none."""
        return 0 if self._current is None else self._current.version

    def on_change(self, listener: Callable[[TrustDocument], None]) -> None:
        """Calls `listener` with each document that takes force from now on."""
        self._listeners.append(listener)

    def load(self, fallback: Envelope | None) -> None:
        """Reads the stored document; where it is missing or broken, the grant's takes its place.

        Both were verified before they were stored; the file's checksum is what is checked again.

        Args:
            fallback: the grant's trust document.

        Raises:
            StorageError: can't be read, or is of a newer version of this program.
        """
        try:
            stored = self._file.load()
        except DocumentBrokenError as error:
            self._log.error("%s", error.message, extra={"code": error.code})
            stored = None
        for envelope in (stored, fallback):
            if envelope is not None:
                document = strict_json.decode(envelope.body(), TrustDocument, max_bytes=MAX_TRUST_BYTES)
                if self._current is None or document.version > self._current.version:
                    self._current = document
        if self._current is not None:
            self._write_login_keys(self._current)

    def start_from_seed(self, envelope: Envelope, document: TrustDocument) -> None:
        """Takes a seed's verified document, before this SE is enrolled: whatever stood there came from another seed."""
        with self._lock:
            if self._current is not None and self._current.cluster_id == document.cluster_id:
                if document.version <= self._current.version:
                    return
            elif self._current is not None:
                self._log.warning(
                    "the seed is of cluster %s now, not %s", document.cluster_id, self._current.cluster_id
                )
            self._put(envelope, document)

    def accept(self, envelope: Envelope) -> bool:
        """Verifies a document from a controller and keeps it where it is newer. Returns whether it took force.

        Raises:
            TrustError, MalformedError: it does not hold; the one in force stays.
            StorageError: it could not be stored; the one in force stays.
        """
        with self._lock:
            current = self.current
            document = verify_trust(envelope, anchors=current.roots, current=current)
            if not replaces(document, current):
                return False
            self._put(envelope, document)
        return True

    def _put(self, envelope: Envelope, document: TrustDocument) -> None:
        self._file.save(envelope)
        # Before it counts as in force: what fails here is done again with the next answer that brings the document.
        self._write_login_keys(document)
        self._current = document
        self._log.info(
            "trust document version %d of cluster %s is in force, %d nodes",
            document.version,
            document.cluster_id,
            len(document.nodes),
        )
        for listener in self._listeners:
            listener(document)

    def _write_login_keys(self, document: TrustDocument) -> None:
        lines = [f'from="127.0.0.1,::1" {key} cluster-{document.cluster_id}\n' for key in document.login_keys]
        content = "".join(lines).encode()
        try:
            if read_limited(self._authorized_keys, max_bytes=_MAX_KEYS_BYTES) == content:
                return
        except FileNotFoundError:
            pass
        write_atomic(self._authorized_keys, content, mode=0o600)
