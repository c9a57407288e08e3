"""What a Prometheus scrape shows of each SE, taken from the fleet and its history; `metrics` renders it."""

from __future__ import annotations

from appliance.controller.fleet import Fleet
from appliance.controller.metrics import SeMetrics
from appliance.controller.telemetry import History
from appliance.protocol.fleet import State

SHOWN = frozenset({State.UP, State.DEGRADED, State.UPGRADING})
"""States with a link that works."""


def scrape(fleet: Fleet, history: History) -> list[SeMetrics]:
    """Every SE at this moment. On the controller's loop only."""
    found = []
    for record, link in fleet:
        derived, _ = fleet.state(record)
        found.append(
            SeMetrics(
                se_id=record.se_id,
                name=record.name,
                state=derived.state,
                up=derived.state in SHOWN,
                rtt_s=link.rtt.value if link else None,
                heartbeats=link.heartbeats if link else 0,
                sample=history.latest_text(record.se_id),
            )
        )
    return found
