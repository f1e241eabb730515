"""Shades imported furniture as the renderer of its icons does, so that both can be compared like for like.

Sweet Home 3D makes icons by Java3D, which is OpenGL's fixed light: sums of sRGB numbers, clipped at 1,
computed at the corners of triangles and interpolated between them. From its public source:
three white lamps of 0.9, one of 0.66 from below (since 2013), and an ambient light of 0.2; Ka, Kd, Ks and Ns
count, highlights only for illum 2 and more; Ke and Tr are not read; a texture is lit as a white material with
Ka 0.2; backs of faces are not drawn. Found by comparing: highlights are added after the texture.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from latentscenes.core.cameras import Cameras
from latentscenes.data.meshes import mtl, obj
from latentscenes.data.meshes.surfaces import Remarks, to_soup
from latentscenes.data.placing import rotation
from latentscenes.data.raycast import BLEND, OPAQUE, RayCaster, TriangleSoup
from latentscenes.data.shading import LIGHTS, to_srgb

LAMPS = (
    ((-1.732, -1.0, 0.8), 0.9), ((1.732, -1.0, 0.8), 0.9), ((0.0, 1.0, 0.8), 0.9), ((0.0, 0.0, -1.0), 0.66),
)  # fmt: skip
"""Directions toward the lamps, and their strengths; −y is the front and z is up."""
BEFORE_2013 = LAMPS[:3]
AMBIENT = 0.2


@dataclass(frozen=True)
class Shine:
    """What MTL says of a material's light and our import leaves out; the defaults are those of Java3D."""

    ambient: tuple[float, ...] = (0.2, 0.2, 0.2)
    specular: tuple[float, ...] = (1.0, 1.0, 1.0)
    exponent: float = 64.0
    lit: bool = True


def read(
    path: Path, turn: tuple[float, ...] | None, multiply: bool = False
) -> tuple[TriangleSoup, list[Shine]]:
    """Reads an OBJ file by the package's reader, and the light of the material of each triangle."""
    tables, faces, libraries = obj._parse(mtl.read_lines(path), path, Remarks())
    paints = mtl.read_materials(path, libraries, Remarks(), multiply)
    entries = dict(_entries(path, libraries))
    surfaces, shines = [], []
    for name, group in faces.items():
        if group.points:
            name = name if name in paints else name.rpartition("_")[0]
            parts = obj._surfaces(path, tables, group, paints.get(name, mtl.ObjMaterial()))
            surfaces += parts
            shines += [_shine(entries.get(name, {}))] * sum(len(part.corners) for part in parts)
    matrix = rotation("y", None, 0.0)
    if turn is not None:
        matrix = matrix @ np.array(turn).reshape(3, 3)
    return to_soup(path, surfaces, matrix), shines


def _entries(path: Path, libraries: list[str]) -> Iterator[tuple[str, dict[str, str]]]:
    for library in libraries:
        for name in (library, *library.split()):
            if file := mtl.find_beside(path, name):
                yield from mtl._statements(mtl.read_lines(file)).items()
                break


def _shine(entry: dict[str, str]) -> Shine:
    def color(key: str, default: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(mtl._color(entry, key, "", Remarks())) if entry.get(key) else default

    illumination = int((entry.get("illum") or "2").split()[0])
    if illumination < 2:
        return Shine(color("ka", Shine.ambient), (0.0, 0.0, 0.0), 1.0, illumination > 0)
    exponent = float((entry.get("ns") or "64").split()[0].replace(",", "."))
    return Shine(color("ka", Shine.ambient), color("ks", Shine.specular), min(max(exponent, 1.0), 128.0))


def shaded(
    soup: TriangleSoup, shines: list[Shine], view: Cameras, lamps: tuple = LAMPS
) -> tuple[TriangleSoup, np.ndarray]:
    """The object with light in its corner colors, as sRGB numbers, for one camera; and the highlights at its
    corners, which are added after texturing."""
    eye = -view.cam2world[0, :, 2].numpy()  # for highlights, the viewer counts as infinitely far
    textured = np.array([picture.shape[1] > 1 for picture in soup.textures])[soup.texture]
    kinds = list(dict.fromkeys(shines))
    kind = np.array([kinds.index(one) for one in shines])

    def each(values: list) -> np.ndarray:
        return np.array(values, np.float64)[kind]

    ambient, specular = (
        each([getattr(one, name) for one in kinds])[:, None] for name in ("ambient", "specular")
    )
    ambient = np.where(textured[:, None, None], Shine.ambient, ambient)
    exponent = each([one.exponent for one in kinds])[:, None]
    diffuse = np.where(textured[:, None, None], 1, to_srgb(soup.colors[..., :3].astype(np.float64)))
    light = AMBIENT * ambient + np.zeros_like(diffuse)
    shine = np.zeros_like(diffuse)
    for lamp, strength in lamps:
        toward = np.array(lamp) / np.linalg.norm(lamp)
        half = (toward + eye) / np.linalg.norm(toward + eye)
        facing = np.maximum(soup.normals @ toward, 0)
        glance = np.where(facing > 0, np.maximum(soup.normals @ half, 0), 0) ** exponent
        light += strength * diffuse * facing[..., None]
        shine += strength * specular * glance[..., None]
    light = np.where(each([one.lit for one in kinds]).astype(bool)[:, None, None], light, diffuse)
    colors = np.concatenate([np.clip(light, 0, 1), soup.colors[..., 3:]], -1).astype(np.float32)
    lit = replace(soup, colors=colors, linear=False, emission=None, lit=None)
    return lit, np.clip(shine, 0, 1).astype(np.float32)


class IconCaster(RayCaster):
    """Adds highlights to a soup whose corner colors hold the rest of the light."""

    def __init__(self, soup: TriangleSoup, shine: np.ndarray):
        super().__init__(soup, LIGHTS["flat"])
        self.shine = shine

    def _surface(self, face, u, v, across, toward):
        color, opacity = super()._surface(face, u, v, across, toward)
        weights = np.stack([1 - u - v, u, v], -1)[:, None]
        return np.minimum(color + (weights @ self.shine[face])[:, 0], 1), opacity


def icon_picture(
    soup: TriangleSoup, shines: list[Shine], view: Cameras, size: int, lamps: tuple = LAMPS
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the picture over white, and which share of each pixel shows anything, even if it is clear."""
    # Backs, of which some lie on the front of the next face, are taken out before rays meet them
    edges = soup.corners[:, 1:] - soup.corners[:, :1]
    eye = view.cam2world[0, :, 3].numpy()
    front = (np.cross(edges[:, 0], edges[:, 1]) * (eye - soup.corners[:, 0])).sum(-1) > 0
    soup, shines = soup.select(front), [shine for shine, seen in zip(shines, front) if seen]
    lit, shine = shaded(soup, shines, view, lamps)
    solid = replace(lit, cutoff=np.where(lit.cutoff == BLEND, np.float32(OPAQUE), lit.cutoff))
    casters = IconCaster(lit, shine), IconCaster(solid, shine)
    return casters[0].render(view, size, 2)[0][0], casters[1].render(view, size, 2)[1][0]
