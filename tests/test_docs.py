"""The documentation against the code: the map of files, commands, imports, links, the page of settings."""

import ast
import dataclasses
import functools
import importlib
import re
import shlex
from pathlib import Path

import pytest
import tyro
import yaml

from docs import settings
from latentscenes.cli import main as cli
from latentscenes.core import config, config_io

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
PACKAGE = ROOT / "src" / "latentscenes"


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str = "") -> list[str]:
    """Returns the fenced blocks of a page in one language; by default, those without a language."""
    return [
        text
        for kind, text in re.findall(r"^ *```(\w*)\n(.*?)^ *```", page.read_text(), re.M | re.S)
        if kind == language
    ]


def commands(page: Path, program: str) -> list[str]:
    lines = "\n".join(blocks(page)).replace("\\\n", " ").splitlines()
    return [line.split("   #")[0] for line in lines if line.startswith(f"{program} ")]


BENCHMARKS = [
    (name(page), line) for page in PAGES for line in commands(page, "python") if " -m benchmarks." in line
]
LATENTSCENES = [(name(page), line) for page in PAGES for line in commands(page, "latentscenes")]


# The map


def mapped_files() -> set[str]:
    """Returns the files of package and benchmarks that docs/architecture.md lists."""
    text = (ROOT / "docs" / "architecture.md").read_text().split("<!-- map -->")[1].split("<!-- /map -->")[0]
    found, folder = set(), ""
    for line in text.splitlines():
        if re.match(r"\S+/$", line):
            folder = "" if "src" in line else line
        elif section := re.match(r"  (\S+/)$", line):
            folder = section[1]
        elif file := re.match(r" +(\S+)  +\S", line):
            found.add(folder + file[1])
    return found


def source_files() -> set[str]:
    """Returns the files of package and benchmarks without __init__.py; a pretrained model is one folder."""
    found = {
        path.relative_to(PACKAGE)
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    names = {
        f"pretrained/{file.parts[1]}/" if file.parts[0] == "pretrained" else str(file)
        for file in found
        if str(file) == "__init__.py" or file.name != "__init__.py"
    }
    return names | {
        f"benchmarks/{path.name}" for path in (ROOT / "benchmarks").glob("*.*") if path.name != "__init__.py"
    }


def test_map_and_tree_agree():
    mapped, present = mapped_files(), source_files()
    assert present - mapped == set(), "add these to the map in docs/architecture.md"
    assert mapped - present == set(), "remove these from the map in docs/architecture.md"


# Commands

GROUPS = {group: cli.load_commands(group) for group in cli.GROUPS}
"""Commands that are groups of commands."""


def parse(line: str) -> dict:
    """Returns the arguments that the command line reads from a line. The command itself is not run."""
    seen = {}

    def stub(command):
        @functools.wraps(command)
        def record(**values):
            seen.update(values)

        return record

    words = shlex.split(line)[1:]
    known, prog = (
        (GROUPS[words[0]], f"latentscenes {words[0]}")
        if words[0] in GROUPS
        else (cli.load_commands(), "latentscenes")
    )
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
        assert preset in config_io.presets()
        config_io.load(preset, values.get("overrides", ()))


@pytest.mark.parametrize(("page", "line"), BENCHMARKS)
def test_benchmarks_in_pages_parse(page, line, capsys):
    _, _, module, *arguments = shlex.split(line)
    with pytest.raises(Parsed):
        tyro.cli(parsed(importlib.import_module(module).main), args=arguments)


class Parsed(Exception):
    """The command line was read without an error."""


def parsed(command):
    @functools.wraps(command)
    def stop(**_):
        raise Parsed

    return stop


def test_every_command_is_in_some_page():
    shown = {
        " ".join(line.split()[1:3]) if line.split()[1] in GROUPS else line.split()[1]
        for _, line in LATENTSCENES
    }
    assert shown == set(cli.COMMANDS) - set(GROUPS) | {
        f"{group} {kind}" for group, known in GROUPS.items() for kind in known
    }


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


# Python examples and file names


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_examples_import_existing_names(page):
    for text in blocks(page, "python"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("latentscenes"):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module}: {alias.name}"


OTHER_REPOSITORY = "docs/from-3da-ae.md"
"""The page that also names files of the published code."""


@pytest.mark.parametrize("page", [page for page in PAGES if name(page) != OTHER_REPOSITORY], ids=name)
def test_code_files_named_in_pages_exist(page):
    for file in re.findall(r"`([\w/]+/\w+\.(?:py|cpp|h))`", page.read_text()):
        assert "NAME" in file or (PACKAGE / file).is_file() or (ROOT / file).is_file(), file


def test_unknown_flags_and_commands_would_be_noticed(capsys):
    with pytest.raises(SystemExit):
        parse("latentscenes train --data a --out b --epochs 3")
    with pytest.raises(AssertionError, match="no command"):
        parse("latentscenes fly --out b")


# Error messages


def string_constants() -> str:
    """Returns all string constants in the package's Python files, also the constant parts of f-strings."""
    nodes = (node for file in PACKAGE.rglob("*.py") for node in ast.walk(ast.parse(file.read_text())))
    return "\n".join(n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str))


def test_error_messages_in_page_of_data_exist():
    table = (ROOT / "docs" / "data.md").read_text().split("## Errors and remedies")[1]
    quoted = [
        text for row in re.findall(r"^\| (`.*?) \|", table, re.M) for text in re.findall("`(.+?)`", row)
    ]
    known = string_constants()
    assert len(quoted) > 30
    for message in quoted:
        parts = [part.strip() for part in message.split("…")]
        assert all(part in known for part in parts), message


# Links


def links(page: Path) -> list[str]:
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.M | re.S)
    return [
        target
        for target in re.findall(r"\]\(([^)\s]+)\)", text)
        if not target.startswith(("http://", "https://"))
    ]


def anchors(page: Path) -> set[str]:
    """Returns the anchors that GitHub gives to the headings of a page."""
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
    assert page == settings.updated(page), "run: python docs/settings.py docs/configuration.md"


def test_page_of_settings_leaves_no_section_out():
    known = {
        value
        for value in vars(config).values()
        if isinstance(value, type) and dataclasses.is_dataclass(value)
    }
    assert {kind for kind, _ in settings.SECTIONS} == known


def test_every_preset_is_explained():
    explained = set(
        re.findall(
            r"^\| `(\w+)` \|", (ROOT / "docs" / "configuration.md").read_text().split("## Changing")[0], re.M
        )
    )
    assert explained == set(config_io.presets())


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_configurations_in_pages_are_valid(page):
    for text in blocks(page, "yaml"):
        assert yaml.safe_load(text)
        config_io.parse(text, name(page))
