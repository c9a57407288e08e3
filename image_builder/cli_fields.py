"""Fields of a recipe as options of the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import click

from image_builder.recipe import Field


def recipe_options(fields: Iterable[Field]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Returns a decorator that gives a command one option for each field; its argument has `__` in place of `.`."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        for field in reversed(list(fields)):
            kind: Any = str
            if field.kind == "whole":
                kind = int
            elif field.choices:
                kind = click.Choice(field.choices)
            many = field.kind in {"texts", "paths"}
            name = field.name.replace(".", "__")
            if field.kind == "yes":
                option = click.option(field.flag, name, is_flag=True, default=None, help=field.help)
            else:
                option = click.option(field.flag, name, type=kind, multiple=many, default=None, help=field.help)
            function = option(function)
        return function

    return decorate


def given_values(given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields whose options were given: `section.field` to value."""
    return {
        name.replace("__", "."): list(value) if isinstance(value, tuple) else value
        for name, value in given.items()
        if value is not None and value != ()  # click gives () for a repeated option that wasn't there
    }
