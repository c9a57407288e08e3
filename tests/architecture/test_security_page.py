"""The threat model names tests that exist, and no defence without one."""

from __future__ import annotations

import ast
import re

from source_tree import PROJECT

PAGE = (PROJECT / "docs/security.md").read_text(encoding="utf-8")
HEAD = "| who has what | what they can do | what stops them | shown by |"


def existing() -> set[str]:
    """Test functions, and modules that are one test as a whole (a scanner)."""
    found = set()
    for path in (PROJECT / "tests").rglob("test_*.py"):
        found.add(path.stem)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    return found


def rows() -> list[list[str]]:
    lines = [
        line for line in PAGE.splitlines() if line.startswith("| ") and line not in {HEAD, "| --- | --- | --- | --- |"}
    ]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_every_test_that_is_named_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    missing = named - existing()
    assert not missing, f"docs/security.md names {', '.join(sorted(missing))}; say which test shows it now"


def test_every_defence_has_a_test() -> None:
    assert len(rows()) > 20
    for row in rows():
        assert len(row) == 4, row
        assert re.fullmatch(r"(`test_\w+` ?)+", row[3]), f"no test shows what stops {row[0]!r}"


def test_what_is_not_defended_is_said() -> None:
    part = PAGE.partition("## Not defended")[2].partition("\n## ")[0]
    assert part.count("\n- **") >= 5
