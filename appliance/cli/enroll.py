"""`appliance enroll`: what a person gives an SE on its console. The daemon acts on it; this command hands it over."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from appliance.cli import output, this_machine
from appliance.cli.context import CliContext, pass_context
from appliance.errors import ModeError, UsageError
from appliance.protocol.why import Step, StepResult

if TYPE_CHECKING:
    from appliance.runtime.health import HealthDocument

_MAX_INPUT_CHARS = 256
_LOOK_S = 0.2


@click.command("enroll")
@click.option(
    "--seed", type=click.Path(path_type=Path), help="Seed to take: a directory, an ISO or the device of a seed disk."
)
@click.option("--token", metavar="-", help="Read a token of `appliance token create` from the terminal or a pipe.")
@click.option("--anew", is_flag=True, help="Give up the identity that this SE has, if any (it is set aside).")
@click.option("--wait", "wait_s", type=click.IntRange(0, 3600), default=60, show_default=True, help="Seconds to watch.")
@pass_context
def command(context: CliContext, seed: Path | None, token: str | None, anew: bool, wait_s: int) -> None:
    """Gives this SE a token, a seed, or both, and tells what comes of it.

    For an SE that lost its state: on the controller `appliance token create --rejoin SE`, here
    `appliance enroll --token -`. For one whose image key asks for a token: the same with a token for that key. For one
    that was deleted, or is to be another one: --anew with a seed that has a current image key. For one whose
    controller moved: a seed with the new address. For one whose controller was restored from before a change of root:
    --anew with a seed of that controller and a rejoin token, by which it keeps its number.

    A token is never taken from the command line, where everybody on this machine could read it.
    """
    from appliance.runtime.mode import Mode, running_role
    from appliance.se import given

    if running_role(context.paths) is not Mode.SE:
        raise ModeError("this machine is no SE", hint="run this on the SE; `appliance mode show` tells the role")
    if seed is None and token is None and not anew:
        raise UsageError("nothing to give", hint="--seed PATH, --token - or --anew")
    state = context.paths.se_state
    if token is not None and not anew and given.has_grant(state):
        raise UsageError(
            "this SE is enrolled: a token would change nothing",
            hint="`appliance why` tells what keeps it from being UP; --anew gives its identity up first",
        )
    text = "" if token is None else _read_token(token)
    files = {} if seed is None else _read_seed(context, seed)
    given.GivenFile(state).write(given.Given(token=text, seed=files, anew=anew))
    _watch(context, wait_s)


def _read_token(argument: str) -> str:
    from appliance.protocol import token

    if argument != "-":
        raise UsageError(
            "a token on the command line can be read by everybody on this machine; consider it lost",
            hint="revoke it (`appliance token revoke`), and give the next one by `--token -`",
        )
    typed = sys.stdin.isatty()
    text = str(click.prompt("token", hide_input=True, err=True) if typed else sys.stdin.read(_MAX_INPUT_CHARS)).strip()
    token.parse(text)
    return text


def _read_seed(context: CliContext, path: Path) -> dict[str, bytes]:
    """Returns the seed's files, once they were verified as the daemon will verify them."""
    from appliance.se import seed

    files = seed.read_files(path)
    loaded = seed.load(context.paths, setting=context.settings.se.seed, given=files)
    for note in loaded.notes:
        output.say(output.screen(), f"note: {note}")
    return files


def _watch(context: CliContext, wait_s: int) -> None:
    """Shows the daemon's state line as it changes, until a grant is stored, a refusal came, or the time is over."""
    console, told = output.screen(), ""
    begun, until = time.time(), time.monotonic() + wait_s
    while time.monotonic() < until:
        health = _health(context)
        if health is not None and health.written_at >= begun:
            line = f"{health.state}  {health.reason}"
            if line != told:
                output.say(console, line)
                told = line
            if _is_over(health, begun):
                return
        time.sleep(_LOOK_S)
    if not told:
        output.say(console, "handed over; `systemctl start appliance-se` starts the daemon, `appliance why` tells more")
    elif wait_s:
        output.say(console, "it goes on by itself; `appliance why` tells how far it is")


def _health(context: CliContext) -> HealthDocument | None:
    from appliance.errors import UnreachableError

    try:
        seen = this_machine.look(context.paths)
    except UnreachableError:
        return None
    return seen.health if seen.is_alive else None


def _is_over(health: HealthDocument, begun: float) -> bool:
    steps = {link.step: link for link in health.steps}
    stored, link = steps.get(Step.STORED), steps.get(Step.LINK)
    news = [entry for entry in (stored, link) if entry is not None and entry.at >= begun]
    return any(entry.result is StepResult.OK for entry in news) and health.state == "UP"
