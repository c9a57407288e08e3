"""This process's local settings: defaults < file < environment < command line, checked as a whole.

The structs below are the reference: each field is a key of `settings.toml`, its default is the default, its
annotation the allowed range, its name ends in its unit. `load` reports *all* problems of all sources in one
`SettingsError`, each with its position; unknown keys are refused with the nearest known one. A syntax error doesn't
hide what follows it: the line is reported, left out, and the rest is read.

The environment's names are `APPLIANCE_<SECTION>_<KEY>`, the command line's `section.key=value`. Lists are written
with commas there, tables as `name=value,name=value`.
"""

from __future__ import annotations

import ipaddress
import itertools
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta

from appliance.errors import SettingsError, UsageError
from appliance.paths import Paths
from appliance.protocol.address import parse_endpoint

Port = Annotated[int, Meta(ge=0, le=65535)]
"""0 asks the system for a free port (lab)."""
Seconds = Annotated[float, Meta(ge=0.01, le=86400)]
Rate = Annotated[float, Meta(gt=0, le=1e6)]
Count = Annotated[int, Meta(ge=1, le=1_000_000)]
UserName = Annotated[str, Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_.-]{0,31}\Z")]


class Log(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[log]`."""

    level: Literal["debug", "info", "warning", "error"] = "info"


class Users(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[users]`: SSH identities of SEs and of controller nodes."""

    se: UserName = "aviseuser"
    controller: UserName = "avictlruser"


class Controller(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[controller]`."""

    enroll_listen: str = "0.0.0.0:8443"
    ssh_listen: str = "0.0.0.0:22"
    reverse_port: Port = 5097
    metrics_listen: str = "127.0.0.1:9101"
    """Loopback only: the figures are read without a password."""
    reverse_users: tuple[UserName, ...] = ("root",)
    """Local users who may connect to SEs over the reverse path."""
    heartbeat_interval_s: Annotated[float, Meta(ge=0.1, le=300)] = 5.0
    allow_curve25519: bool = False
    """Offers a key exchange without post-quantum protection beside mlkem768x25519-sha256."""
    enroll_rate_per_s: Rate = 500.0
    """Requests, of which an enrollment takes two (nonce and enroll)."""
    enroll_burst: Count = 5000
    source_rate_per_s: Rate = 250.0
    source_burst: Count = 4000
    """A thousand VMs behind one NAT are one source, and each may have to try twice."""
    image_key_rate_per_s: Rate = 50.0
    """Requests that one image key may sign, where its own terms say nothing else."""
    image_key_burst: Count = 1000
    max_unauthenticated: Count = 2000
    max_unauthenticated_per_source: Count = 1000
    max_begun_requests: Count = 64
    """Enrollment requests of which a part may be there: our agents send each in one piece."""
    handshake_timeout_s: Seconds = 10.0
    header_timeout_s: Seconds = 5.0
    body_timeout_s: Seconds = 10.0
    login_timeout_s: Seconds = 20.0
    max_channels_per_link: Count = 64
    max_links_per_se: Annotated[int, Meta(ge=2, le=1000)] = 8
    """Connections logged in with one SE's key: whoever copied it must not take the room of other SEs."""
    max_queued_requests: Count = 16
    """Requests on one connection that wait behind the one that is answered: an agent's pings, not a flood of them."""
    heartbeats_per_interval: Annotated[float, Meta(ge=2, le=1000)] = 4.0
    """Of one link, beside a burst: an agent sends one, and a second where the first goes unanswered."""
    heartbeat_burst: Annotated[int, Meta(ge=10, le=100_000)] = 60
    """Heartbeats that a link may send at once, with what was spooled while it was away."""
    refusal_rate_per_s: Rate = 20.0
    refusal_burst: Count = 100
    """What a link may ask for that it can't have, before it is read more slowly."""
    rekey_timeout_s: Seconds = 10.0
    """How long a key exchange on a link may take: nothing else is sent meanwhile."""
    max_links: Count = 20000
    link_unsent_max_bytes: Annotated[int, Meta(ge=1 << 20, le=1 << 32)] = 8 * 1024 * 1024
    """What may wait for one link whose SE doesn't read; more closes it. Bulk stops at 1 MiB by itself."""
    unsent_max_bytes: Annotated[int, Meta(ge=1 << 20, le=1 << 40)] = 256 * 1024 * 1024
    """The same for all links together; those for which the most waits are closed first."""
    windows_max_bytes: Annotated[int, Meta(ge=1 << 20, le=1 << 40)] = 256 * 1024 * 1024
    """What all channels together may have under way above 64 KiB each: memory, where local readers don't read."""
    disk_reserve_bytes: Annotated[int, Meta(ge=0)] = 64 * 1024 * 1024
    """Below this much free space enrollments are refused, so that what was granted can still be stored."""
    audit_reserve_bytes: Annotated[int, Meta(ge=0, le=1 << 32)] = 8 * 1024 * 1024
    """Disk space held back, so that what an operator does is stored and audited on a full disk too."""
    pending_life_s: Annotated[float, Meta(ge=1, le=366 * 86400)] = 7 * 86400.0
    """How long an SE waits for approval before its request lapses; one that still lives asks anew."""
    enroll_hook: str = ""
    """Absolute path of the program that decides for image keys of the policy `hook`."""
    events_hook: str = ""
    """Absolute path of a program that is run for each event, with the event as JSON on its stdin."""
    events_webhook: str = ""
    """`http(s)://host[:port]/path` to which each event is posted as JSON."""
    services: dict[str, str] = {}
    """Controller services that SEs may reach over their links: name to `host:port`."""
    telemetry_history_s: Annotated[float, Meta(ge=0, le=7 * 86400)] = 3600.0


class Se(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[se]`."""

    seed: str = ""
    """Path of a seed directory or ISO image; empty searches the usual places."""
    sshd_host: str = "127.0.0.1"
    sshd_port: Annotated[int, Meta(ge=1, le=65535)] = 22
    """Where the reverse path ends: this SE's own sshd."""
    telemetry_interval_s: Seconds = 10.0
    spool_max_bytes: Annotated[int, Meta(ge=64 * 1024, le=1 << 32)] = 8 * 1024 * 1024
    redial_first_s: Seconds = 0.5
    redial_most_s: Seconds = 30.0
    refresh_after_s: Seconds = 60.0
    """How long no link may come up before the SE asks for its grant again."""
    retry_most_s: Annotated[float, Meta(gt=0, le=3600)] = 3600.0
    """The longest that it waits because a controller told it when to ask again."""
    connect_timeout_s: Seconds = 10.0
    login_timeout_s: Seconds = 20.0
    """For key exchange, log-in and hello; a busy gateway lets an SE wait in line for 12 of them."""
    max_links: Annotated[int, Meta(ge=1, le=16)] = 3
    allow_curve25519: bool = False
    forwards: dict[str, str] = {}
    """Loopback listeners `127.0.0.1:port` by the name of the controller service they lead to."""


class Clock(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[clock]`: for laboratories; an appliance leaves it alone."""

    offset_s: Annotated[float, Meta(ge=-1e10, le=1e10)] = 0.0
    synchronised: Literal["auto", "yes", "no"] = "auto"


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All sections."""

    log: Log = Log()
    users: Users = Users()
    controller: Controller = Controller()
    se: Se = Se()
    clock: Clock = Clock()


class _Given(NamedTuple):
    """One value and where it came from."""

    where: str
    value: object
    is_text: bool
    """From the environment or the command line: written as text, whatever its type."""


_Key = tuple[str, str]
_SERVICE_NAME = re.compile(r"[a-z][a-z0-9-]{0,30}")
_MAX_SYNTAX_ERRORS = 20
_SECTIONS: dict[str, type[msgspec.Struct]] = {
    field.name: type(field.default) for field in msgspec.structs.fields(Settings)
}
_TYPES: dict[_Key, Any] = {
    (section, field.name): field.type for section, kind in _SECTIONS.items() for field in msgspec.structs.fields(kind)
}


def load(paths: Paths, *, environ: Mapping[str, str], overrides: Mapping[str, str]) -> Settings:
    """Returns the settings of the instance at `paths`.

    Args:
        paths: names the settings file; a missing one means defaults.
        environ: the environment, whole; only names of a known section are looked at.
        overrides: `section.key` to value, from the command line.

    Raises:
        SettingsError: naming every problem with its position.
    """
    problems: list[str] = []
    given: dict[_Key, _Given] = {}
    values: dict[str, dict[str, Any]] = {section: {} for section in _SECTIONS}
    sources = (_from_file(paths, problems), _from_environment(environ, problems), _from_overrides(overrides, problems))
    for (section, name), entry in itertools.chain.from_iterable(sources):
        given[section, name] = entry
        try:
            values[section][name] = _value(section, name, entry)
        except (msgspec.ValidationError, UsageError) as error:
            problems.append(f"{entry.where}: {section}.{name} = {entry.value!r}: {_reason(error)}")
    if not problems:
        settings = msgspec.convert(values, Settings)
        problems = [
            f"{given[key].where if key in given else 'default'}: {key[0]}.{key[1]}: {text}"
            for key, text in _contradictions(settings)
        ]
        if not problems:
            return settings
    count = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
    raise SettingsError(
        f"{count} in the settings:\n" + "\n".join(f"  {problem}" for problem in problems),
        hint="correct each line named; nothing was started or changed",
    )


# --- sources -----------------------------------------------------------------------------------------------------


def _from_file(paths: Paths, problems: list[str]) -> Iterator[tuple[_Key, _Given]]:
    file = paths.settings_file
    try:
        text = file.read_text("utf-8")
    except FileNotFoundError:
        return
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{file}: can't be read: {error}")
        return
    lines = text.split("\n")  # TOML knows no other line ends
    document = _parse(lines, file=str(file), problems=problems)
    positions = _positions(lines)
    for section, table in document.items():
        if section.startswith(_BROKEN):
            continue
        where = f"{file}:{positions.get((section, ''), 1)}"
        if section not in _SECTIONS:
            problems.append(f"{where}: unknown section [{section}]{_nearest(section, _SECTIONS)}")
        elif not isinstance(table, dict):
            problems.append(f"{where}: {section!r} is a section, write [{section}]")
        else:
            for name, value in table.items():
                where = f"{file}:{positions.get((section, name), positions.get((section, ''), 1))}"
                if (section, name) in _TYPES:
                    yield (section, name), _Given(where, value, is_text=False)
                else:
                    problems.append(f"{where}: unknown key {section}.{name}{_nearest_key(section, name)}")


def _from_environment(environ: Mapping[str, str], problems: list[str]) -> Iterator[tuple[_Key, _Given]]:
    for variable in sorted(environ):
        prefix, _, rest = variable.partition("_")
        section, _, name = rest.lower().partition("_")
        if prefix != "APPLIANCE" or section not in _SECTIONS or not name:
            continue
        where = f"environment {variable}"
        if (section, name) in _TYPES:
            yield (section, name), _Given(where, environ[variable], is_text=True)
        else:
            problems.append(f"{where}: unknown key {section}.{name}{_nearest_key(section, name)}")


def _from_overrides(overrides: Mapping[str, str], problems: list[str]) -> Iterator[tuple[_Key, _Given]]:
    for dotted, value in overrides.items():
        section, _, name = dotted.partition(".")
        where = f"--set {dotted}"
        if section not in _SECTIONS:
            problems.append(f"{where}: unknown section {section!r}{_nearest(section, _SECTIONS)}")
        elif (section, name) not in _TYPES:
            problems.append(f"{where}: unknown key {section}.{name}{_nearest_key(section, name)}")
        else:
            yield (section, name), _Given(where, value, is_text=True)


def _nearest(word: str, known: Mapping[str, object] | list[str]) -> str:
    import difflib  # for mistakes only

    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"


def _nearest_key(section: str, name: str) -> str:
    import difflib

    own = [key for known, key in _TYPES if known == section]
    if not difflib.get_close_matches(name, own, n=1):
        for known, key in _TYPES:
            if key == name:
                return f"; did you mean {known}.{key}?"
    return _nearest(name, own)


# --- TOML with positions -----------------------------------------------------------------------------------------

_BROKEN = "\0"
_HEADER = re.compile(r"\s*\[\s*([^\[\]]+?)\s*\]\s*(?:#.*)?$")
_PAIR = re.compile(r"""\s*([A-Za-z0-9_."'\s-]+?)\s*=""")
_AT_LINE = re.compile(r"\(at line (\d+), column \d+\)")


def _parse(lines: list[str], *, file: str, problems: list[str]) -> dict[str, Any]:
    """Parses TOML; a line that doesn't parse is reported, taken out, and the rest is read all the same."""
    import tomllib  # an SE without a settings file does without it

    rest = list(lines)
    for _ in range(_MAX_SYNTAX_ERRORS):
        try:
            return tomllib.loads("\n".join(rest))
        except RecursionError:
            problems.append(f"{file}: brackets within brackets, too deep to be read")
            return {}
        except tomllib.TOMLDecodeError as error:
            match = _AT_LINE.search(str(error))
            if match is None:
                last = 1 + "\n".join(lines).rstrip().count("\n")
                problems.append(f"{file}:{last}: {error}")
                return {}
            number = min(int(match[1]), len(rest))
            reason = str(error)[: match.start()].strip()
            problems.append(f"{file}:{number}: {reason}: {lines[number - 1].strip()!r}")
            # Keys below a broken header must not fall into the section above it.
            broken = rest[number - 1].lstrip().startswith("[")
            rest[number - 1] = f'["\\u0000{number}"]' if broken else ""
    return {}


def _positions(lines: list[str]) -> dict[_Key, int]:
    """Line numbers of sections (key "") and of their keys, the first of each."""
    found: dict[_Key, int] = {}
    header: list[str] = []
    for number, line in enumerate(lines, 1):
        if match := _HEADER.match(line):
            header = path = _split(match[1])
        elif match := _PAIR.match(line):
            path = header + _split(match[1])
        else:
            continue
        found.setdefault((path[0], ""), number)
        if len(path) > 1:
            found.setdefault((path[0], path[1]), number)
    return found


def _split(dotted: str) -> list[str]:
    return [part.strip().strip("\"'") for part in dotted.split(".")]


# --- values ------------------------------------------------------------------------------------------------------


def _value(section: str, name: str, entry: _Given) -> Any:
    """Returns the checked value. Raises `msgspec.ValidationError` or `UsageError` with the reason."""
    kind = _TYPES[section, name]
    value = entry.value
    if isinstance(value, str) and entry.is_text:
        if name in {"forwards", "services"}:
            value = dict(_pair(part) for part in value.split(",") if part.strip())
        elif name == "reverse_users":
            value = [part.strip() for part in value.split(",") if part.strip()]
    if typing.get_origin(kind) is Literal and value not in typing.get_args(kind):
        raise UsageError(f"expected one of {', '.join(typing.get_args(kind))}")
    converted = msgspec.convert(value, kind, strict=not entry.is_text)
    check = _CHECKS.get((section, name))
    if check is not None:
        check(converted)
    return converted


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise UsageError("expected name=host:port, parted by commas")
    return name.strip(), value.strip()


def _reason(error: msgspec.ValidationError | UsageError) -> str:
    text = str(error).partition(" - at `")[0]
    return text[:1].lower() + text[1:].replace("`", "")


def _check_endpoint(value: str) -> None:
    if ":" not in value.rpartition("]")[2]:
        raise UsageError("expected host:port")
    parse_endpoint(value, default_port=0)


def _check_loopback(value: str) -> None:
    _check_endpoint(value)
    host, _ = parse_endpoint(value, default_port=0)
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = False
    if not is_loopback:
        raise UsageError("expected a loopback address, for example 127.0.0.1:9101")


def _check_program(value: str) -> None:
    if value and not value.startswith("/"):
        raise UsageError("expected an absolute path")


def _check_url(value: str) -> None:
    if not value:
        return
    from urllib.parse import urlsplit  # an SE's process does without it

    try:
        parts = urlsplit(value)
        is_whole = parts.scheme in {"http", "https"} and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        is_whole = False
    if not is_whole or "@" in value or not value.isascii() or not value.isprintable() or " " in value:
        raise UsageError("expected http://host:port/path or https://…, without a user name")


def _check_services(value: dict[str, str]) -> None:
    for name, target in value.items():
        if name == "channel" or not _SERVICE_NAME.fullmatch(name):
            raise UsageError(f"{name!r} can't name a service: lower-case letters, digits and '-', but not 'channel'")
        _check_endpoint(target)


def _check_forwards(value: dict[str, str]) -> None:
    for name, listen in value.items():
        # Whoever may open a loopback port must not speak to the controller in this SE's name.
        if name == "channel":
            raise UsageError("the channel API is never reachable through a port")
        _check_loopback(listen)


_CHECKS: dict[_Key, Callable[[Any], None]] = {
    ("controller", "enroll_listen"): _check_endpoint,
    ("controller", "ssh_listen"): _check_endpoint,
    ("controller", "metrics_listen"): _check_loopback,
    ("controller", "enroll_hook"): _check_program,
    ("controller", "events_hook"): _check_program,
    ("controller", "events_webhook"): _check_url,
    ("controller", "services"): _check_services,
    ("se", "forwards"): _check_forwards,
}


def _contradictions(settings: Settings) -> Iterator[tuple[_Key, str]]:
    """Yields what each value allows but not all of them together."""
    if settings.se.redial_first_s > settings.se.redial_most_s:
        yield ("se", "redial_first_s"), f"is above se.redial_most_s ({settings.se.redial_most_s:g})"
    if settings.users.se == settings.users.controller:
        yield ("users", "se"), f"is the same as users.controller ({settings.users.controller!r})"
