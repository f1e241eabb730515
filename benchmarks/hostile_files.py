"""Good files of every kind that latentscenes reads, as small as can be, for `benchmarks.hostile` to break."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from trimesh import Trimesh
from trimesh.creation import box
from trimesh.visual import ColorVisuals

from latentscenes.core import config_io
from latentscenes.core.cameras import Box, Cameras, orbit
from latentscenes.core.config import frozen
from latentscenes.data.dataset import PosedImages
from latentscenes.data.writing import DatasetWriter

CONFIG = """
codec: {kind: identity}
planes: {resolution: 8, micro: 2, macro: 3, bases: 3}
field: {hidden: 8}
render: {coarse: 4, fine: 4}
train: [{name: all, epochs: 1, scenes: 2, views: 2, losses: {latent: 1}, rates: {micro: 1e-2, field: 1e-2}}]
exploit: [{name: new, epochs: 1, scenes: 1, views: 2, losses: {latent: 1}, rates: {micro: 1e-2}}]
"""
ONE = "--threads 1"
READ_MESH = "data meshes --folder {0} --out {out} --views 3 --size 16 --held-out 1"
SIDE, VIEWS = 16, 4


@dataclass(frozen=True)
class Good:
    """A set of good files and the commands that read them; `{}` is their folder, `{out}` a place to write."""

    kind: str
    folder: Path
    commands: tuple[str, ...]

    def files(self) -> list[str]:
        """Returns the files, by their paths in the folder."""
        found = (path for path in self.folder.rglob("*") if path.is_file() and path.name != "lock")
        return sorted(str(path.relative_to(self.folder)) for path in found)


def good_sets(folder: Path) -> list[Good]:
    """Returns one set of each kind, made in `folder` where it is not there yet."""
    joined = "data join --folders {0}/data {0}/other --out {out}"
    film = f"render --run {folder}/library --scene a --path {{0}}/path.json --size 16 --out {{out}}.gif {ONE}"
    makers: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
        "dataset": (_dataset, ("data verify {0}/data", joined, _train("{0}/data", "{out}"))),
        "run": (_run, (*(command.format(run="{0}/run") for command in RUN), _train("{0}/data", "{0}/run"))),
        "library": (_library, tuple(f"{command} {ONE}" if slow else command for command, slow in LIBRARY)),
        "configuration": (_configuration, ("cost --config {0}/config.yaml",)),
        "camera path": (_camera_path, (film,)),
        "glTF": (_gltf, (READ_MESH,)),
        "GLB": (_glb, (READ_MESH,)),
        "OBJ": (_obj, (READ_MESH,)),
        "PLY": (_ply, (READ_MESH,)),
        "transforms": (_transforms, ("data transforms --folder {0} --out {out} --held-out 1",)),
        "SRN": (_srn, ("data srn --folder {0} --out {out} --held-out 1",)),
        "EG3D": (_eg3d, ("data srn --folder {0} --out {out} --held-out 1",)),
        "COLMAP": (_colmap, ("data photos --folder {0} --out {out} --size 16",)),
        "split": (_split, ("data srn --folder {0}/scenes --split {0}/split.json --out {out} --held-out 1",)),
    }  # fmt: skip
    sets = []
    for kind, (make, commands) in makers.items():
        place = folder / kind.replace(" ", "_")
        if not place.exists():
            place.mkdir(parents=True)
            make(place)
        sets.append(Good(kind, place, commands))
    return sets


LIBRARY = (
    ("library list {0}", False), ("library show {0}", False), ("library show {0} a", False),
    ("library verify {0}", False), ("cost --run {0}", False), ("search {0} a", True),
    ("render --run {0} --scene a --frames 1 --out {out}.png", True),
    ("export page --run {0} --match * --frames 1 --out {out}.html", True),
    ("library publish {0} --out {out} --site", False), ("library join {out} {0}", False),
    ("library rename {0} a other", False), ("library export {0} b --out {out}", False),
    ("library repack {0} --precision int4", True), ("library compact {0}", False),
)  # fmt: skip
"""Commands on a library, and whether they render."""


RUN = (f"eval --run {{run}} {ONE}", "cost --run {run}", "verify {run}")
"""Commands on a run."""


def _train(data: str, out: str) -> str:
    return f"train --data {data} --config {{0}}/config.yaml --out {out} {ONE}"


def _pictures(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (v, SIDE, SIDE, 3) and silhouettes of a block."""
    alpha = np.zeros((VIEWS, SIDE, SIDE), np.uint8)
    alpha[:, 5:11, 5:11] = 255
    color = np.random.default_rng(seed).integers(0, 200, (VIEWS, SIDE, SIDE, 3), np.uint8)
    return np.where(alpha[..., None] > 0, color, 255).astype(np.uint8), alpha


def _write_dataset(path: Path, names: str) -> PosedImages:
    with DatasetWriter(path, (SIDE, SIDE), True, "made") as writer:
        for seed, name in enumerate(names):
            images, alpha = _pictures(seed)
            split = "new" if name == "c" else "train"
            writer.add(name, images, orbit(VIEWS), split, (1,), alpha)
        writer.finish(Box((0.0, 0.0, 0.0), (0.4, 0.4, 0.4)))
    return PosedImages.open(path)


def _dataset(folder: Path) -> None:
    _write_dataset(folder / "data", "abc")
    _write_dataset(folder / "other", "de")
    _configuration(folder)


def _configuration(folder: Path) -> None:
    (folder / "config.yaml").write_text(CONFIG)


def _run(folder: Path) -> None:
    from latentscenes.training.loop import train

    images = _write_dataset(folder / "data", "abc")
    _configuration(folder)
    train(config_io.parse(CONFIG, "made"), images, folder / "run", device="cpu")


def _library(folder: Path) -> None:
    from latentscenes.storage.run import Run
    from latentscenes.training.append import library_from_run

    source = folder.with_name("run")
    run, images = Run.open(source / "run"), PosedImages.open(source / "data")
    library_from_run(folder, run, images, frozen(run.config), "int8", True, "cpu").close()


def _camera_path(folder: Path) -> None:
    frame = {"camera_to_world": [1, 0, 0, 0, 0, 0, -1, -2, 0, 1, 0, 0, 0, 0, 0, 1], "fov": 50, "aspect": 1}
    path = {"camera_path": [frame] * 2, "render_height": 16, "render_width": 16, "seconds": 1}
    (folder / "path.json").write_text(json.dumps(path, indent=1))


def _block() -> Trimesh:
    shape = box()
    colors = np.random.default_rng(0).integers(0, 255, (len(shape.vertices), 4), np.uint8)
    shape.visual = ColorVisuals(shape, vertex_colors=colors)
    return shape


def _glb(folder: Path) -> None:
    _block().export(folder / "block.glb")


def _gltf(folder: Path) -> None:
    for name, content in _block().export(file_type="gltf").items():
        (folder / name).write_bytes(content)


def _obj(folder: Path) -> None:
    _picture(folder / "paint.png", 0)
    (folder / "block.mtl").write_text("newmtl a\nKd 0.5 0.4 0.3\nd 0.9\nmap_Kd -s 2 2 1 paint.png\n")
    lines = ["mtllib block.mtl", *(f"v {x} {y} {z}" for x, y, z in _block().vertices), "vt 0 0", "vt 1 1"]
    lines += ["usemtl a", "s 1", *(f"f {a + 1}/1 {b + 1}/2 {c + 1}/1" for a, b, c in _block().faces)]
    (folder / "block.obj").write_text("\n".join(lines))


def _ply(folder: Path) -> None:
    _block().export(folder / "binary.ply")
    (folder / "text.ply").write_bytes(_block().export(file_type="ply", encoding="ascii"))


def _picture(path: Path, seed: int, view: int = 0) -> None:
    images, alpha = _pictures(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.dstack([images[view], alpha[view]])).save(path)


def _rows(cameras: Cameras) -> list[list[float]]:
    return [[*matrix.flatten().tolist(), 0.0, 0.0, 0.0, 1.0] for matrix in cameras.cam2world]


def _transforms(folder: Path) -> None:
    frames = []
    for view, row in enumerate(_rows(orbit(VIEWS))):
        _picture(folder / f"images/{view}.png", 0, view)
        matrix = np.array(row).reshape(4, 4) @ np.diag([1, -1, -1, 1])
        frames.append({"file_path": f"images/{view}.png", "transform_matrix": matrix.tolist()})
    lens = {"fl_x": 16.4, "fl_y": 16.4, "cx": 8, "cy": 8, "w": SIDE, "h": SIDE, "k1": 0}
    (folder / "transforms.json").write_text(json.dumps({**lens, "frames": frames}, indent=1))


def _srn(folder: Path) -> None:
    for number, name in enumerate("ab"):
        for view, row in enumerate(_rows(orbit(VIEWS))):
            _picture(folder / name / f"rgb/{view:06d}.png", number, view)
            pose = folder / name / f"pose/{view:06d}.txt"
            pose.parent.mkdir(exist_ok=True)
            pose.write_text(" ".join(map(str, row)))
        (folder / name / "intrinsics.txt").write_text(f"16.4 8 8 0\n0 0 0\n1\n{SIDE} {SIDE}\n")


def _eg3d(folder: Path) -> None:
    labels = []
    for view, row in enumerate(_rows(orbit(VIEWS))):
        _picture(folder / f"a/{view}.png", 0, view)
        labels.append([f"a/{view}.png", [*row, 1.025, 0, 0.5, 0, 1.025, 0.5, 0, 0, 1]])
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}, indent=1))


def _split(folder: Path) -> None:
    _srn(folder / "scenes")
    (folder / "split.json").write_text('{"train": ["a"], "new": ["b"]}')


def _colmap(folder: Path) -> None:
    """Twelve photographs on a circle; COLMAP's text files give poses from the world to the camera."""
    model, cameras = folder / "sparse" / "0", orbit(12)
    model.mkdir(parents=True)
    (model / "cameras.txt").write_text("1 SIMPLE_RADIAL 64 64 66 32 32 0.01\n")
    (model / "points3D.txt").write_text("")
    lines = []
    for view, matrix in enumerate(cameras.cam2world.double().numpy()):
        rotation = matrix[:, :3].T
        w, x, y, z = _quaternion(rotation)
        place = " ".join(map(str, -rotation @ matrix[:, 3]))
        lines += [f"{view + 1} {w} {x} {y} {z} {place} 1 {view}.png", ""]
        canvas = np.full((64, 64, 4), (255, 255, 255, 0), np.uint8)
        canvas[22:42, 22:42] = (90, 60, 200, 255)
        (folder / "images").mkdir(exist_ok=True)
        Image.fromarray(canvas).save(folder / "images" / f"{view}.png")
    (model / "images.txt").write_text("\n".join([*lines, ""]))


def _quaternion(rotation: np.ndarray) -> np.ndarray:
    """The unit quaternion w, x, y, z of a rotation: the dominant eigenvector of Bar-Itzhack's matrix."""
    (a, b, c), (d, e, f), (g, h, i) = rotation
    matrix = np.array([
        [a + e + i, h - f, c - g, d - b], [h - f, a - e - i, d + b, g + c],
        [c - g, d + b, e - a - i, h + f], [d - b, g + c, h + f, i - a - e],
    ])  # fmt: skip
    return np.linalg.eigh(matrix)[1][:, -1]
