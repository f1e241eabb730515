"""Stage 2 as published: base planes, field and decoder keep learning with the new scenes.

Existing scenes would change, so the result is another library. `learn_new` chooses this or `exploit`.
"""

import dataclasses
from pathlib import Path

import torch

from latentscenes.core.config import Config, frozen, shared_rates
from latentscenes.core.console import say
from latentscenes.core.errors import UserError
from latentscenes.core.names import counted
from latentscenes.core.options import ExploitOptions, StoragePrecision
from latentscenes.data.dataset import PosedImages
from latentscenes.model.planes import mean_parameters
from latentscenes.storage.description import refuse_inside
from latentscenes.storage.library import LibraryFolder, LibraryInfo, refuse_foreign
from latentscenes.storage.pretrained import open_parent, refuse_no_stages, refuse_other_settings  # fmt: skip
from latentscenes.storage.run import Run, RunInfo
from latentscenes.storage.scene_set import shows_silhouettes
from latentscenes.training.append import Provenance, library_info, new_scenes
from latentscenes.training.batches import TrainingScenes
from latentscenes.training.exploit import exploit
from latentscenes.training.groups import finish, missing_scenes, remove_stale_runs, starting_parameters
from latentscenes.training.loop import Tracker, Trainer
from latentscenes.training.preparing import refuse_cut_off


def learn_new(
    out: Path, images: PosedImages, config: Config, parent: Path | None, published: bool,
    options: ExploitOptions, device: torch.device,
) -> LibraryFolder:  # fmt: skip
    """Calls `finetune` if `published`, or if there is no library yet and the stages of `config` learn shared
    parts. Otherwise calls `exploit`. `parent` is a run; for `finetune` it may be a library."""
    if published or (shared_rates(config.exploit) and not LibraryFolder.exists(out)):
        if parent is None:
            raise UserError("exploit: to finetune, name with --run the run or library to start from.")
        if options.drop_views:
            raise UserError("--drop-views: not with --finetune, which learns all scenes in one run.")
        if options.scenes is not None:
            raise UserError("--scenes: not with --finetune. Set the scenes of its stages with --set.")
        if options.workers > 1:
            raise UserError(
                f"--workers {options.workers}: with --finetune, one process learns all scenes. Leave it out."
            )
        return finetune(out, images, config, open_parent(parent), options, device)
    if parent is not None and LibraryFolder.exists(out):
        if LibraryFolder.open(out).info.finetuned_from == str(parent.resolve()):
            parent = None  # the same command again, now that its library is there
    return exploit(out, images, config, open_parent(parent) if parent else None, options, device)


def finetune(
    out: Path, images: PosedImages, config: Config, parent: Run | LibraryFolder, options: ExploitOptions,
    device: torch.device,
) -> LibraryFolder:  # fmt: skip
    """Learns all `new` scenes of a dataset together with the shared parts of `parent`, into a new library
    `out`. The scenes of `parent` stay untouched and are not part of the new library.

    Raises:
        UserError: no stage of `config` learns shared parts, its model differs from the parent's, the parent
        is unfinished, the objects do not fit its box, or `out` holds another library.
        Interrupted: a signal asked to stop. Everything is saved.
    """
    refuse_no_stages(config)
    if not shared_rates(config.exploit):
        raise UserError(
            "configuration: no exploit stage has a rate for a shared part, so there is nothing to finetune."
        )
    scenes = images.select("new", limit=options.limit)
    if LibraryFolder.exists(out):
        library = LibraryFolder.open(out)
        same = library.info.finetuned_from == str(parent.path.resolve())
        if not same or missing_scenes(library, images, scenes):
            raise UserError(
                f"{out}: a library's shared parts never change. Name a new folder with --out. "
                "To start from this library, name it with --run."
            )
        return library
    refuse_foreign(out)
    refuse_inside(out)
    refuse_other_settings(parent.config, config, parent.path)
    refuse_cut_off(images, parent)
    say(f"Shared parts keep learning. {out} becomes a library of {counted(len(scenes), 'new scene')} only.")
    # A run that begins with the parent's shared parts and mean scene
    names, data = [scene.name for scene in scenes], str(images.path.resolve())
    model, mean = parent.starting(device)
    info = _info(parent, images, options.precision or "int8")
    run_info = RunInfo("exploit", data, "new", names, info.box, info.parent)
    remove_stale_runs(out / "work", None)
    run = Run.create(out / "work" / "finetune", config, run_info)
    parameters = starting_parameters(config, mean, images, scenes).to(device)
    if config.exploit_fresh_field:
        torch.manual_seed(config.seed)
        model.field = model.random_field().to(device)
    # Learn
    tracker = Tracker(options.track, run.path, {"seed": config.seed})
    Trainer(run, model, TrainingScenes(parameters, images, scenes), tracker).fit(config.exploit)
    tracker.close()
    model.eval().requires_grad_(False)
    # Store
    known, spent = shows_silhouettes(config.exploit, images), run.spent.times(1 / len(scenes))
    provenance = Provenance("exploit", "new", spent, silhouettes=known)
    found = new_scenes(model, parameters, info.view, images, scenes, info.precision, provenance)
    library = LibraryFolder.create(out, frozen(config), info, model, mean_parameters(1, parameters), found)
    finish(run, library)
    return library


def _info(parent: Run | LibraryFolder, images: PosedImages, precision: StoragePrecision) -> LibraryInfo:
    """Describes a library whose model starts as that of `parent`."""
    known = parent.info if isinstance(parent, LibraryFolder) else library_info(parent, images, precision)
    return dataclasses.replace(known, precision=precision, finetuned_from=str(parent.path.resolve()))
