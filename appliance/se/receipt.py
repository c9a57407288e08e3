"""The receipt at hand: whether it still proves this SE's enrollment, and taking a new one.

A receipt proves nothing to a restored controller that doesn't count its signer: a root that was replaced and forgotten,
an issuing CA that was revoked. So a new one is due, at hello or on the live link, when

    key        it is for another key than this SE's (the answer to a change of key got lost)
    roots      since it was given the trust document lost a root
    revoked    since it was given the trust document revoked a key

That may ask for one too many, and needs no certificate to be read: an SE with a link seldom does (memory). Under which
trust document it was given is that of the grant; of a later receipt it is remembered by this process alone.
"""

from __future__ import annotations

import threading

from appliance.errors import ApplianceError, StorageError
from appliance.pki.trust import verify_receipt
from appliance.protocol import strict_json
from appliance.protocol.trust import MAX_TRUST_BYTES, Envelope, Receipt, TrustDocument, outlasts
from appliance.runtime import log
from appliance.se.believed import Beliefs
from appliance.se.identity import SeState

_MAX_RECEIPT_BYTES = 4 * 1024


class Receipts:
    """The receipt of one SE. Thread-safe.

    Args:
        state: where it is stored, with the grant it came with.
        beliefs: by which it is verified.
    """

    def __init__(self, state: SeState, beliefs: Beliefs) -> None:
        self._log = log.bind("tunnel")
        self._state = state
        self._beliefs = beliefs
        self._lock = threading.Lock()
        self._given_under: TrustDocument | None = None

    @property
    def is_due(self) -> bool:
        """Whether a new one is to be asked for."""
        grant = self._state.grant
        if grant is None:
            return False
        receipt = strict_json.decode(grant.receipt.body(), Receipt, max_bytes=_MAX_RECEIPT_BYTES)
        if receipt.thumbprint != self._state.identity.thumbprint:
            return True
        under = self._given_under
        if under is None:
            under = strict_json.decode(grant.trust.body(), TrustDocument, max_bytes=MAX_TRUST_BYTES)
        return not outlasts(under, self._beliefs.current)

    def checked(self, envelope: Envelope | None, thumbprint: str) -> Envelope | None:
        """Returns a receipt where it holds, and is for this SE with that key; without one, the next hello asks."""
        grant = self._state.grant
        if envelope is None or grant is None:
            return None
        try:
            current = self._beliefs.current
            receipt = verify_receipt(envelope, current.roots, current.revoked_node_keys)
        except ApplianceError as error:
            self._log.warning("the receipt for this SE's key is not kept: %s", error.message)
            return None
        return envelope if (receipt.se_id, receipt.thumbprint) == (grant.se_id, thumbprint) else None

    def keep(self, envelope: Envelope | None) -> None:
        """Stores a receipt for this SE's key in place of the one at hand, where it holds."""
        with self._lock:
            under = self._beliefs.current
            receipt = self.checked(envelope, self._state.identity.thumbprint)
            if receipt is None:
                return
            try:
                self._state.save_receipt(receipt)
            except StorageError as error:
                # The next hello asks again; a full disk is no reason to lose the link.
                self._log.error("the new receipt could not be stored: %s", error.message)
                return
            self._given_under = under
            self._log.info("a new receipt of this SE's enrollment is kept, under trust document %d", under.version)
