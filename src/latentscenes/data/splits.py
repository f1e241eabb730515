"""Which objects of a source become scenes to learn first (`train`) or later (`new`)."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

from latentscenes.core.errors import UserError
from latentscenes.core.names import check_name, counted
from latentscenes.core.reading import read_any_json
from latentscenes.data.dataset import Split
from latentscenes.data.options import New


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Returns a sort key that puts `car_9` before `car_10`."""
    parts = [part for part in re.split(r"([0-9]+)", name) if part]
    numbers = (part.lstrip("0") if part[0] in "0123456789" else None for part in parts)
    return [
        (1, 0, part) if digits is None else (0, len(digits), digits) for part, digits in zip(parts, numbers)
    ]


def read_split(path: str | Path, names: Sequence[str]) -> dict[str, Split]:
    """Reads splits from a JSON file {"train": [name, …], "new": [name, …]}, in the order of `names`.

    Every name in the file must be among `names`. Names that the file does not list are left out.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such split file.")
    lists = read_any_json(path)
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
                raise UserError(
                    f"{path}: lists scene {name!r}, which is not among the {len(names)} found; {hint}"
                )
            if name in chosen:
                raise UserError(f"{path}: lists scene {name!r} twice; a scene is either `train` or `new`.")
            chosen[name] = split
    if not chosen:
        raise UserError(f"{path}: lists no scene at all.")
    return {name: chosen[name] for name in names if name in chosen}


def choose_splits(names: Sequence[str], split: str | Path | None = None, new: New = 0) -> dict[str, Split]:
    """Returns the split of every scene, in natural order of names.

    `split` names a file for `read_split`. Without it, the last `new` scenes (or `all`) are `new` and the
    others `train`.
    """
    ordered = sorted((check_name(name, "scenes") for name in names), key=natural_key)
    if split is not None:
        if new:
            raise UserError(f"--split {split} and --new {new} are both given; give one of them.")
        return read_split(split, ordered)
    new = len(ordered) if new == "all" else new
    if not 0 <= new <= len(ordered):
        raise UserError(
            f"--new {new}: only {counted(len(ordered), 'scene')} found; give at most that many, or `all`."
        )
    first_new = len(ordered) - new
    return {name: "train" if place < first_new else "new" for place, name in enumerate(ordered)}
