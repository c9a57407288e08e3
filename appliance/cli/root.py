"""The command line's root: global options, commands that are imported when called, and the one error boundary.

Every error ends here. Ours become `error CODE: message` and `hint: …` on stderr (one JSON object with `--json`) and
their exit code; a defect becomes one line, with its traceback in a file, and 70.

| exit code | meaning                                    |
| --------- | ------------------------------------------ |
| 0         | done                                       |
| 1 .. 10   | by the class of the error, see `errors.py` |
| 2         | wrong usage                                |
| 70        | a defect of this program                   |
| 130       | interrupted                                |
| 141       | whoever read our output went away          |
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from appliance import __version__
from appliance.cli.context import CliContext
from appliance.errors import ApplianceError, UsageError
from appliance.paths import Paths

NAME = "appliance"
COMPLETE_VARIABLE = "_APPLIANCE_COMPLETE"

_NOUNS = {
    "mode": ("appliance.cli.mode", "Show or change the role of this machine."),
    "first-boot": ("appliance.cli.first_boot", "On our own system, as root: take the image's seed."),
    "run": ("appliance.cli.run", "Run the daemon of this machine's role."),
    "status": ("appliance.cli.status", "The fleet, or this SE, in one look."),
    "why": ("appliance.cli.why", "Tell where an SE's way into the fleet stopped, and why."),
    "controller": ("appliance.cli.controller", "Make and show this controller."),
    "enroll": ("appliance.cli.enroll", "On an SE: give it a token or a seed, or enroll it anew."),
    "image": ("appliance.cli.image", "List, show and revoke built images."),
    "image-key": ("appliance.cli.image_key", "Create, list and revoke image keys."),
    "token": ("appliance.cli.token", "Create, list and revoke tokens for single VMs."),
    "se": ("appliance.cli.se", "List, show, approve, revoke, reinstate and delete SEs."),
    "events": ("appliance.cli.events", "What happened, and what happens."),
    "audit": ("appliance.cli.audit", "Show and verify the audit chain."),
    "doctor": ("appliance.cli.doctor", "Check this machine for what would keep the daemon from working."),
    "lab": ("appliance.cli.lab", "A controller and SEs as local processes."),
    "completion": ("appliance.cli.completion", "Print the completion script for a shell."),
    "version": ("appliance.cli.version", "Print the version."),
}
"""Noun to the module that has it as `command`, and its line of help: help must not import all of them."""

_GLOBAL_OPTIONS = {"--root", "--set"}
_DEFECT_CODE = "APPLIANCE-999"
_EXIT_DEFECT, _EXIT_INTERRUPTED, _EXIT_PIPE = 70, 130, 141


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """All nouns, in their order of help."""
        return list(_NOUNS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Imports a command."""
        if cmd_name not in _NOUNS:
            return None
        command: click.Command = importlib.import_module(_NOUNS[cmd_name][0]).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Writes the list of nouns from the table."""
        with formatter.section("Commands"):
            formatter.write_dl([(noun, text) for noun, (_, text) in _NOUNS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, with the nearest noun in the message."""
        if args and args[0] not in _NOUNS and not ctx.resilient_parsing:
            import difflib

            close = difflib.get_close_matches(args[0], _NOUNS, n=1)
            ctx.fail(f"there is no command {args[0]!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
        return super().resolve_command(ctx, args)


def _overrides(_context: click.Context, _parameter: click.Parameter, values: Sequence[str]) -> dict[str, str]:
    found = {}
    for text in values:
        name, equals, value = text.partition("=")
        if not equals or "." not in name:
            raise click.BadParameter(f"{text!r}: expected section.key=value")
        found[name.strip()] = value
    return found


@click.group(NAME, cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--root",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("/"),
    envvar="APPLIANCE_ROOT",
    show_envvar=True,
    show_default=True,
    help="Directory that all paths of this instance are relative to.",
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    callback=_overrides,
    help="Override one setting; may be given several times.",
)
@click.version_option(__version__, message=f"{NAME} %(version)s")
@click.pass_context
def group(context: click.Context, root: Path, overrides: dict[str, str]) -> None:
    """One executable for VM appliances: a controller, or a service engine (SE) that calls it."""
    context.obj = CliContext(paths=Paths(root), overrides=overrides)


def main(args: Sequence[str]) -> int:
    """Runs one command line. Returns the exit code; nothing is raised."""
    if COMPLETE_VARIABLE in os.environ:
        return _complete()
    wants_json = "--json" in args
    context: click.Context | None = None
    try:
        context = group.make_context(NAME, list(args))
        with context:
            group.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as error:
        return _flushed(error.exit_code)
    except ApplianceError as error:
        return _tell(error, wants_json=wants_json)
    except click.ClickException as raised:
        usage = _explained(raised)
        if wants_json:
            return _tell(UsageError(usage.format_message()), wants_json=True)
        usage.show()
        return usage.exit_code
    except KeyboardInterrupt:
        return _EXIT_INTERRUPTED
    except click.Abort:  # a question was answered with no
        click.echo("aborted", err=True)
        return 1
    except BrokenPipeError:
        return _silenced()
    except Exception as error:  # noqa: BLE001 - the boundary
        paths = context.obj.paths if context is not None and context.obj is not None else None
        return _tell_defect(error, paths, wants_json=wants_json)
    return 0


def _explained(error: click.ClickException) -> click.ClickException:
    """Returns the same error, or one that says where an option goes that is only in the wrong place."""
    if isinstance(error, click.NoSuchOption) and (name := error.option_name) in _GLOBAL_OPTIONS:
        return click.NoSuchOption(name, f"{name} goes before the command: {NAME} {name} …", ctx=error.ctx)
    return error


def _complete() -> int:
    """Answers the shell's question for completions; click ends the process itself."""
    try:
        group.main(prog_name=NAME, complete_var=COMPLETE_VARIABLE)
    except SystemExit as end:
        code = end.code
    return code if isinstance(code, int) else 1


def _flushed(code: int) -> int:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return _silenced()
    return code


def _silenced() -> int:
    # Else the interpreter flushes stdout once more when it ends, and complains.
    os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), sys.stdout.fileno())
    return _EXIT_PIPE


def _tell(error: ApplianceError, *, wants_json: bool, exit_code: int | None = None) -> int:
    code = error.exit_code if exit_code is None else exit_code
    if wants_json:
        import json

        problem = {
            "type": f"/problems/{error.code}",
            "code": error.code,
            "title": error.message,
            "advice": error.hint,
            "retryable": error.retryable,
            "exit_code": code,
        }
        text = json.dumps(problem, indent=2)
    else:
        text = f"error {error.code}: {error.message}" + (f"\nhint: {error.hint}" if error.hint else "")
    click.echo(_printable(text), err=True)
    return code


def _tell_defect(error: Exception, paths: Paths | None, *, wants_json: bool) -> int:
    """Keeps the traceback of a defect where it can be found, and says one line."""
    kept = _keep_traceback(error, paths)
    message = f"unexpected {type(error).__name__}: {error}"
    hint = f"this is a defect of the program; the traceback is in {kept}"
    defect = ApplianceError(message.replace("\n", " "), hint=hint, code=_DEFECT_CODE)
    return _tell(defect, wants_json=wants_json, exit_code=_EXIT_DEFECT)


def _keep_traceback(error: Exception, paths: Paths | None) -> str:
    import tempfile
    import traceback

    text = "".join(traceback.format_exception(error))
    for directory in ([str(paths.log)] if paths is not None else []) + [tempfile.gettempdir()]:
        try:
            descriptor, name = tempfile.mkstemp(prefix="appliance-defect-", suffix=".log", dir=directory)
            with os.fdopen(descriptor, "w") as file:
                file.write(text)
        except OSError:
            continue
        return name
    return f"no file, since none could be written:\n{text}"


def _printable(text: str) -> str:
    """Messages may quote what a peer said; it doesn't get to drive the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
