"""The metadata of stored scenes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

from latentscenes.core.console import Spent
from latentscenes.core.options import StoragePrecision
from latentscenes.core.reading import parse_json

Origin = Literal["stage 1", "exploit", "add"]


@dataclass(frozen=True)
class SceneInfo:
    """The metadata of a stored scene."""

    name: str
    precision: StoragePrecision
    bytes: int
    """Size of the stored planes, weights and bias, without index entry and thumbnail."""
    origin: Origin
    """`stage 1`: learned with the shared parts. `exploit`: learned by the command. `add`: added in Python."""
    dataset: str | None
    """Folder of the dataset that the scene was learned from; None if its images were not kept."""
    split: str | None
    """Split of the dataset: `train` or `new`."""
    source: str
    """Name in the dataset; differs from `name` after a rename."""
    added: str
    """Time of storage, ISO 8601."""
    seconds: float | None
    """Learning time by the clock; None for scenes of stage 1, which are learned together with the shared
    parts."""
    cpu_seconds: float | None
    """Learning time of the processor, over all threads; None for scenes of stage 1 and of earlier
    versions."""
    psnr: float | None
    """Mean PSNR as learned, dB, on a few held-out views (on fitted views if none is held out)."""
    psnr_lost: float | None
    """PSNR lost by storing the scene at `precision`, dB."""
    silhouettes: bool | None = None
    """Whether the scene was learned with silhouettes over random backgrounds, so that its opacity says where
    the object is. None for scenes of earlier versions."""
    tags: dict[str, Any] = field(default_factory=dict)
    """The object's row of a catalog (`category`, `license`, …), and notes of the user."""

    @property
    def spent(self) -> Spent | None:
        """Learning time; None for scenes of stage 1."""
        return None if self.seconds is None else Spent(self.seconds, self.cpu_seconds)


class Totals(NamedTuple):
    """Sums over the scenes of a library."""

    count: int
    bytes: int
    psnr: float | None
    """Mean over the scenes with a known PSNR, dB; None if there are none."""


Kind = tuple[type, ...] | frozenset
TEXT, NUMBER, NONE = (str,), (int, float, type(None)), type(None)
KINDS: dict[str, Kind] = {
    "precision": frozenset(get_args(StoragePrecision)), "origin": frozenset(get_args(Origin)),
    "bytes": (int,), "dataset": (str, NONE), "split": frozenset({"train", "new", None}),
    "silhouettes": frozenset({True, False, None}),
    **dict.fromkeys(("seconds", "cpu_seconds", "psnr", "psnr_lost"), NUMBER),
}  # fmt: skip
"""Types of the fields of SceneInfo; the others hold text."""
FIELD_KINDS = [KINDS.get(name, TEXT) for name in SceneInfo.__dataclass_fields__ if name != "tags"]
CHOICES = [(place, kind) for place, kind in enumerate(FIELD_KINDS) if isinstance(kind, frozenset)]
_RIGHT: set[tuple[type, ...]] = set()
"""Types of fields that were found right: some combinations, which nearly all rows have."""


def scene_info(row: Sequence[Any]) -> SceneInfo | None:
    """Returns the metadata that a row of fields holds, with the tags as an object or as JSON; None if no
    version wrote it. Parses no JSON for empty tags, which is slow for 100,000 scenes."""
    *values, tags = row
    try:
        if isinstance(tags, str):
            tags = {} if tags == "{}" else parse_json(tags)
        types = tuple(map(type, values))
        if types not in _RIGHT and all(map(_is_of, values, FIELD_KINDS)):
            _RIGHT.add(types)
        right = types in _RIGHT and all(values[place] in choices for place, choices in CHOICES)
        if right and isinstance(tags, dict):
            silhouettes = values.pop()
            known = None if silhouettes is None else bool(silhouettes)  # SQLite keeps numbers
            return SceneInfo(*values, silhouettes=known, tags=tags)
    except (TypeError, ValueError):
        pass
    return None


def _is_of(value: Any, kind: Kind) -> bool:
    return isinstance(kind, frozenset) or isinstance(value, kind)
