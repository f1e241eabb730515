"""The command line's `data` commands: making and importing datasets."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from latentscenes.data.importing import Imported


def data_cars(
    out: Path,
    train: int = 24,
    new: int = 8,
    views: int = 40,
    size: int = 128,
    held_out: int = 4,
    seed: int = 0,
    box: str | None = None,
) -> None:
    """Make a dataset of procedural cars. No download.

    Args:
        out: folder of the new dataset.
        train: cars to learn from in stage 1.
        new: cars kept for stage 2.
        views: pictures of each car.
        size: pixels along a side.
        held_out: views of each car kept for evaluation.
        seed: decides cars and cameras.
        box: the scene box: half side of a cube around the origin, or cx,cy,cz,hx,hy,hz; unset: the smallest around all.
    """
    from latentscenes.data.raycast import ViewOptions
    from latentscenes.data.synthetic.cars import make_cars

    make_cars(
        out, ViewOptions(views=views, size=size, held_out=held_out, seed=seed, box=box), train=train, new=new
    )


def data_join(folders: tuple[Path, ...], out: Path) -> None:
    """Join datasets into one, to learn several classes at once.

    Args:
        folders: the datasets, two or more. Their images must be of one size, their scenes' names must differ.
        out: folder of the new dataset. Splits and held-out views stay as they are.
    """
    from latentscenes.core.console import console
    from latentscenes.data.dataset import join

    made = join(folders, out)
    known = "" if made.alpha is not None else "; without silhouettes, as not all parts have them"
    console.print(
        f"{out}: {len(made.scenes)} scenes, {len(made.rgb)} views of {made.size[1]}x{made.size[0]}{known}.",
        highlight=False,
    )


def data_meshes(
    folder: Path,
    out: Path,
    views: int = 40,
    size: int = 128,
    held_out: int = 4,
    split: Path | None = None,
    new: int = 0,
    up: Literal["auto", "y", "z"] = "auto",
    seed: int = 0,
    box: str | None = None,
    limit: int | None = None,
    strict: bool = False,
) -> None:
    """Photograph a folder of meshes (GLB, glTF, OBJ, PLY).

    Args:
        folder: searched with its subfolders; or one file.
        out: folder of the new dataset.
        views: pictures of each mesh.
        size: pixels along a side.
        held_out: views of each mesh kept for evaluation.
        split: JSON file {"train": [...], "new": [...]} with file names without their endings.
        new: without `split`: the last so many meshes, by name, are kept for stage 2.
        up: the axis that points up in the files.
        seed: decides the cameras.
        box: the scene box: half side of a cube around the origin, or cx,cy,cz,hx,hy,hz; unset: the smallest around all.
        limit: at most so many meshes of each split.
        strict: stop at the first file that cannot be read.
    """
    from latentscenes.data.meshes import make_meshes
    from latentscenes.data.raycast import ViewOptions

    options = ViewOptions(views=views, size=size, held_out=held_out, seed=seed, box=box)
    make_meshes(folder, out, options, split=split, new=new, up=up, limit=limit, strict=strict)


@dataclass(frozen=True)
class Import:
    """How existing pictures become a dataset."""

    size: int | None = None
    """Pixels along each side of the stored images, reached by averaging; unset: as they are."""
    box: str | None = None
    """The scene box: half side of a cube around the origin, or cx,cy,cz,hx,hy,hz; unset: fitted to the silhouettes."""
    background: Literal["auto", "alpha", "white", "unknown"] = "auto"
    """How silhouettes are known: the files' alpha, white pixels connected to the border, or not at all."""
    held_out: int = 4
    """Views of each scene kept for evaluation, where the source sets none apart itself."""
    split: Path | None = None
    """JSON file {"train": [...], "new": [...]} with names of scenes; the others are left out."""
    new: int = 0
    """Without `split`: the last so many scenes are kept for stage 2."""
    limit: int | None = None
    """Take at most the first so many scenes."""
    axes: Literal["auto", "opencv", "opengl"] = "auto"
    """Camera axes of the files, where they break the layout's custom."""


ImportOptions = Annotated[Import, tyro.conf.arg(name="")]


def data_srn(
    folder: Path,
    out: Path,
    above: bool = False,
    intrinsics_size: int | None = None,
    options: ImportOptions = Import(),
) -> None:
    """Import objects in the ShapeNet-SRN layout, or an EG3D export with dataset.json.

    Args:
        folder: a folder of objects, or one object.
        out: folder of the new dataset.
        above: keep only views whose camera height is above -0.5.
        intrinsics_size: the image size that intrinsics.txt is stated for, where its last line is wrong.
    """
    from latentscenes.data.srn import make_srn

    _import(make_srn, folder, out, options, "opencv", above=above, intrinsics_size=intrinsics_size)


def data_transforms(
    folder: Path,
    out: Path,
    held_out_from: Literal["test", "val", "none"] | None = None,
    options: ImportOptions = Import(),
) -> None:
    """Import nerfstudio or Blender transforms*.json: one scene or a folder of scenes.

    Args:
        folder: a folder with transforms*.json, or a folder of such folders.
        out: folder of the new dataset.
        held_out_from: whose frames become the held-out views; unset: test where there is such a file, else val.
    """
    from latentscenes.data.transforms import make_transforms

    _import(make_transforms, folder, out, options, "opengl", held_out_from=held_out_from)


def data_photos(
    folder: Path,
    out: Path,
    size: int = 128,
    held_out: int = 4,
    split: Path | None = None,
    new: int = 0,
    limit: int | None = None,
) -> None:
    """Import your own photographs with their COLMAP reconstructions and masks. Needs latentscenes[photos].

    Args:
        folder: a folder of objects, each a folder with images/, sparse/0 and masks/ (unless images are transparent around the
            object); or one of them.
        out: folder of the new dataset.
        size: pixels along each side of the stored pictures.
        held_out: views of each object kept for evaluation.
        split: JSON file {"train": [...], "new": [...]} with names of objects; the others are left out.
        new: without `split`: the last so many objects are kept for stage 2.
        limit: take at most the first so many objects.
    """
    from latentscenes.data.photos.importer import make_photos

    _say_made(make_photos(folder, out, size=size, held_out=held_out, split=split, new=new, limit=limit))


def _import(make: Callable, folder: Path, out: Path, chosen: Import, custom: str, **more: object) -> None:
    from latentscenes.data.importing import ImportOptions

    settings = {name: value for name, value in vars(chosen).items() if name != "axes"}
    axes = custom if chosen.axes == "auto" else chosen.axes
    _say_made(make(folder, out, axes=axes, options=ImportOptions(**settings), **more))


def _say_made(made: "Imported") -> None:
    from latentscenes.core.console import console

    height, width = made.size
    half = " x ".join(f"{side:.3f}" for side in made.box.half)
    console.print(
        f"{made.path}: {made.scenes} scenes, {made.views} views of {width}x{height}; background: {made.background}.",
        highlight=False,
    )
    console.print(f"Scene box: half sides {half}, {made.box_from}.", highlight=False)
    for note in made.notes:
        console.print(f"Note: {note}", highlight=False)


DATA_COMMANDS = {
    "cars": data_cars, "meshes": data_meshes, "srn": data_srn, "transforms": data_transforms,
    "photos": data_photos, "join": data_join,
}  # fmt: skip
