"""Learned scenes as colored meshes and point clouds.

Notable:
- Features live in a latent space, so colors come from decoded pictures taken all around. Each point of the
  surface blends the pictures in which it is visible. Pictures that look at it head-on weigh more.
- Parts that no picture shows, such as the underside of a car photographed from above, take the colors of the
  nearest visible points. Point clouds leave them out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from embreex import rtcore_scene
from embreex.mesh_construction import TriangleMesh
from jaxtyping import Bool, Float, Int, UInt16
from trimesh import PointCloud, Trimesh
from trimesh.exchange.gltf import export_glb
from trimesh.exchange.ply import export_ply

from latentscenes.core.cameras import Cameras, Viewpoint
from latentscenes.core.console import tracked
from latentscenes.core.errors import UserError
from latentscenes.core.files import check_place
from latentscenes.core.version import __version__
from latentscenes.export.sheets import save_file
from latentscenes.export.surface import REACHED, Surface, simplified, surface
from latentscenes.model.model import CHUNK, RenderedImages, render_images
from latentscenes.storage.scene_set import SceneSet

VIEWS = 48
"""Number of pictures that colors come from."""
GRAZING = 0.15
"""A picture does not color points where the cosine between normal and viewing direction is below this."""
SHARPNESS = 4
"""Pictures are blended with that cosine to this power as weights."""
OPAQUE = 0.95
"""Pixels of lower opacity do not color points, since too much background shines through."""
NEAREST = 32
"""A point that no picture shows takes the mean color of this many visible points nearby."""
LIFTED = 0.3
"""Height above the surface where rays to cameras start, in cells, so that they do not hit it at once."""


@dataclass(frozen=True)
class Triangles:
    """p vertices and f triangles; world units, z up."""

    vertices: Float[np.ndarray, "p 3"]
    faces: Int[np.ndarray, "f 3"]
    """Corners counter-clockwise, seen from outside."""
    normals: Float[np.ndarray, "p 3"]
    """Unit vectors outward, at the vertices."""


@dataclass(frozen=True)
class Mesh(Triangles):
    """Triangles with colors at their vertices."""

    colors: Float[np.ndarray, "p 3"]
    """sRGB in [0, 1]."""


@dataclass(frozen=True)
class Points:
    """n points of a surface; world units, z up."""

    positions: Float[np.ndarray, "n 3"]
    normals: Float[np.ndarray, "n 3"]
    """Unit vectors outward."""
    colors: Float[np.ndarray, "n 3"]
    """sRGB in [0, 1]."""


def scene_mesh(
    loaded: SceneSet,
    scene: str,
    view: Viewpoint,
    cells: int = 128,
    lowest: float = 0.0,
    faces: int | None = None,
) -> Mesh:
    """Extracts the closed surface of a scene, in color.

    Args:
        view: how the cameras of its dataset look at it; colors come from pictures taken in the same way.
        cells: number of cells along the longest side of the scene box. More cells give a finer surface.
        lowest: elevation in degrees of the lowest camera that colors come from. Use −90 for objects
            photographed from below too; for others, colors rendered from below are arbitrary.
        faces: most triangles; unset: as many as the cells give.

    Raises:
        UserError: the export extra is absent, nothing in the scene is solid, or no picture shows it.
    """
    shot = photographed(loaded, scene, view, cells, lowest, faces)
    from scipy.spatial import cKDTree  # comes with scikit-image, without which there is no surface

    vertices, normals = shot.surface.vertices, shot.surface.normals()
    colors, seen = shot.visible_colors(vertices, normals)
    tree = cKDTree(vertices[seen])
    colors[~seen] = colors_nearby(tree, colors[seen], vertices[~seen], shot.surface.step)
    return Mesh(vertices, shot.surface.faces, normals, colors)


def scene_points(
    loaded: SceneSet, scene: str, view: Viewpoint, count: int = 100_000, cells: int = 128, lowest: float = 0.0
) -> Points:
    """Samples `count` points, uniform over the part of the surface that pictures show. Other arguments and
    errors are as for `scene_mesh`."""
    if count < 1:
        raise UserError(f"--count {count}: at least 1.")
    shot = photographed(loaded, scene, view, cells, lowest)
    random, parts = np.random.default_rng(0), []
    while sum(len(part[0]) for part in parts) < count:
        positions, normals = sampled(shot.surface, count, random)
        colors, seen = shot.visible_colors(positions, normals)
        parts.append((positions[seen], normals[seen], colors[seen]))
    return Points(*(np.concatenate(values)[:count] for values in zip(*parts, strict=True)))


def sampled(
    found: Surface, count: int, random: np.random.Generator
) -> tuple[Float[np.ndarray, "n 3"], Float[np.ndarray, "n 3"]]:
    """Samples points uniformly over a surface's area. Returns positions and normals."""
    corners = found.vertices[found.faces]
    face, weights = random_places(corners, count, random)
    normals = (weights * found.normals()[found.faces[face]]).sum(1)
    length = np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)
    return (weights * corners[face]).sum(1), normals / length


def random_places(
    corners: Float[np.ndarray, "f 3 3"], count: int, random: np.random.Generator
) -> tuple[Int[np.ndarray, "n"], Float[np.ndarray, "n 3 1"]]:
    """Samples points uniformly over the area of triangles. Returns each point's triangle and the weights of
    its corners."""
    area = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
    face = random.choice(len(area), count, p=area / area.sum(dtype=np.float64))
    root, share = np.sqrt(random.random(count)), random.random(count)
    return face, np.stack([1 - root, root * (1 - share), root * share], -1)[..., None]


@dataclass(frozen=True)
class Photographed:
    """A scene's surface, and pictures of it from all around, which give it colors."""

    scene: str
    surface: Surface
    shown: RenderedImages
    cameras: Cameras

    def paint(
        self, points: Float[np.ndarray, "n 3"], normals: Float[np.ndarray, "n 3"]
    ) -> tuple[Float[np.ndarray, "n 3"], Bool[np.ndarray, "n"]]:
        """Returns the colors of points of the surface (sRGB in [0, 1], zero where no picture shows a point)
        and the mask of visible points. A point is visible in a picture if a ray from it reaches the camera
        without hitting the surface again and the picture is opaque there."""
        caster = rtcore_scene.EmbreeScene()
        TriangleMesh(caster, np.ascontiguousarray(self.surface.vertices[self.surface.faces], np.float32))
        total, weight = np.zeros((len(points), 3)), np.zeros(len(points))
        for view, eye in enumerate(self.cameras.positions.double().numpy()):
            toward = eye - points
            distance = np.linalg.norm(toward, axis=1)
            facing = (toward * normals).sum(1) / distance
            turned = np.flatnonzero(facing > GRAZING)
            start = points[turned] + LIFTED * self.surface.step * normals[turned]
            ray = toward[turned] / distance[turned, None]
            hits = caster.run(start.astype(np.float32), ray.astype(np.float32), output=True)
            free = turned[hits["tfar"] > distance[turned]]
            picture = torch.cat([self.shown.images[view], self.shown.opacity[view][None]])[None]
            flat = torch.tensor(points[free], dtype=torch.float32)
            at = 2 * self.cameras[view : view + 1].project(flat)[0][None] - 1
            read = torch.nn.functional.grid_sample(picture, at, align_corners=False)[0, :, 0].double().numpy()
            share = facing[free] ** SHARPNESS * (read[3] > OPAQUE)
            total[free] += share[:, None] * read[:3].T
            weight[free] += share
        return total / np.maximum(weight, 1e-12)[:, None], weight > 0

    def visible_colors(
        self, points: Float[np.ndarray, "n 3"], normals: Float[np.ndarray, "n 3"]
    ) -> tuple[Float[np.ndarray, "n 3"], Bool[np.ndarray, "n"]]:
        """As `paint`. Raises a UserError if no picture shows any of the points."""
        colors, seen = self.paint(points, normals)
        if not seen.any():
            raise UserError(
                f"{self.scene}: no picture shows its surface, so it has no colors. "
                "Check it with latentscenes render --mode opacity."
            )
        return colors, seen


def photographed(
    loaded: SceneSet,
    scene: str,
    view: Viewpoint,
    cells: int,
    lowest: float,
    faces: int | None = None,
    finer: int = 1,
    reached: float = REACHED,
) -> Photographed:
    """Extracts a scene's surface, with at most `faces` triangles, and renders pictures of it from all around.
    Pictures have `finer` times the pixels of the dataset's on each side. `reached` is as for `surface`."""
    if not -90 <= lowest < 90:
        raise UserError(f"--lowest {lowest:g}: an elevation in degrees, from -90 to below 90.")
    planes, cameras = loaded.planes(scene), view.dome(VIEWS, lowest)
    size = finer * view.size[0], finer * view.size[1]
    parts = list(torch.arange(VIEWS).split(CHUNK))
    some = [render_images(loaded.model, planes, cameras[part], size) for part in tracked(parts, "rendering")]
    names = ("images", "latents", "depth", "opacity")
    shown = RenderedImages(*(torch.cat([getattr(one, name) for one in some]) for name in names))
    found = surface(loaded.model, planes, shown, cameras, cells, reached, loaded.silhouettes(scene))
    return Photographed(scene, found if faces is None else simplified(found, faces), shown, cameras)


def colors_nearby(
    tree: Any, colors: Float[np.ndarray, "n 3"], points: Float[np.ndarray, "k 3"], step: float
) -> Float[np.ndarray, "k 3"]:
    """Returns for each point the mean color of the nearest of the n points of a cKDTree, weighted by the
    inverse of the distance; `step` is the least distance."""
    distance, nearest = tree.query(points, min(NEAREST, len(colors)))
    weights = 1 / np.maximum(distance.reshape(len(points), -1, 1), step)
    return (weights * colors[nearest.reshape(weights.shape[:2])]).sum(1) / weights.sum(1)


# Files

UNLIT = {
    "pbrMetallicRoughness": {"metallicFactor": 0.0, "roughnessFactor": 1.0},
    "extensions": {"KHR_materials_unlit": {}},
}
"""A glTF material that shows colors as they are, without shading."""


def write_glb(path: str | Path, mesh: Mesh, name: str = "", tags: Mapping[str, Any] | None = None) -> int:
    """Writes a mesh as binary glTF 2.0, y up, and returns the size in bytes. `tags` become `extras` of its
    node. trimesh writes colors in 8 bits and without a material, so 16-bit colors go in as an attribute that
    becomes COLOR_0 here."""

    def finish(tree: dict[str, Any]) -> None:
        (primitive,) = tree["meshes"][0]["primitives"]
        primitive["attributes"]["COLOR_0"] = color = primitive["attributes"].pop("_color")
        primitive["material"] = 0
        tree["accessors"][color]["normalized"] = True
        tree["meshes"][0]["name"] = name
        tree["asset"]["generator"] = f"latentscenes {__version__}"
        tree["extensionsUsed"] = list(UNLIT["extensions"])
        node = {"mesh": 0, "name": name} | ({"extras": dict(tags)} if tags else {})
        tree |= {"materials": [UNLIT], "nodes": [node], "scenes": [{"nodes": [0]}]}

    shape = Trimesh(y_up(mesh.vertices), mesh.faces, vertex_normals=y_up(mesh.normals), process=False)
    shape.vertex_attributes["color"] = _linear(mesh.colors)
    return save_file(path, export_glb(shape.scene(), include_normals=True, tree_postprocessor=finish))


def write_ply(path: str | Path, points: Points) -> int:
    """Writes points as binary little-endian PLY, z up: positions, normals, colors as bytes. Returns the size
    in bytes."""
    cloud = PointCloud(points.positions, np.round(255 * points.colors.clip(0, 1)).astype(np.uint8))
    cloud.vertex_normals = points.normals
    return save_file(path, export_ply(cloud, vertex_normal=True))


def y_up(vectors: Float[np.ndarray, "p 3"]) -> Float[np.ndarray, "p 3"]:
    x, y, z = vectors.T
    return np.stack([x, z, -y], 1)


def _linear(colors: Float[np.ndarray, "p 3"]) -> UInt16[np.ndarray, "p 4"]:
    """Converts sRGB values in [0, 1] to linear light (IEC 61966-2-1) and alpha, 16 bits each."""
    encoded = np.clip(colors, 0, 1)
    light = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    return np.round(65535 * np.pad(light, ((0, 0), (0, 1)), constant_values=1)).astype(np.uint16)


def check_ending(path: Path, *endings: str) -> None:
    """Refuses a file name with another ending than these, or a place that cannot be written to, before any
    work is done."""
    if path.suffix.lower() not in endings:
        kinds = " or ".join(ending[1:].upper() for ending in endings)
        raise UserError(
            f"{path}: this command writes {kinds}; name a file that ends in {' or '.join(endings)}."
        )
    if path.is_dir():
        raise UserError(f"{path}: this is a folder. Name a file.")
    check_place(path)
