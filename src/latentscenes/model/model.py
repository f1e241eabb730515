"""The parts that all scenes share: codec, normalizer, field and base planes, built from a Config."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from latentscenes.core.cameras import Box, Cameras, box_sizes
from latentscenes.core.config import CodecConfig, Config
from latentscenes.core.errors import UserError
from latentscenes.core.files import load_tensors, reading_from
from latentscenes.core.runtime import Numbers, uniform
from latentscenes.model.codec import COLORS, Codec
from latentscenes.model.normalizer import Normalizer
from latentscenes.model.planes import SceneParameters, compose, fuse, random_bases
from latentscenes.rendering.adaptive import CELL, render_adaptively
from latentscenes.rendering.field import Field, FusedPlanes
from latentscenes.rendering.occupancy import SIDE, bound_rays, occupied_cells
from latentscenes.rendering.render import Rays, camera_rays, render_rays

PREVIEW_CHANNELS = 3
CHUNK = 8
"""Views rendered and decoded together."""
PORTION = 16384
"""Rays rendered together in adaptive views."""
LARGE = 192
"""Smallest side of pictures that adaptive views make from fewer rays, in latent pixels. Smaller ones would
gain nothing."""
TOLERANCE = 0.03
"""Differences of colors, opacities and depths that adaptive views interpolate: colors in [0, 1], depths in
the scene's unit of length."""


class LatentView(NamedTuple):
    """v rendered views of p latent pixels each, composited over the background."""

    latents: Float[Tensor, "v p c"]
    """In (−1, 1)."""
    preview: Float[Tensor, "v p q"]
    """Low-resolution RGB in (−1, 1), q = 3; q = 0 unless the configuration asks for it."""
    depth: Float[Tensor, "v p"]
    """Expected distance along the ray, world units."""
    opacity: Float[Tensor, "v p"]
    rays: Rays
    """In box coordinates."""

    def image(self, height: int, width: int) -> Float[Tensor, "v c h w"]:
        """Returns the latents as images. All pixels must have been rendered."""
        return self.latents.transpose(1, 2).unflatten(2, (height, width))


class Model(nn.Module):
    """The parts that all scenes share. Its latents are always normalized, in (−1, 1)."""

    def __init__(self, config: Config, box: Box, pretrained: bool = True):
        """Without `pretrained`, `codec.path` is not read if the architecture is known without it, and nothing
        is downloaded. The caller then loads weights from a checkpoint."""
        super().__init__()
        self.config, self.box = config, box
        generator = torch.Generator().manual_seed(config.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.codec = build_codec(config.codec, pretrained)
            self.normalizer = Normalizer(
                config.normalizer.kind,
                self.codec.channels,
                scale=config.normalizer.scale,
                window=config.normalizer.window,
            )
            self.field = self.random_field()
        self.bases = nn.Parameter(random_bases(config.planes, generator))

    def random_field(self) -> Field:
        """Builds a field with random weights from torch's global generator."""
        field = self.config.field
        channels = self.codec.channels + PREVIEW_CHANNELS * self.config.render.preview
        return Field(
            self.config.planes.features, channels, field.hidden, field.frequencies, field.view_direction
        )

    def parts(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Returns the named parameters of each part that a stage can train or freeze."""
        return {
            "encoder": [(str(k), parameter) for k, parameter in enumerate(self.codec.encoder_parameters())],
            "decoder": [(str(k), parameter) for k, parameter in enumerate(self.codec.decoder_parameters())],
            "field": list(self.field.named_parameters()),
            "bases": [("bases", self.bases)] if self.bases.numel() else [],
        }

    def encode(self, images: Float[Tensor, "v 3 H W"]) -> Float[Tensor, "v c h w"]:
        """Encodes images in [0, 1] to normalized latents."""
        return self.normalizer.normalize(self.codec.encode(images))

    def decode(self, latents: Float[Tensor, "v c h w"]) -> Float[Tensor, "v 3 H W"]:
        """Decodes normalized latents to images in about [0, 1]."""
        return self.codec.decode(self.normalizer.denormalize(latents))

    def colors(self, latents: Float[Tensor, "v c h w"]) -> Float[Tensor, "v 3 h w"]:
        """Returns the colors among normalized latents, in about [0, 1], where the codec has them
        (`leading_colors`)."""
        return (self.normalizer.denormalize(latents)[:, :COLORS] + 1) / 2

    def background(self, height: int, width: int) -> Float[Tensor, "c h w"]:
        """Returns the normalized latents of a white image of that size in pixels."""
        return self.normalizer.normalize(self.codec.background(height, width)[None])[0].detach()

    @property
    def device(self) -> torch.device:
        return self.bases.device

    def compose(self, scenes: SceneParameters, bounded: bool = False) -> FusedPlanes:
        """Returns the tri-planes of scenes, fused and mixed, for rendering. `bounded`: with their occupied
        cells, for views."""
        settings = self.config.planes
        texels = compose(scenes, self.bases, settings.fusion)
        planes = FusedPlanes(texels, None, None, settings.axes, settings.aggregation, own_boxes(scenes))
        if not bounded or self.config.render.near is not None:
            return planes
        length = 2 * self.boxes(planes)[:, 3:].amax(1) / SIDE / self.units(planes)
        return planes._replace(occupied=occupied_cells(planes, self.field, length))

    def fuse(self, scenes: SceneParameters, macro: Float[Tensor, "s 3 r r g"] | None = None) -> FusedPlanes:
        """Returns the fused tri-planes of scenes for learning; the renderer applies the mixing. `macro` are
        their macro planes, if these are constant."""
        settings, fusion = self.config.planes, self.config.planes.fusion
        mixing = scenes.mixing if scenes.mixing.numel() else None
        own = scenes.micro if macro is not None and scenes.micro.shape[-1] and fusion == "concat" else None
        texels = fuse(scenes, self.bases, fusion, macro)
        return FusedPlanes(texels, mixing, own, settings.axes, settings.aggregation, own_boxes(scenes))

    # Boxes

    def boxes(self, planes: FusedPlanes) -> Float[Tensor, "s 6"]:
        """Returns center and half sides of each scene's box."""
        if planes.boxes is not None:
            return planes.boxes
        return self.box.numbers.to(planes.texels.device).expand(len(planes.texels), 6)

    def box_of(self, planes: FusedPlanes) -> Box:
        """Returns the box of a scene (s = 1)."""
        return self.box if planes.boxes is None else Box.of(planes.boxes[0])

    def units(self, planes: FusedPlanes) -> Float[Tensor, "s"]:
        """Returns each scene's unit of length, world units: the size of its box over the size of the model's
        box (geometric means of the sides)."""
        if planes.boxes is None:
            return planes.texels.new_ones(len(planes.texels))
        return box_sizes(planes.boxes) / box_sizes(self.box.numbers[None].to(planes.boxes.device))

    def rays(
        self,
        planes: FusedPlanes,
        cameras: Cameras,
        height: int,
        width: int,
        pixels: Int[Tensor, "v p"] | None = None,
    ) -> Rays:
        """Returns the rays of cameras through the scenes' boxes, in the scenes' units (see `camera_rays`)."""
        settings = self.config.render
        bounds = None if settings.near is None else (settings.near, settings.far)
        return camera_rays(cameras, self.boxes(planes), height, width, bounds, pixels, self.units(planes))

    def render(
        self,
        planes: FusedPlanes,
        cameras: Cameras,
        background: Float[Tensor, "c h w"],
        generator: Numbers | None = None,
        pixels: Int[Tensor, "v p"] | None = None,
        behind: Float[Tensor, "v p c"] | None = None,
        free_rays: bool = False,
    ) -> LatentView:
        """Renders views of s scenes at the background's resolution. Cameras come scene by scene,
        equally many each.

        With a generator, samples are jittered, and rays that meet no occupied cell sample in the whole box;
        without, samples lie in the middle of their slices. `pixels` picks the rays of each view
        (row · w + column); without it, all are rendered. `behind` gives each ray a background of its own.
        With `free_rays`, each ray's origin and direction take gradients.
        """
        settings = self.config.render
        rays = self.rays(planes, cameras, *background.shape[1:], pixels)
        leave = rays.far
        if planes.occupied is not None:
            bounded = bound_rays(rays, planes.occupied)
            if generator is not None:
                missed = bounded.near == bounded.far  # what these rays meet must become empty
                near = torch.where(missed, rays.near, bounded.near)
                far = torch.where(missed, rays.far, bounded.far)
                bounded = bounded._replace(near=near, far=far)
            rays = bounded
        if free_rays:
            free = {name: getattr(rays, name).detach().requires_grad_() for name in ("origins", "directions")}
            rays = rays._replace(**free)
        shape = rays.near.shape

        def numbers(count: int) -> Tensor:
            if generator is None:
                return torch.full((*shape, count), 0.5, device=self.device)
            return uniform(generator, *shape, count, device=self.device)

        rendered = render_rays(
            planes, self.field, rays, numbers(settings.coarse), numbers(settings.fine),
            settings.kernel, settings.precision,
        )  # fmt: skip
        depth = rendered.depth + (1 - rendered.opacity) * (leave - rays.far)  # where light leaves the box
        rendered = rendered._replace(depth=depth * self.units(planes)[:, None])
        views = len(cameras)
        features, depth, opacity = (value.reshape(views, -1, *value.shape[2:]) for value in rendered)
        if behind is None:
            flat = background.flatten(1).t()
            behind = flat[None] if pixels is None else flat[pixels]
        empty = 1 - opacity[..., None]
        channels = self.codec.channels
        return LatentView(
            features[..., :channels] + empty * behind, features[..., channels:] + empty, depth, opacity, rays
        )


@dataclass(frozen=True)
class RenderedImages:
    """v views of one scene, on the CPU."""

    images: Float[Tensor, "v 3 H W"]
    """Decoded, in [0, 1]."""
    latents: Float[Tensor, "v c h w"]
    """Rendered, in (−1, 1)."""
    depth: Float[Tensor, "v a b"]
    """Expected distance along the ray, world units, as fine as images, or latents without `geometry`."""
    opacity: Float[Tensor, "v a b"]


class CompositedViews(NamedTuple):
    """v whole views, composited over the background."""

    latents: Float[Tensor, "v c h w"]
    depth: Float[Tensor, "v h w"]
    """As in `LatentView`."""
    opacity: Float[Tensor, "v h w"]


@torch.no_grad()
def adaptive_views(
    model: Model,
    planes: FusedPlanes,
    cameras: Cameras,
    background: Float[Tensor, "c h w"],
    geometry: bool = True,
    watch: Callable[[], None] = lambda: None,
) -> CompositedViews:
    """Renders views of one scene; large ones with rays where they are needed (`render_adaptively`).

    Args:
        geometry: whether depth places rays too; without, it may be wrong where a surface ends in front of
            another one of its color.
        watch: is called before each portion of rays, and may raise to stop.
    """
    (channels, height, width), unit = background.shape, model.units(planes)[:1]
    limits = [2 * TOLERANCE] * channels + [TOLERANCE, TOLERANCE * float(unit) if geometry else math.inf]
    limits = background.new_tensor([*limits, math.inf])
    views = []
    for camera in torch.arange(len(cameras)).split(1):

        def cast(pixels: Tensor, camera: Cameras = cameras[camera]) -> Tensor:
            parts = []
            for some in pixels.to(model.device).split(PORTION):
                watch()
                view = model.render(planes, camera, background, pixels=some[None])
                depths = torch.stack([view.opacity, view.opacity * view.depth, view.depth], -1)
                parts.append(torch.cat([view.latents, depths], -1)[0])
            return torch.cat(parts)

        cell = CELL if min(height, width) >= LARGE else 1
        views.append(render_adaptively(cast, height, width, limits, cell))
    found = torch.stack(views).permute(0, 3, 1, 2)
    return CompositedViews(found[:, :channels], found[:, -1], found[:, channels])


@torch.no_grad()
def render_images(
    model: Model,
    planes: FusedPlanes,
    cameras: Cameras,
    size: tuple[int, int],
    geometry: bool = True,
    adaptive: bool = False,
    decoded: bool = True,
) -> RenderedImages:
    """Renders views of one scene and decodes images of `size` (height, width).

    Args:
        geometry: whether depth and opacity are rendered at this size too; otherwise, they are those of the
            latents' rays.
        adaptive: whether large pictures are made from fewer rays, for looking at (`adaptive_views`).
        decoded: whether the codec decodes; otherwise, latents are rendered at this size, and images are
            their colors. Only for codecs with `leading_colors`.
    """

    def shown(some: Cameras, background: Tensor) -> CompositedViews:
        if adaptive:
            return adaptive_views(model, planes, some, background, geometry)
        view, shape = model.render(planes, some, background), background.shape[1:]
        return CompositedViews(
            view.image(*shape), view.depth.unflatten(1, shape), view.opacity.unflatten(1, shape)
        )

    enlarged = 1 if decoded else model.codec.downsampling
    background = model.background(enlarged * size[0], enlarged * size[1])
    full = background.new_zeros(background.shape[0], *size) if geometry else background
    found = []
    for chunk in torch.arange(len(cameras)).split(CHUNK):
        some = cameras[chunk].to(model.device)
        view = shown(some, background)
        solid = view if full.shape == background.shape else shown(some, full)
        images = (model.decode if decoded else model.colors)(view.latents.contiguous()).clamp(0, 1)
        found.append([value.cpu() for value in (images, view.latents, solid.depth, solid.opacity)])
    return RenderedImages(*(torch.cat(values).float() for values in zip(*found, strict=True)))


def own_boxes(scenes: SceneParameters) -> Float[Tensor, "s 6"] | None:
    """Returns center and half sides of scenes' own boxes; None if they have the model's."""
    return scenes.box if scenes.box.numel() else None


def to_uint8(images: Float[Tensor, "v 3 H W"]) -> UInt8[np.ndarray, "v H W 3"]:
    """Converts images in [0, 1] to bytes."""
    return (255 * images.clamp(0, 1)).round().byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()


def build_codec(config: CodecConfig, pretrained: bool = True) -> Codec:
    """Builds the configured codec. Each kind is imported only where it is used."""
    if config.kind == "convolutional":
        from latentscenes.model.convolutional import ConvolutionalCodec

        codec = ConvolutionalCodec(config.downsampling, config.channels, config.width, config.bfloat16)
        if config.path and pretrained:
            _load_from_run(codec, Path(config.path))
        return codec
    if config.kind == "guided":
        from latentscenes.model.guided import GuidedCodec

        codec = GuidedCodec(config.downsampling, config.channels, config.width, config.bfloat16)
        if config.path and pretrained:
            _load_from_run(codec, Path(config.path))
        return codec
    if config.kind == "identity":
        from latentscenes.model.codec import IdentityCodec

        return IdentityCodec()
    if config.kind == "diffusers":
        from latentscenes.model.diffusers import DiffusersCodec

        return DiffusersCodec.load(config.path, config.subfolder, config.allow_download and pretrained)
    if config.kind == "tiny":
        from latentscenes.model.diffusers import TinyCodec

        return TinyCodec.from_folder(config.path)
    raise UserError(f"codec.kind: {config.kind!r} is not known.")


def _load_from_run(codec: Codec, path: Path) -> None:
    """Loads the codec weights of another run's last checkpoint."""
    files = sorted(path.glob("checkpoints/*/shared.safetensors"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise UserError(
            f"codec.path: {path} holds no checkpoint. Name the run folder of a `latentscenes train` command."
        )
    with reading_from(files[-1], "Restore it from a copy, or name another run."):
        stored = load_tensors(files[-1])
    state = {name.removeprefix("codec."): stored[name] for name in stored if name.startswith("codec.")}
    try:
        codec.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(
            f"codec.path: {path} holds another codec ({str(error).splitlines()[1].strip()[:120]}). "
            "Use the same codec settings."
        ) from None
