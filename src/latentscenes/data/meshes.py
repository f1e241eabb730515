"""Renders a folder of meshes (GLB, glTF, OBJ, PLY) into a dataset.

- Every file that cannot be read is reported with the reason.
- glTF files have y up, and their factors and vertex colors are linear light.
- Objects are moved and scaled: bounding box centered at the origin, with diagonal 1, z up.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import trimesh
from jaxtyping import Float, UInt8

from latentscenes.core.console import console, progress_bar
from latentscenes.core.errors import UserError
from latentscenes.data.dataset import DatasetWriter, Split
from latentscenes.data.importing import choose_splits
from latentscenes.data.options import Up, ViewOptions
from latentscenes.data.raycast import (
    BLEND,
    DEFAULT_VIEWS,
    OPAQUE,
    TriangleSoup,
    render_object,
    scene_box,
    soup_from_mesh,
)  # fmt: skip

FORMATS = {".glb": "y", ".gltf": "y", ".obj": "y", ".ply": "z"}
"""Readable formats, and the axis that points up if `up` is "auto"."""
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
    """Renders meshes into a new dataset.

    Args:
        folder: a folder, searched with its subfolders, or one file.
        out: the dataset's folder; must not exist or be empty.
        options: views, size, held-out views, seed, camera distance, scene box.
        split: JSON file {"train": [...], "new": [...]} with file names without their endings.
        new: without `split`: mark the last meshes by name, this many, as new; the others as train.
        up: the axis that points up in the files; auto: y in glTF and OBJ, z in PLY.
        limit: read at most this many meshes of each split.
        strict: raise a UserError for the first file that cannot be read, instead of reporting it at the end.
    """
    files = find_meshes(Path(folder))
    listed = choose_splits(list(files), split, new)
    splits, unlisted = _at_most(limit, listed), sorted(set(files) - set(listed))
    bounds, failed, remarks = [], {}, {}
    with (
        DatasetWriter(out, (options.size, options.size), alpha=True, origin=f"meshes {folder}") as writer,
        progress_bar() as progress,
    ):
        for name in progress.track(splits, description="rendering meshes"):
            try:
                soup, remarks[name] = read_mesh(files[name], up)
            except UserError as error:
                if strict:
                    raise
                failed[name] = str(error)
                continue
            render_object(writer, name, soup, splits[name], options)
            bounds.append(soup.bounds)
        if not bounds:
            reasons = "\n".join(failed.values())
            raise UserError(f"{folder}: none of {len(splits)} meshes could be read.\n{reasons}")
        writer.finish(scene_box(bounds, options))
    lines = [f"{out}: {len(bounds)} scenes"]
    lines += [f"remark: {name}: {line}" for name in remarks for line in remarks[name]]
    if unlisted:
        some = ", ".join(unlisted[:3]) + (" …" if len(unlisted) > 3 else "")
        lines.append(f"{len(unlisted)} left out, as the split file does not name them: {some}")
    if failed:
        lines.append(f"{len(failed)} of {len(splits)} could not be read:")
        lines += [f"  {reason}" for reason in failed.values()]
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def find_meshes(folder: Path) -> dict[str, Path]:
    """Returns mesh files by name, sorted. A name is the path inside the folder, `/` as `__`, no ending."""
    if folder.is_file():
        if folder.suffix.lower() not in FORMATS:
            raise UserError(f"{folder}: not a readable mesh format; give {', '.join(FORMATS)}.")
        return {folder.stem: folder}
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder.")
    files: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in FORMATS and path.is_file():
            name = "__".join(path.relative_to(folder).with_suffix("").parts)
            if name in files:
                raise UserError(f"{path} and {files[name]} are both named {name!r}; rename or remove one.")
            files[name] = path
    if not files:
        raise UserError(f"{folder}: holds no mesh ({', '.join(FORMATS)}), even in subfolders.")
    return files


def _at_most(limit: int | None, splits: dict[str, Split]) -> dict[str, Split]:
    """Returns the first `limit` scenes of each split; None: all."""
    kept = {name for part in ("train", "new") for name in [n for n in splits if splits[n] == part][:limit]}
    return {name: part for name, part in splits.items() if name in kept}


def read_mesh(path: Path, up: Up = "auto") -> tuple[TriangleSoup, list[str]]:
    """Reads a mesh file as a normalized soup with z up, and the loader's remarks (a missing texture)."""
    suffix = path.suffix.lower()
    with _remarks() as remarks:
        try:
            scene = trimesh.load_scene(path, process=False)
            soups = [_soup(mesh, linear=suffix in (".glb", ".gltf")) for mesh in _surfaces(scene)]
        except UserError:
            raise
        except Exception as error:  # damaged files can raise anything
            reason = f"{type(error).__name__}: {error}".removesuffix(": ")
            kind = suffix[1:].upper()
            raise UserError(f"{path}: cannot be read; it is damaged or not {kind} ({reason}).") from None
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
    """Yields every mesh in scene coordinates. (trimesh's `dump` loses vertex colors beside a material.)"""
    for node in scene.graph.nodes_geometry:
        matrix, name = scene.graph[node]
        mesh = scene.geometry[name]
        if not isinstance(mesh, trimesh.Trimesh) or not len(mesh.faces):
            continue
        placed = mesh.copy()
        placed.apply_transform(matrix)
        if isinstance(mesh.visual, trimesh.visual.TextureVisuals):
            attributes = mesh.visual.vertex_attributes
            if "color" in attributes:
                placed.visual.vertex_attributes["color"] = attributes["color"]
        yield placed


@contextmanager
def _remarks() -> Iterator[list[str]]:
    """Collects trimesh's warnings, and its debug messages about lost content."""
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
    """Converts a mesh. `linear`: its factors and vertex colors are linear light, not sRGB."""
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
        mesh.vertices, mesh.faces,
        normals=_normals(mesh), uv=uv, colors=colors * factor, texture=texture, cutoff=cutoff,
    )  # fmt: skip


def _normals(mesh: trimesh.Trimesh) -> Float[np.ndarray, "p 3"] | None:
    """Returns the file's vertex normals, or None if they are absent or unusable."""
    if "vertex_normals" not in mesh._cache.cache:
        return None
    normals = np.asarray(mesh.vertex_normals)
    usable = normals.shape == mesh.vertices.shape and np.isfinite(normals).all()
    return normals if usable and (np.abs(normals).max(1) > 0.1).all() else None


def _material(material: object) -> tuple[UInt8[np.ndarray, "h w 4"] | None, Float[np.ndarray, "4"], float]:
    """Returns texture, color factor and cutoff of a glTF or MTL material."""
    if isinstance(material, trimesh.visual.material.PBRMaterial):
        picture, factor, mode = material.baseColorTexture, material.baseColorFactor, material.alphaMode
        threshold = 0.5 if material.alphaCutoff is None else float(material.alphaCutoff)
        cutoff = {"MASK": threshold, "BLEND": BLEND}.get(mode, OPAQUE)
    else:
        picture, factor = getattr(material, "image", None), getattr(material, "diffuse", None)
        cutoff = 0.5
    texture = None if picture is None else np.array(picture.convert("RGBA"))
    return texture, np.ones(4) if factor is None else _rgba(np.asarray(factor)), cutoff


def _rgba(values: np.ndarray) -> Float[np.ndarray, "*n 4"]:
    """Converts colors (3 or 4 channels; bytes, 16-bit or fractions) to fractions with alpha."""
    scale = np.iinfo(values.dtype).max if values.dtype.kind in "ui" else 1
    values = values / scale
    if values.shape[-1] == 3:
        values = np.concatenate([values, np.ones_like(values[..., :1])], -1)
    return np.clip(values, 0, 1)


def _to_srgb(rgba: Float[np.ndarray, "*n 4"]) -> Float[np.ndarray, "*n 4"]:
    """Converts linear light to sRGB values (IEC 61966-2-1); alpha stays."""
    light = rgba[..., :3]
    curve = 1.055 * np.maximum(light, 1e-9) ** (1 / 2.4) - 0.055
    encoded = np.where(light <= 0.0031308, 12.92 * light, curve)
    return np.concatenate([encoded, rgba[..., 3:]], -1)
