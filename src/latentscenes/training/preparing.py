"""Preparations of stage 2: the library, the configuration, the groups of new scenes."""

from collections.abc import Sequence
from pathlib import Path

import torch

from latentscenes.core.config import Config, scenes_as_in, shared_rates, with_scenes
from latentscenes.core.console import say
from latentscenes.core.errors import UserError
from latentscenes.core.files import refuse_links
from latentscenes.core.options import ExploitOptions
from latentscenes.data.dataset import PosedImages, Scene
from latentscenes.storage.description import refuse_inside
from latentscenes.storage.library import LibraryFolder
from latentscenes.storage.pretrained import (
    enlargement,
    library_from_model,
    refuse_larger,
    refuse_no_stages,
    refuse_other_model,
    refuse_other_settings,
)  # fmt: skip
from latentscenes.storage.quantize import check_precision
from latentscenes.storage.recovery import unlisted
from latentscenes.storage.run import Run
from latentscenes.training.append import library_from_run
from latentscenes.training.groups import missing_scenes
from latentscenes.training.probe import for_exploit

MUCH_SMALLER = 1.8
"""Objects that could be so many times as large in the model's box are noted."""
MUCH_LARGER = 1.5
"""Pictures so many times as wide as those of stage 1 have detail that its planes do not show."""


def with_chosen_scenes(
    config: Config, library: Config, options: ExploitOptions, device: torch.device
) -> Config:
    """Returns the configuration with as many scenes a step as options ask for. If they are to fill the
    device, it is the number that the settings of the library or the plan of ranks state."""
    if isinstance(options.scenes, int):
        return with_scenes(config, "exploit", options.scenes)
    return scenes_as_in(config, library, "exploit") if options.fills(device.type) else config


def library_for(
    out: Path, images: PosedImages, config: Config, parent: Run | LibraryFolder | None,
    options: ExploitOptions, device: torch.device,
) -> LibraryFolder:  # fmt: skip
    """Opens the library `out`, or makes one from the finished run `parent`, or an empty one with the shared
    parts of the library `parent`. Checks that new scenes of a dataset can be learned into it.

    Raises:
        UserError: stages of `config` learn shared parts, its model differs from the library's, the parent is
            unfinished or not the one that the library was made from, or the objects do not fit the box.
    """
    refuse_no_stages(config)
    if learning := shared_rates(config.exploit):
        raise UserError(
            f"configuration: exploit stages learn {', '.join(learning)}, which all scenes of a library "
            "share. Set those rates to 0, or use --finetune."
        )
    images.select("new", limit=options.limit)  # refuses datasets without new scenes before anything is made
    if LibraryFolder.exists(out):
        library = LibraryFolder.open(out)
        if parent is not None:
            refuse_other_model(library, parent)
    elif parent is None:
        raise UserError(f"{out}: no library here yet. Name the run to make it from, with --run.")
    else:
        refuse_inside(out)
        refuse_other_settings(parent.config, config, parent.path)
        refuse_cut_off(images, parent)
        precision = check_precision(options.precision) if options.precision else None
        if options.fills(device.type):
            config = for_exploit(config, images, parent, options.limit, device)
        else:
            config = with_chosen_scenes(config, config, options, device)
        if isinstance(parent, LibraryFolder):
            library = library_from_model(out, parent, config, precision)
        else:
            seen = _images_of(parent) if options.stage_one else images
            chosen = precision or "int8"
            library = library_from_run(out, parent, seen, config, chosen, options.stage_one, device)
    refuse_other_settings(library.config, config, library.path)
    refuse_cut_off(images, library)
    refuse_links(library.path)
    return library


def refuse_cut_off(images: PosedImages, learned: Run | LibraryFolder) -> None:
    """Refuses objects that exceed the box of a model. In a model with a box for each object, all fit."""
    if not learned.has_boxes:
        refuse_larger(images, learned.info.box, learned.path)


def _images_of(run: Run) -> PosedImages:
    if not (Path(run.info.data) / "views.json").is_file():
        raise UserError(
            f"{run.info.data}: the dataset of {run.path} is gone, so its scenes cannot be measured. "
            "Put it back, or leave those scenes out with --no-stage-one."
        )
    return PosedImages.open(run.info.data)


def groups_to_learn(
    library: LibraryFolder, images: PosedImages, config: Config, options: ExploitOptions
) -> list[list[Scene]]:
    """Returns the new scenes of a dataset that a library does not hold, in groups, and prints which scenes it
    skips."""
    for file in unlisted(library):
        say(f"Note: the index does not list {file}. `latentscenes library verify` says what it holds.")
    wanted = images.select("new", limit=options.limit)
    pending = missing_scenes(library, images, wanted)
    _report_skipped(library, images, wanted, pending)
    if library.has_boxes != images.has_boxes:
        say(
            f"Note: {images.path} has one box for all objects, and each object gets this box, although the "
            "model has a box for each. Objects look finer if the dataset is made with --boxes object."
            if library.has_boxes
            else f"Note: the boxes of single objects in {images.path} are not used, because the model was "
            "learned in one box for all objects."
        )
    if pending and not library.has_boxes and enlargement(images, library.info.box) >= MUCH_SMALLER:
        say(
            f"Note: the objects of {images.path} are small in the model's box: they could be "
            f"{enlargement(images, library.info.box):.3g} times as large, and the model knows objects that "
            "fill it. To scale them, stop, and repeat the command with --fit and another --out."
        )
    if pending and max(images.size) >= MUCH_LARGER * max(library.info.view.size):
        say(
            f"Note: the model learned from pictures of {max(library.info.view.size)} pixels, and these have "
            f"{max(images.size)}. Its planes have {config.planes.resolution} texels a side; finer detail "
            "needs a model that is trained on such pictures."
        )
    size = options.group or max(stage.scenes for stage in config.exploit)
    return [pending[k : k + size] for k in range(0, len(pending), size)]


def _report_skipped(
    library: LibraryFolder, images: PosedImages, wanted: Sequence[Scene], pending: Sequence[Scene]
) -> None:
    skipped = {scene.name for scene in wanted} - {scene.name for scene in pending}
    if not skipped:
        return
    say(f"{library.path}: {len(skipped)} of {len(wanted)} new scenes are there already.")
    if foreign := sorted(skipped - library.index.sources(str(images.path.resolve()), "new")):
        info = library.index.info(foreign[0])
        say(
            f"Note: {len(foreign)} of these were learned from other data; the first, {foreign[0]!r}, from "
            f"{info.dataset if info else None}. If that is another object, rename it with "
            "`latentscenes library rename` and run the command again."
        )
