"""Ranks that share no folder but a bucket.

    BUCKET/plan.json                      the groups, and how they are learned (plan.py)
    BUCKET/claims/                        who makes the plan
    BUCKET/ID/library/                    the model and the settings of the library
    BUCKET/ID/claims/                     which group is learned by whom, and which are done
    BUCKET/ID/parts/part-0003-1a2b3c/     the shards that a process has learned, and their thumbnails

Each machine has a folder of its own for unfinished work. A group is done when its shards are in the bucket.
No process joins them: `library join` fetches the parts of a bucket and joins them as it joins folders.
"""

import json
import re
import secrets
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from latentscenes.core import config_io
from latentscenes.core.config import Config
from latentscenes.core.errors import UserError
from latentscenes.core.files import locked, make_folder, write_bytes, write_with_checksum, writing_to
from latentscenes.core.options import ExploitOptions, RankOptions
from latentscenes.core.ranks import Rank
from latentscenes.data.dataset import PosedImages
from latentscenes.storage.description import FILE as DESCRIPTION
from latentscenes.storage.description import SHARED
from latentscenes.storage.entries import SceneInfo
from latentscenes.storage.index import FILE, Index
from latentscenes.storage.joining import empty_copy
from latentscenes.storage.library import START, LibraryFolder
from latentscenes.storage.published.targets import BucketTarget
from latentscenes.storage.run import SETTINGS
from latentscenes.storage.shards import NAME, shard_scenes
from latentscenes.training.preparing import with_chosen_scenes
from latentscenes.training.sharing.boards import BucketBoard, created
from latentscenes.training.sharing.claims import Claims, own_name
from latentscenes.training.sharing.plan import PLAN, Plan, new_plan, read_or_make, read_plan, refuse_other
from latentscenes.training.sharing.ranks import Share, Worker, items, opened, refuse_alone, reporter

SEED = f"model/{SHARED}", f"model/{START}", SETTINGS, DESCRIPTION
"""Files of a library without scenes. The last one makes it a library."""
PICTURES = ".pictures"
"""Ending of the file with the thumbnails of a shard: PNG files by row, in the format of safetensors."""
MOST_FILE = 4 << 30
"""Bytes of the largest shard or model that is fetched."""
OWNER = re.compile(r"part-\d{4,9}(-\d{1,9})?-[0-9a-f]{6}")
"""Names of parts."""


def exploit_in_bucket(
    bucket: BucketTarget, images: PosedImages, config: Config, parent: Path | None, options: ExploitOptions,
    device: torch.device, shared: tuple[Rank, RankOptions],
) -> Share:  # fmt: skip
    """Learns new scenes of a dataset together with other processes that make the same call, each with its own
    rank. They agree by a bucket, and put what they learn there. Returns when all scenes are there.

    Raises:
        UserError: as `exploit_rank`; or the bucket cannot be reached, or its store knows no conditional
            writes.
        Interrupted: a signal asked to stop. Everything is saved in this machine's folder.
    """
    refuse_alone(images, options)
    rank, ranks = shared
    folder = ranks.parts or Path(f"{bucket.address.rpartition('/')[2]}.parts")
    with Claims(_board(bucket, "claims"), uuid.uuid4().hex, ranks.lease).renewing() as claims:
        plan = read_or_make(
            claims, lambda: _read(bucket, folder),
            lambda: _planned(bucket, folder, images, config, parent, options, device),
        )  # fmt: skip
    config = with_chosen_scenes(
        config, config_io.parse(plan.settings, f"{bucket.address}/{PLAN}"), options, device
    )
    refuse_other(plan, bucket.address, (bucket.address, images), config, options)
    home = folder / plan.id
    seed = _seed(bucket, plan, home)
    created(home / "machine", secrets.token_hex(3))
    with own_name(home / "owners", f"part-{rank.number:04d}") as name:
        owner = f"{name}-{(home / 'machine').read_text()}"
        with Claims(
            _board(bucket, f"{plan.id}/claims"), owner, ranks.lease, ranks.patience
        ).renewing() as claims:
            part, report = home / name, reporter(plan, owner)

            def stored(item: str, infos: list[SceneInfo], now: bool) -> None:
                _put(bucket, plan, part, owner, infos)
                report(item, infos, now)

            worker = Worker(plan, claims, lambda: opened(part, seed, plan), stored, lambda: True)
            worker.learn(images, config, device, rank)
    return Share(worker.learned, None)


def fetched_parts(bucket: BucketTarget, folder: Path) -> tuple[dict[Path, list[str]], int]:
    """Fetches the parts of a bucket as libraries into a folder. The same call continues a stopped one.

    Returns:
        The scenes of all groups that are done, by the part to take them from; and how many groups are not.

    Raises:
        UserError: no ranks have learned there, it cannot be reached, or a file is damaged.
    """
    plan = _read(bucket, folder)
    if plan is None:
        raise UserError(
            f"{bucket.address}: no processes have learned here (plan.json is absent). Name the address that "
            "was their --out, or fetch a published library with `latentscenes library pull`."
        )
    home = folder / plan.id
    seed = _seed(bucket, plan, home)
    done = Claims(_board(bucket, f"{plan.id}/claims"), "reader", 1.0).state().done
    only: dict[Path, list[str]] = {}
    for item, names in zip(items(plan), plan.groups, strict=True):
        if item in done:
            if not OWNER.fullmatch(done[item]):
                raise UserError(f"{bucket.address}: {done[item]!r} is no name of a part. Remove it there.")
            only.setdefault(home / done[item], []).extend(names)
    for part in only:
        _fetch(bucket, f"{plan.id}/parts/{part.name}", seed, part)
    return only, sum(item not in done for item in items(plan))


def _board(bucket: BucketTarget, folder: str) -> BucketBoard:
    return BucketBoard(bucket.address, bucket.store, folder)


def _read(bucket: BucketTarget, folder: Path) -> Plan | None:
    content = bucket.read(PLAN)
    if content is None:
        return None
    with writing_to(folder):
        make_folder(folder)
    write_bytes(folder / PLAN, content)
    return read_plan(folder)


def _planned(
    bucket: BucketTarget, folder: Path, images: PosedImages, config: Config, parent: Path | None,
    options: ExploitOptions, device: torch.device,
) -> Plan:  # fmt: skip
    """Makes the plan, and a library without scenes, and puts both into the bucket."""
    library = folder / f"made-{uuid.uuid4().hex[:8]}"
    try:
        plan = replace(
            new_plan(library, images, config, parent, replace(options, stage_one=False), device),
            library=bucket.address,
        )
        for name in SEED:
            bucket.write(f"{plan.id}/library/{name}", (library / name).read_bytes())
        write_with_checksum(library / PLAN, asdict(plan))
        bucket.write(PLAN, (library / PLAN).read_bytes())
    finally:
        shutil.rmtree(library, ignore_errors=True)
    return plan


def _seed(bucket: BucketTarget, plan: Plan, home: Path) -> Path:
    """Returns the library without scenes, after fetching it once for each machine."""
    seed = home / "library"
    with writing_to(home):
        make_folder(seed / "model")
    with locked(home / "lock", True, f"{home}: another process is fetching the model"):
        if not LibraryFolder.exists(seed):
            for name in SEED:
                if name == DESCRIPTION:
                    Index.create(seed / FILE).close()
                write_bytes(seed / name, _content(bucket, f"{plan.id}/library/{name}"))
    return seed


def _content(bucket: BucketTarget, name: str) -> bytes:
    content = bucket.read(name, MOST_FILE)
    if content is None:
        raise UserError(f"{bucket.address}/{name}: absent, although processes need it. Put it back.")
    return content


def _put(bucket: BucketTarget, plan: Plan, part: Path, owner: str, infos: Sequence[SceneInfo]) -> None:
    """Puts the shards of a group into the bucket, with their thumbnails."""
    library = LibraryFolder.open(part)
    places = {info.name: library.index.place(info.name) for info in infos}
    pictures = library.index.thumbnails(list(places))
    for shard in sorted({place.shard for place in places.values()}):
        shown = {
            str(place.row): torch.frombuffer(bytearray(pictures[name]), dtype=torch.uint8)
            for name, place in places.items()
            if place.shard == shard and name in pictures
        }
        file, there = library.shards.file(shard), f"{plan.id}/parts/{owner}"
        bucket.write(f"{there}/{file.stem}{PICTURES}", save(shown))
        bucket.write(f"{there}/{file.name}", file.read_bytes())
    library.close()


def _fetch(bucket: BucketTarget, there: str, seed: Path, part: Path) -> None:
    """Fetches the shards of a part that are not here yet, and lists their scenes in its index."""
    if not LibraryFolder.exists(part):
        empty_copy(seed, part, "DELETE").close()
    library = LibraryFolder.open(part)
    known = library.index.shards()
    for name in sorted(_board(bucket, there).names()):
        found = NAME.fullmatch(name)
        if not found or int(found[1]) in known:
            continue
        file, where = library.shards.file(int(found[1])), f"{bucket.address}/{there}/{name}"
        write_bytes(file, _content(bucket, f"{there}/{name}"))
        scenes = shard_scenes(file)
        if not all(scene.intact and scene.stated for scene in scenes):
            raise UserError(f"{where}: damaged. Remove it there, and let a rank learn its group again.")
        pictures = _pictures(_content(bucket, f"{there}/{found[1]}{PICTURES}"), where)
        rows = [(scene.info, scene.checksum, pictures.get(scene.row)) for scene in scenes]
        with library.index.transaction():
            library.index.add(int(found[1]), rows)
    library.close()


def _pictures(content: bytes, where: str) -> dict[int, bytes]:
    try:
        return {int(row): png.numpy().tobytes() for row, png in load(content).items()}
    except (SafetensorError, ValueError, TypeError, json.JSONDecodeError):
        raise UserError(f"{where}: its thumbnails are damaged. Remove {PICTURES} and learn again.") from None
