"""Recipes: every field, every mistake at once, files and options alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from image_builder import recipe
from image_builder.recipe import Recipe

NOW = 1_800_000_000
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJzCZ1pSBUL9KDvQkWqKYBdRNVEeUnJGuJ0pvDjiRqYP"


def checked(tmp_path: Path, **values: Any) -> tuple[Recipe, list[str]]:
    bundle = tmp_path / "bundle.json"
    bundle.touch()
    problems: list[str] = []
    given = {"bundle": str(bundle), "output.directory": str(tmp_path)}
    given |= {name.replace("__", "."): value for name, value in values.items()}
    return recipe.check(
        {name: value for name, value in given.items() if value is not None}, now=NOW, agent=Path("a"), problems=problems
    ), problems


def test_little_is_needed(tmp_path: Path) -> None:
    found, problems = checked(tmp_path)
    assert not problems
    assert (found.name, found.role, found.baked_at, found.base, found.formats) == (
        "appliance-se", "se", NOW, None, ["qcow2"],
    )  # fmt: skip


def test_second_addresses_come_after_all_first_ones(tmp_path: Path) -> None:
    found, problems = checked(tmp_path, controllers=["10.0.0.1, 192.168.0.1", "c.example:444", "[2001:db8::1],a.b"])
    assert not problems
    assert found.wishes.controllers == ["10.0.0.1", "c.example:444", "[2001:db8::1]", "192.168.0.1", "a.b"]


@pytest.mark.parametrize(
    ("text", "mib"), [("8G", 8192), ("512M", 512), ("1T", 1024 * 1024), ("2 GiB", 2048), ("2048MB", 2048)]
)
def test_sizes(tmp_path: Path, text: str, mib: int) -> None:
    assert checked(tmp_path, disk__size=text)[0].disk_bytes == mib << 20


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"name": "a/b"}, "name 'a/b'"),
        ({"name": ".hidden"}, "name '.hidden'"),
        ({"bundle": None}, "bundle or image_key.create"),
        ({"bundle": "/nowhere"}, "bundle: the file /nowhere is not there"),
        ({"image_key__create": True}, "bundle and image_key.create"),
        ({"image_key__expires": "30d"}, "image_key.create isn't set"),
        ({"bundle": None, "image_key__create": True, "image_key__expires": "soon"}, "image_key.expires 'soon'"),
        ({"bundle": None, "image_key__create": True, "image_key__max_uses": 0}, "image_key.max_uses 0"),
        ({"controllers": ["a,b,c"]}, "controller 'a,b,c'"),
        ({"controllers": ["a,"]}, "controller 'a,'"),
        ({"disk__size": "8"}, "disk.size '8'"),
        ({"base__image": "/"}, "base.image: the file / is a folder"),
        ({"base__sha256": "ab"}, "base.sha256 'ab'"),
        ({"base__sha256": "0" * 64}, "no base.image that it could be of"),
        ({"base__packages": ["Vim; rm"]}, "base.packages 'Vim; rm'"),
        ({"base__sources": ["/nowhere.list"]}, "base.sources: the file /nowhere.list"),
        ({"output__formats": []}, "output.formats: at least one"),
        ({"output__formats": ["vhd"]}, "output.formats 'vhd': qcow2, raw, ova, iso expected"),
        ({"output__directory": "/nowhere"}, "output.directory /nowhere is no folder"),
        ({"role": "node"}, "role 'node': se, controller expected"),
        ({"role": "controller"}, "bundle is for SEs"),
        ({"controller__addresses": ["10.0.0.1"]}, "controller.addresses is for a controller's image"),
        ({"role": "controller", "controller__addresses": ["10.0.0.1:8443"]}, "without a port expected"),
        ({"role": "controller", "controller__addresses": ["$(reboot)"]}, "'$(reboot)': a name or an address"),
        ({"role": "controller", "controller__trust_clock": True}, "no cluster is made at first boot"),
        ({"role": "controller", "bundle": None, "output__formats": ["iso"]}, "there is no iso of it"),
        ({"ova__key": "/nowhere"}, "both or none"),
        ({"hooks": ["/nowhere"]}, "the hook /nowhere can't be read"),
        ({"operator_key": "/nowhere"}, "operator_key is neither"),
        ({"token": "/nowhere"}, "token is neither"),
        ({"token": "enroll-x"}, "token: that is no token"),
        (
            {"bundle": None, "image_key__create": True, "image_key__policy": "all"},
            "image_key.policy 'all': open, token",
        ),
        ({"bundle": None, "image_key__create": True, "image_key__networks": ["10.0.0.1/8"]}, "such as 192.0.2.0/24"),
    ],
)
def test_mistakes(tmp_path: Path, values: dict[str, Any], told: str) -> None:
    problems = checked(tmp_path, **values)[1]
    assert any(told in problem for problem in problems), problems


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(
        'nmae = "x"\nhostname = 5\nlabels = "a=b"\n[disk]\nsize = "big"\n[outputs]\nformats = ["qcow2"]\n'
        '[base]\nsha256 = "no"\n'
    )
    problems: list[str] = []
    values = recipe.read_file(path, problems)
    recipe.check(values, now=NOW, agent=Path("a"), problems=problems)
    text = str(recipe.refusal(problems))
    for told in (
        "there is no field 'nmae', 'name' perhaps?",
        "hostname is 5, text expected",
        "labels is 'a=b', a list of texts expected",
        "there is no field 'outputs.formats', 'output.formats' perhaps?",
        "disk.size 'big'",
        "base.sha256 'no'",
        "bundle or image_key.create",
    ):
        assert told in text, text


def test_paths_in_a_file_are_relative_to_it(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('bundle = "b.json"\nhooks = ["h.sh"]\n[base]\nimage = "d.qcow2"\n')
    values = recipe.read_file(path, [])
    assert values == {
        "bundle": str(tmp_path / "b.json"),
        "hooks": [str(tmp_path / "h.sh")],
        "base.image": str(tmp_path / "d.qcow2"),
    }
    path.write_text(f'[base]\nimage = "{recipe.OWN_BASE}"\n')
    assert recipe.read_file(path, []) == {"base.image": recipe.OWN_BASE}


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"\xff", "no TOML"), (b"a = ", "no TOML"), (b"#" * (recipe.MAX_RECIPE_BYTES + 1), "more than")],
)
def test_files_that_are_no_recipe(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes(content)
    problems: list[str] = []
    assert recipe.read_file(path, problems) == {}
    assert told in problems[0]
    missing: list[str] = []
    recipe.read_file(tmp_path / "none", missing)
    assert "can't be read" in missing[0]


def test_an_operator_key_may_stand_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "key.pub").write_text(f"{KEY} me@here\n")
    found, problems = checked(tmp_path, operator_key=str(tmp_path / "key.pub"))
    assert not problems
    assert found.cloud.operator_key == f"{KEY} me@here"


def test_words_that_may_be_files_are_relative_to_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(f'operator_key = "operator.pub"\ntoken = "vm.token"\n[base]\nimage = "{recipe.OWN_BASE}"\n')
    problems: list[str] = []
    found = recipe.read_file(path, problems)
    assert (found["operator_key"], found["token"]) == (str(tmp_path / "operator.pub"), str(tmp_path / "vm.token"))
    assert found["base.image"] == recipe.OWN_BASE
    path.write_text(f'operator_key = "{KEY}"\ntoken = "enroll-x"\n')
    assert recipe.read_file(path, problems) == {"operator_key": KEY, "token": "enroll-x"}
    assert not problems


def test_every_field_has_an_option_of_its_own() -> None:
    flags = [field.flag for field in recipe.FIELDS]
    assert len(set(flags)) == len(flags)
    assert {"--network-address", "--network-dns", "--controller", "--hook", "--base-package", "--output-format"} <= set(
        flags
    )
