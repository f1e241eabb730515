"""The command line's `data` commands: making and importing datasets."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import tyro

from latentscenes.cli.common import (
    CORES,
    CoreOptions,
    Cores,
    require_dataset,
    require_parent,
    require_there,
    say,
    set_up,
)
from latentscenes.core.errors import UserError
from latentscenes.core.names import counted, one_line
from latentscenes.data.options import (
    Axes,
    Boxes,
    HeldOutFrom,
    ImportOptions,
    MeshChoice,
    MeshOptions,
    Placement,
    SceneChoice,
    ViewOptions,
)

if TYPE_CHECKING:
    from latentscenes.core.cameras import Box
    from latentscenes.data.importing import Imported

Views = Annotated[ViewOptions, tyro.conf.arg(name="")]
VIEWS = ViewOptions()
Reading = Annotated[MeshOptions, tyro.conf.arg(name="")]
MESHES = MeshOptions()
Placing = Annotated[Placement, tyro.conf.arg(name="")]
PLACING = Placement()
Choice = Annotated[MeshChoice, tyro.conf.arg(name="")]
ALL = MeshChoice()
Objects = Annotated[SceneChoice, tyro.conf.arg(name="")]
EVERY = SceneChoice()
Import = Annotated[ImportOptions, tyro.conf.arg(name="")]
IMPORT = ImportOptions()
Fitting = TypeVar("Fitting", ViewOptions, ImportOptions)


def data_cars(
    out: Path, train: int = 24, new: int = 8, options: Views = VIEWS, cores: CoreOptions = CORES
) -> None:
    """Make a dataset of procedural cars. Nothing is downloaded.

    Args:
        out: Folder of the new dataset.
        train: Cars to learn in stage 1.
        new: Cars kept for stage 2.
    """
    set_up(cores)
    from latentscenes.data.synthetic.cars import make_cars

    make_cars(out, options, train=train, new=new)


def data_place(folder: Path, out: Path, fit_to: Path | None = None, placing: Placing = PLACING) -> None:
    """Turn, scale or fit the objects of a dataset, by moving its cameras.

    Args:
        folder: The dataset.
        out: Folder of the new dataset.
        fit_to: Model, run or library; after turning, each object is moved and scaled to just fit its box.
    """
    if fit_to is not None:
        require_parent(fit_to)
    require_dataset(folder)
    from latentscenes.data.placing import place

    made = place(folder, out, placing, fit_to and _one_box(fit_to))
    half = " x ".join(f"{side:.3f}" for side in made.box.half)
    say(f"{out}: {counted(len(made.scenes), 'scene')}, scene box with half sides {half}.")


def data_join(folders: tuple[Path, ...], out: Path) -> None:
    """Join datasets, to learn several classes at once.

    Args:
        folders: Two or more datasets with images of one size and different scene names.
        out: Folder of the new dataset. Splits and held-out views are kept.
    """
    for folder in folders:
        require_dataset(folder)
    from latentscenes.data.writing import join

    made = join(folders, out)
    note = "" if made.alpha is not None else "; without silhouettes, which some parts lack"
    say(
        f"{out}: {counted(len(made.scenes), 'scene')}, {counted(len(made.rgb), 'view')} of "
        f"{made.size[1]}x{made.size[0]}{note}."
    )


def data_meshes(
    folder: Path,
    out: Path,
    choice: Choice = ALL,
    fit_to: Path | None = None,
    reading: Reading = MESHES,
    options: Views = VIEWS,
    cores: CoreOptions = CORES,
) -> None:
    """Render meshes (GLB, glTF, OBJ, PLY) of a folder, of a zip archive, or of a furniture library (.sh3f).
    The same command continues a stopped import.

    Args:
        folder: A folder, searched with its subfolders and the archives in it; an archive; or one mesh.
        out: Folder of the new dataset.
        fit_to: Model, run or library; each object is moved and scaled to just fit its box.
    """
    _prepare(folder, cores, fit_to)
    from latentscenes.data.meshes.importer import make_meshes

    make_meshes(folder, out, _fitted(options, fit_to), reading, choice)


def data_srn(
    folder: Path,
    out: Path,
    above: bool = False,
    axes: Axes = "opencv",
    intrinsics_size: int | tuple[int, int] | None = None,
    fit_to: Path | None = None,
    options: Import = IMPORT,
    cores: CoreOptions = CORES,
) -> None:
    """Import objects in the ShapeNet-SRN layout, or an EG3D export with dataset.json.

    Args:
        folder: A folder of objects, or one object.
        out: Folder of the new dataset.
        above: Keep only views whose camera height is above -0.5.
        axes: Camera axes of the files.
        intrinsics_size: Height and width that intrinsics.txt refers to, if its last line is wrong.
        fit_to: Model, run or library; each object is moved and scaled to just fit its box.
    """
    _prepare(folder, cores, fit_to)
    from latentscenes.data.srn import make_srn

    options = _fitted(options, fit_to)
    _report(make_srn(folder, out, above=above, axes=axes, intrinsics_size=intrinsics_size, options=options))


def data_transforms(
    folder: Path,
    out: Path,
    held_out_from: HeldOutFrom | None = None,
    axes: Axes = "opengl",
    fit_to: Path | None = None,
    options: Import = IMPORT,
    cores: CoreOptions = CORES,
) -> None:
    """Import nerfstudio or Blender transforms*.json: one scene or a folder of scenes.

    Args:
        folder: A folder with transforms*.json, or a folder of such folders.
        out: Folder of the new dataset.
        held_out_from: The part whose frames become held-out views; unset: test if it exists, else val.
        axes: Camera axes of the files.
        fit_to: Model, run or library; each object is moved and scaled to just fit its box.
    """
    _prepare(folder, cores, fit_to)
    from latentscenes.data.transforms import make_transforms

    options = _fitted(options, fit_to)
    _report(make_transforms(folder, out, held_out_from=held_out_from, axes=axes, options=options))


def data_photos(
    folder: Path,
    out: Path,
    size: int = 128,
    held_out: int = 4,
    choice: Objects = EVERY,
    cores: CoreOptions = CORES,
    boxes: Boxes = "common",
) -> None:
    """Import your own photographs with their COLMAP reconstructions and masks. Needs latentscenes[photos].

    Args:
        folder: A folder of objects, or one object: a folder with images/, sparse/0 and masks/ (no masks/ if
            images are transparent around the object).
        out: Folder of the new dataset.
        size: Pixels along each side of the stored images.
        held_out: Views of each object kept for evaluation.
        boxes: One scene box for all objects (`common`), or one for each (`object`).
    """
    _prepare(folder, cores)
    from latentscenes.data.photos.importer import make_photos

    _report(make_photos(folder, out, size=size, held_out=held_out, boxes=boxes, choice=choice))


def _prepare(folder: Path, cores: Cores, fit_to: Path | None = None) -> None:
    """Refuses a mistyped folder or model, before torch is loaded, and sets the number of threads."""
    require_there(folder)
    if fit_to is not None:
        require_parent(fit_to)
    set_up(cores)


def _one_box(model: Path) -> "Box | None":
    """Returns the box that a model was learned in; None if each of its objects has a box of its own."""
    from latentscenes.storage.pretrained import open_parent

    learned = open_parent(model)
    return None if learned.has_boxes else learned.info.box


def _fitted(options: Fitting, model: Path | None) -> Fitting:
    """Returns options that make objects fit the box of a model, or give each the box that it asks for."""
    if model is None:
        return options
    if options.box is not None:
        raise UserError(f"--box {options.box} and --fit-to {model} are both given; give one of them.")
    box = _one_box(model)
    if box is None:
        return replace(options, boxes="object")
    return replace(options, box=",".join(map(repr, (*box.center, *box.half))), fit=True)


def data_verify(data: Annotated[Path, tyro.conf.Positional]) -> None:
    """Compare a dataset with its checksums. The exit status is 1 if it differs from when it was made.

    Args:
        data: Dataset folder.
    """
    require_dataset(data)
    from latentscenes.data.dataset import PosedImages, verify

    damaged = verify(data)
    if damaged is None:
        say(f"{data}: its files fit together. It was made by an earlier version, without checksums.")
        return
    for damage in damaged:
        print(one_line(damage))
    if damaged:
        raise SystemExit(1)
    say(f"{data}: {counted(len(PosedImages.open(data).scenes), 'scene')}, all intact.")


def _report(made: "Imported") -> None:
    height, width = made.size
    half = " x ".join(f"{side:.3f}" for side in made.box.half)
    for line in (
        f"{made.path}: {counted(made.scenes, 'scene')}, {counted(made.views, 'view')} of {width}x{height}; "
        f"background: {made.background}.",
        f"Scene box: half sides {half}, {made.box_from}.",
        *(f"Note: {note}" for note in made.notes),
    ):
        say(line)


COMMANDS = {
    "cars": data_cars, "meshes": data_meshes, "srn": data_srn, "transforms": data_transforms,
    "photos": data_photos, "join": data_join, "place": data_place, "verify": data_verify,
}  # fmt: skip
