"""The documentation against the tree: the map of the house, commands, links, the page of settings."""

import ast
import dataclasses
import functools
import re
import shlex
from pathlib import Path

import pytest
import yaml

from latentscenes import cli, config, config_docs

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
PACKAGE = ROOT / "src" / "latentscenes"


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str = "") -> list[str]:
    """The fenced blocks of a page in a language, or in none."""
    return [text for kind, text in re.findall(r"^ *```(\w*)\n(.*?)^ *```", page.read_text(), re.M | re.S) if kind == language]


def commands(page: Path, program: str) -> list[str]:
    lines = "\n".join(blocks(page)).replace("\\\n", " ").splitlines()
    return [line.split("   #")[0] for line in lines if line.startswith(f"{program} ")]


LATENTSCENES = [(name(page), line) for page in PAGES for line in commands(page, "latentscenes")]


# The map


def house_map() -> dict[str, int]:
    """Files of the package, with their floors, as the README maps them."""
    text = (ROOT / "README.md").read_text().split("<!-- map -->")[1].split("<!-- /map -->")[0]
    floors, floor = {}, -1
    for line in text.splitlines():
        if found := re.match(r"  (\d) \w+$", line):
            floor = int(found[1])
        elif found := re.match(r"    (\S+)  +\S", line):
            floors[found[1]] = floor
    return floors


def source_files() -> set[str]:
    files = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {f"models/{file.parts[1]}/" if file.parts[0] == "models" else str(file) for file in files}


def test_map_and_tree_agree():
    mapped, present = set(house_map()), source_files()
    assert present - mapped == set(), "add these to the README's map"
    assert mapped - present == set(), "remove these from the README's map"


def test_files_import_only_from_their_floor_or_below():
    floors = house_map()
    for file in sorted(source_files()):
        if not file.endswith(".py"):
            continue
        for module in imported(PACKAGE / file):
            path = next(p for p in (f"{module}.py", f"{module}/__init__.py") if p in floors)
            assert floors[path] <= floors[file], f"{file} (floor {floors[file]}) imports {path} (floor {floors[path]})"


def imported(file: Path) -> set[str]:
    """Modules of the package that a file imports, as paths without ending."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("latentscenes"):
            base = node.module.removeprefix("latentscenes").lstrip(".").replace(".", "/")
            for alias in node.names:
                longer = f"{base}/{alias.name}".lstrip("/")
                found.add(longer if (PACKAGE / f"{longer}.py").is_file() or (PACKAGE / longer).is_dir() else base)
    return found - {""}


# Commands

GROUPS = {group: commands for group, (commands, _) in cli.GROUPS.items()}
"""Commands that are groups of commands."""


def parse(line: str) -> dict:
    """What the command line takes a line for; the command itself is not run."""
    seen = {}

    def stub(command):
        @functools.wraps(command)
        def record(**values):
            seen.update(values)

        return record

    words = shlex.split(line)[1:]
    known, prog = (GROUPS[words[0]], f"latentscenes {words[0]}") if words[0] in GROUPS else (cli.COMMANDS, "latentscenes")
    arguments = words[1:] if words[0] in GROUPS else words
    assert arguments[0] in known, f"no command {arguments[0]!r}"
    cli.run_commands(prog, {key: stub(command) for key, command in known.items()}, "", [*arguments])
    return seen


@pytest.mark.parametrize(("page", "line"), LATENTSCENES)
def test_commands_in_pages_parse(page, line, capsys):
    try:
        values = parse(line.split(" > ")[0])
    except SystemExit:
        pytest.fail(f"{page}: {line}\n{''.join(capsys.readouterr())}")
    preset = values.get("config")
    if preset is not None and not preset.endswith(".yaml"):
        assert preset in config.presets()
        config.load(preset, values.get("overrides", ()))


def test_every_command_is_in_some_page():
    told = {" ".join(line.split()[1:3]) if line.split()[1] in GROUPS else line.split()[1] for _, line in LATENTSCENES}
    assert told == set(cli.COMMANDS) - set(GROUPS) | {f"{group} {kind}" for group, known in GROUPS.items() for kind in known}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_within_sentences_exist(page):
    for words in re.findall(r"`latentscenes ([a-z ]+)", " ".join(page.read_text().split())):
        first, *rest = words.split()
        assert first in cli.COMMANDS, f"latentscenes {words}"
        assert first not in GROUPS or not rest or rest[0] in GROUPS[first], f"latentscenes {words}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_make_targets_exist(page):
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    assert {line.split()[1] for line in commands(page, "make")} <= targets


def test_unknown_flags_and_commands_would_be_noticed(capsys):
    with pytest.raises(SystemExit):
        parse("latentscenes train --data a --out b --epochs 3")
    with pytest.raises(AssertionError, match="no command"):
        parse("latentscenes fly --out b")


# Links


def links(page: Path) -> list[str]:
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.M | re.S)
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not target.startswith(("http://", "https://"))]


def anchors(page: Path) -> set[str]:
    """Headings as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


# Settings


def test_page_of_settings_is_up_to_date():
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == config_docs.updated(page), "run: python -m latentscenes.config_docs docs/configuration.md"


def test_page_of_settings_leaves_no_section_out():
    known = {value for value in vars(config).values() if isinstance(value, type) and dataclasses.is_dataclass(value)}
    assert {kind for kind, _ in config_docs.SECTIONS} == known


def test_every_preset_is_explained():
    told = set(re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "configuration.md").read_text().split("## Changing")[0], re.M))
    assert told == set(config.presets())


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_configurations_in_pages_are_valid(page):
    for text in blocks(page, "yaml"):
        assert yaml.safe_load(text)
        config.parse(text, name(page))
