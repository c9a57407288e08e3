"""Reads the project as text: which module imports what, which files are tracked. Nothing of it is executed."""

from __future__ import annotations

import ast
import dataclasses
import functools
import subprocess
from collections.abc import Iterator
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Import:
    """One import: the dotted name that is asked for, and where."""

    name: str
    line: int

    def of(self, package: str) -> bool:
        """Whether it asks for `package` or something inside it."""
        return self.name == package or self.name.startswith(package + ".")


@dataclasses.dataclass(frozen=True)
class Module:
    """One module of the product."""

    path: Path
    """Relative to the project."""
    name: str
    tree: ast.Module
    lines: int

    @functools.cached_property
    def imports(self) -> list[Import]:
        """All imports, also those inside functions and under TYPE_CHECKING; `from p import m` asks for p.m."""
        return list(self._imports())

    def _imports(self) -> Iterator[Import]:
        for node in ast.walk(self.tree):
            match node:
                case ast.Import(names=names):
                    yield from (Import(alias.name, node.lineno) for alias in names)
                case ast.ImportFrom(module=str(origin), level=0, names=names):
                    for alias in names:
                        full = f"{origin}.{alias.name}"
                        yield Import(full if full in module_names() else origin, node.lineno)
                case ast.ImportFrom():
                    raise AssertionError(f"{self.path}:{node.lineno}: relative import; write the full name")
                case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(name)), *_]):
                    yield Import(name, node.lineno)

    def calls(self, *names: str) -> Iterator[tuple[str, int]]:
        """Calls of `names`, each written as in the source (`sys.exit`, `exit`)."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in names:
                yield ast.unparse(node.func), node.lineno

    @property
    def package(self) -> str:
        """First two parts of the name: `appliance.se` for `appliance.se.link`, `image_builder` for all of that."""
        parts = self.name.split(".")
        return parts[0] if parts[0] != "appliance" else ".".join(parts[:2])


def _name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def _paths() -> tuple[Path, ...]:
    found = [path for top in ("appliance", "image_builder") for path in (PROJECT / top).rglob("*.py")]
    return tuple(sorted(path.relative_to(PROJECT) for path in found))


@functools.cache
def module_names() -> frozenset[str]:
    """Dotted names of all modules and packages of the product."""
    return frozenset(_name(path) for path in _paths())


@functools.cache
def modules() -> tuple[Module, ...]:
    """All modules of the product."""
    found = []
    for path in _paths():
        text = (PROJECT / path).read_text(encoding="utf-8")
        found.append(Module(path, _name(path), ast.parse(text, filename=str(path)), text.count("\n")))
    return tuple(found)


@functools.cache
def tracked() -> tuple[Path, ...]:
    """Files that git tracks and that are there, relative to the project."""
    listed = subprocess.run(
        ["git", "-C", str(PROJECT), "ls-files", "-z"], check=True, capture_output=True, timeout=60
    ).stdout.decode()
    return tuple(Path(name) for name in listed.split("\0") if name and (PROJECT / name).is_file())
