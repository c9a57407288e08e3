"""Settings: layers, ranges, and every mistake named at once with its position."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from appliance import settings as module
from appliance.errors import SettingsError
from appliance.paths import Paths
from appliance.settings import Settings

Load = Callable[..., Settings]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Loads with a file's text, an environment and overrides."""

    def call(text: str | None = None, *, environ: dict[str, str] | None = None, **overrides: str) -> Settings:
        paths = Paths(tmp_path)
        if text is not None:
            paths.settings_file.parent.mkdir(parents=True, exist_ok=True)
            paths.settings_file.write_text(text, "utf-8")
        dotted = {name.replace("__", "."): value for name, value in overrides.items()}
        return module.load(paths, environ=environ or {}, overrides=dotted)

    return call


def problems(load: Load, *args: str, **kwargs: object) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        load(*args, **kwargs)
    return [line.strip() for line in caught.value.message.splitlines()[1:]]


def test_defaults_without_any_source(load: Load) -> None:
    assert load() == Settings()


def test_defaults_keep_their_own_ranges() -> None:
    assert msgspec.convert(msgspec.to_builtins(Settings()), Settings) == Settings()


def test_the_command_line_wins_over_the_environment_over_the_file(load: Load) -> None:
    text = '[log]\nlevel = "error"\n[se]\nmax_links = 1\nsshd_port = 2222\n'
    environ = {"APPLIANCE_LOG_LEVEL": "warning", "APPLIANCE_SE_MAX_LINKS": "2"}
    found = load(text, environ=environ, log__level="debug")
    assert (found.log.level, found.se.max_links, found.se.sshd_port) == ("debug", 2, 2222)


def test_text_sources_are_read_by_the_type_of_the_setting(load: Load) -> None:
    environ = {
        "APPLIANCE_CONTROLLER_REVERSE_USERS": "root, admin",
        "APPLIANCE_CONTROLLER_ALLOW_CURVE25519": "true",
        "APPLIANCE_CLOCK_OFFSET_S": "-3.5",
    }
    services = "metrics=10.0.0.1:9090"
    found = load(environ=environ, se__forwards="metrics=127.0.0.1:9000,api=[::1]:9001", controller__services=services)
    assert found.controller.services == {"metrics": "10.0.0.1:9090"}
    assert found.controller.reverse_users == ("root", "admin")
    assert found.controller.allow_curve25519 is True
    assert found.clock.offset_s == -3.5
    assert found.se.forwards == {"metrics": "127.0.0.1:9000", "api": "[::1]:9001"}


def test_five_mistakes_are_named_at_once_with_their_lines(load: Load, tmp_path: Path) -> None:
    text = """\
[log]
level = "loud"
[controler]
enroll_listen = "x"

[controller]
reverse_prot = 5097
enroll_listen = "no port"
[se]
max_links = 99
"""
    file = Paths(tmp_path).settings_file
    assert sorted(problems(load, text)) == sorted(
        [
            f"{file}:2: log.level = 'loud': expected one of debug, info, warning, error",
            f"{file}:3: unknown section [controler]; did you mean 'controller'?",
            f"{file}:7: unknown key controller.reverse_prot; did you mean 'reverse_port'?",
            f"{file}:8: controller.enroll_listen = 'no port': expected host:port",
            f"{file}:10: se.max_links = 99: expected int <= 16",
        ]
    )


def test_a_syntax_error_hides_nothing_that_follows(load: Load) -> None:
    found = problems(load, '[log]\nlevel = "info\n[se\nseed = 3\n[se]\nmax_links = "many"\nseed 4\n[se]\n')
    assert len(found) == 5
    assert [line.split(":")[1] for line in found] == ["2", "3", "7", "8", "6"]


def test_a_syntax_error_over_several_lines_ends_the_reading(load: Load) -> None:
    (found,) = problems(load, "[controller]\nreverse_users = [\n")
    assert ":2:" in found


def test_a_broken_construct_of_several_lines_is_not_tried_for_ever(load: Load) -> None:
    assert 1 <= len(problems(load, '[log]\nlevel = """abc\n\n\n')) <= 3


@pytest.mark.parametrize("brackets", [1_000, 100_000])
def test_brackets_within_brackets_are_a_problem_like_others(load: Load, brackets: int) -> None:
    (found,) = problems(load, "[log]\nlevel = " + "[" * brackets)
    assert "level" in found or "too deep" in found


def test_an_invisible_character_is_placed_rightly(load: Load) -> None:
    found = problems(load, "[log]\r\n\x0b\nlevel = 1\n")
    assert [line.split(":")[1] for line in found] == ["2", "3"]


def test_a_file_of_nothing_but_errors_ends(load: Load) -> None:
    assert 1 <= len(problems(load, "x\n" * 100)) <= 20


def test_every_source_is_named(load: Load) -> None:
    found = problems(
        load,
        environ={"APPLIANCE_SE_MAX_LINK": "3", "APPLIANCE_LOG_LEVEL": "x", "APPLIANCE_ROOT": "/", "APPLIANCE_LOG": ""},
        se__max_links="x",
        sea__x="1",
        log__levels="x",
    )
    assert sorted(line.split(": ")[0] for line in found) == [
        "--set log.levels",
        "--set se.max_links",
        "--set sea.x",
        "environment APPLIANCE_LOG_LEVEL",
        "environment APPLIANCE_SE_MAX_LINK",
    ]


def test_a_bad_value_is_told_even_where_a_higher_source_replaces_it(load: Load) -> None:
    assert len(problems(load, "[se]\nmax_links = 0\n", se__max_links="2")) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[controller]\nheartbeat_interval_s = nan\n", ">= 0.1"),
        ("[clock]\noffset_s = inf\n", "<="),
        ("[controller]\nenroll_burst = true\n", "expected int, got bool"),
        ("[controller]\nmax_links = '5'\n", "expected int, got str"),
        ("[controller]\nreverse_users = ['root', 'a b']\n", "matching regex"),
        ("[controller]\nreverse_users = ['root', 3]\n", "expected str, got int"),
        ("[controller]\nmetrics_listen = '0.0.0.0:9101'\n", "expected a loopback address"),
        ("[controller]\nmetrics_listen = 'localhost:9101'\n", "expected a loopback address"),
        ("[controller]\nssh_listen = '0.0.0.0:99999'\n", "is no address"),
        ("[controller]\nssh_listen = '[::1]'\n", "expected host:port"),
        ("[users]\nse = 'a\\nb'\n", "matching regex"),
        ("[users]\nse = 'same'\ncontroller = 'same'\n", "is the same as users.controller"),
        ("[se]\nredial_first_s = 60\n", "is above se.redial_most_s (30)"),
        ("[se]\nsshd_port = 0\n", ">= 1"),
        ("[se.forwards]\nchannel = '127.0.0.1:1'\n", "the channel API is never reachable through a port"),
        ("[se.forwards]\nx = '10.0.0.1:1'\n", "expected a loopback address"),
        ("[controller.services]\nchannel = '10.0.0.1:1'\n", "can't name a service"),
        ("[controller.services]\nx = '10.0.0.1'\n", "expected host:port"),
        ("[se]\nenroll_listen = 'x'\n", "did you mean controller.enroll_listen?"),
        ("[log]\nqqqqq = 'x'\n", "known are level"),
        ("log = 3\n", "'log' is a section, write [log]"),
    ],
)
def test_what_does_not_hold_is_refused(load: Load, text: str, expected: str) -> None:
    (found,) = problems(load, text)
    assert expected in found


def test_a_pair_without_a_value_is_refused(load: Load) -> None:
    (found,) = problems(load, se__forwards="metrics")
    assert "expected name=host:port" in found


def test_a_contradiction_of_a_default_is_named_as_such(load: Load) -> None:
    (found,) = problems(load, "[se]\nredial_most_s = 0.1\n")
    assert found.startswith("default: se.redial_first_s")


def test_positions_of_dotted_and_quoted_keys(load: Load) -> None:
    found = problems(load, 'log.level = 3\n\n[ "se" ]\n"max_links" = "x"\n')
    assert [line.split(":")[1] for line in found] == ["1", "4"]


def test_a_file_that_is_no_text_is_told(load: Load, tmp_path: Path) -> None:
    file = Paths(tmp_path).settings_file
    file.parent.mkdir(parents=True)
    file.write_bytes(b"\xff\xfe")
    (found,) = problems(load)
    assert "can't be read" in found


def test_a_directory_in_its_place_is_told(load: Load, tmp_path: Path) -> None:
    Paths(tmp_path).settings_file.mkdir(parents=True)
    (found,) = problems(load)
    assert "can't be read" in found


@pytest.mark.parametrize(
    "value", ["", "http://127.0.0.1:8080/in", "https://alerts.example/hook?x=1", "http://[::1]:80/", "http://h"]
)
def test_a_webhook_is_an_address(tmp_path: Path, value: str) -> None:
    settings = module.load(Paths(tmp_path), environ={}, overrides={"controller.events_webhook": value})
    assert settings.controller.events_webhook == value


@pytest.mark.parametrize(
    "value",
    [
        "ftp://h/",
        "h:80",
        "http://",
        "http://h:99999/",
        "http://h:0/",
        "http://user:word@h/",
        "http://h/a b",
        "http://[/",
    ],
)
def test_what_is_no_address_of_a_webhook(tmp_path: Path, value: str) -> None:
    with pytest.raises(SettingsError, match="expected http"):
        module.load(Paths(tmp_path), environ={}, overrides={"controller.events_webhook": value})


def test_an_events_hook_is_an_absolute_path(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="absolute path"):
        module.load(Paths(tmp_path), environ={}, overrides={"controller.events_hook": "hook"})
