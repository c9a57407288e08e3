"""The command line's root: lazy commands, global options, and the one place where errors end."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import operator_double as doubles
import pytest

from appliance.cli import context as contexts
from appliance.cli import root
from appliance.cli.context import CliContext
from appliance.errors import ModeError
from appliance.paths import Paths

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def noun(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[CliContext], None]], None]:
    """Puts a command of the test's own in the place of `version`."""

    def put(body: Callable[[CliContext], None]) -> None:
        @click.command("version")
        @contexts.json_option
        @contexts.pass_context
        def command(context: CliContext) -> None:
            body(context)

        monkeypatch.setattr("appliance.cli.version.command", command)

    return put


def run(*arguments: str, environ: dict[str, str] | None = None, code: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", *(["-c", code] if code else ["-m", "appliance"]), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, cwd=REPOSITORY,
        env={**os.environ, **(environ or {})},
    )  # fmt: skip


def test_version() -> None:
    done = run("version")
    assert (done.returncode, done.stdout, done.stderr) == (0, "appliance 0.1.0\n", "")
    assert json.loads(run("version", "--json").stdout)["version"] == "0.1.0"
    assert run("--version").stdout == "appliance 0.1.0\n"


def test_version_imports_click_and_little_else() -> None:
    code = (
        "import sys; sys.argv[0] = 'appliance'\n"
        "from appliance.cli import root\n"
        "code = root.main(['version'])\n"
        "heavy = {'msgspec', 'rich', 'psutil', 'cryptography', 'paramiko', 'asyncssh', 'starlette', 'uvicorn',\n"
        "         'asyncio', 'http.client', 'logging', 'ssl', 'subprocess', 'multiprocessing'}\n"
        "print(code, sorted(heavy & set(sys.modules)))\n"
    )
    assert run(code=code).stdout.splitlines()[-1] == "0 []"


def test_help_lists_all_nouns_without_importing_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.import_module", lambda name: pytest.fail(f"{name} was imported"))
    text = root.group.get_help(click.Context(root.group))
    listed = [line.split()[0] for line in text.partition("Commands:\n")[2].splitlines()]
    assert sorted(listed) == sorted(
        ["mode", "run", "controller", "image-key", "se", "status", "why", "events", "audit", "doctor", "version", "lab",
         "completion", "token", "enroll", "image", "first-boot"]
    )  # fmt: skip


@pytest.mark.parametrize("name", list(root._NOUNS))
def test_every_noun_is_a_command_of_its_name(name: str) -> None:
    command = root.group.get_command(click.Context(root.group), name)
    assert isinstance(command, click.Command)
    assert command.name == name
    assert command.help


def test_a_misspelt_noun_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert root.main(["versoin"]) == 2
    assert "there is no command 'versoin'; did you mean 'version'?" in capsys.readouterr().err
    assert root.main(["xyzzy"]) == 2
    assert "there is no command 'xyzzy'\n" in capsys.readouterr().err
    assert root.group.get_command(click.Context(root.group), "xyzzy") is None


def test_a_global_option_behind_the_noun_is_told_where_it_goes(capsys: pytest.CaptureFixture[str]) -> None:
    assert root.main(["mode", "show", "--root", "/x"]) == 2
    assert "--root goes before the command: appliance --root …" in capsys.readouterr().err
    assert root.main(["status", "--json", "--set", "a.b=1"]) == 2
    assert "--set goes before the command" in json.loads(capsys.readouterr().err)["title"]


@pytest.mark.parametrize("arguments", [["--help"], ["mode", "--help"], ["mode", "set", "-h"]])
def test_help_is_no_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert root.main(arguments) == 0
    assert "Usage: appliance" in capsys.readouterr().out


def test_the_root_and_overrides_reach_the_command(
    noun: Callable[[Callable[[CliContext], None]], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[CliContext] = []
    noun(seen.append)
    assert root.main(["--root", str(tmp_path), "--set", "log.level=debug", "--set", "se.seed=a=b", "version"]) == 0
    assert seen[0].paths.root == tmp_path
    assert (seen[0].settings.log.level, seen[0].settings.se.seed, seen[0].json) == ("debug", "a=b", False)
    monkeypatch.setenv("APPLIANCE_ROOT", str(tmp_path / "env"))
    assert root.main(["version", "--json"]) == 0
    assert (seen[1].paths.root, seen[1].json) == (tmp_path / "env", True)


@pytest.mark.parametrize("text", ["level=x", "log.level"])
def test_an_override_has_a_form(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert root.main(["--set", text, "version"]) == 2
    assert "expected section.key=value" in capsys.readouterr().err


def fail(error: BaseException) -> Callable[[CliContext], None]:
    def body(_: CliContext) -> None:
        raise error

    return body


def test_our_errors_are_a_line_a_hint_and_their_exit_code(
    noun: Callable[[Callable[[CliContext], None]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    noun(fail(ModeError("it is \x1b[2Jso", hint="do this", code="MODE-009")))
    assert root.main(["version"]) == 8
    assert capsys.readouterr() == ("", "error MODE-009: it is \\x1b[2Jso\nhint: do this\n")
    noun(fail(ModeError("alone")))
    root.main(["version"])
    assert capsys.readouterr().err == "error MODE-001: alone\n"


def test_with_json_an_error_is_one_object_on_stderr(
    noun: Callable[[Callable[[CliContext], None]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    noun(fail(ModeError("it is so", hint="do this")))
    assert root.main(["version", "--json"]) == 8
    out, err = capsys.readouterr()
    assert out == ""
    assert json.loads(err) == {
        "type": "/problems/MODE-001",
        "code": "MODE-001",
        "title": "it is so",
        "advice": "do this",
        "retryable": False,
        "exit_code": 8,
    }
    assert root.main(["version", "--json", "--wrong"]) == 2
    assert json.loads(capsys.readouterr().err)["code"] == "USAGE-001"


def test_a_defect_is_one_line_and_a_file_with_the_traceback(
    noun: Callable[[Callable[[CliContext], None]], None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    noun(fail(KeyError("lost\nkey")))
    (tmp_path / "var/log/appliance").mkdir(parents=True)
    assert root.main(["--root", str(tmp_path), "version"]) == 70
    first, second = capsys.readouterr().err.splitlines()
    assert first == "error APPLIANCE-999: unexpected KeyError: 'lost\\nkey'"
    (file,) = (tmp_path / "var/log/appliance").iterdir()
    assert second.endswith(f"the traceback is in {file}")
    assert "KeyError" in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_defect_before_the_root_is_known_is_kept_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(root.group, "make_context", lambda *_: 1 / 0)
    assert root.main(["version"]) == 70
    (file,) = tmp_path.iterdir()
    assert str(file) in capsys.readouterr().err


def test_where_no_file_can_be_written_the_traceback_is_shown(
    noun: Callable[[Callable[[CliContext], None]], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    noun(fail(ValueError("x")))

    def full(**_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.mkstemp", full)
    assert root.main(["version"]) == 70
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_an_interrupt_is_130_and_quiet(
    noun: Callable[[Callable[[CliContext], None]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    noun(fail(KeyboardInterrupt()))
    assert root.main(["version"]) == 130
    assert capsys.readouterr().err == ""


def test_a_question_answered_with_no(
    noun: Callable[[Callable[[CliContext], None]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    noun(fail(click.Abort()))
    assert root.main(["version"]) == 1
    assert capsys.readouterr().err == "aborted\n"


def test_a_command_ends_with_the_code_it_wants(noun: Callable[[Callable[[CliContext], None]], None]) -> None:
    noun(fail(click.exceptions.Exit(42)))
    assert root.main(["version"]) == 42


@pytest.mark.parametrize("body", ["print('x' * 1_000_000)", "print('x')", "print('x'); raise click.exceptions.Exit(1)"])
def test_a_reader_that_goes_away_is_no_noise(body: str) -> None:
    code = (
        "import sys, click\n"
        "from appliance.cli import root, version\n"
        "@click.command('version')\n"
        f"def command():\n    {body}\n"
        "version.command = command\n"
        "sys.exit(root.main(['version']))\n"
    )
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            stdout=writing,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
            cwd=REPOSITORY,
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_ask_this_program(shell: str) -> None:
    done = run("completion", shell)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{root.COMPLETE_VARIABLE}={shell}_complete" in done.stdout


def test_the_shell_gets_its_completions() -> None:
    environ = {"COMP_WORDS": "appliance ver", "COMP_CWORD": "1", root.COMPLETE_VARIABLE: "bash_complete"}
    done = run(environ=environ)
    assert (done.returncode, done.stdout) == (0, "plain,version\n")
    environ = {"COMP_WORDS": "appliance mode set c", "COMP_CWORD": "3", root.COMPLETE_VARIABLE: "bash_complete"}
    assert run(environ=environ).stdout == "plain,controller\n"


def completed(line: str, place: Path) -> list[str]:
    """What a shell that completes `line` gets."""
    words = line.split(" ")
    environ = {
        "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1), root.COMPLETE_VARIABLE: "bash_complete",
        "APPLIANCE_ROOT": str(place),
    }  # fmt: skip
    done = run(environ=environ)
    assert (done.returncode, done.stderr) == (0, "")
    return [line.removeprefix("plain,") for line in done.stdout.split()]


def test_names_of_ses_are_completed(tmp_path: Path) -> None:
    with doubles.serve(Paths(tmp_path).controller_socket) as double:
        double.answers["GET /v1/ses"] = [doubles.summary(number, name=f"db-{number % 2}") for number in (1, 2, 3)]
        assert completed("appliance se show ", tmp_path) == ["db-0", "db-1"]
        assert completed("appliance se approve db-0 db-1", tmp_path) == ["db-1"]
        assert completed("appliance token create --rejoin d", tmp_path) == ["db-0", "db-1"]
        assert completed("appliance why x", tmp_path) == []
        assert completed(f"appliance --root {tmp_path} se revoke db-1", Path("/nowhere")) == ["db-1"]
        double.answers["GET /v1/ses"] = b"{"
        assert completed("appliance se show ", tmp_path) == []


@pytest.mark.parametrize("there_is", ["nothing", "no listener", "silence"])
def test_where_no_controller_answers_nothing_is_completed(tmp_path: Path, there_is: str) -> None:
    path = Paths(tmp_path).controller_socket
    path.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as listener:
        if there_is != "nothing":
            short = tmp_path / "s"
            listener.bind(str(short))
            path.symlink_to(short)
        if there_is == "silence":
            listener.listen()
        began = time.monotonic()
        assert completed("appliance se show ", tmp_path) == []
        assert time.monotonic() - began < 20


def test_run_without_a_role_says_how_to_get_one(tmp_path: Path) -> None:
    done = run("--root", str(tmp_path), "run")
    assert done.returncode == 8
    assert done.stderr.startswith("error MODE-002: this machine has no role")
    assert "appliance mode set" in done.stderr


def test_run_names_all_mistakes_of_the_settings(tmp_path: Path) -> None:
    file = tmp_path / "etc/appliance/settings.toml"
    file.parent.mkdir(parents=True)
    file.write_text('[log]\nlevel = "x"\n[so]\n[se]\nmax_links = -1\nsshd_prot = 1\nseed = 3\n')
    done = run("--root", str(tmp_path), "run")
    assert done.returncode == 3
    assert [line for line in done.stderr.splitlines() if line.startswith("  ")] == [
        f"  {file}:{line}"
        for line in (
            "2: log.level = 'x': expected one of debug, info, warning, error",
            "3: unknown section [so]; known are log, users, controller, se, clock",
            "5: se.max_links = -1: expected int >= 1",
            "6: unknown key se.sshd_prot; did you mean 'sshd_port'?",
            "7: se.seed = 3: expected str, got int",
        )
    ]


def test_the_printed_json_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    contexts.print_json({"a": [1, 2]})
    assert json.loads(capsys.readouterr().out) == {"a": [1, 2]}


def test_off_a_terminal_lines_are_not_folded(capsys: pytest.CaptureFixture[str]) -> None:
    contexts.console().print("x" * 300)
    contexts.console(stderr=True).print("y" * 300)
    assert capsys.readouterr() == ("x" * 300 + "\n", "y" * 300 + "\n")
