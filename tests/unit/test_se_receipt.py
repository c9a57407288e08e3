"""se.receipt: when an SE needs another receipt, and which one it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from appliance.paths import Paths
from appliance.pki.authority import Authority, Issuer
from appliance.pki.identity import Identity
from appliance.protocol import strict_json
from appliance.protocol.enroll import Grant
from appliance.protocol.trust import RECEIPT_TYPE, TRUST_TYPE, Envelope, Receipt, TrustDocument
from appliance.se.believed import Beliefs
from appliance.se.identity import SeState
from appliance.se.receipt import Receipts

NOW = 1_790_000_000
ROOT, NEXT = (Authority.create("c-1", now=NOW) for _ in range(2))
ISSUED = ROOT.issue_issuing(now=NOW)
ISSUING = Issuer.load(ISSUED.certificate_pem, ISSUED.key.reveal())


def trust(version: int, *roots: Authority, signer: Issuer = ROOT, **changes: Any) -> Envelope:
    pems = [root.certificate_pem.decode() for root in roots or (ROOT,)]
    document = TrustDocument(
        cluster_id="c-1", version=version, epoch=0, signed_at=NOW, roots=pems, nodes=[], **changes
    )  # fmt: skip
    return signer.sign(TRUST_TYPE, strict_json.encode(document))


class Stand:
    """An SE with a grant whose receipt an issuing CA signed."""

    def __init__(self, root: Path) -> None:
        self.state = SeState(Paths(root))
        self.state.create(image_id="i")
        self.state.save_grant(
            Grant(
                cluster_id="c-1", se_id=self.state.require().se_id, name="se-1", number=1, address="127.1.0.1",
                trust=trust(1), receipt=self.receipt(ISSUING), heartbeat_interval_s=5.0,
            )
        )  # fmt: skip
        self.beliefs = Beliefs(self.state.trust_document, authorized_keys=self.state.authorized_keys_path)
        self.beliefs.load(trust(1))
        self.receipts = Receipts(self.state, self.beliefs)

    def receipt(self, by: Issuer, **changes: Any) -> Envelope:
        own = {"se_id": self.state.require().se_id, "thumbprint": self.state.identity.thumbprint, **changes}
        return by.sign(
            RECEIPT_TYPE,
            strict_json.encode(
                Receipt(cluster_id="c-1", number=1, image_key_id="ik", epoch=1, issued_at=NOW, **own)
            ),
        )  # fmt: skip

    @property
    def kept(self) -> Envelope:
        assert self.state.grant is not None
        return self.state.grant.receipt


@pytest.fixture
def stand(tmp_path: Path) -> Stand:
    return Stand(tmp_path)


def test_without_a_grant_there_is_nothing_to_prove(tmp_path: Path) -> None:
    state = SeState(Paths(tmp_path))
    receipts = Receipts(state, Beliefs(state.trust_document, authorized_keys=state.authorized_keys_path))
    assert not receipts.is_due
    assert receipts.checked(trust(1), "t") is None


def test_one_is_due_for_another_key(stand: Stand) -> None:
    assert not stand.receipts.is_due
    stand.state.next_identity()
    stand.state.promote_key()
    assert stand.receipts.is_due
    stand.receipts.keep(stand.receipt(ROOT))
    assert not stand.receipts.is_due


def test_one_is_due_when_a_root_is_gone_and_not_when_one_is_announced(stand: Stand) -> None:
    stand.beliefs.accept(trust(2, ROOT, NEXT))
    assert not stand.receipts.is_due
    stand.beliefs.accept(trust(3, NEXT))
    assert stand.receipts.is_due
    stand.receipts.keep(stand.receipt(ROOT))
    assert stand.receipts.is_due, "the former root's proves nothing"
    stand.receipts.keep(wanted := stand.receipt(NEXT))
    assert stand.kept == wanted
    assert not stand.receipts.is_due
    # After a restart it is asked for once more, which does no harm.
    assert Receipts(stand.state, stand.beliefs).is_due


def test_one_is_due_when_a_key_was_revoked(stand: Stand) -> None:
    stand.beliefs.accept(trust(2, revoked_node_keys=[ISSUING.key_id]))
    assert stand.receipts.is_due
    stand.receipts.keep(stand.receipt(ISSUING))
    assert stand.receipts.is_due
    stand.receipts.keep(stand.receipt(ROOT))
    assert not stand.receipts.is_due


@pytest.mark.parametrize("changes", [{"thumbprint": Identity.create().thumbprint}, {"se_id": "0" * 8}])
def test_a_receipt_for_somebody_else_is_not_kept(stand: Stand, changes: dict[str, str]) -> None:
    before = stand.kept
    stand.receipts.keep(stand.receipt(ROOT, **changes))
    stand.receipts.keep(None)
    stand.receipts.keep(stand.receipt(Authority.create("c-1", now=NOW)))
    assert stand.kept == before


def test_a_full_disk_keeps_the_old_one(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    before = stand.kept
    stand.beliefs.accept(trust(2, revoked_node_keys=[ISSUING.key_id]))

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    stand.receipts.keep(stand.receipt(ROOT))
    assert stand.kept == before
    assert stand.receipts.is_due
