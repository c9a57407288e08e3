"""Option types with units: durations such as `30d`, networks such as `192.0.2.0/24`."""

from __future__ import annotations

import re
from typing import Any

import click

from appliance.protocol.source import check_networks

_DURATION = re.compile(r"(\d{1,9})(s|m|h|d|w)")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


class _Duration(click.ParamType[int]):
    """Seconds, at least one."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Returns whole seconds."""
        if isinstance(value, int):
            return value
        match = _DURATION.fullmatch(value)
        if match is None or int(match[1]) == 0:
            self.fail(f"{value!r} is no duration; write for example 90s, 15m, 12h or 30d", param, ctx)
        return int(match[1]) * _SECONDS[match[2]]


class _Network(click.ParamType[str]):
    """An IPv4 or IPv6 network in CIDR form."""

    name = "cidr"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Returns `value` as it is."""
        problems = check_networks([value])
        if problems:
            self.fail(problems[0], param, ctx)
        return str(value)


DURATION = _Duration()
NETWORK = _Network()
