"""What an operator may do to an SE, by the status that the store has of it.

    status        approve     reject      revoke     reinstate   delete
    pending       enrolled    rejected    -          pending     deleted
    enrolled      enrolled    -           revoked    enrolled    deleted
    quarantined   -           -           revoked    enrolled    deleted
    rejected      -           rejected    -          pending     deleted
    revoked       -           -           revoked    enrolled    deleted
    deleted       -           -           -          -           deleted

To reinstate is to undo: who waited for approval when it was rejected waits again.
"""

from __future__ import annotations

import enum

from appliance.errors import UsageError
from appliance.protocol.enroll import SeStatus


class Act(enum.StrEnum):
    """What an operator does to an SE."""

    APPROVE = "approve"
    REJECT = "reject"
    REVOKE = "revoke"
    REINSTATE = "reinstate"
    DELETE = "delete"


_ACTS = {
    (Act.APPROVE, SeStatus.PENDING): SeStatus.ENROLLED,
    (Act.REJECT, SeStatus.PENDING): SeStatus.REJECTED,
    (Act.REVOKE, SeStatus.ENROLLED): SeStatus.REVOKED,
    (Act.REVOKE, SeStatus.QUARANTINED): SeStatus.REVOKED,
    (Act.REINSTATE, SeStatus.REVOKED): SeStatus.ENROLLED,
    (Act.REINSTATE, SeStatus.QUARANTINED): SeStatus.ENROLLED,
    (Act.REINSTATE, SeStatus.REJECTED): SeStatus.PENDING,
    **{(Act.DELETE, status): SeStatus.DELETED for status in SeStatus},
    # Done already: said twice, it is still so.
    (Act.APPROVE, SeStatus.ENROLLED): SeStatus.ENROLLED,
    (Act.REJECT, SeStatus.REJECTED): SeStatus.REJECTED,
    (Act.REVOKE, SeStatus.REVOKED): SeStatus.REVOKED,
    (Act.REINSTATE, SeStatus.ENROLLED): SeStatus.ENROLLED,
    (Act.REINSTATE, SeStatus.PENDING): SeStatus.PENDING,
}
_INSTEAD = {
    SeStatus.PENDING: "approve or reject it",
    SeStatus.ENROLLED: "revoke it",
    SeStatus.QUARANTINED: "reinstate or revoke it",
    SeStatus.REJECTED: "reinstate it first",
    SeStatus.REVOKED: "reinstate it first",
    SeStatus.DELETED: "deleting is for good; its VM may come back as a new SE: `appliance enroll --anew` there",
}


def act(doing: Act, status: SeStatus) -> SeStatus:
    """Returns the status that an SE of `status` gets; the same where there is nothing to do.

    Raises:
        UsageError: that can't be done to an SE of this status; the hint says what can.
    """
    found = _ACTS.get((doing, status))
    if found is None:
        raise UsageError(f"can't {doing.value} an SE that is {status.value}", hint=_INSTEAD[status])
    return found
