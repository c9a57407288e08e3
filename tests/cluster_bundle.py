"""A cluster's trust material without a controller, and the bundle that one would write."""

from __future__ import annotations

from typing import Any

import msgspec

from appliance.pki import image_key, ssh_keys
from appliance.pki.authority import Authority
from appliance.protocol import strict_json
from appliance.protocol.seed import Bundle
from appliance.protocol.trust import TRUST_TYPE, TrustDocument, TrustNode

NOW = 1_800_000_000


class Cluster:
    """A root with what a controller makes of it."""

    def __init__(self) -> None:
        self.authority = Authority.create("c-1", now=NOW)
        self.host_key, self.host_line = ssh_keys.generate()
        self.image_key_id, self.image_key = image_key.create_image_key()

    def document(self, **changes: Any) -> TrustDocument:
        document = TrustDocument(
            cluster_id="c-1",
            version=1,
            epoch=1,
            signed_at=NOW,
            roots=[self.authority.certificate_pem.decode()],
            nodes=[TrustNode(number=1, enroll=["c.example:8443"], ssh=["c.example:22"], host_keys=[self.host_line])],
        )
        return msgspec.structs.replace(document, **changes)

    def bundle(self, document: TrustDocument | None = None, **changes: Any) -> bytes:
        bundle = Bundle(
            schema=1,
            cluster_id="c-1",
            root_ca=self.authority.certificate_pem.decode(),
            trust=self.authority.sign(TRUST_TYPE, strict_json.encode(document or self.document())),
            image_key_id=self.image_key_id,
            image_key=self.image_key.pkcs8().reveal().decode(),
            controllers=["c.example:8443"],
        )
        return strict_json.encode(msgspec.structs.replace(bundle, **changes))
