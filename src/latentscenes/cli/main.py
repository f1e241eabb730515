"""The program: finds the command that its first words name. Each command is a function whose docstring is its
help. Only the module of that command is loaded, and torch only when it runs, so that `--help` is fast."""

import importlib
import sys
from collections.abc import Callable, Mapping

import tyro

from latentscenes.cli.common import PATHS, errors_in_one_line, refuse_repeated

COMMANDS = {
    "data": "main.data",
    "train": "commands.train",
    "exploit": "commands.exploit",
    "eval": "commands.evaluate",
    "report": "commands.report",
    "render": "export.render",
    "export": "main.export",
    "cost": "commands.cost",
    "verify": "commands.verify",
    "library": "main.library",
    "search": "library.search",
    "view": "commands.view",
    "demo": "commands.demo",
}
"""Commands of one word, and the module and the function of each."""
GROUPS = {
    "data": "Make or import a packed dataset of posed images.",
    "export": "Export learned scenes: meshes, points, posed pictures, a web page.",
    "library": "Inspect and maintain a library of learned scenes.",
}
"""Groups of commands of two words: modules with a table `COMMANDS`."""


def data() -> None:
    """Make, import, join, place or verify datasets: data cars | meshes | srn | transforms | photos | …"""


def export() -> None:
    """Export scenes: export mesh | points | splats | images | page."""


def library() -> None:
    """Inspect and maintain a library: list | show | rename | export | verify | rebuild | compact | …."""


def load_commands(group: str = "", word: str = "") -> dict[str, Callable[..., None]]:
    """Returns the commands of a group, or those of one word: only `word`, if it is one of them, else all."""
    if group:
        return importlib.import_module(f"latentscenes.cli.{group}").COMMANDS
    found = {}
    for name in [word] if word in COMMANDS else COMMANDS:
        module, function = COMMANDS[name].split(".")
        found[name] = getattr(importlib.import_module(f"latentscenes.cli.{module}"), function)
    return found


def run_commands(
    prog: str, commands: Mapping[str, Callable[..., None]], description: str, arguments: list[str]
) -> None:
    """Runs the command that the first argument names, or shows the help of all."""
    refuse_repeated(arguments)
    with PATHS:
        if command := commands.get(arguments[0]):
            tyro.cli(command, prog=f"{prog} {arguments[0]}", args=arguments[1:])
        else:
            tyro.extras.subcommand_cli_from_dict(
                dict(commands), prog=prog, description=description, args=arguments
            )


def _arguments() -> list[str]:
    """Arguments of the command line. Fills in required folders if a configuration is only to be printed."""
    given = sys.argv[1:]
    if "--print-config" in given and given[0] in ("train", "exploit"):
        given += [word for flag in ("--data", "--out") if flag not in given for word in (flag, "unused")]
    return given or ["--help"]


def main() -> None:
    """Entry point of `latentscenes`."""
    with errors_in_one_line():
        first, *others = _arguments()
        if first in GROUPS:
            commands = load_commands(first)
            run_commands(f"latentscenes {first}", commands, GROUPS[first], others or ["--help"])
        else:
            description = "Learn large collections of 3D objects from posed images."
            run_commands("latentscenes", load_commands(word=first), description, [first, *others])
