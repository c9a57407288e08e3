"""The trust document in force: what SEs with an older one are sent, and how a new version comes about.

A new version is signed, stored durably, and only then handed out: with grants, refreshes, hellos and heartbeats.
While a former root's key is kept it signs too, so that an SE which slept through a change of root can still follow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from appliance.controller.material import Material
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

    def publish(self, *, at_least: int = 0, **changes: Any) -> TrustDocument:
        """Puts a new version with `changes` (fields of `TrustDocument`) in force; none are needed where nothing
        differs. Its number is one more, and `at_least` so high.

        Raises:
            StorageError: it could not be stored; the one in force stays.
        """
        material = self._material
        if all(getattr(material.trust, name) == value for name, value in changes.items()):
            return material.trust
        document = msgspec.structs.replace(
            material.trust, version=max(self.version + 1, at_least), signed_at=int(self._wall()), **changes
        )
        body = strict_json.encode(document)
        envelope = combine([authority.sign(TRUST_TYPE, body) for authority in material.signers])
        write_atomic(material.files.trust, strict_json.encode(envelope), mode=0o644)
        material.trust, material.envelope = document, envelope
        self._on_publish(document)
        return document
