"""Photographs taken again, as a pinhole camera at the same place would have: turned, cropped and without distortion.

Turning a camera about its centre changes no parallax, so any part of a photograph can be shown as a square picture whose
optical axis goes through its middle. Pixels are averages, not single samples.
"""

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d, grid_sample

from latentscenes.core.cameras import Cameras
from latentscenes.data.photos.colmap import Photograph

SAMPLES = 4
"""SAMPLES² places of the photograph are averaged into each pixel; it is first reduced until they lie dense enough."""
Layer = tuple[Image.Image, int]
"""A picture of the photograph's shape, and the value of what lies outside of it."""


def retake(
    photograph: Photograph, layers: list[Layer], rotation: Float[np.ndarray, "3 3"], focal: float, size: int
) -> UInt8[np.ndarray, "size size c"]:
    """What a pinhole camera sees at the photograph's place.

    Args:
        photograph: its lens and pose.
        layers: the photograph, its mask; their channels follow each other in the result.
        rotation: the pinhole camera's, camera-to-world, OpenCV axes, in COLMAP's world.
        focal: its focal length as a fraction of the picture's side; it looks through the picture's middle.
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
    """The layer at `places` (fractions of it, within `extent`; NaN outside), averaged over blocks; the layer is first
    reduced by `factor`."""
    first = np.floor(extent[0] * layer.size - factor).clip(0).astype(int)
    last = np.ceil(extent[1] * layer.size + factor).clip(None, layer.size).astype(int)
    reduced = layer.reduce(factor, (*first.tolist(), *last.tolist()))
    grid = torch.from_numpy(2 * (places * layer.size - first) / factor / reduced.size - 1).float()
    picture = torch.from_numpy(np.atleast_3d(np.asarray(reduced)).copy()).permute(2, 0, 1).float()
    values = grid_sample(picture[None], grid.nan_to_num(0)[None], padding_mode="border", align_corners=False)
    return avg_pool2d(torch.where(grid[..., 0].isnan(), float(outside), values), SAMPLES)[0]
