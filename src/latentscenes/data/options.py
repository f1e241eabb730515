"""Options of `data` commands and of the functions behind them. Loads neither torch nor numpy."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from latentscenes.core.errors import UserError

Axes = Literal["opencv", "opengl"]
"""Camera axes of a file. `opencv`: x right, y down, z forward. `opengl`: x right, y up, z backward."""
Background = Literal["auto", "alpha", "white", "unknown"]
HeldOutFrom = Literal["test", "val", "none"]
Up = Literal["auto", "x", "y", "z", "-x", "-y", "-z"]
Front = Literal["+x", "-x", "+y", "-y", "+z", "-z"]
Boxes = Literal["common", "object"]
New = int | Literal["all"]
"""Number of objects kept for stage 2."""
LightName = Literal["studio", "flat", "camera"]


@dataclass(frozen=True)
class Placement:
    """How objects are turned and scaled."""

    up: Up = "auto"
    """The axis that points up; it becomes z. auto: z already does."""
    front: Front | None = None
    """The axis of the files that the objects face; they are turned to face +x. Unset: not turned."""
    turn: float = 0.0
    """Turn the objects about the vertical, degrees, counter-clockwise seen from above."""
    scale: float = 1.0
    """Factor on the size of the objects. Meshes have a bounding-box diagonal of 1 before."""

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf or not math.isfinite(self.turn):
            raise UserError(
                f"scale = {self.scale}, turn = {self.turn}: give a scale above 0 and a finite angle."
            )


@dataclass(frozen=True)
class BoxOptions:
    """Which scene box objects get."""

    box: str | float | None = None
    """The scene box: half side of a cube around the origin, or cx,cy,cz,hx,hy,hz. Unset: the smallest box
    around all objects; for images without silhouettes, the cube that all cameras see."""
    boxes: Boxes = "common"
    """`common`: one scene box for all objects. `object`: one for each, for objects of different shapes and
    sizes."""
    fit: bool = False
    """Move and scale each object so that it just fits `box`."""

    def __post_init__(self) -> None:
        if self.fit and self.box is None:
            raise UserError("--fit: give the box to fit objects to, with --box or --fit-to.")
        if self.box is not None:
            box_numbers(self.box)
            if self.boxes == "object":
                raise UserError(f"--box {self.box} and --boxes object are both given; give one of them.")


@dataclass(frozen=True)
class ViewOptions(BoxOptions):
    """How the objects of a dataset are rendered."""

    views: int = 40
    """Images of each object, from cameras spread over the upper hemisphere."""
    size: int = 128
    """Pixels along each side of an image."""
    held_out: int = 4
    """Views of each object kept for evaluation, evenly spread."""
    seed: int = 0
    """Seed of the cameras and of procedural objects. The same seed gives the same bytes."""
    distance: float = 1.3
    """From camera to the object's center, in lengths of the object's bounding-box diagonal."""
    focal: float = 1.025
    """Focal length as a fraction of the image's width."""
    lowest: float = 0.0
    """Lowest camera elevation above the horizon, radians."""
    fill: float | None = None
    """Instead of `distance`: the share of the image's side that each object spans in its closest view."""
    samples: int = 3
    """Average samples² rays per pixel."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("views", "size", "samples"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)}: must be at least 1.")
        if not 0 <= self.held_out < self.views:
            raise UserError(f"held_out = {self.held_out} of views = {self.views}: leave at least one to fit.")
        if self.distance <= 0.5:
            raise UserError(f"distance = {self.distance}: must be above 0.5, the radius of the object.")
        if self.fill is not None and not 0 < self.fill <= 1:
            raise UserError(f"fill = {self.fill}: must be above 0 and at most 1.")


@dataclass(frozen=True)
class MeshOptions(Placement):
    """How mesh files are read and lit."""

    up: Up = "auto"
    """The axis that points up in the files; it becomes z. auto: y in glTF and OBJ, z in PLY."""
    light: LightName = "studio"
    """`studio`: bright and even; `flat`: the surface's own color; `camera`: a lamp that moves with the
    camera."""
    multiply_kd: bool = False
    """Multiply OBJ textures by the material's Kd, which they replace otherwise."""


@dataclass(frozen=True)
class SceneChoice:
    """Which objects are imported, and the table that describes them."""

    catalog: Path | None = None
    """Table of the objects (CSV, JSON or .properties) with columns such as file, name, category, tags, size
    and license; `file` names a mesh or the folder of an object. A furniture library (.sh3f) brings its
    own."""
    split: Path | None = None
    """JSON file {"train": [...], "new": [...]} with names of scenes. Scenes that it does not list are left
    out."""
    new: New = 0
    """Without `split`: keep the last objects by name, this many or `all`, for stage 2 (`new`)."""
    limit: int | None = None
    """Import at most this many objects."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise UserError(f"--limit {self.limit}: give at least one object.")


@dataclass(frozen=True)
class MeshChoice(SceneChoice):
    """Which meshes are imported, the table that describes them, and how many processes render."""

    limit: int | None = None
    """Import at most this many objects of each split: of those for stage 1, and of the new ones."""
    strict: bool = False
    """Stop at the first file that cannot be read."""
    workers: int = 0
    """Processes that render side by side; 0: one per core. Pictures do not depend on it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.workers < 0:
            raise UserError(f"--workers {self.workers}: give 0 or more.")


@dataclass(frozen=True)
class ImportOptions(BoxOptions, Placement, SceneChoice):
    """How existing images become a dataset."""

    size: int | tuple[int, int] | None = None
    """Height and width of the stored images (one number if square), reached by averaging. Unset:
    unchanged."""
    reduce: int = 1
    """Divide height and width by this whole number, instead of setting `size`."""
    background: Background = "auto"
    """Source of the silhouettes. `alpha`: the files' alpha channel, or else their masks; `white`: white
    pixels connected to the border; `unknown`: none (photographs); `auto`: decided by the first scene's
    images."""
    alpha_from_white: bool = False
    """Store silhouettes found from a white background as alpha."""
    held_out: int = 4
    """Views of each scene kept for evaluation, evenly spread, if the source does not define any."""

    def __post_init__(self) -> None:
        for part in (BoxOptions, Placement, SceneChoice):
            part.__post_init__(self)


def box_numbers(box: str | float) -> list[float]:
    """Returns center and half sides (6 numbers) of a box given as a half side or as "cx,cy,cz,hx,hy,hz"."""
    try:
        numbers = [float(part) for part in str(box).split(",")]
    except ValueError:
        numbers = []
    if len(numbers) == 1:
        numbers = [0.0, 0.0, 0.0, *numbers * 3]
    if len(numbers) != 6 or not all(map(math.isfinite, numbers)) or min(numbers[3:]) <= 0:
        raise UserError(f"--box {box}: give a half side above 0, or center and half sides cx,cy,cz,hx,hy,hz.")
    return numbers
