"""Reads COLMAP reconstructions through pycolmap: photographs with their lenses and poses.

- COLMAP's poses are world-to-camera in OpenCV axes. Its first pixel has its corner at (0, 0), as here.
- COLMAP ignores the EXIF orientation, so this says which side of a photograph is up.
- pycolmap does the projection, so all its lens models except panoramas are supported.
"""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d, grid_sample

from latentscenes.core.cameras import Cameras
from latentscenes.core.errors import UserError
from latentscenes.core.names import counted
from latentscenes.core.reading import MOST_MODEL, require_regular
from latentscenes.data.images import image_orientation, image_size, open_image
from latentscenes.data.importing import is_leftover, subfolders
from latentscenes.data.splits import natural_key

PHOTOGRAPHS = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp"}
"""File endings of photographs."""
FEWEST = 10
"""Least number of photographs of an object."""
UNPLACED = (
    "Photographs that COLMAP cannot place overlap too little, are blurred, or show too little texture: take "
    "more, with a patterned cloth or newspaper under the object, and run COLMAP again. Or remove the "
    "photographs without a pose from images/."
)
PARTS = "cameras", "images"
"""Files of a model that are read."""
WIDEST = 3.0
"""Largest tangent of the angle from the optical axis; wider rectilinear images are mostly rim."""


class Lens:
    """Projection of directions into the photographs of one COLMAP camera."""

    def __init__(self, camera: Any, source: Path):
        """`camera`: a pycolmap.Camera. `source`: the model's folder, for messages."""
        self.camera = camera
        self.focal = float(camera.mean_focal_length()) / camera.width
        """As a fraction of the photograph's width."""
        steps = np.linspace(0, 1, 65)
        ends = np.zeros_like(steps), np.ones_like(steps)
        border = np.concatenate([np.stack(line, -1) for end in ends for line in ((steps, end), (end, steps))])
        rays = np.asarray(camera.cam_from_img(border * (camera.width, camera.height)))
        rays = rays[np.isfinite(rays).all(-1)]
        if not len(rays):
            raise UserError(
                f"{source}: the lens of camera {camera.camera_id} ({camera.model.name} "
                f"{camera.params.tolist()}) cannot be inverted at the photograph's border. Run COLMAP again "
                "with a simpler lens model, such as SIMPLE_RADIAL."
            )
        self.reach = float(min(np.hypot(*rays.T).max(), WIDEST))
        """Tangent of the largest angle from the optical axis that the photograph shows."""

    def project(self, toward: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 2"]:
        """Projects directions in camera axes to fractions (x, y) of the photograph; NaN if not shown.

        Distortion polynomials are not valid beyond the photograph's border and are not used there.
        """
        ahead = toward[:, 2] > 1e-9
        plane = toward / np.where(ahead, toward[:, 2], 1)[:, None]
        places = np.asarray(self.camera.img_from_cam(plane)) / (self.camera.width, self.camera.height)
        shown = ahead & (np.hypot(*plane[:, :2].T) <= self.reach) & ((places >= 0) & (places <= 1)).all(-1)
        return np.where(shown[:, None], places, np.nan)


@dataclass(frozen=True)
class Photograph:
    """One photograph with the pose that COLMAP found."""

    name: str
    """Its path inside images/, as in COLMAP."""
    file: Path
    lens: Lens
    rotation: Float[np.ndarray, "3 3"]
    """Camera-to-world, OpenCV axes, in COLMAP's world."""
    position: Float[np.ndarray, "3"]
    up: Float[np.ndarray, "3"]
    """Up in the upright photograph, in camera axes: one of ±x, ±y."""
    pixel_focal: float
    """Focal length in pixels of the file, which may be a reduced copy of COLMAP's."""


def read_photographs(folder: Path) -> tuple[list[Photograph], int]:
    """Reads the photographs in `folder` (images/ and sparse/) that have a pose, in natural order of names,
    and counts the files in images/ without one."""
    images = folder / "images"
    if not images.is_dir():
        raise UserError(f"{images}: no such folder. Each object's folder holds its photographs in images/.")
    source, model = _read_model(folder)
    for camera in model.cameras.values():
        if camera.model.name == "EQUIRECTANGULAR":
            raise UserError(
                f"{source}: camera {camera.camera_id} takes panoramas (EQUIRECTANGULAR): not supported."
            )
    lenses = {number: Lens(camera, source) for number, camera in model.cameras.items()}
    photographs = []
    for number in model.reg_image_ids():
        image = model.image(number)
        pose = image.cam_from_world().inverse()
        name = image.name.replace("\\", "/")  # COLMAP on Windows
        file = images / name
        if not file.is_file():
            raise UserError(
                f"{file}: no such photograph, but {source} lists it. Put it back; to leave a photograph "
                "out, give it an entirely black mask."
            )
        lens = lenses[image.camera_id]
        focal = lens.focal * _checked_width(file, lens)
        rotation, position = np.asarray(pose.rotation.matrix()), np.asarray(pose.translation)
        if not (np.isfinite(rotation).all() and np.isfinite(position).all()):
            raise UserError(f"{source}: the pose of {name} is not finite. Run COLMAP again.")
        photographs.append(Photograph(name, file, lens, rotation, position, _up(file), focal))
    files = (file for file in images.rglob("*") if not is_leftover(file.name))
    present = sum(file.suffix.lower() in PHOTOGRAPHS for file in files)
    if len(photographs) < max(FEWEST, present / 2):
        raise UserError(
            f"{source}: has {len(photographs)} of the {present} photographs in {images}; at least {FEWEST} "
            "and half of them are needed. "
            f"{UNPLACED if len(photographs) < present else 'Take more, and run COLMAP again.'}"
        )
    photographs.sort(key=lambda photograph: natural_key(photograph.name))
    return photographs, present - len(photographs)


def _read_model(folder: Path) -> tuple[Path, Any]:
    """Returns the folder of the capture's only model, and the pycolmap.Reconstruction."""
    try:
        import pycolmap
    except ImportError:
        raise UserError(
            "COLMAP models are read by pycolmap, which is not installed: pip install 'latentscenes[photos]'"
        ) from None
    files = [f"{name}{ending}" for name in PARTS for ending in (".bin", ".txt")]
    for sparse in (folder / "sparse", folder / "colmap" / "sparse"):
        entries = (sparse, *subfolders(sparse)) if sparse.is_dir() else ()
        found = [entry for entry in entries if any((entry / file).is_file() for file in files)]
        if found:
            break
    if not found:
        raise UserError(
            f"{folder / 'sparse'}: no COLMAP model here (cameras and images as .bin or .txt, usually in "
            f"sparse/0). Make one: colmap automatic_reconstructor --image_path {folder / 'images'} "
            f"--workspace_path {folder} --dense 0"
        )
    models = {}
    for source in found:
        try:
            models[source] = _open_model(source, pycolmap.Reconstruction)
        except UserError:
            raise
        except Exception as error:  # damaged files can raise anything
            raise UserError(
                f"{source}: no readable COLMAP model ({error}). Copy it again, or run COLMAP again; if it "
                "is newer, update pycolmap."
            ) from None
    if len(models) > 1:
        counts = {source.name: model.num_reg_images() for source, model in models.items()}
        sizes = ", ".join(f"{name} with {counted(count, 'photograph')}" for name, count in counts.items())
        raise UserError(
            f"{sparse}: holds {len(models)} models ({sizes}): COLMAP could not join the photographs. Keep "
            "only the right one; or add photographs that overlap both and run COLMAP again."
        )
    return next(iter(models.items()))


def _open_model(source: Path, opened: Callable[[str], Any]) -> Any:
    """Returns the pycolmap.Reconstruction in `source`, whose points, unused here, may be absent."""
    for file in source.iterdir():
        if file.suffix in (".bin", ".txt"):
            require_regular(file, MOST_MODEL)
    absent = {
        ending: [f"{name}{ending}" for name in PARTS if not (source / f"{name}{ending}").is_file()]
        for ending in (".bin", ".txt")
    }
    ending = min(absent, key=lambda ending: len(absent[ending]))
    if absent[ending]:
        ways = " or ".join(", ".join(files) for files in absent.values())
        raise UserError(
            f"{source}: {ways} is absent. COLMAP's cameras and images must both be .bin or both .txt; copy "
            "the missing file, or write the model again: colmap model_converter"
        )
    points = source / f"points3D{ending}"
    if points.is_file() and (ending == ".txt" or points.stat().st_size >= 8):  # with a count in it
        return opened(str(source))
    with tempfile.TemporaryDirectory() as copy:
        for file in source.glob(f"*{ending}"):
            shutil.copy(file, copy)
        (Path(copy) / points.name).write_bytes(bytes(8) if ending == ".bin" else b"")
        try:
            return opened(copy)
        except Exception as error:
            raise ValueError(str(error).replace(copy, str(source))) from None


def _checked_width(file: Path, lens: Lens) -> int:
    """Returns the width in pixels. Refuses a shape that differs from COLMAP's by more than rounding."""
    (height, width), (seen_height, seen_width) = image_size(file), (lens.camera.height, lens.camera.width)
    if abs(width * seen_height - height * seen_width) > max(seen_height, seen_width):
        raise UserError(
            f"{file}: is {width}x{height} (width x height), but COLMAP saw {seen_width}x{seen_height}, "
            "another shape. Put the photographs that COLMAP saw into images/, neither cropped nor turned."
        )
    return width


def _up(file: Path) -> Float[np.ndarray, "3"]:
    """Returns up in camera axes from the photograph's EXIF orientation (tag 274)."""
    with open_image(file) as image:
        orientation = image_orientation(image)
    side = {3: (0, 1), 4: (0, 1), 5: (-1, 0), 6: (-1, 0), 7: (1, 0), 8: (1, 0)}.get(orientation, (0, -1))
    return np.array([*side, 0.0])


# Undistortion


SAMPLES = 4
"""Each pixel averages SAMPLES² samples of the photograph, which is first reduced until they are dense."""
Layer = tuple[Image.Image, int]
"""An image of the photograph's shape, and the value outside of it."""


def resample(
    photograph: Photograph, layers: list[Layer], rotation: Float[np.ndarray, "3 3"], focal: float, size: int
) -> UInt8[np.ndarray, "size size c"]:
    """Resamples a photograph as a pinhole camera at its position would take it.

    Args:
        photograph: its lens and pose.
        layers: images such as the photograph and its mask, whose channels are stacked in the result.
        rotation: of the pinhole camera, camera-to-world, OpenCV axes, in COLMAP's world.
        focal: of the pinhole camera, as a fraction of the image's side; the principal point is the center.
        size: pixels along each side.
    """
    turned = np.concatenate([photograph.rotation.T @ rotation, np.zeros((3, 1))], 1)
    pinhole = Cameras.from_matrices(turned[None], focal)
    fine = size * SAMPLES
    places = photograph.lens.project(pinhole.rays(fine, fine)[1][0].double().numpy()).reshape(fine, fine, 2)
    shown = ~np.isnan(places[..., 0])
    if not shown.any():
        channels = [value for layer, value in layers for _ in layer.getbands()]
        return np.tile(np.array(channels, np.uint8), (size, size, 1))
    extent = places[shown].min(0), places[shown].max(0)
    factor = max(1, int(photograph.pixel_focal / (focal * size) / 2))
    planes = [_sampled(layer, places, extent, value, factor) for layer, value in layers]
    return torch.cat(planes).add(0.5).clamp(0, 255).byte().permute(1, 2, 0).numpy()


def _sampled(
    layer: Image.Image,
    places: Float[np.ndarray, "n n 2"],
    extent: tuple[Float[np.ndarray, "2"], Float[np.ndarray, "2"]],
    outside: int,
    factor: int,
) -> Float[Tensor, "c size size"]:
    """Samples the layer at `places` (fractions of it, within `extent`; NaN outside) and averages blocks. The
    layer is first reduced by `factor`."""
    first = np.floor(extent[0] * layer.size - factor).clip(0).astype(int)
    last = np.ceil(extent[1] * layer.size + factor).clip(None, layer.size).astype(int)
    reduced = layer.reduce(factor, (*first.tolist(), *last.tolist()))
    grid = torch.from_numpy(2 * (places * layer.size - first) / factor / reduced.size - 1).float()
    picture = torch.from_numpy(np.atleast_3d(np.asarray(reduced)).copy()).permute(2, 0, 1).float()
    values = grid_sample(picture[None], grid.nan_to_num(0)[None], padding_mode="border", align_corners=False)
    return avg_pool2d(torch.where(grid[..., 0].isnan(), float(outside), values), SAMPLES)[0]
