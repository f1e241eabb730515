"""Text from untrusted files: the rule for scene names, text that a terminal or an HTML page may show, file
names, tags. Loads neither torch nor numpy."""

import difflib
import fnmatch
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from latentscenes.core.errors import UserError

LONGEST_NAME = 200
"""Bytes of the longest name of a scene, in UTF-8."""
MOST_COMPARED = 10_000
"""Names among which the nearest to a wrong one are sought."""
LONGEST_FILE_NAME = 120
"""Bytes of the longest file name made from a scene's name, without its ending."""
HIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufffe\uffff\ud800-\udfff]"
)
"""Characters that a terminal obeys instead of showing them: control characters, marks that turn the direction
of text, ends of lines; and halves of surrogate pairs, which no file can hold."""
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
"""Names that Windows keeps for devices."""


def check_name(name: object, where: object) -> str:
    """Returns a new scene's name if it follows the rule of all entrances.

    Raises:
        UserError: it is no text, empty, `.` or `..`, longer than LONGEST_NAME, or holds characters of HIDDEN.
    """
    if not isinstance(name, str) or not name.strip():
        reason = "is empty" if isinstance(name, str) else "is no text"
    elif name.strip() in (".", ".."):
        reason = "stands for a folder"
    elif found := HIDDEN.search(name):
        reason = f"holds {unicodedata.name(found[0], 'a control character')} (U+{ord(found[0]):04X})"
    elif (size := len(name.encode())) > LONGEST_NAME:
        reason = f"has {size} bytes; {LONGEST_NAME} are the most"
    else:
        return name
    raise UserError(f"{where}: {short(name)} cannot name a scene: it {reason}. Choose another name.")


def counted(count: int, one: str, many: str | None = None) -> str:
    """Returns a number with its noun: 1 scene, 2 scenes. `many` is a plural that is not `one` with an s."""
    return f"{count} {one if count == 1 else many or one + 's'}"


def short(value: object, most: int = 80) -> str:
    """Returns `repr(value)` in printable characters, cut after `most` of them."""
    text = repr(value) if isinstance(value, str | int | float | bool | None) else f"a {type(value).__name__}"
    return one_line(text if len(text) <= most else f"{text[:most]} …")


def printable(text: str) -> str:
    """Returns text whose lines a terminal shows as they are; see `one_line`."""
    return "\n".join(map(one_line, text.split("\n")))


def one_line(text: object) -> str:
    """Returns text with the characters of HIDDEN escaped as in Python."""
    return HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def file_names(names: Iterable[str]) -> dict[str, str]:
    """Returns a file name for each of different scene names: no folder, no ending that a system strips, no
    name of a device. Names that would fall together, also where case does not count, are numbered."""
    chosen: dict[str, str] = {}
    taken: set[str] = set()
    for name in names:
        safe = HIDDEN.sub("_", re.sub(r'[/\\:*?"<>|]', "_", name)).strip(" .") or "_"
        safe = safe.encode()[:LONGEST_FILE_NAME].decode(errors="ignore").rstrip(" .")
        safe = f"_{safe}" if RESERVED.fullmatch(safe) else safe
        number, unique = 1, safe
        while unique.casefold() in taken:
            number += 1
            unique = f"{safe}-{number}"
        taken.add(unique.casefold())
        chosen[name] = unique
    return chosen


def plain_text(value: object, longest: int = 300) -> str:
    """Formats a value as one line of printable text: control characters become spaces, and what exceeds
    `longest` characters is cut, with an ellipsis."""
    text = "".join(sign if sign.isprintable() else " " for sign in str(value))
    text = " ".join(text.split())
    return text if len(text) <= longest else text[: longest - 1] + "…"


def tags_text(tags: Mapping[str, object]) -> str:
    """Formats the tags of an object as one line: name, category, keywords, size, creator, license, then
    the other tags with their keys."""
    values = {
        key: ", ".join(map(str, value)) if isinstance(value, list) else value
        for key, value in tags.items()
        if not isinstance(value, dict)  # what learning found out
    }
    known = ("name", "category", "tags", "size", "creator", "license", "description")
    parts = [values[key] for key in known if values.get(key)]
    parts += [f"{key}: {value}" for key, value in values.items() if key not in known]
    return " · ".join(plain_text(part) for part in parts)


def tagged(tags: Mapping[str, Mapping[str, Any]], where: Sequence[str]) -> list[str]:
    """Returns the names of scenes whose tags (by name in `tags`) meet all conditions, each TAG=PATTERN (* and
    ?). Case does not matter; of a list, one value must match. Raises a UserError if a condition is not of
    this form, or no scene has such a tag."""
    known, names = {key for found in tags.values() for key in found}, list(tags)
    for condition in where:
        key, sign, pattern = condition.partition("=")
        if not sign or key not in known:
            there = f"the tags are {', '.join(sorted(known))}" if known else "the scenes have no tags"
            raise UserError(f"--where {condition}: give TAG=PATTERN; {there}.")
        wanted = re.compile(fnmatch.translate(pattern.casefold()))
        found = {name: tags[name].get(key, []) for name in names}
        values = {name: value if isinstance(value, list) else [value] for name, value in found.items()}
        names = [name for name in names if any(wanted.match(str(one).casefold()) for one in values[name])]
    return names


def address_text(path: Path | str) -> str:
    """Returns a path as it was typed if it is an address, which has lost one of two slashes as a path."""
    return re.sub(r"\A(https?|s3|gs):/(?=[^/])", r"\1://", str(path))


def nothing_learned(path: Path | str) -> UserError:
    """Returns the error to raise where a run or a library was expected."""
    return UserError(
        f"{address_text(path)}: no run and no library here (neither run.json nor library.json). "
        "Start with `latentscenes train`."
    )


def no_dataset(path: Path | str) -> UserError:
    """Returns the error to raise where a dataset was expected."""
    return UserError(f"{path}: no dataset here (views.json is absent). Make one: latentscenes data …")


def no_folder(path: Path | str) -> UserError:
    """Returns the error to raise where a folder was expected."""
    return UserError(f"{path}: no such folder.")


def unknown_scene(path: Path | str, name: str, names: Sequence[str]) -> UserError:
    """Returns the error for a name that `path` does not hold; it states the nearest known names."""
    near = difflib.get_close_matches(name[:LONGEST_NAME], names[:MOST_COMPARED], n=3, cutoff=0)
    hint = f"the nearest names are {', '.join(map(repr, near))}" if near else "it holds no scenes"
    return UserError(f"{path}: no scene {name!r} here; {hint}.")
