"""What every command gets: where the instance lies, its settings when asked for, and whether to speak JSON.

A command module looks like this:

    @click.command("status")
    @json_option
    @pass_context
    def command(context: CliContext) -> None: ...

`rich` and `msgspec` are imported when something is printed, so that a command which prints nothing stays fast.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

from appliance.paths import Paths

if TYPE_CHECKING:
    from rich.console import Console

    from appliance.cli.operator import Operator
    from appliance.settings import Settings

_F = TypeVar("_F", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True)
class CliContext:
    """One invocation of the command line."""

    paths: Paths
    overrides: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """`--set section.key=value`."""
    json: bool = False

    @functools.cached_property
    def settings(self) -> Settings:
        """The settings, read on first use. Raises `SettingsError`."""
        from appliance import settings

        return settings.load(self.paths, environ=os.environ, overrides=self.overrides)

    @functools.cached_property
    def operator(self) -> Operator:
        """The controller on this machine; tells on stderr where it makes somebody wait."""
        from appliance.cli.operator import Operator

        return Operator(self.paths, say=lambda sentence: click.echo(sentence, err=True))


pass_context = click.make_pass_decorator(CliContext)
"""Decorator: the command's first argument is the `CliContext`."""


def _set_json(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        found = context.find_object(CliContext)
        if found is not None:
            context.obj = dataclasses.replace(found, json=True)


def json_option(function: _F) -> _F:
    """Decorator: adds `--json`; the command sees it as `context.json`."""
    return click.option(
        "--json", is_flag=True, expose_value=False, callback=_set_json, help="Print JSON instead of text."
    )(function)


def reason_option(function: _F) -> _F:
    """Decorator: adds `--reason`, for whatever the audit keeps."""
    return click.option("--reason", default="", help="Goes into the audit.")(function)


def print_json(value: object) -> None:
    """Prints a struct, dataclass or plain value as one indented JSON document on stdout."""
    import msgspec

    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def console(*, stderr: bool = False) -> Console:
    """A rich console for tables; off a terminal lines aren't folded, so that `grep` finds what it looks for."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, highlight=False, width=None if stream.isatty() else 400, soft_wrap=False)
