"""What a receipt is worth to a controller that was restored from a backup. Pure; the caller verified both signatures.

An SE that enrolled after the backup shows the receipt that came with its grant, and its key's own signature. In
RECOVERY the controller takes it in as one that waits for an operator:

    receipt not for this se_id and key, or not of an epoch before the restore    refuse RECEIPT
    key known under another se_id                                                refuse CLONED_KEY
    se_id revoked, rejected, quarantined, deleted in the backup                  refuse, each with its own code
    se_id known with another key     issued after the backup's record of it      hold: the key is newer
                                     before, or at the same time                 refuse CONFLICT: the key was replaced
    se_id pending with the same key  (it was approved after the backup)          hold
    unknown                                                                      hold

Held with its own number, unless that is another SE's by now: then with a new one, and no list of receipts approves it.
"""

from __future__ import annotations

from appliance.protocol.enroll import REFUSED_STATUS, Known, Refusals
from appliance.protocol.trust import Receipt

SKIPPED_NUMBERS = 65_536
"""How many SE numbers a restored controller passes over: more than were given out since the backup."""


def judge(
    receipt: Receipt,
    se_id: str,
    thumbprint: str,
    *,
    epoch: int,
    by_id: Known | None,
    since: int,
    by_key: Known | None,
) -> Refusals | None:
    """The table of the module's docstring; None holds the SE for approval.

    Args:
        receipt: signed by a root of this cluster.
        se_id: of the SE that shows it.
        thumbprint: of the key that signed its request.
        epoch: the controller's own.
        by_id: what is known under `se_id`.
        since: when that got its key, seconds since 1970.
        by_key: what is known under `thumbprint`.
    """
    if (receipt.se_id, receipt.thumbprint) != (se_id, thumbprint) or receipt.epoch >= epoch:
        return Refusals.RECEIPT
    if by_key is not None and by_key.se_id != se_id:
        return Refusals.CLONED_KEY
    known = by_id or by_key
    if known is None:
        return None
    if known.status in REFUSED_STATUS:
        return REFUSED_STATUS[known.status]
    if known.thumbprint != thumbprint and receipt.issued_at <= since:
        return Refusals.CONFLICT
    return None
