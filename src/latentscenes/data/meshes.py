"""A folder of meshes → a dataset: every GLB, glTF, OBJ or PLY is read, brought to one size and photographed.

Notable:
- What cannot be read is named with the reason; nothing is left out in silence.
- glTF states its axes (y up) and that factors and vertex colors are linear light; both are honored.
- Objects have the middle of their bounding box at the origin and its diagonal 1, z up.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import trimesh
from jaxtyping import Float, UInt8
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from latentscenes.core.errors import UserError
from latentscenes.data.dataset import DatasetWriter, Split, spread
from latentscenes.data.importing import choose_splits
from latentscenes.data.raycast import (
    BLEND,
    DEFAULT_VIEWS,
    OPAQUE,
    RayCaster,
    TriangleSoup,
    ViewOptions,
    soup_from_mesh,
)

Up = Literal["auto", "y", "z"]
FORMATS = {".glb": "y", ".gltf": "y", ".obj": "y", ".ply": "z"}
"""What is read, and which axis points up where `up` is "auto"."""
Y_TO_Z = np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])


def make_meshes(
    folder: Path,
    out: Path,
    options: ViewOptions = DEFAULT_VIEWS,
    *,
    split: Path | None = None,
    new: int = 0,
    up: Up = "auto",
    limit: int | None = None,
    strict: bool = False,
) -> None:
    """Photograph meshes into a new dataset.

    Args:
        folder: a folder (searched with its subfolders), or one file, of GLB, glTF, OBJ or PLY.
        out: the dataset's folder; must not exist or be empty.
        options: views, size, held-out views, seed, camera distance, scene box.
        split: JSON file {"train": [...], "new": [...]} with file names without their endings.
        new: without `split`, how many meshes, the last by name, are new scenes instead of training ones.
        up: the axis that points up in the files. auto: y in glTF and OBJ, z in PLY.
        limit: read at most so many meshes of each split.
        strict: stop at the first file that cannot be read, instead of reporting it at the end.
    """
    console = Console(stderr=True)
    files = find_meshes(Path(folder))
    listed = choose_splits(list(files), split, new)
    splits, unlisted = _at_most(limit, listed), sorted(set(files) - set(listed))
    bounds, failed, remarks = [], {}, {}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with (
        DatasetWriter(out, (options.size, options.size), alpha=True, origin=f"meshes {folder}") as writer,
        Progress(*columns, console=console) as progress,
    ):
        for name in progress.track(splits, description="rendering meshes"):
            try:
                soup, remarks[name] = read_mesh(files[name], up)
            except UserError as error:
                if strict:
                    raise
                failed[name] = str(error)
                continue
            options.check_fits(name, soup.bounds)
            cameras = options.cameras(name)
            rgb, alpha = RayCaster(soup).render(cameras, options.size, options.samples)
            writer.add(name, rgb, cameras, splits[name], spread(options.views, options.held_out), alpha)
            bounds.append(soup.bounds)
        if not bounds:
            raise UserError(
                f"{folder}: none of {len(splits)} meshes could be read.\n" + "\n".join(failed.values())
            )
        writer.finish(options.scene_box(bounds))
    _report(console, out, len(bounds), failed, remarks, unlisted)


def _report(
    console: Console,
    out: Path,
    count: int,
    failed: dict[str, str],
    remarks: dict[str, list[str]],
    unlisted: list[str],
) -> None:
    """Say what was read and, by name, what was not."""

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    say(f"{out}: {count} scenes")
    for name, lines in remarks.items():
        for line in lines:
            say(f"remark: {name}: {line}")
    if unlisted:
        some = ", ".join(unlisted[:3]) + (" …" if len(unlisted) > 3 else "")
        say(f"{len(unlisted)} left out, as the split file does not name them: {some}")
    if failed:
        say(f"{len(failed)} of {len(failed) + count} could not be read:")
        for reason in failed.values():
            say(f"  {reason}")


def find_meshes(folder: Path) -> dict[str, Path]:
    """Mesh files by name: the path inside the folder without its ending, folders joined by `__`; sorted."""
    if folder.is_file():
        if folder.suffix.lower() not in FORMATS:
            raise UserError(f"{folder}: not a mesh that can be read; give {', '.join(FORMATS)}.")
        return {folder.stem: folder}
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder.")
    files: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in FORMATS and path.is_file():
            name = "__".join(path.relative_to(folder).with_suffix("").parts)
            if name in files:
                raise UserError(
                    f"{path} and {files[name]} would both be called {name!r}; rename or remove one."
                )
            files[name] = path
    if not files:
        raise UserError(f"{folder}: holds no mesh ({', '.join(FORMATS)}), nor do its subfolders.")
    return files


def _at_most(limit: int | None, splits: dict[str, Split]) -> dict[str, Split]:
    """The first `limit` scenes of each split; None: all."""
    counts = {"train": 0, "new": 0}
    chosen = {}
    for name, part in splits.items():
        counts[part] += 1
        if limit is None or counts[part] <= limit:
            chosen[name] = part
    return chosen


def read_mesh(path: Path, up: Up = "auto") -> tuple[TriangleSoup, list[str]]:
    """A mesh file as a normalized soup with z up, and the loader's remarks about it (a texture not found, say)."""
    suffix = path.suffix.lower()
    with _remarks() as remarks:
        try:
            scene = trimesh.load_scene(path, process=False)
            soups = [_soup(mesh, linear=suffix in (".glb", ".gltf")) for mesh in _surfaces(scene)]
        except UserError:
            raise
        except Exception as error:  # a broken file may break its reader in any way
            reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise UserError(
                f"{path}: cannot be read; it is damaged or not {suffix[1:].upper()} ({reason})."
            ) from None
    if not soups:
        raise UserError(f"{path}: holds no triangles.")
    soup = TriangleSoup.joined(soups)
    if not np.isfinite(soup.corners).all():
        raise UserError(f"{path}: some vertices are not finite numbers.")
    if not (soup.bounds[1] - soup.bounds[0]).max() > 0:
        raise UserError(f"{path}: has no size; all vertices lie in one point.")
    if (FORMATS[suffix] if up == "auto" else up) == "y":
        soup = soup.turned(Y_TO_Z)
    return soup.normalized(), remarks


def _surfaces(scene: trimesh.Scene) -> Iterator[trimesh.Trimesh]:
    """Every mesh with triangles, at its place. (trimesh's own `dump` forgets vertex colors that stand beside a material.)"""
    for node in scene.graph.nodes_geometry:
        matrix, name = scene.graph[node]
        mesh = scene.geometry[name]
        if not isinstance(mesh, trimesh.Trimesh) or not len(mesh.faces):
            continue
        placed = mesh.copy()
        placed.apply_transform(matrix)
        if (
            isinstance(mesh.visual, trimesh.visual.TextureVisuals)
            and "color" in mesh.visual.vertex_attributes
        ):
            placed.visual.vertex_attributes["color"] = mesh.visual.vertex_attributes["color"]
        yield placed


@contextmanager
def _remarks() -> Iterator[list[str]]:
    """Collects what trimesh would only log: warnings, and the losses that it mentions at debug level."""
    lines: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            line = " ".join(record.getMessage().split())
            loss = any(word in line for word in ("unable", "failed", "unsupported", "not loaded", "skipping"))
            if line not in lines and (loss or record.levelno >= logging.WARNING):
                lines.append(line)

    logger, collector = logging.getLogger("trimesh"), Collector()
    before = logger.propagate, logger.level
    logger.addHandler(collector)
    logger.propagate = False
    logger.setLevel(logging.DEBUG)
    try:
        yield lines
    finally:
        logger.removeHandler(collector)
        logger.propagate = before[0]
        logger.setLevel(before[1])


def _soup(mesh: trimesh.Trimesh, linear: bool) -> TriangleSoup:
    """One mesh with one material. `linear`: factors and vertex colors are linear light, not sRGB values."""
    uv, texture, cutoff, factor = None, None, OPAQUE, np.ones(4)
    colors = np.ones((len(mesh.vertices), 4))
    visual = mesh.visual
    if isinstance(visual, trimesh.visual.TextureVisuals):
        texture, factor, cutoff = _material(visual.material)
        uv = visual.uv
        if uv is None or len(uv) != len(mesh.vertices) or not np.isfinite(uv).all():
            uv = texture = None
        if (painted := visual.vertex_attributes.get("color")) is not None and len(painted) == len(colors):
            colors = _rgba(np.asarray(painted))
    elif visual.kind == "vertex":
        colors = _rgba(visual.vertex_colors)
    elif visual.kind == "face":
        colors = np.repeat(_rgba(visual.face_colors)[:, None], 3, 1)
    if cutoff == OPAQUE and visual.kind in ("vertex", "face") and colors[..., 3].min() < 1:
        cutoff = BLEND
    if linear:
        colors, factor = _to_srgb(colors), _to_srgb(factor)
    return soup_from_mesh(
        mesh.vertices,
        mesh.faces,
        normals=_normals(mesh),
        uv=uv,
        colors=colors * factor,
        texture=texture,
        cutoff=cutoff,
    )


def _normals(mesh: trimesh.Trimesh) -> Float[np.ndarray, "p 3"] | None:
    """The file's own vertex normals; else None, for flat triangles."""
    if "vertex_normals" not in mesh._cache.cache:
        return None
    normals = np.asarray(mesh.vertex_normals)
    usable = (
        normals.shape == mesh.vertices.shape
        and np.isfinite(normals).all()
        and (np.abs(normals).max(1) > 0.1).all()
    )
    return normals if usable else None


def _material(material: object) -> tuple[UInt8[np.ndarray, "h w 4"] | None, Float[np.ndarray, "4"], float]:
    """Texture, color factor and cutoff of a glTF or MTL material."""
    if isinstance(material, trimesh.visual.material.PBRMaterial):
        picture, factor, mode = material.baseColorTexture, material.baseColorFactor, material.alphaMode
        cutoff = {
            "MASK": 0.5 if material.alphaCutoff is None else float(material.alphaCutoff),
            "BLEND": BLEND,
        }.get(mode, OPAQUE)
    else:
        picture, factor = getattr(material, "image", None), getattr(material, "diffuse", None)
        cutoff = 0.5
    texture = None if picture is None else np.array(picture.convert("RGBA"))
    return texture, np.ones(4) if factor is None else _rgba(np.asarray(factor)), cutoff


def _rgba(values: np.ndarray) -> Float[np.ndarray, "*n 4"]:
    """Colors with three or four channels, bytes, 16-bit or fractions, as fractions with alpha."""
    scale = np.iinfo(values.dtype).max if values.dtype.kind in "ui" else 1
    values = values / scale
    if values.shape[-1] == 3:
        values = np.concatenate([values, np.ones_like(values[..., :1])], -1)
    return np.clip(values, 0, 1)


def _to_srgb(rgba: Float[np.ndarray, "*n 4"]) -> Float[np.ndarray, "*n 4"]:
    """Linear light → sRGB values; alpha stays."""
    light = rgba[..., :3]
    encoded = np.where(
        light <= 0.0031308, 12.92 * light, 1.055 * np.maximum(light, 1e-9) ** (1 / 2.4) - 0.055
    )
    return np.concatenate([encoded, rgba[..., 3:]], -1)
