"""What an operator may do to an SE, cell by cell of the table in `protocol.standing`."""

from __future__ import annotations

import itertools

import pytest

from appliance.errors import UsageError
from appliance.protocol import standing
from appliance.protocol.enroll import SeStatus
from appliance.protocol.standing import Act, act


def table() -> dict[tuple[Act, SeStatus], str]:
    """The cells of the table in the module's docstring."""
    rows = [line.split() for line in (standing.__doc__ or "").splitlines() if line.startswith("    ")]
    doings = [Act(word) for word in rows[0][1:]]
    return {(doing, SeStatus(row[0])): cell for row in rows[1:] for doing, cell in zip(doings, row[1:], strict=True)}


@pytest.mark.parametrize(("doing", "status"), list(itertools.product(Act, SeStatus)))
def test_what_the_table_says_is_done(doing: Act, status: SeStatus) -> None:
    cell = table()[doing, status]
    if cell == "-":
        with pytest.raises(UsageError, match=f"can't {doing.value} an SE that is {status.value}") as refused:
            act(doing, status)
        assert refused.value.hint
    else:
        assert act(doing, status) is SeStatus(cell)


def test_only_an_approval_or_its_undoing_makes_an_se_enrolled() -> None:
    ways = {
        (doing, status)
        for (doing, status), cell in table().items()
        if cell == SeStatus.ENROLLED.value and status is not SeStatus.ENROLLED
    }
    assert ways == {
        (Act.APPROVE, SeStatus.PENDING),
        (Act.REINSTATE, SeStatus.REVOKED),
        (Act.REINSTATE, SeStatus.QUARANTINED),
    }
