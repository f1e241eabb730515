"""Measures the distance between an exported mesh and the mesh that its scene was rendered from. Run:

    python -m benchmarks.mesh_error --run libraries/cars --scene car_7 --source car_7.glb

Notable:
- Only parts that cameras see are compared, since photographs do not show, for instance, a car's floor.
- The distance is the Chamfer distance between random points, uniform over each surface's area.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float

from latentscenes.cli.common import MACHINE, MachineOptions, run_program, set_up
from latentscenes.core.cameras import Cameras
from latentscenes.core.errors import UserError
from latentscenes.data.meshes.importer import read_mesh
from latentscenes.data.raycast import RayCaster, TriangleSoup, soup_from_mesh
from latentscenes.export.mesh import VIEWS, Mesh, random_places, scene_mesh
from latentscenes.storage.scene_set import SceneSet

DENSE, TESTED = 400_000, 50_000
"""Numbers of points that represent a surface, and of points whose distance to it is measured."""
CLEAR = 2e-3
"""Distance in front of a point where rays to cameras start, world units (the source's diagonal is 1)."""


@dataclass(frozen=True)
class Distances:
    """Means, as fractions of the source's longest side."""

    to_source: float
    """From the exported surface to the source."""
    to_export: float
    """From the source to the exported surface."""
    hidden: float
    """Share of the source's area that no camera sees and that is left out."""

    @property
    def chamfer(self) -> float:
        return (self.to_source + self.to_export) / 2


def compare(mesh: Mesh, source: str | Path, cameras: Cameras) -> Distances:
    """Compares a mesh with the file that `data meshes` rendered, moved and scaled as that command does.

    Raises:
        UserError: the file cannot be read, or cameras see nothing of one of the two meshes.
    """
    original, _ = read_mesh(Path(source))
    exported = soup_from_mesh(mesh.vertices, mesh.faces)
    (ours, ours_seen), (theirs, theirs_seen) = (_seen_points(soup, cameras) for soup in (exported, original))
    for seen, name in ((ours_seen, "the exported mesh"), (theirs_seen, source)):
        if not seen.any():
            raise UserError(f"{name}: no camera sees it, so there is nothing to compare.")
    length = float((original.bounds[1] - original.bounds[0]).max())
    return Distances(
        _mean_distance(ours[:TESTED][ours_seen], theirs) / length,
        _mean_distance(theirs[:TESTED][theirs_seen], ours) / length,
        1 - float(theirs_seen.mean()),
    )


def _seen_points(
    soup: TriangleSoup, cameras: Cameras
) -> tuple[Float[np.ndarray, "d 3"], Bool[np.ndarray, "n"]]:
    """Samples points on a surface. Also returns the mask of the first n points that a camera sees."""
    face, weights = random_places(soup.corners, DENSE, np.random.default_rng(0))
    points = (weights * soup.corners[face]).sum(1).astype(np.float32)
    caster, seen = RayCaster(soup), np.zeros(TESTED, bool)
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


def main(
    run: Path,
    scene: str,
    source: Path,
    cells: int = 128,
    lowest: float = 0.0,
    machine: MachineOptions = MACHINE,
) -> None:
    """Export a scene's mesh and print its Chamfer distance to the mesh that `data meshes` rendered.

    Args:
        run: library, or run folder of train.
        scene: name of the scene.
        source: the mesh file.
        cells: number of cells along the longest side of the scene box.
        lowest: elevation in degrees of the lowest camera that colors come from.
    """
    if not source.is_file():
        raise UserError(f"{source}: no such file. Name the mesh that `data meshes` rendered.")
    learned = SceneSet.open_all(run, set_up(machine))
    learned.check(scene)
    mesh = scene_mesh(learned, scene, learned.view, cells, lowest)
    apart = compare(mesh, source, learned.view.dome(VIEWS, lowest))
    print(
        f"{scene}: Chamfer distance {apart.chamfer:.2%} of its length, {apart.to_source:.2%} from the mesh "
        f"to the source, {apart.to_export:.2%} back; cameras do not see {apart.hidden:.0%} of the source."
    )


if __name__ == "__main__":
    run_program(main)
