"""Measures exported meshes in pictures: the file is read back by `data meshes` and rendered by ray casting
from the cameras of held-out views, in flat light. Run:

    python -m benchmarks.export_quality --run libraries/cars --data data/cars

Notable:
- Three exports of each scene are compared: vertex colors, vertex colors of finer cells, and a texture.
- The importer centers and scales what it reads; the cameras are moved in the same way.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import process_time

import numpy as np
import torch
from jaxtyping import Float, UInt8

from latentscenes.cli.common import MACHINE, MachineOptions, run_program, set_up
from latentscenes.core.cameras import Cameras
from latentscenes.core.errors import UserError
from latentscenes.data.dataset import PosedImages, Scene
from latentscenes.data.meshes.importer import read_mesh
from latentscenes.data.raycast import RayCaster
from latentscenes.data.shading import LIGHTS
from latentscenes.export.mesh import scene_mesh, write_glb
from latentscenes.export.mesh_files import write_textured
from latentscenes.export.texture import CELLS, textured_mesh
from latentscenes.model.model import render_images, to_uint8
from latentscenes.storage.scene_set import SceneSet


@dataclass(frozen=True)
class Scored:
    """Of one export of one scene."""

    truth: float
    """Mean PSNR against held-out pictures, dB."""
    own: float
    """Mean PSNR against the scene's own renders from the same cameras, dB."""
    triangles: int
    bytes: int
    seconds: float
    """CPU seconds of the export."""


def pictures_of(
    file: Path, vertices: Float[np.ndarray, "p 3"], cameras: Cameras, size: tuple[int, int]
) -> tuple[UInt8[np.ndarray, "v H W 3"], int]:
    """Reads a mesh file as `data meshes` does and renders it over white, in its own colors. Returns pictures
    and the number of triangles.

    Args:
        vertices: the exported vertices, in the world of the cameras; the importer moves their bounding box.
    """
    soup, _ = read_mesh(file)
    low, high = vertices.min(0), vertices.max(0)
    scale = 1 / float(np.linalg.norm(high - low))
    moved = cameras.placed(None, scale, tuple((-scale * (low + high) / 2).tolist()))
    return RayCaster(soup, LIGHTS["flat"]).render(moved, size[0])[0], len(soup)


def mean_psnr(shown: UInt8[np.ndarray, "v H W 3"], truth: UInt8[np.ndarray, "v H W 3"]) -> float:
    error = ((shown.astype(float) - truth) ** 2).mean((1, 2, 3)) / 255**2
    return float((-10 * np.log10(np.maximum(error, 1e-10))).mean())


def score(learned: SceneSet, dataset: PosedImages, scene: Scene, folder: Path) -> dict[str, Scored]:
    """Exports a scene in three ways and compares their pictures with held-out views."""
    chosen = torch.tensor(scene.views("held_out"))
    cameras, truth = dataset.cameras[chosen], dataset.rgb[chosen.numpy()]
    planes, view, name = learned.planes(scene.name), learned.view_of(scene.name), scene.name
    own = to_uint8(render_images(learned.model, planes, cameras, dataset.size).images)
    found, file = {}, folder / "mesh.glb"
    kinds = {
        "vertex colors": lambda: scene_mesh(learned, name, view),
        f"vertex colors, {CELLS} cells": lambda: scene_mesh(learned, name, view, CELLS),
        "texture": lambda: textured_mesh(learned, name, view),
    }
    for kind, export in kinds.items():
        began = process_time()
        mesh = export()
        size = (write_textured if kind == "texture" else write_glb)(file, mesh)
        seconds = process_time() - began
        shown, triangles = pictures_of(file, mesh.vertices, cameras, dataset.size)
        found[kind] = Scored(mean_psnr(shown, truth), mean_psnr(shown, own), triangles, size, seconds)
    found["the scene itself"] = Scored(mean_psnr(own, truth), float("inf"), 0, 0, 0.0)
    return found


def main(run: Path, data: Path, limit: int = 6, machine: MachineOptions = MACHINE) -> None:
    """Print a table of exported meshes: PSNR of their pictures, triangles, bytes and CPU seconds.

    Args:
        run: library, or run folder of train.
        data: dataset with held-out views of its scenes.
        limit: number of scenes.
    """
    learned, dataset = SceneSet.open_all(run, set_up(machine)), PosedImages.open(data)
    scenes = [scene for scene in dataset.scenes if scene.name in learned.names][:limit]
    if not scenes or not all(scene.views("held_out") for scene in scenes):
        raise UserError(f"{data}: holds no scene of {run} with held-out views.")
    with tempfile.TemporaryDirectory() as folder:
        found = [score(learned, dataset, scene, Path(folder)) for scene in scenes]
    print(
        "| export | PSNR, held-out views | PSNR, own renders | triangles | MiB | CPU s |\n"
        "|---|---:|---:|---:|---:|---:|"
    )
    for kind in found[0]:
        rows = [of_scene[kind] for of_scene in found]
        truth, own, triangles, size, seconds = (
            float(np.mean([getattr(row, part) for row in rows])) for part in Scored.__annotations__
        )
        print(f"| {kind} | {truth:.2f} | {own:.2f} | {triangles:.0f} | {size / 2**20:.2f} | {seconds:.1f} |")


if __name__ == "__main__":
    run_program(main)
