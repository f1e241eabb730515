"""The objective: a weighted sum of mean squared errors between what is rendered, encoded, decoded and seen.

    latent        ‖E(x) − z̃‖²            rendered latents z̃ against encoded ones (normalized)
    rgb           ‖x − D(z̃)‖²
    autoencoder   ‖x − D(E(x))‖²
    equivariance  ‖τ(x) − D(τ(E(x)))‖²    τ: a random rotation, zoom and mirror of the image plane
    preview       ‖x↓ − ỹ‖²               low-resolution RGB beside the latent
    tv, depth_tv                          squared differences of neighbors

Source: 3Da-AE (arXiv 2403.11678, section 3); equivariance after EQ-VAE (arXiv 2502.09509). Only what a stage weighs
is computed.
"""

import math
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from latentscenes.core.cameras import Cameras
from latentscenes.core.config import LossWeights
from latentscenes.model.model import Model
from latentscenes.rendering.field import FusedPlanes
from latentscenes.rendering.kernels import native


@dataclass
class Batch:
    """v views of s scenes, equally many of each, scene by scene."""

    scenes: Int[Tensor, "s"]
    """Rows of the scenes."""
    cameras: Cameras
    background: Float[Tensor, "c h w"]
    images: Float[Tensor, "v 3 H W"] | None
    """In [0, 1]; absent where no loss looks at pixels."""
    latents: Float[Tensor, "v p c"] | None
    """Normalized, of the rays' pixels; absent where the encoder learns, or no loss looks at them."""
    pixels: Int[Tensor, "v p"] | None
    """Latent pixels whose rays are rendered; all where absent."""
    views: Int[Tensor, "v"] | None = None
    cells: Int[Tensor, "v p"] | None = None
    """Places of the views in the source's memory of errors, and the cells that pixels lie in; absent where rays are drawn
    uniformly."""


def needs_images(weights: LossWeights) -> bool:
    return any((weights.rgb, weights.autoencoder, weights.equivariance, weights.preview))


def needs_render(weights: LossWeights) -> bool:
    return any((weights.latent, weights.rgb, weights.depth_tv, weights.preview))


def terms(
    model: Model, planes: FusedPlanes | None, batch: Batch, weights: LossWeights, generator: torch.Generator
) -> tuple[dict[str, Tensor], Float[Tensor, "v p"] | None]:
    """Computes every term that has a weight, unweighted, by its name in LossWeights. Also returns the mean squared error
    of each ray where the latent term is among them. Planes may be None where no term renders."""
    found: dict[str, Tensor] = {}
    errors = None
    decoded: list[Tensor] = []
    images, encoded, cached = batch.images, None, batch.latents
    if weights.autoencoder or weights.equivariance or weights.latent and cached is None:
        raw = model.codec.encode(images)
        if raw.requires_grad:  # a frozen codec's normalizer stays as it is
            model.normalizer.update(raw.detach())
        encoded = model.normalizer.normalize(raw)

    if weights.autoencoder:
        decoded.append(model.decode(encoded))
        found["autoencoder"] = mean_square(decoded[-1] - images)
    if weights.equivariance:
        latents, target = transform_alike(encoded, images, generator)
        found["equivariance"] = mean_square(model.decode(latents) - target)

    if needs_render(weights):
        view = model.render(planes, batch.cameras, batch.background, generator, batch.pixels)
        height, width = batch.background.shape[1:]
        if weights.latent:
            target = at_pixels(encoded, batch.pixels) if cached is None else cached
            errors = (view.latents - target).square().mean(-1)
            found["latent"] = errors.mean()
        if weights.rgb:
            decoded.append(model.decode(view.image(height, width)))
            found["rgb"] = mean_square(decoded[-1] - images)
        if weights.preview:
            small = nn.functional.interpolate(images, size=(height, width), mode="area")
            found["preview"] = mean_square(view.preview - at_pixels(2 * small - 1, batch.pixels))
        if weights.depth_tv:
            depth = view.depth.unflatten(1, (height, width))
            found["depth_tv"] = mean_square(depth.diff(dim=1)) + mean_square(depth.diff(dim=2))
    if weights.edges and decoded:
        found["edges"] = sum(edge_error(image, images) for image in decoded)
    if weights.tv:
        part = planes.texels if planes.own is None else planes.own
        found["tv"] = total_variation(part) * (part.shape[-1] / planes.texels.shape[-1])
    return found, errors if errors is None else errors.detach()


def at_pixels(
    image: Float[Tensor, "v c h w"], pixels: Int[Tensor, "v p"] | None = None
) -> Float[Tensor, "v p c"]:
    """An image's values at some pixels (row · w + column) of each view; all, row by row, without."""
    flat = image.flatten(2).transpose(1, 2)
    return flat if pixels is None else flat.gather(1, pixels[..., None].expand(-1, -1, flat.shape[2]))


def total(found: dict[str, Tensor], weights: LossWeights) -> Tensor:
    """Σ λ · term."""
    return sum(
        getattr(weights, entry.name) * found[entry.name] for entry in fields(weights) if entry.name in found
    )


def mean_square(difference: Tensor) -> Tensor:
    return difference.square().mean()


def total_variation(planes: Float[Tensor, "s 3 r r f"]) -> Float[Tensor, ""]:
    """Mean over scenes of the mean squared difference of neighboring texels, rows plus columns; by the native kernel where
    it can."""
    if planes.shape[2] > 1 and native.serves(planes):
        return native.total_variation(planes)
    return total_variation_in_torch(planes)


def total_variation_in_torch(planes: Float[Tensor, "s 3 r r f"]) -> Float[Tensor, ""]:
    """`total_variation`, readable, on any device."""
    return mean_square(planes.diff(dim=2)) + mean_square(planes.diff(dim=3))


def edge_error(a: Float[Tensor, "v 3 H W"], b: Float[Tensor, "v 3 H W"]) -> Float[Tensor, ""]:
    """Mean absolute difference of neighbor differences: punishes blur more than a squared error does."""
    difference = a - b
    return difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean()


def transform_alike(
    latents: Float[Tensor, "v c h w"], images: Float[Tensor, "v 3 H W"], generator: torch.Generator
) -> tuple[Float[Tensor, "v c h w"], Float[Tensor, "v 3 H W"]]:
    """The same random rotation, zoom (0.75 to 1.33) and mirroring of both, borders repeated."""
    count, device = len(images), images.device
    angle, zoom, mirror = torch.rand(3, count, generator=generator, device=device)
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
