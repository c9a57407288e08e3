"""Stage telemetry: host figures under OpenTelemetry's `system.*` names.

A sample is a time and points `(metric, attributes, value)`. Names, units and attribute keys follow the OpenTelemetry
semantic conventions for system metrics; `CATALOGUE` is the closed set that a controller accepts.
"""

from __future__ import annotations

import msgspec


class Point(msgspec.Struct, frozen=True, array_like=True):
    """One figure: catalogue name, attribute values in the catalogue's key order, value in the catalogue's unit."""

    name: str
    attributes: tuple[str, ...]
    value: float


class Sample(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All figures of one moment. `time` is the SE's wall clock, seconds since 1970."""

    time: float
    points: list[Point]
