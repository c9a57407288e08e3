"""The trust document in force: what SEs with an older one are sent, and how a new version comes about.

A new version is signed, stored durably, and only then handed out: with grants, refreshes, hellos and heartbeats.
While a former root's key is kept it signs too, for agents that don't ask for what they missed; who does, gets the
documents that ended changes of root one by one (`following`).
Only roots sign it; where they have a passphrase, they must be open.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from appliance.controller.material import Material
from appliance.controller.switching import staged
from appliance.errors import UsageError
from appliance.pki.envelope import combine
from appliance.protocol import strict_json
from appliance.protocol.trust import MAX_TRUST_BYTES, TRUST_TYPE, Envelope, TrustDocument
from appliance.storage.atomic import write_atomic

ROOM_BYTES = 16 * 1024
"""What revoked keys, which stay in the document for ever, must leave of it: to announce a new root takes 2 KiB."""
NEARLY_FULL = 0.8
"""Part of what the document may be above which operators are told."""

_WAY_OUT = (
    "where an issuing CA's key is in wrong hands, `appliance controller issuing-ca renew` without --revoke and then "
    "`rotate-ca`: after that SEs believe nothing that it signed"
)


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

    def in_force(self) -> str:
        """What counts now, for people."""
        material = self._material
        lock = "under a passphrase" if material.authority.is_locked else "without a passphrase"
        issuing = material.issuing.fingerprint if material.issuing else "none"
        return f"trust document version {self.version}, root key {lock}, issuing CA {issuing}"

    def problem(self) -> str:
        """A document that is nearly as large as it may be, "" where it isn't."""
        size = len(strict_json.encode(self.envelope))
        if size <= NEARLY_FULL * MAX_TRUST_BYTES:
            return ""
        return f"the trust document has {size >> 10} of the {MAX_TRUST_BYTES >> 10} KiB that it may have: {_WAY_OUT}"

    def following(self, version: int) -> Envelope:
        """The document for an SE that has `version`: the one in force, or, where it slept through changes of root, the
        one that ended the next of them, which a root that it knows signed."""
        missed = (entry.envelope for entry in self._material.successions if entry.version > version)
        return next(missed, self.envelope)

    def _signed(self, at_least: int, changes: dict[str, Any]) -> tuple[int, bytes]:
        document = msgspec.structs.replace(
            self._material.trust, version=max(self.version + 1, at_least), signed_at=int(self._wall()), **changes
        )
        body = strict_json.encode(document)
        signed = combine([authority.sign(TRUST_TYPE, body) for authority in self._material.signers])
        envelope = strict_json.encode(signed)
        most = MAX_TRUST_BYTES - (ROOM_BYTES if "revoked_node_keys" in changes else 0)
        if len(envelope) > most:
            # Stored, neither the next start of this node nor a restore would read it, and no SE a larger one.
            raise UsageError(
                f"the trust document would have {len(envelope)} bytes, at most {most} expected; "
                f"{len(document.revoked_node_keys)} revoked keys are in it",
                hint=f"nothing was changed; {_WAY_OUT}",
            )
        return document.version, envelope

    def publish(self, *, at_least: int = 0, **changes: Any) -> TrustDocument:
        """Puts a new version with `changes` (fields of `TrustDocument`) in force; none are needed where nothing
        differs. Its number is one more, and `at_least` so high.

        Raises:
            PassphraseError: the root key is locked.
            UsageError: it would be larger than what is read; the one in force stays.
            StorageError: it could not be stored; the one in force stays.
        """
        material = self._material
        if all(getattr(material.trust, name) == value for name, value in changes.items()):
            return material.trust
        write_atomic(material.files.trust, self._signed(at_least, changes)[1], mode=0o644)
        return self.reload()

    def stage(self, **changes: Any) -> int:
        """Writes what `publish` would put in force beside it, to be switched with other files; then call `reload`.
        Returns its version.

        Raises:
            PassphraseError, UsageError, StorageError: as `publish`.
        """
        version, signed = self._signed(0, changes)
        write_atomic(staged(self._material.files.trust), signed, mode=0o644)
        return version

    def reload(self) -> TrustDocument:
        """Puts the document on disk in force. Raises `StorageError`."""
        self._material.load_trust()
        self._on_publish(self.document)
        return self.document
