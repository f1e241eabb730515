"""Comparison of libraries and runs with the checksums of the bytes once written."""

from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

from safetensors import SafetensorError

from latentscenes.core.console import say
from latentscenes.core.errors import UserError
from latentscenes.core.files import file_checksum, open_tensors, read_object
from latentscenes.core.reading import reason
from latentscenes.storage.index import FILE, REMEDY, Place, SceneInfo
from latentscenes.storage.library import SHARED, START, TRIES, LibraryFolder
from latentscenes.storage.quantize import payload_checksum
from latentscenes.storage.records import FIT_SCORES, METRICS, SCORES, log_matches, log_problem
from latentscenes.storage.recovery import abandoned_shards
from latentscenes.storage.row_files import damaged_rows, is_at_work, stored_sums
from latentscenes.storage.run import Run
from latentscenes.storage.shards import ShardScene
from latentscenes.storage.sqlite import database_problem

FIXED = [entry.name for entry in fields(SceneInfo) if entry.name not in ("name", "tags")]
"""Fields that a scene's entry in the index and its shard both hold."""
NAMED = 3
"""Scenes of an unlisted shard that `verify` names."""

MENDED = "What its shard states is taken again by: latentscenes library rebuild"
COUNTED = "They are counted again by: latentscenes library rebuild"


@dataclass(frozen=True)
class Damage:
    """A difference from the bytes once written."""

    name: str
    """Name of the scene or of the file."""
    what: str


def verify(library: LibraryFolder) -> list[Damage]:
    """Compares the model, all scenes, the index, scores and the log with what was written. Returns all
    differences, and shards that the index does not list."""
    if problem := database_problem(library.path / FILE):
        found = [Damage(FILE, f"is damaged ({problem}). {REMEDY} {library.path}")]
        with suppress(UserError):  # its content may say more
            found += _entry_damage(library)
        return found
    with library.index.any_text():
        return _differences(library)


def _differences(library: LibraryFolder) -> list[Damage]:
    found = []
    for name, use in ((SHARED, "every scene needs it"), (START, "new scenes start from it")):
        file = library.path / "model" / name
        if not file.is_file():
            found.append(Damage(f"model/{name}", f"is absent; {use}"))
            continue
        try:
            if name in library.checksums and not _is_unchanged(file, library.checksums[name]):
                found.append(Damage(f"model/{name}", f"its bytes have changed; {use}"))
        except OSError as error:
            found.append(Damage(f"model/{name}", f"cannot be read ({reason(error)}); {use}"))
    places = library.index.places().items()
    for name, place in sorted(places, key=lambda item: (item[1].shard, item[1].row)):
        what = _scene_damage(library, name, place)
        for _ in range(TRIES):
            if what is None or (now := library.index.place(name)) == place:
                break
            place = now  # another process moved, removed or renamed it meanwhile
            what = _scene_damage(library, name, place) if place else None
        if what:
            found.append(Damage(name, what))
    found += _entry_damage(library)
    for file, scenes in abandoned_shards(library).items():
        found.append(Damage(f"shards/{file.name}", _unlisted(library, scenes)))
    if problem := log_problem(library.path):
        found.append(Damage(METRICS, f"{problem}. Remove it: only charts of reports are drawn from it"))
    return found + [Damage(name, what) for name, what in _score_damage(library.path)]


def _entry_damage(library: LibraryFolder) -> list[Damage]:
    """Returns what only the index says, and is not as it was written: names, tags, thumbnails; and the table
    of shards, where it is not that of the files."""
    found, index, path = [], library.index, library.path
    for name, part in dict.fromkeys(index.changed_values()):
        found.append(Damage(name, f"its {part} in {FILE} changed since it was written. {MENDED} {path}"))
    if index.totals_are_damaged():
        found.append(Damage(FILE, f"its totals are not those of its scenes. {COUNTED} {path}"))
    for shard in index.unknown_shards():
        found.append(Damage(FILE, f"does not list shard {shard!r}, in which scenes lie. {MENDED} {path}"))
    for shard, (written, _) in index.shards().items():
        with suppress(FileNotFoundError, SafetensorError):  # which its scenes tell
            if (rows := library.shards.rows(shard)) != written:
                what = f"says that {library.shards.file(shard).name} holds {written} scenes, not {rows}"
                found.append(Damage(FILE, f"{what}. {MENDED} {path}"))
    return found


def _score_damage(folder: Path) -> list[tuple[str, str]]:
    """Returns names of files of scores that have changed since they were written, with descriptions."""
    found = []
    for name in (SCORES, FIT_SCORES):
        with suppress(FileNotFoundError):
            try:
                if (folder / name).exists():
                    read_object(folder / name, "")
            except UserError as error:
                said = str(error).removeprefix(f"{folder / name}: ").rstrip(". ")
                found.append((name, f"{said}. Remove it: `latentscenes eval` computes it again"))
    return found


def _scene_damage(library: LibraryFolder, name: str, place: Place) -> str | None:
    """Returns a description of a scene's damage; None if it is intact."""
    file = library.shards.file(place.shard)
    try:
        if payload_checksum(library.shards.read(place)) != place.checksum:
            return f"its bytes in {file.name} have changed"
        info, stated = library.index.info(name), library.shards.stated(place)
        if stated and stated["checksum"] != place.checksum:
            return f"its shard {file.name} states another checksum than the index"
        if info and stated and (other := [key for key in FIXED if stated.get(key) != getattr(info, key)]):
            return f"its entry in the index is not that of its shard {file.name}: {', '.join(other)}"
    except UserError as error:  # an entry that no version wrote
        return str(error).removeprefix(f"{library.path / FILE}: ")
    except FileNotFoundError:
        return f"its shard {file.name} is absent"
    except SafetensorError as error:
        return f"its shard is damaged; {error}"
    return None


def _unlisted(library: LibraryFolder, scenes: list[ShardScene] | str) -> str:
    if isinstance(scenes, str):
        return f"the index does not list it, and it cannot be read ({scenes})"
    names = ", ".join(repr(scene.info.name) for scene in scenes[:NAMED]) + (
        " …" if len(scenes) > NAMED else ""
    )
    return (
        f"the index, which may be an older copy, does not list it; it holds {names}. "
        f"Take it in: latentscenes library rebuild {library.path}"
    )


def _is_unchanged(file: Path, checksum: str) -> bool:
    """Compares a file of tensors with its checksum; reads it whole only if its header fits its size."""
    try:
        with open_tensors(file, "np"):
            return file_checksum(file) == checksum
    except SafetensorError:
        return False


def verify_run(path: Path) -> list[str]:
    """Compares everything in a run that has a checksum. Returns the differences, one sentence a file. Another
    process may work on the run. Raises a UserError if there is no run, or its run.json is damaged."""
    run, found = Run.open(path), []
    for checkpoint in run.checkpoints():
        try:
            run.check_at(checkpoint)
            run.position_at(checkpoint)
        except UserError as error:
            if checkpoint.exists():  # else another process has just replaced it by a newer one
                found.append(str(error))
    found += [f"{path / name}: {what}." for name, what in _score_damage(path)]
    if found or (newest := run.newest()) is None:
        return found
    if (log := run.state_at(newest).get("log")) is not None and not log_matches(path, log):
        found.append(f"{path / METRICS}: was edited, or damaged, since the last checkpoint.")
    if is_at_work(rows := path / "rows"):
        say(f"Note: {rows} is not compared: this run is in progress, or was interrupted.")
    elif sums := stored_sums(newest, "Restore it from a copy."):
        found += damaged_rows(rows, len(run.info.scenes), run.config.planes, sums)
    return found
