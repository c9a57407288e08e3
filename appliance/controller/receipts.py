"""Receipts: the controller's signed word that an SE enrolled, given with each grant and shown after a restore."""

from __future__ import annotations

from appliance.controller.material import Material
from appliance.controller.records import SeRecord
from appliance.pki.trust import verify_receipt
from appliance.protocol import strict_json
from appliance.protocol.trust import RECEIPT_TYPE, Envelope, Receipt


class Receipts:
    """Signs and verifies them with the cluster's roots."""

    def __init__(self, material: Material) -> None:
        self._material = material

    def sign(self, record: SeRecord) -> Envelope:
        """Returns the receipt of an enrolled SE as it stands now."""
        cluster = self._material.cluster
        receipt = Receipt(
            cluster_id=cluster.cluster_id,
            se_id=record.se_id,
            thumbprint=record.thumbprint,
            number=record.number,
            image_key_id=record.image_key_id,
            epoch=cluster.epoch,
            issued_at=int(record.key_since),
            name=record.name,
            labels=record.labels,
        )
        return self._material.issuer.sign(RECEIPT_TYPE, strict_json.encode(receipt))

    def check(self, envelope: Envelope) -> Receipt:
        """Returns a receipt that a root of this cluster signed, be it the former one, or an issuing CA in its name.

        Raises as `verify_receipt`.
        """
        return verify_receipt(envelope, self._material.anchors, self._material.trust.revoked_node_keys)
