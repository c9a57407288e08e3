"""Problem documents as they go over the wire (RFC 9457)."""

from __future__ import annotations

import msgspec

from appliance.protocol.problem import Problem


def test_empty_members_are_left_out() -> None:
    problem = Problem(type="/problems/X-001", title="t", status=400, code="X-001")
    assert msgspec.json.decode(msgspec.json.encode(problem)) == {
        "type": "/problems/X-001",
        "title": "t",
        "status": 400,
        "code": "X-001",
    }


def test_members_of_a_newer_controller_are_ignored() -> None:
    """RFC 9457 section 3.2: consumers must ignore extensions that they don't recognize."""
    raw = b'{"type": "/problems/X-001", "title": "t", "status": 400, "code": "X-001", "new": 1}'
    assert msgspec.json.decode(raw, type=Problem).code == "X-001"
