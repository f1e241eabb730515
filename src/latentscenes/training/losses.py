"""The objective: a weighted sum of mean squared errors. x are images, E and D the codec, z̃ rendered latents.

    latent        ‖E(x) − z̃‖²            both normalized
    color         ‖x↓ − z̃_rgb‖²           the first 3 channels, where they are colors
    rgb           ‖x − D(z̃)‖²
    autoencoder   ‖x − D(E(x))‖²
    equivariance  ‖τ(x) − D(τ(E(x)))‖²    τ: a random rotation, zoom and mirror of the image plane
    preview       ‖x↓ − ỹ‖²               ỹ: low-resolution RGB, rendered beside the latents
    tv, depth_tv                          squared differences of neighboring texels or depths
    edges                                 absolute error of neighbor differences, of all decoded images

Source: 3Da-AE (arXiv 2403.11678, section 3); equivariance after EQ-VAE (arXiv 2502.09509). Terms without
weight are not computed.
"""

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from latentscenes.core.cameras import Cameras
from latentscenes.core.config import LossWeights
from latentscenes.core.runtime import Numbers, uniform
from latentscenes.model.codec import COLORS
from latentscenes.model.model import LatentView, Model
from latentscenes.rendering.field import FusedPlanes
from latentscenes.rendering.kernels import native

if TYPE_CHECKING:
    from latentscenes.training.corrections import Corrected


@dataclass
class Batch:
    """v views of s scenes, equally many of each, scene by scene."""

    scenes: Int[Tensor, "s"]
    """Rows in the scene parameters."""
    cameras: Cameras
    background: Float[Tensor, "c h w"]
    images: Float[Tensor, "v 3 H W"] | None
    """In [0, 1], whole or cropped. None if no term needs images."""
    latents: Float[Tensor, "v p c"] | None
    """Normalized, of the rays' pixels. None if the encoder learns or no term needs latents."""
    pixels: Int[Tensor, "v p"] | None
    """Pixels of the background whose rays are rendered. None: all."""
    grid: tuple[int, int] | None = None
    """Rows and columns of the crop that the rays of a view form. None: whole views, or scattered rays."""
    colors: Float[Tensor, "v p 3"] | None = None
    """Target of rendered colors, 2 · color − 1, where rays are scattered. None: `images`, as coarse as the
    grid."""
    views: Int[Tensor, "v"] | None = None
    """Ranks of the views among all fitted views: their rows in the error map and in the corrections."""
    cells: Int[Tensor, "v p"] | None = None
    """Cells of that map that the pixels lie in."""
    behind: Float[Tensor, "v p c"] | None = None
    """Latents behind each ray, which `latents` show too. None: those of `background`."""
    occupied: UInt8[Tensor, "s n n n"] | None = None
    """Cells of the scenes' boxes inside of which rays sample (`hulls`). None: all."""
    corrected: "Corrected | None" = None
    """Corrections of the views, if they have any. The cameras are corrected already."""
    share: float = 1.0
    """These views as a part of the step's, if several processes share its scenes."""


def needs_images(weights: LossWeights) -> bool:
    return any((weights.rgb, weights.autoencoder, weights.equivariance, weights.preview))


def needs_render(weights: LossWeights) -> bool:
    return any((weights.latent, weights.color, weights.rgb, weights.depth_tv, weights.preview))


def terms(
    model: Model, planes: FusedPlanes | None, batch: Batch, weights: LossWeights, generator: Numbers
) -> tuple[dict[str, Tensor], Float[Tensor, "v p"] | None]:
    """Computes every term that has a weight. Returns unweighted terms by their names in LossWeights, and the
    mean squared error of each ray in the last of the terms latent, color and rgb. Planes may be None if no
    term needs a render."""
    found: dict[str, Tensor] = {}
    errors = None
    decoded: list[Tensor] = []
    images, encoded, cached = batch.images, None, batch.latents

    # Encode
    if weights.autoencoder or weights.equivariance or weights.latent and cached is None:
        raw = model.codec.encode(images)
        if raw.requires_grad:  # a frozen codec's normalizer stays as it is
            model.normalizer.update(raw.detach())
        encoded = model.normalizer.normalize(raw)

    # Codec alone
    if weights.autoencoder:
        decoded.append(model.decode(encoded))
        found["autoencoder"] = mean_square(decoded[-1] - images)
    if weights.equivariance:
        latents, target = transform_alike(encoded, images, generator)
        found["equivariance"] = mean_square(model.decode(latents) - target)

    # Renders against their targets
    if needs_render(weights):
        view = _rendered(model, planes._replace(occupied=batch.occupied), batch, generator)
        grid = batch.grid or tuple(batch.background.shape[1:])
        pixels = None if batch.grid else batch.pixels  # images are cropped as the grid is
        if weights.latent:
            target = at_pixels(encoded, pixels) if cached is None else cached
            errors = (view.latents - target).square().mean(-1)
            found["latent"] = errors.mean()
        if weights.color:
            target = at_pixels(_coarser(images, grid)) if batch.colors is None else batch.colors
            errors = (view.latents[..., :COLORS] - target).square().mean(-1)
            found["color"] = errors.mean()
        if batch.corrected is not None and (weights.latent or weights.color):
            batch.corrected.compare(target)
        if weights.rgb:
            decoded.append(model.decode(view.image(*grid)))
            squares = (decoded[-1] - images).square()
            errors = at_pixels(nn.functional.interpolate(squares.detach(), size=grid, mode="area")).mean(-1)
            found["rgb"] = squares.mean()
        if weights.preview:
            found["preview"] = mean_square(view.preview - at_pixels(_coarser(images, grid), pixels))
        if weights.depth_tv:
            depth = view.depth.unflatten(1, grid)
            found["depth_tv"] = mean_square(depth.diff(dim=1)) + mean_square(depth.diff(dim=2))

    # Edges and smoothness
    if weights.edges and decoded:
        found["edges"] = sum(edge_error(image, images) for image in decoded)
    if weights.tv:
        part = planes.texels if planes.own is None else planes.own
        found["tv"] = total_variation(part) * (part.shape[-1] / planes.texels.shape[-1])
    return found, errors if errors is None else errors.detach()


def _rendered(model: Model, planes: FusedPlanes, batch: Batch, generator: Numbers) -> LatentView:
    """Renders a batch, with the corrections of its views if they have any."""
    corrected = batch.corrected
    free = corrected is not None and corrected.moves
    view = model.render(planes, batch.cameras, batch.background, generator, batch.pixels, batch.behind, free)
    return view if corrected is None else corrected.recolored(view, batch)


def _coarser(images: Float[Tensor, "v 3 H W"], size: tuple[int, int]) -> Float[Tensor, "v 3 h w"]:
    """Returns 2 · color − 1 of images at another size, each pixel the mean of its area."""
    return 2 * nn.functional.interpolate(images, size=size, mode="area") - 1


def at_pixels(
    image: Float[Tensor, "v c h w"], pixels: Int[Tensor, "v p"] | None = None
) -> Float[Tensor, "v p c"]:
    """Returns the values at some pixels (row · w + column) of each view, or at all, row by row."""
    flat = image.flatten(2).transpose(1, 2)
    return flat if pixels is None else flat.gather(1, pixels[..., None].expand(-1, -1, flat.shape[2]))


def total(found: dict[str, Tensor], weights: LossWeights) -> Tensor:
    """Returns Σ weight · term."""
    names = [entry.name for entry in fields(weights) if entry.name in found]
    return sum(getattr(weights, name) * found[name] for name in names)


def mean_square(difference: Tensor) -> Tensor:
    return difference.square().mean()


def total_variation(planes: Float[Tensor, "s 3 r r f"]) -> Float[Tensor, ""]:
    """Returns the mean squared difference of neighboring texels, rows plus columns."""
    if planes.shape[2] > 1 and native.serves(planes):
        return native.total_variation(planes)
    return total_variation_in_torch(planes)


def total_variation_in_torch(planes: Float[Tensor, "s 3 r r f"]) -> Float[Tensor, ""]:
    """Computes `total_variation` in plain torch."""
    return mean_square(planes.diff(dim=2)) + mean_square(planes.diff(dim=3))


def edge_error(a: Float[Tensor, "v 3 H W"], b: Float[Tensor, "v 3 H W"]) -> Float[Tensor, ""]:
    """Returns the mean absolute error of neighbor differences, which penalizes blur more than squares do."""
    difference = a - b
    return difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean()


def transform_alike(
    latents: Float[Tensor, "v c h w"], images: Float[Tensor, "v 3 H W"], generator: Numbers
) -> tuple[Float[Tensor, "v c h w"], Float[Tensor, "v 3 H W"]]:
    """Applies the same random rotation, zoom (0.75 to 1.33) and mirroring to both. Borders are repeated."""
    count, device = len(images), images.device
    angle, zoom, mirror = uniform(generator, 3, count, axis=1, device=device)
    angle, zoom = 2 * math.pi * angle, 0.75 * (4 / 3 / 0.75) ** zoom
    flip = torch.where(mirror < 0.5, -1.0, 1.0)
    affine = torch.zeros(count, 2, 3, device=device)
    affine[:, 0, 0], affine[:, 0, 1] = flip * angle.cos() / zoom, -angle.sin() / zoom
    affine[:, 1, 0], affine[:, 1, 1] = flip * angle.sin() / zoom, angle.cos() / zoom

    def moved(image: Tensor) -> Tensor:
        grid = nn.functional.affine_grid(affine, list(image.shape), align_corners=False)
        return nn.functional.grid_sample(
            image, grid, mode="bilinear", padding_mode="border", align_corners=False
        )

    return moved(latents), moved(images)
