"""Which scenes are learned together with the codec (`train`), and which come later (`new`)."""

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path

from latentscenes.core.errors import UserError
from latentscenes.data.dataset import Split


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key under which `car_9` comes before `car_10`."""
    return [(0, int(part), "") if part[0] in "0123456789" else (1, 0, part) for part in re.split(r"([0-9]+)", name) if part]


def read_split(path: str | Path, names: Sequence[str]) -> dict[str, Split]:
    """Splits from a JSON file {"train": [name, …], "new": [name, …]}, in the order of `names`.

    Every name in the file must be among `names`. Names that the file does not list are left out of the result, so a
    file may choose a part of a large collection.
    """
    path = Path(path)
    try:
        lists = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such split file.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error}).") from None
    well_formed = isinstance(lists, dict) and all(
        isinstance(group, list) and all(isinstance(name, str) for name in group) for group in lists.values()
    )
    if not well_formed or not lists or not set(lists) <= {"train", "new"}:
        raise UserError(f'{path}: a split file looks like {{"train": ["name", …], "new": ["name", …]}}.')
    chosen: dict[str, Split] = {}
    known = set(names)
    for split in ("train", "new"):
        for name in lists.get(split, []):
            if name not in known:
                near = difflib.get_close_matches(name, names, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(list(names)[:5])} …"
                raise UserError(f"{path}: lists scene {name!r}, which is not among the {len(names)} found; {hint}")
            if name in chosen:
                raise UserError(f"{path}: lists scene {name!r} twice; a scene is either `train` or `new`.")
            chosen[name] = split
    if not chosen:
        raise UserError(f"{path}: lists no scene at all.")
    return {name: chosen[name] for name in names if name in chosen}


def choose_splits(names: Sequence[str], split: str | Path | None = None, new: int = 0) -> dict[str, Split]:
    """The split of every scene, scenes in natural order of their names.

    `split` names a file for `read_split`; without one the last `new` scenes are `new`, all others `train`.
    """
    ordered = sorted(names, key=natural_key)
    if split is not None:
        if new:
            raise UserError(f"Both a split file ({split}) and new={new} were given; give one of them.")
        return read_split(split, ordered)
    if not 0 <= new <= len(ordered):
        raise UserError(f"new={new}, but there are {len(ordered)} scenes; give a number from 0 to {len(ordered)}.")
    first_new = len(ordered) - new
    return {name: "train" if place < first_new else "new" for place, name in enumerate(ordered)}
