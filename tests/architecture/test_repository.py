"""The repository keeps what it promises: scripts run, documents name what exists, the lock is whole."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from source_tree import PROJECT, tracked

SCRIPTS = sorted(path.relative_to(PROJECT) for path in (PROJECT / "scripts").iterdir() if path.is_file())
PAGES = sorted(
    path.relative_to(PROJECT) for path in (*PROJECT.glob("*.md"), *(PROJECT / "docs").rglob("*.md")) if path.is_file()
)
LOCKS = ("run", "build", "dev", "scan", "fuzz")
SOURCED = Path("scripts/env")


def read(path: Path | str) -> str:
    return (PROJECT / path).read_text(encoding="utf-8")


@pytest.mark.parametrize("path", [*SCRIPTS, Path(".ci/run")], ids=str)
def test_a_script_can_be_started(path: Path) -> None:
    text = read(path)
    shell = re.match(r"#!/(bin/bash|bin/sh|usr/bin/env python3)\n", text)
    assert shell, f"{path} has no first line that names its shell"
    if path != SOURCED:
        assert os.access(PROJECT / path, os.X_OK), f"{path} can't be executed: git update-index --chmod=+x {path}"
    if "python3" not in shell[1]:
        command = ["bash", "-n", str(PROJECT / path)]
        checked = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_a_page_names_only_what_exists(page: Path) -> None:
    """Links between pages, and files in code spans that begin with a folder of the project."""
    text = read(page)
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)(?:#[^)]*)?\)", text)
    files = re.findall(r"`((?:appliance|image_builder|scripts|tests|docs|requirements|\.ci)/[\w./-]+)", text)
    missing = [target for target in links if not (PROJECT / page.parent / target).exists()]
    missing += [named for named in files if not (PROJECT / named.rstrip("/.")).exists()]
    assert not missing, f"{page} names what isn't there: {', '.join(missing)}"


def test_readme_names_only_commands_that_exist() -> None:
    nouns = set(re.findall(r'^    "([a-z-]+)": \("appliance\.cli\.\w+",', read("appliance/cli/root.py"), re.MULTILINE))
    assert nouns, "the table of nouns in appliance/cli/root.py has another form than this test reads"
    for noun in re.findall(r"`appliance ([a-z-]+)", read("README.md")):
        assert noun in nouns, f"README.md speaks of `appliance {noun}`, which is no command"


def test_every_script_is_in_the_readme() -> None:
    """A newcomer finds them all there; what is only ever sourced or called by another one needn't be."""
    text = read("README.md") + "".join(read(path) for path in SCRIPTS)
    unnamed = [str(path) for path in SCRIPTS if path != SOURCED and str(path) not in text.replace(f"#   {path}", "")]
    assert not unnamed, f"nobody names {', '.join(unnamed)}"


def test_decisions_are_numbered_and_say_what_gets_worse() -> None:
    pages = sorted((PROJECT / "docs/adr").glob("*.md"))
    numbers = [path.name[:4] for path in pages]
    assert numbers == [f"{number:04d}" for number in range(1, len(pages) + 1)]
    for path in pages:
        text = path.read_text(encoding="utf-8")
        assert text.startswith(f"# {path.name[:4]}: "), f"{path.name}: the title begins with the number"
        for part in ("\nStatus: ", "\n## Context\n", "\n## Decision\n", "\n## What gets worse\n"):
            assert part in text, f"{path.name}: {part.strip()!r} is missing"


def test_the_changelog_has_a_place_for_the_next_change() -> None:
    assert re.search(r"^## Unreleased$", read("CHANGELOG.md"), re.MULTILINE)


def locked(name: str) -> dict[str, str]:
    """Package name to version, as requirements/NAME.txt pins it; every one must have a hash."""
    entries = re.split(
        r"\n(?=[a-z0-9])", re.sub(r"^\s*#.*\n?", "", read(f"requirements/{name}.txt"), flags=re.MULTILINE)
    )
    found = {}
    for entry in filter(None, map(str.strip, entries)):
        pin = re.match(r"([a-z0-9][a-z0-9._-]*)==(\S+)", entry)
        assert pin, f"requirements/{name}.txt: no pin: {entry.splitlines()[0]!r}"
        assert "--hash=sha256:" in entry, f"requirements/{name}.txt: {pin[1]} has no hash"
        found[pin[1]] = pin[2]
    return found


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_pins_everything_by_hash_and_names_no_place(name: str) -> None:
    assert locked(name)
    text = read(f"requirements/{name}.txt")
    assert not re.search(
        r"://|^\s*-(?:i|f|-index-url|-find-links|-extra-index-url|-trusted-host)\b", text, re.MULTILINE
    )


def test_what_is_tested_is_what_is_frozen() -> None:
    tested = locked("dev")
    for name in ("run", "build"):
        other = {package: version for package, version in locked(name).items() if tested.get(package) != version}
        assert not other, f"requirements/{name}.txt differs from dev.txt: {other}; run scripts/lock"


def test_the_lock_covers_what_the_project_asks_for() -> None:
    project = tomllib.loads(read("pyproject.toml"))["project"]
    groups = {"run": project["dependencies"], **project["optional-dependencies"]}
    for name in ("scan", "fuzz"):
        lines = read(f"requirements/{name}.in").splitlines()
        groups[name] = [line for line in lines if not line.startswith("#")]
    for name, wanted in groups.items():
        names = {re.split(r"[<>=!\[; ]", entry)[0].lower().replace("_", "-") for entry in wanted}
        missing = names - locked(name).keys()
        assert not missing, f"requirements/{name}.txt lacks {', '.join(sorted(missing))}; run scripts/lock"


def test_nothing_that_is_made_is_tracked() -> None:
    folders = {"__pycache__", "build", "dist", ".venv", ".venv-scan", ".mypy_cache"}
    made = [str(path) for path in tracked() if folders & set(path.parts[:-1])]
    assert not made, f"made by tools, not ours to keep: {made}"
