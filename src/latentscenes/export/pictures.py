"""Learned scenes as pictures: contact sheets, orbits, dashboards, and the files they are saved in.

Notable:
- Pictures are uint8 arrays (H, W, 3) over white from the moment they leave a model.
- Latent channels and depth are scaled once for a whole sheet or orbit, so that nothing flickers.
- Depth and opacity are marched at image resolution, although images come from the few rays of a latent: the density
  is a function of space and knows no resolution.
"""

import io
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from latentscenes.core.cameras import Cameras, Viewpoint
from latentscenes.core.errors import UserError
from latentscenes.core.files import check_place, writing_to
from latentscenes.data.dataset import Scene, Views
from latentscenes.export.tiles import Picture, Pictures, beside, captioned, colour_depth, enlarge, grey, grid, headed
from latentscenes.model import metrics
from latentscenes.model.model import Model
from latentscenes.storage.scene_set import Loaded

Mode = Literal["rgb", "depth", "opacity", "latent", "dashboard"]
CHUNK = 8
"""Views rendered and decoded at once …"""
PIXELS = 1 << 19
"""… if they have no more pixels than this together."""
SAMPLES = 8
"""Frames of a film that decide how depth and latent channels are scaled in all of it."""


@dataclass(frozen=True)
class Shown:
    """v views of one scene, on the CPU."""

    images: Float[Tensor, "v 3 H W"]
    """Decoded, in [0, 1]."""
    latents: Float[Tensor, "v c h w"]
    """Rendered, in (−1, 1)."""
    depth: Float[Tensor, "v a b"]
    """Expected distance along the ray, world units; as fine as the images, or as the latents without `geometry`."""
    opacity: Float[Tensor, "v a b"]


@torch.no_grad()
def look(model: Model, planes: Float[Tensor, "1 3 r r f"], cameras: Cameras, size: tuple[int, int], geometry: bool = True) -> Shown:
    """Views of one scene's fused planes with images of `size` (height, width); without `geometry`, depth and opacity
    are those of the latent's few rays."""
    background = model.background(*size)
    full = background.new_zeros(background.shape[0], *size) if geometry else background
    found = []
    for chunk in torch.arange(len(cameras)).split(CHUNK):
        some = cameras[chunk].to(planes.device)
        view = model.render(planes, some, background)
        latents = view.image(*background.shape[1:])
        solid = view if full.shape == background.shape else model.render(planes, some, full)
        depth, opacity = (value.unflatten(1, full.shape[1:]) for value in (solid.depth, solid.opacity))
        found.append([value.cpu() for value in (model.decode(latents).clamp(0, 1), latents, depth, opacity)])
    return Shown(*(torch.cat(values).float() for values in zip(*found, strict=True)))


def to_pictures(images: Float[Tensor, "v 3 H W"]) -> Pictures:
    """Images in [0, 1] as bytes."""
    return (255 * images.clamp(0, 1)).round().byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()


# Sheets


def comparison_sheet(
    ours: Loaded,
    dataset: Views,
    scenes: Sequence[Scene],
    *,
    views_per_scene: int = 2,
    limit: int | None = 8,
    others: Sequence[Loaded] = (),
    across: int = 2,
) -> Picture:
    """Contact sheet on held-out views (on any, if none was held out): truth | codec | ours | one column for each of
    `others` that learned the scene. The first `limit` scenes are shown, `across` groups side by side, each tile with
    its PSNR."""
    model, groups = ours.model, []
    for scene in scenes[:limit]:
        index = torch.tensor(spread_evenly(scene.views("held_out") or scene.views("all"), views_per_scene))
        truth, cameras = dataset.images(index).float() / 255, dataset.cameras[index]
        columns = [("truth", truth)]
        if model.codec.downsampling > 1:
            with torch.no_grad():
                columns.append(("codec", model.decode(model.encode(truth.to(ours.device))).cpu()))
        for loaded in (ours, *others):
            if scene.name in loaded.names:
                columns.append((loaded.label, look(loaded.model, loaded.planes(scene.name), cameras, dataset.size, geometry=False).images))
        for view in range(len(index)):
            tiles = [
                captioned(to_pictures(images[view : view + 1])[0], label if images is truth else f"{label}  {_psnr(images[view], truth[view])}")
                for label, images in columns
            ]
            groups.append(headed(beside(tiles), scene.name))
    return grid(groups, across)


def dashboard_sheet(loaded: Loaded, dataset: Views, scenes: Sequence[Scene], *, limit: int | None = 6) -> Picture:
    """What training looks like from inside, one held-out view for each of the first `limit` scenes: truth, its latent
    channels, the rendered ones, their colour code, the decoded render, depth, opacity."""
    model = loaded.model
    shown, truths, encoded = [], [], []
    for scene in scenes[:limit]:
        index = torch.tensor(spread_evenly(scene.views("held_out") or scene.views("all"), 1))
        truth = dataset.images(index).float() / 255
        with torch.no_grad():
            encoded.append(model.encode(truth.to(loaded.device)).cpu().float())
        truths.append(truth)
        shown.append(look(model, loaded.planes(scene.name), dataset.cameras[index], dataset.size))
    together = Shown(*(torch.cat([getattr(one, name) for one in shown]) for name in ("images", "latents", "depth", "opacity")))
    height, width = dataset.size
    reference = torch.cat(encoded)
    columns = [
        ("truth", to_pictures(torch.cat(truths))),
        ("latent of the truth", _channel_tiles(reference, reference, height)),
        ("latent rendered", _channel_tiles(together.latents, reference, height)),
        ("as colours", enlarge(_colour_code(together.latents, reference, together.opacity), (height, width))),
        ("decoded", to_pictures(together.images)),
        ("depth", colour_depth(together.depth.numpy(), together.opacity.numpy(), _depth_range(together))),
        ("opacity", grey(together.opacity.numpy(), (1.0, 0.0))),
    ]
    lines = [headed(beside([captioned(tiles[k], label) for label, tiles in columns]), scene.name) for k, scene in enumerate(scenes[:limit])]
    return grid(lines, 1)


def _psnr(image: Float[Tensor, "3 H W"], truth: Float[Tensor, "3 H W"]) -> str:
    return f"{metrics.psnr(image[None], truth[None]).item():.1f} dB"


def spread_evenly(index: list[int], count: int) -> list[int]:
    """`count` of them at most, evenly spread."""
    count = min(count, len(index))
    return [index[int((k + 0.5) * len(index) / count)] for k in range(count)]


# Orbits


def orbit_frames(
    loaded: Loaded,
    scene: str,
    view: Viewpoint,
    *,
    frames: int = 60,
    size: int | None = None,
    mode: Mode = "rgb",
    elevation: float = 25.0,
) -> list[Picture]:
    """Pictures from cameras once around a scene.

    Args:
        view: how its dataset looks at it.
        size: pixels along the wider side, a multiple of the codec's downsampling; unset: as in the data.
        mode: `latent` shows every channel in grey; `dashboard` image, latent channels, depth and opacity side by side.
        elevation: degrees above the horizon.

    Raises:
        UserError: `size` does not suit the codec, or `frames` is not above 0.
    """
    if frames < 1:
        raise UserError(f"--frames {frames}: at least 1.")
    height, width = scaled(view.size, size, loaded.model.codec.downsampling)
    return list(camera_frames(loaded, scene, view.orbit(frames, elevation), (height, width), mode))


def camera_frames(loaded: Loaded, scene: str, cameras: Cameras, size: tuple[int, int], mode: Mode = "rgb") -> Iterator[Picture]:
    """Pictures of a scene from any cameras, one after the other: no more than a few are held.

    Args:
        size: height and width, multiples of the codec's downsampling.
    """
    planes, geometry = loaded.planes(scene), mode in ("depth", "opacity", "dashboard")
    some = torch.tensor(spread_evenly(list(range(len(cameras))), SAMPLES))
    like = None if mode in ("rgb", "opacity") else look(loaded.model, planes, cameras[some], size, geometry)
    for chunk in torch.arange(len(cameras)).split(max(1, min(CHUNK, PIXELS // (size[0] * size[1])))):
        shown = look(loaded.model, planes, cameras[chunk], size, geometry)
        yield from _frames(shown, like or shown, mode, size[0])


def _frames(shown: Shown, like: Shown, mode: Mode, height: int) -> Pictures:
    """Pictures of `shown`, their scales those of `like`."""
    if mode == "rgb":
        return to_pictures(shown.images)
    if mode == "depth":
        return colour_depth(shown.depth.numpy(), shown.opacity.numpy(), _depth_range(like))
    if mode == "opacity":
        return grey(shown.opacity.numpy(), (1.0, 0.0))
    if mode == "latent":
        return _channel_tiles(shown.latents, like.latents, height)
    labels = ("image", "latent channels", "depth", "opacity")
    panels = [_frames(shown, like, part, height) for part in ("rgb", "latent", "depth", "opacity")]
    return np.stack([beside([captioned(panel[k], label) for label, panel in zip(labels, panels, strict=True)]) for k in range(len(panels[0]))])


def scaled(stored: tuple[int, int], size: int | None, step: int) -> tuple[int, int]:
    """Height and width of pictures `size` pixels wide (along the wider side), shaped like the stored ones."""
    if size is None:
        return stored
    if size < step or size % step:
        raise UserError(f"--size {size}: must be a multiple of the codec's downsampling, {step}; try {max(step, round(size / step) * step)}.")
    height, width = (max(step, round(side * size / max(stored) / step) * step) for side in stored)
    return height, width


def check_elevation(what: str, elevation: float) -> None:
    """Refuse an elevation beyond straight above or below, degrees."""
    if not -90 <= elevation <= 90:
        raise UserError(f"{what} {elevation:g}: degrees above the horizon, from -90 to 90.")


def _depth_range(shown: Shown) -> tuple[float, float]:
    """Nearest and farthest depth of what is solid, leaving out stray points."""
    solid = shown.depth[shown.opacity > 0.7]
    if solid.numel() < 2:
        return shown.depth.min().item(), shown.depth.max().item() + 1e-6
    ordered = solid.sort().values
    return ordered[int(0.01 * len(ordered))].item(), ordered[int(0.99 * (len(ordered) - 1))].item() + 1e-6


def _channel_tiles(latents: Float[Tensor, "v c h w"], like: Float[Tensor, "n c h w"], height: int) -> Pictures:
    """Every channel in grey, in two rows of tiles if there are many; black to white is a channel's range in `like`.
    All tiles together are `height` pixels tall."""
    count = latents.shape[1]
    lines = 1 if count < 3 else 2 if count <= 8 else math.ceil(count / 6)
    columns = math.ceil(count / lines)
    gap = 2
    tall = (height - (lines - 1) * gap) / lines
    wide = round(tall * latents.shape[3] / latents.shape[2])
    canvas = np.full((len(latents), height, columns * wide + (columns - 1) * gap, 3), 200, np.uint8)
    for channel in range(count):
        ends = torch.quantile(like[:, channel].flatten()[:: max(1, like[:, channel].numel() // 100_000)], torch.tensor([0.005, 0.995])).tolist()
        line, column = divmod(channel, columns)
        top, bottom = round(line * (tall + gap)), round(line * (tall + gap) + tall)
        tile = grey(latents[:, channel].numpy(), (ends[0], ends[1]))
        canvas[:, top:bottom, column * (wide + gap) : column * (wide + gap) + wide] = enlarge(tile, (bottom - top, wide))
    return canvas


def _colour_code(latents: Float[Tensor, "v c h w"], like: Float[Tensor, "n c h w"], opacity: Float[Tensor, "v H W"]) -> Pictures:
    """Latents by their first three principal components in `like`, as red, green and blue, over white."""
    points = like.movedim(1, -1).flatten(0, 2)
    middle = points.mean(0)
    axes = torch.linalg.svd((points - middle).T @ (points - middle)).Vh[:3]
    axes = axes * torch.where(axes.sum(1, keepdim=True) < 0, -1.0, 1.0)  # a definite sign
    reference = ((points - middle) @ axes.T)[:: max(1, len(points) // 100_000)]
    ends = torch.quantile(reference, torch.tensor([0.01, 0.99]), dim=0)
    codes = ((latents.movedim(1, -1) - middle) @ axes.T - ends[0]) / (ends[1] - ends[0]).clamp_min(1e-6)
    solid = torch.nn.functional.adaptive_avg_pool2d(opacity[:, None], latents.shape[2:]).movedim(1, -1)
    colours = codes.clamp(0, 1) * solid + 1 - solid
    return torch.nn.functional.pad(255 * colours, (0, 3 - colours.shape[-1]), value=127).round().byte().numpy()


# Files


def save_image(path: str | Path, picture: Picture) -> None:
    """Write one picture; the ending says how (.png, .jpg, .webp)."""
    path = Path(path)
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"{path}: pictures are written as .png, .jpg or .webp.")
    with writing_to(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)


def check_film(path: str | Path) -> None:
    """Refuse, before anything is rendered, a name that `save_frames` cannot write to."""
    path = Path(path)
    if path.suffix.lower() not in (".mp4", ".gif", ".png", ""):
        raise UserError(f"{path}: frames are written as .mp4, .gif or .png, or into a folder (a name without an ending).")
    if not path.suffix and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: exists and is not an empty folder. Name another, or remove it first.")
    if path.suffix and path.is_dir():
        raise UserError(f"{path}: is a folder. Name a file, or for a folder of pictures a name without an ending.")
    check_place(path)
    if path.suffix.lower() == ".mp4":
        try:
            import av  # noqa: F401
        except ImportError:
            raise UserError(f"{path}: writing .mp4 needs PyAV. Run: pip install latentscenes[export] — or write a .gif.") from None


def save_frames(path: str | Path, frames: Iterable[Picture], fps: int | float = 20) -> None:
    """Write a film (.mp4, which needs the export extra, or .gif), a strip of frames (.png), or numbered PNG files into a
    new folder (a name without an ending)."""
    path = Path(path)
    check_film(path)
    kind, partial = path.suffix.lower(), path.with_name(f"{path.stem}.partial-{os.getpid()}{path.suffix}")
    with writing_to(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if kind == ".mp4":
                _save_mp4(partial, frames, fps)
            elif kind == ".gif":
                partial.write_bytes(gif_bytes(list(frames), fps))
            elif kind == ".png":
                shown = list(frames)
                columns = math.ceil(math.sqrt(len(shown) * shown[0].shape[0] / shown[0].shape[1]))
                save_image(partial, grid(shown, len(shown) if len(shown) <= 6 else max(1, columns)))
            else:
                partial.mkdir()
                for place, frame in enumerate(frames):
                    save_image(partial / f"{place:05d}.png", frame)
                if path.exists():
                    path.rmdir()
            partial.replace(path)
        finally:
            if partial.is_dir():
                shutil.rmtree(partial)
            else:
                partial.unlink(missing_ok=True)


def _save_mp4(path: Path, frames: Iterable[Picture], fps: int | float) -> None:
    """H.264 that browsers play; sides are padded to even ones."""
    import av

    with av.open(str(path), "w") as film:
        stream = film.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), pix_fmt="yuv420p", options={"crf": "16"})
        for place, frame in enumerate(frames):
            even = np.pad(frame, ((0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)), constant_values=255)
            if place == 0:
                stream.height, stream.width = even.shape[:2]
            film.mux(stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))
        film.mux(stream.encode())


def gif_bytes(frames: Sequence[Picture], fps: int | float) -> bytes:
    """An animated GIF. One palette for all frames, from a sample of their pixels: small, and colours hold still."""
    pixels = np.concatenate([frame.reshape(-1, 3) for frame in frames])
    coloured = pixels[(pixels != 255).any(1)]
    sample = coloured[:: max(1, len(coloured) // 120_000)] if len(coloured) else np.zeros((1, 3), np.uint8)
    chosen = Image.fromarray(sample[None]).quantize(255, Image.Quantize.MEDIANCUT).getpalette()[: 3 * 255]
    white = len(chosen) // 3
    images = []
    palette = Image.new("P", (1, 1))
    palette.putpalette(chosen)
    for frame in frames:
        index = np.array(Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE))
        index[(frame == 255).all(-1)] = white  # the ground: exactly white, whatever colours are near it
        image = Image.fromarray(index)
        image.putpalette([*chosen, 255, 255, 255])
        images.append(image)
    stream = io.BytesIO()
    images[0].save(stream, "GIF", save_all=True, append_images=images[1:], duration=max(20, round(100 / fps) * 10), loop=0, optimize=False)
    return stream.getvalue()
