"""How far an exported mesh lies from the one that its scene was photographed from.

Notable:
- Compared is what cameras see: photographs tell nothing about seats behind dark windows or about a car's floor.
- Distances are between random points, uniform over each surface's area: Chamfer distance, in both directions.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float

from latentscenes.cameras import Cameras
from latentscenes.datasets.embree import Caster, Soup, soup_from_mesh
from latentscenes.datasets.meshes import read_mesh
from latentscenes.errors import UserError
from latentscenes.export_mesh import Mesh, random_places

DENSE, TESTED = 400_000, 50_000
"""Points that stand for a whole surface, and points whose distance to it is taken."""
CLEAR = 2e-3
"""A point is seen if nothing is in the way from so far before it, world units (the source's diagonal is 1)."""


@dataclass(frozen=True)
class Distances:
    """Means, as fractions of the source's longest side."""

    to_source: float
    """From the exported surface to the source."""
    to_export: float
    """From the source to the exported surface."""
    hidden: float
    """Share of the source's area that no camera sees, which is left out."""

    @property
    def chamfer(self) -> float:
        return (self.to_source + self.to_export) / 2


def compare(mesh: Mesh, source: str | Path, cameras: Cameras) -> Distances:
    """A mesh beside the file that `data meshes` photographed, brought to the same place and size as there.

    Raises:
        UserError: the file cannot be read, or cameras see nothing of one of both.
    """
    original, _ = read_mesh(Path(source))
    exported = soup_from_mesh(mesh.vertices, mesh.faces)
    (ours, ours_seen), (theirs, theirs_seen) = (_seen_points(soup, cameras) for soup in (exported, original))
    for seen, what in ((ours_seen, "the exported mesh"), (theirs_seen, source)):
        if not seen.any():
            raise UserError(f"{what}: no camera sees it, so there is nothing to compare.")
    length = float((original.bounds[1] - original.bounds[0]).max())
    return Distances(_mean_distance(ours[:TESTED][ours_seen], theirs) / length, _mean_distance(theirs[:TESTED][theirs_seen], ours) / length, 1 - float(theirs_seen.mean()))


def _seen_points(soup: Soup, cameras: Cameras) -> tuple[Float[np.ndarray, "d 3"], Bool[np.ndarray, "n"]]:
    """Points all over a surface, and which of the first n some camera sees."""
    face, weights = random_places(soup.corners, DENSE, np.random.default_rng(0))
    points = (weights * soup.corners[face]).sum(1).astype(np.float32)
    caster, seen = Caster(soup), np.zeros(TESTED, bool)
    for eye in cameras.positions.numpy():
        left = np.flatnonzero(~seen)
        toward = eye - points[left]
        distance = np.linalg.norm(toward, axis=1, keepdims=True)
        toward /= distance
        seen[left] = ~caster.reached(points[left] + np.float32(CLEAR) * toward, toward, float(distance.max()))
    return points, seen


def _mean_distance(points: Float[np.ndarray, "n 3"], to: Float[np.ndarray, "d 3"]) -> float:
    from scipy.spatial import cKDTree

    return float(cKDTree(to).query(points)[0].mean())
