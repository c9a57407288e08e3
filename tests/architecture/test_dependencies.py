"""Who may import whom, and what nobody may. Each failure says where, why the rule is there, and what to do instead."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping

import pytest
from source_tree import PROJECT, Module, modules, tracked

BELOW_ALL = {"appliance.errors"}
LOWER = {"appliance.pki", "appliance.storage", "appliance.runtime"}
ROLE = BELOW_ALL | LOWER | {"appliance.protocol", "appliance.paths", "appliance.settings"}

# runtime stands on storage: a daemon's life begins with a lock, and the machine's mode must survive a power cut.
MAY_IMPORT: Mapping[str, set[str]] = {
    "appliance": set(),
    "appliance.errors": set(),
    "appliance.paths": BELOW_ALL,
    "appliance.protocol": BELOW_ALL,
    "appliance.settings": BELOW_ALL | {"appliance.paths", "appliance.protocol"},
    "appliance.pki": BELOW_ALL | {"appliance.protocol"},
    "appliance.storage": BELOW_ALL | {"appliance.protocol"},
    "appliance.runtime": BELOW_ALL
    | {"appliance.protocol", "appliance.paths", "appliance.settings", "appliance.storage"},
    "appliance.se": ROLE,
    "appliance.controller": ROLE,
    "appliance.machine": ROLE,
    "appliance.lab": ROLE | {"appliance.se", "appliance.controller"},
    "appliance.cli": ROLE | {"appliance.se", "appliance.controller", "appliance.lab", "appliance.machine"},
    "appliance.__main__": {"appliance.cli"},
    "image_builder": BELOW_ALL | {"appliance.protocol", "appliance.pki", "appliance.runtime.child"},
}
"""The layers: cli -> lab -> se | controller -> pki | storage | runtime -> protocol. A package may import itself and the
version in `appliance`."""

WHY: Mapping[str, str] = {
    "appliance.protocol": "protocol is pure; take a key, a file or a time as an argument, or live higher up",
    "appliance.pki": "pki takes and gives bytes, so that it can be tested alone; store them in se or controller",
    "appliance.storage": "storage knows bytes and paths, not what they mean; give them meaning in se or controller",
    "appliance.runtime": "runtime keeps daemons alive, whichever they are; what it must know of them is an argument",
    "appliance.se": "the two roles meet on the wire alone; put the shape of what they say into protocol",
    "appliance.controller": "the two roles meet on the wire alone; put the shape of what they say into protocol",
    "appliance.machine": "what runs once as root hands files to the roles, and knows none of them",
    "appliance.lab": "only the command line stands above the lab",
    "image_builder": "image-builder runs in pipelines without the daemons; what both need belongs into protocol or pki",
}

HOMES: Mapping[str, tuple[tuple[str, ...], str]] = {
    "cryptography": (("appliance.pki",), "keys are handled in one place; call pki, or add what is missing there"),
    "psutil": (("appliance.runtime.host",), "host figures have one source; add a function to runtime.host"),
    "paramiko": (("appliance.se",), "paramiko is the SE's SSH; the controller's and the lab's is asyncssh"),
    "asyncssh": (("appliance.controller", "appliance.lab"), "asyncssh is the gateway's SSH; an SE stays under 45 MB"),
    "uvloop": (
        ("appliance.controller", "appliance.lab", "appliance.cli.lab_fleet"),
        "only the controller and simulated fleets have a loop",
    ),
    "click": (("appliance.cli", "image_builder"), "the daemons don't load the command line; raise an ApplianceError"),
    "rich": (("appliance.cli", "image_builder"), "tables are for people at a terminal; return values, print in cli"),
    "starlette": (("appliance.controller",), "the web framework is the controller's alone"),
    "uvicorn": (("appliance.controller",), "the web server is the controller's alone"),
    "httptools": (("appliance.controller",), "the web server is the controller's alone"),
    "pycdlib": (
        ("image_builder", "appliance.se.seed"),
        "ISO files are read once, at first boot, and written by baking",
    ),
    "subprocess": (
        ("appliance.runtime.child", "appliance.cli.lab_fleet"),  # the latter reads its workers' reports as they end
        "a child of the frozen program needs a cleaned environment; use runtime.child.run or Daemon",
    ),
    "multiprocessing": (("appliance.__main__",), "a frozen program forks badly; start a child by runtime.child"),
    "joserfc": ((), "it accepts what enrollment must refuse (ADR 0002); use protocol.jws and pki.jws"),
    "urllib3": ((), "http.client is enough (ADR 0003)"),
    "requests": ((), "http.client is enough (ADR 0003)"),
    "logging.config": ((), "logging is set up by runtime.log alone"),
}

IMPURE = {
    "asyncio", "concurrent", "datetime", "fcntl", "io", "logging", "multiprocessing", "os", "pathlib", "random",
    "secrets", "select", "selectors", "shutil", "signal", "socket", "sqlite3", "ssl", "subprocess", "tempfile",
    "threading", "time", "uuid",
}  # fmt: skip

BANNED_WORDS = {
    "base", "common", "data", "handler", "handlers", "helper", "helpers", "info", "manager", "managers", "misc", "util",
    "utils",
}  # fmt: skip

SLEEPERS: Mapping[str, str] = {
    "appliance.cli": "polls at a terminal, where Ctrl-C ends it",
    "appliance.lab": "polls other processes at a terminal, where Ctrl-C ends it",
    "appliance.storage.lock": "five short tries before the daemon has a stop token",
}


def within(name: str, packages: Iterable[str]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def fail(violations: list[str]) -> None:
    if violations:
        pytest.fail("\n".join(["the architecture's rules are broken:", *violations]), pytrace=False)


@pytest.mark.parametrize("module", modules(), ids=lambda module: module.name)
def test_imports_follow_the_layers(module: Module) -> None:
    home = module.package
    assert home in MAY_IMPORT, f"{module.path}: the package {home} isn't in the drawing; give it a place in MAY_IMPORT"
    allowed = MAY_IMPORT[home] | {home}
    fail(
        [
            f"{module.path}:{entry.line}: {home} imports {entry.name}, allowed are {', '.join(sorted(allowed))}. "
            f"{WHY.get(home, 'see docs/architecture.md')}"
            for entry in module.imports
            if entry.of("appliance") or entry.of("image_builder")
            if entry.name != "appliance" and not within(entry.name, allowed)
        ]
    )


@pytest.mark.parametrize("library", HOMES)
def test_a_library_stays_in_its_home(library: str) -> None:
    homes, why = HOMES[library]
    fail(
        [
            f"{module.path}:{entry.line}: imports {entry.name}, whose home is {' and '.join(homes) or 'nowhere'}: {why}"
            for module in modules()
            if not within(module.name, homes)
            for entry in module.imports
            if entry.of(library)
        ]
    )


def test_an_se_and_an_image_cannot_sign_as_a_controller() -> None:
    fail(
        [
            f"{module.path}:{entry.line}: imports {entry.name}: an SE's process holds no code that makes certificates "
            "or signs trust documents, so that taking one over gives no such tool; verify with pki.trust"
            for module in modules()
            if module.package in {"appliance.se", "image_builder"}
            for entry in module.imports
            if entry.of("appliance.pki.authority")
        ]
    )


def test_protocol_touches_nothing() -> None:
    fail(
        [
            f"{module.path}:{entry.line}: imports {entry.name}: protocol has no socket, file, thread or clock, so that "
            "its rules can be tested whole; take the value as an argument"
            for module in modules()
            if module.package == "appliance.protocol"
            for entry in module.imports
            if within(entry.name, IMPURE)
        ]
    )


def test_every_module_can_be_read_in_one_go() -> None:
    fail(
        [
            f"{module.path}: {module.lines} lines, fewer than 500 are allowed: give the part that has a name of its "
            "own a module of its own"
            for module in modules()
            if module.lines >= 500
        ]
    )


def test_names_say_what_a_thing_is() -> None:
    violations = []
    advice = "says nothing about what it does; name it for its job"
    for module in modules():
        last = module.name.rpartition(".")[2]
        violations += [f"{module.path}: the word {word!r} {advice}" for word in last.split("_") if word in BANNED_WORDS]
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef):
                words = {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z0-9]+", node.name)}
                violations += [
                    f"{module.path}:{node.lineno}: the word {word!r} in class {node.name} {advice}"
                    for word in sorted(words & BANNED_WORDS)
                ]
    fail(violations)


def test_the_process_ends_in_one_place() -> None:
    violations = []
    for module in modules():
        if module.package == "appliance.cli" or module.name in {"appliance.__main__", "image_builder.__main__"}:
            continue
        places = [line for _, line in module.calls("sys.exit", "exit", "quit", "os._exit")]
        places += [
            node.lineno
            for node in ast.walk(module.tree)
            if isinstance(node, ast.Raise) and node.exc is not None and "SystemExit" in ast.unparse(node.exc)
        ]
        violations += [
            f"{module.path}:{line}: ends the process: only the command line knows exit codes; raise an ApplianceError"
            for line in places
        ]
    fail(violations)


def test_nobody_sleeps_where_it_could_not_be_woken() -> None:
    fail(
        [
            f"{module.path}:{line}: calls {name}: a daemon that sleeps can't stop; wait on its StopToken"
            for module in modules()
            if not within(module.name, SLEEPERS)
            for name, line in module.calls("time.sleep", "sleep")
        ]
    )


# What must not be written into any tracked file. The patterns are written so that they don't match themselves.
FORBIDDEN = {
    "a private key": (
        re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----(?:\\n|\s)+[A-Za-z0-9+/=]{40}"),
        "make keys when the test runs; a key that was committed is known to everyone, for ever",
    ),
    "a package registry's host": (
        re.compile(r"\b(?:py[p]i\.org|pythonhoste[d]\.org|registry[.]npm[j]s|deb[.]debian[.]org)", re.IGNORECASE),
        "which registry serves a package is the matter of each machine's own configuration; name the package alone",
    ),
    "a path of one machine": (
        re.compile(r"(?<![\w.<>}\])~-])/(?:root|work|home/[a-z]\w*|Users/\w+|opt/(?:wheels|pypi))/"),
        "write paths relative to the project, or take them from an argument",
    ),
}


@pytest.mark.parametrize("thing", FORBIDDEN)
def test_no_tracked_file_holds(thing: str) -> None:
    pattern, advice = FORBIDDEN[thing]
    violations = []
    for path in tracked():
        try:
            text = (PROJECT / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for found in pattern.finditer(text):
            line = text.count("\n", 0, found.start()) + 1
            violations.append(f"{path}:{line}: holds {thing}: {advice}")
    fail(violations)


@pytest.mark.parametrize(
    ("thing", "text"),
    [
        ("a private key", "-----BEGIN {}PRIVATE KEY-----\n".format("OPENSSH ") + "A" * 40),
        ("a package registry's host", "--index-url https://" + "pypi" + ".org/simple"),
        ("a path of one machine", "cd " + "/ro" + "ot/project"),
    ],
)
def test_the_patterns_find_what_they_are_for(thing: str, text: str) -> None:
    assert FORBIDDEN[thing][0].search(text)
