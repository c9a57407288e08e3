"""The trust document in force: what SEs with an older one are sent, and how a new version comes about.

A new version is signed, stored durably, and only then handed out: with grants, refreshes, hellos and heartbeats.
While a former root's key is kept it signs too, so that an SE which slept through a change of root can still follow.
Only roots sign it; where they have a passphrase, they must be open.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from appliance.controller.material import Material
from appliance.controller.switching import staged
from appliance.pki.envelope import combine
from appliance.protocol import strict_json
from appliance.protocol.trust import TRUST_TYPE, Envelope, TrustDocument
from appliance.storage.atomic import write_atomic


class Publication:
    """What this cluster says about itself. One loop only."""

    def __init__(
        self, material: Material, *, on_publish: Callable[[TrustDocument], None], wall: Callable[[], float]
    ) -> None:
        """`on_publish` is told each new document before anybody else."""
        self._material = material
        self._on_publish = on_publish
        self._wall = wall

    @property
    def document(self) -> TrustDocument:
        """The document in force."""
        return self._material.trust

    @property
    def envelope(self) -> Envelope:
        """The document in force as it is sent."""
        return self._material.envelope

    @property
    def version(self) -> int:
        """Its version."""
        return self._material.trust.version

    def _signed(self, at_least: int, changes: dict[str, Any]) -> bytes:
        document = msgspec.structs.replace(
            self._material.trust, version=max(self.version + 1, at_least), signed_at=int(self._wall()), **changes
        )
        body = strict_json.encode(document)
        return strict_json.encode(combine([authority.sign(TRUST_TYPE, body) for authority in self._material.signers]))

    def publish(self, *, at_least: int = 0, **changes: Any) -> TrustDocument:
        """Puts a new version with `changes` (fields of `TrustDocument`) in force; none are needed where nothing
        differs. Its number is one more, and `at_least` so high.

        Raises:
            PassphraseError: the root key is locked.
            StorageError: it could not be stored; the one in force stays.
        """
        material = self._material
        if all(getattr(material.trust, name) == value for name, value in changes.items()):
            return material.trust
        write_atomic(material.files.trust, self._signed(at_least, changes), mode=0o644)
        return self.reload()

    def stage(self, **changes: Any) -> None:
        """Writes what `publish` would put in force beside it, to be switched with other files; then call `reload`.

        Raises:
            PassphraseError, StorageError: as `publish`.
        """
        write_atomic(staged(self._material.files.trust), self._signed(0, changes), mode=0o644)

    def reload(self) -> TrustDocument:
        """Puts the document on disk in force. Raises `StorageError`."""
        self._material.load_trust()
        self._on_publish(self.document)
        return self.document
