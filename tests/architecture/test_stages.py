"""Who knows a stage's word finds all of the stage: its rules, who says it, who hears it, its page."""

from __future__ import annotations

import re

import pytest
from source_tree import PROJECT

STAGES = ("seed", "enroll", "tunnel", "config", "telemetry", "logs", "upgrade")

PLACES = {
    "seed": ("appliance/se/{}.py", "image_builder/{}.py"),  # baked by image-builder, read by the SE
}
"""Where a stage's two sides are; a controller bakes no image."""
USUAL_PLACES = ("appliance/se/{}.py", "appliance/controller/{}.py")


def places(stage: str) -> list[str]:
    return [f"appliance/protocol/{stage}.py", *(place.format(stage) for place in PLACES.get(stage, USUAL_PLACES))]


def is_built(stage: str) -> bool:
    return any((PROJECT / place).exists() for place in places(stage))


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_found_by_its_word(stage: str) -> None:
    page = (PROJECT / f"docs/stages/{stage}.md").read_text(encoding="utf-8")
    says_unbuilt = page.startswith(f"# {stage}\n\nNot built yet.")
    if not is_built(stage):
        assert says_unbuilt, f"docs/stages/{stage}.md must begin with 'Not built yet.'"
        return
    assert not says_unbuilt, f"docs/stages/{stage}.md says 'Not built yet.', but the stage is there"
    for place in places(stage):
        assert (PROJECT / place).exists(), f"stage {stage}: {place} is missing; one word names a stage everywhere"


@pytest.mark.parametrize("stage", STAGES)
def test_a_stages_protocol_begins_with_its_word(stage: str) -> None:
    path = PROJECT / f"appliance/protocol/{stage}.py"
    if path.exists():
        first = path.read_text(encoding="utf-8").splitlines()[0]
        assert first.startswith(f'"""Stage {stage}:'), f"{path.name} begins with {first!r}, 'Stage {stage}: …' expected"


def test_every_page_is_a_stage() -> None:
    pages = {path.stem for path in (PROJECT / "docs/stages").glob("*.md")}
    assert pages == set(STAGES)


def test_error_codes_begin_with_a_known_word() -> None:
    """A code's prefix leads to who raises it: a stage's word, or the one of an error class."""
    texts = {
        path.relative_to(PROJECT): path.read_text(encoding="utf-8")
        for top in ("appliance", "image_builder")
        for path in (PROJECT / top).rglob("*.py")
    }
    known = {stage.upper() for stage in STAGES} | {"HTTP", "SHA"}
    # HTTP: what a web server refuses before any stage; SHA: how CycloneDX writes a digest's kind
    for text in texts.values():
        known.update(re.findall(r'^    code(?:: str)? = "([A-Z]+)-\d{3}"$', text, re.MULTILINE))
    for path, text in texts.items():
        strange = set(re.findall(r'"([A-Z]{3,})-\d{3}"', text)) - known
        assert not strange, f"{path}: codes of no stage and of no error class: {sorted(strange)}"
