"""protocol.receipt: every row of the table."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from appliance.protocol.enroll import Known, Refusals, SeStatus
from appliance.protocol.receipt import judge
from appliance.protocol.trust import Receipt

SE, KEY = "se-1", "SHA256:new"
RECEIPT = Receipt(
    cluster_id="c-1", se_id=SE, thumbprint=KEY, number=7, image_key_id="ik-1", epoch=1, issued_at=1000
)  # fmt: skip


def verdict(known: Known | None = None, *, since: int = 0, by_key: Known | None = None, **changes: Any) -> object:
    receipt = msgspec.structs.replace(RECEIPT, **changes)
    return judge(receipt, SE, KEY, epoch=500, by_id=known, since=since, by_key=by_key)


def test_an_unknown_se_is_held() -> None:
    assert verdict() is None


@pytest.mark.parametrize("changes", [{"se_id": "se-2"}, {"thumbprint": "SHA256:other"}, {"epoch": 500}, {"epoch": 501}])
def test_a_receipt_for_another_or_of_no_epoch_before_is_refused(changes: dict[str, Any]) -> None:
    assert verdict(**changes) is Refusals.RECEIPT


def test_a_receipt_of_any_epoch_before_counts() -> None:
    assert verdict(epoch=499) is None


def test_a_key_of_another_se_is_a_copy() -> None:
    assert verdict(by_key=Known("se-2", KEY, SeStatus.ENROLLED, True)) is Refusals.CLONED_KEY


@pytest.mark.parametrize(
    ("status", "refusal"),
    [
        (SeStatus.REVOKED, Refusals.REVOKED),
        (SeStatus.REJECTED, Refusals.REJECTED),
        (SeStatus.QUARANTINED, Refusals.QUARANTINED),
        (SeStatus.DELETED, Refusals.DELETED),
    ],
)
def test_no_receipt_undoes_what_an_operator_did_before_the_backup(status: SeStatus, refusal: Refusals) -> None:
    assert verdict(Known(SE, KEY, status, True)) is refusal
    assert verdict(by_key=Known(SE, KEY, status, True)) is refusal


@pytest.mark.parametrize(("since", "refusal"), [(999, None), (1000, Refusals.CONFLICT), (1001, Refusals.CONFLICT)])
def test_only_a_newer_key_takes_the_place_of_the_backups(since: int, refusal: Refusals | None) -> None:
    """An older receipt is that of a key which was replaced: lost with a VM's disk, or stolen."""
    assert verdict(Known(SE, "SHA256:backup", SeStatus.ENROLLED, True), since=since) is refusal


def test_one_that_was_approved_after_the_backup_is_held() -> None:
    known = Known(SE, KEY, SeStatus.PENDING, False)
    assert verdict(known, since=2000, by_key=known) is None
