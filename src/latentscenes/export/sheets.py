"""Contact sheets and their parts: tiles side by side with captions, grays, a color map for depth.

Notable:
- Pictures are uint8 arrays (H, W, 3), or (H, W, 4) with alpha.
- Latent channels and depth are scaled once for a whole sheet or orbit, so that animations do not flicker.
"""

import io
import math
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from latentscenes.core.errors import UserError
from latentscenes.core.files import check_place, write_files
from latentscenes.data.dataset import PosedImages, Scene, spread_evenly
from latentscenes.model import metrics
from latentscenes.model.model import RenderedImages, render_images, to_uint8
from latentscenes.storage.scene_set import SceneSet

Picture = UInt8[np.ndarray, "_H _W _c"]
Pictures = UInt8[np.ndarray, "_v _H _W _c"]
"""Underscores: pictures in one signature may differ in size."""

PICTURES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""Formats of pictures by the ending of the file."""
GAP = 4
"""Pixels between tiles."""
CAPTION = 15
"""Height of a line of small text, in pixels."""
INK, FAINT = (38, 42, 51), (112, 118, 130)

DEPTH_COLORS = np.array([
    (252, 206, 92), (247, 156, 70), (233, 100, 82), (194, 64, 112),
    (140, 56, 136), (86, 60, 146), (46, 66, 132), (22, 48, 88),
], np.float64)  # fmt: skip
"""From near to far: gold, red, violet, night blue. All stand out from white."""


def color_depth(
    depth: Float[np.ndarray, "v H W"], opacity: Float[np.ndarray, "v H W"], ends: tuple[float, float]
) -> Pictures:
    """Colors depth between `ends` (near, far) by DEPTH_COLORS and fades it to white where opacity (in [0, 1])
    is low."""
    place = np.clip((depth - ends[0]) / (ends[1] - ends[0]), 0, 1) * (len(DEPTH_COLORS) - 1)
    low = np.minimum(place.astype(int), len(DEPTH_COLORS) - 2)
    share = (place - low)[..., None]
    colors = DEPTH_COLORS[low] * (1 - share) + DEPTH_COLORS[low + 1] * share
    solid = np.clip(opacity, 0, 1)[..., None]
    return np.round(colors * solid + 255 * (1 - solid)).astype(np.uint8)


def gray(values: Float[np.ndarray, "v H W"], ends: tuple[float, float]) -> Pictures:
    """Grays for values from ends[0] (black) to ends[1] (white)."""
    span = ends[1] - ends[0]
    shade = np.clip((values - ends[0]) / (span if abs(span) > 1e-9 else 1e-9), 0, 1)
    return np.repeat(np.round(255 * shade).astype(np.uint8)[..., None], 3, -1)


def enlarge(pictures: Pictures, size: tuple[int, int]) -> Pictures:
    """Enlarges to (height, width) by the nearest pixel."""
    rows = (np.arange(size[0]) + 0.5) * pictures.shape[1] / size[0]
    columns = (np.arange(size[1]) + 0.5) * pictures.shape[2] / size[1]
    return np.ascontiguousarray(pictures[:, rows.astype(int)][:, :, columns.astype(int)])


def in_row(pictures: Sequence[Picture], gap: int = GAP) -> Picture:
    """Puts pictures in a row on white, tops aligned."""
    height = max(picture.shape[0] for picture in pictures)
    width = sum(picture.shape[1] for picture in pictures) + gap * (len(pictures) - 1)
    canvas = np.full((height, width, 3), 255, np.uint8)
    left = 0
    for picture in pictures:
        canvas[: picture.shape[0], left : left + picture.shape[1]] = picture
        left += picture.shape[1] + gap
    return canvas


def stacked(pictures: Sequence[Picture], gap: int = GAP) -> Picture:
    """Puts pictures one below the other on white, left edges aligned."""
    turned = in_row([picture.transpose(1, 0, 2) for picture in pictures], gap)
    return np.ascontiguousarray(turned.transpose(1, 0, 2))


def grid(pictures: Sequence[Picture], across: int) -> Picture:
    """Puts pictures in rows of `across`, with white space between and around."""
    across = min(across, len(pictures))
    lines = [
        in_row(pictures[k * across : (k + 1) * across], 4 * GAP)
        for k in range(math.ceil(len(pictures) / across))
    ]
    return np.pad(stacked(lines, 2 * GAP), ((2 * GAP,) * 2, (2 * GAP,) * 2, (0, 0)), constant_values=255)


def captioned(picture: Picture, text: str) -> Picture:
    """Adds a line of small text below."""
    return stacked([picture, _line(text, picture.shape[1], FAINT)], gap=0)


def with_heading(picture: Picture, text: str) -> Picture:
    """Adds a line of text above."""
    return stacked([_line(text, picture.shape[1], INK), picture], gap=1)


def _line(text: str, width: int, color: tuple[int, int, int]) -> Picture:
    """Draws one line of text on white, cut in the middle to `width` pixels."""
    font = _font()
    fitting = next((k for k in range(len(text), 0, -1) if font.getlength(cut(text, k)) <= width), 0)
    text = cut(text, fitting)
    image = Image.new("RGB", (width, CAPTION), (255, 255, 255))
    ImageDraw.Draw(image).text((0, 0), text, fill=color, font=font)
    return np.array(image)


def cut(text: str, most: int) -> str:
    """Replaces the middle of a text of more than `most` characters by an ellipsis; both ends tell apart."""
    if len(text) <= most:
        return text
    end = max(0, most - 1) // 2
    return f"{text[: max(0, most - 1 - end)]}…{text[len(text) - end :]}"


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Returns a short unique caption for each name: as many of its last parts as no other name ends with.
    Parts are the folders and the file that importers join by `__`."""
    parts = {name: name.split("__") for name in names}
    found = {name: name for name in names}
    for count in range(max(map(len, parts.values()), default=0), 0, -1):
        ends = {name: "__".join(part[-count:]) for name, part in parts.items()}
        often = Counter(ends.values())
        found |= {name: end for name, end in ends.items() if often[end] == 1 and len(parts) > 1}
    return found


def captions_of(names: Sequence[str], most: int) -> dict[str, str]:
    """Returns short captions: the end of the name that no other ends with, of at most `most`
    letters; where it is longer, the middle is left out."""
    return {name: cut(end, most) for name, end in short_names(names).items()}


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(11)


# Sheets


def comparison_sheet(
    ours: SceneSet,
    dataset: PosedImages,
    scenes: Sequence[Scene],
    *,
    views_per_scene: int = 2,
    limit: int | None = 8,
    others: Sequence[SceneSet] = (),
    across: int = 2,
) -> Picture:
    """Makes a contact sheet of held-out views (of any views, if none is held out): truth | codec | ours | one
    column for each of `others` that learned the scene. Shows the first `limit` scenes, `across` groups side
    by side, and the PSNR of each tile; says how many scenes are left out."""
    model, groups, names = ours.model, [], short_names(ours.names)
    for scene in scenes[:limit]:
        index = torch.tensor(spread_evenly(scene.views("held_out") or scene.views("all"), views_per_scene))
        truth, cameras = dataset.images(index).float() / 255, dataset.cameras[index]
        columns = [("truth", truth)]
        if model.codec.downsampling > 1 and model.codec.encodes_all:
            with torch.no_grad():
                columns.append(("codec", model.decode(model.encode(truth.to(ours.device))).cpu()))
        for loaded in (ours, *others):
            if scene.name in loaded.names:
                planes = loaded.planes(scene.name)
                shown = render_images(loaded.model, planes, cameras, dataset.size, geometry=False)
                columns.append((loaded.label, shown.images))
        for view in range(len(index)):
            tiles = [
                captioned(
                    to_uint8(images[view : view + 1])[0],
                    label if images is truth else f"{label}  {_psnr(images[view], truth[view])}",
                )
                for label, images in columns
            ]
            groups.append(with_heading(in_row(tiles), names[scene.name]))
    return _with_count(grid(groups, across), len(scenes[:limit]), len(scenes))


def dashboard_sheet(
    loaded: SceneSet, dataset: PosedImages, scenes: Sequence[Scene], *, limit: int | None = 6
) -> Picture:
    """Makes a sheet of intermediate results, one held-out view for each of the first `limit` scenes: truth,
    its latent channels (if the codec encodes all), the rendered latent channels, their first three principal
    components as colors, the decoded render, depth, opacity. Says how many scenes are left out."""
    model, captions = loaded.model, short_names(loaded.names)
    shown, truths, encoded = [], [], []
    for scene in scenes[:limit]:
        index = torch.tensor(spread_evenly(scene.views("held_out") or scene.views("all"), 1))
        truth = dataset.images(index).float() / 255
        if model.codec.encodes_all:
            with torch.no_grad():
                encoded.append(model.encode(truth.to(loaded.device)).cpu().float())
        truths.append(truth)
        shown.append(render_images(model, loaded.planes(scene.name), dataset.cameras[index], dataset.size))
    names = ("images", "latents", "depth", "opacity")
    together = RenderedImages(*(torch.cat([getattr(one, name) for one in shown]) for name in names))
    height, width = dataset.size
    reference = torch.cat(encoded) if encoded else together.latents
    columns = [
        ("truth", to_uint8(torch.cat(truths))),
        *([("latent of the truth", channel_tiles(reference, reference, height))] if encoded else []),
        ("latent rendered", channel_tiles(together.latents, reference, height)),
        ("as colors", enlarge(_color_code(together.latents, reference, together.opacity), (height, width))),
        ("decoded", to_uint8(together.images)),
        ("depth", color_depth(together.depth.numpy(), together.opacity.numpy(), depth_range(together))),
        ("opacity", gray(together.opacity.numpy(), (1.0, 0.0))),
    ]
    lines = [
        with_heading(in_row([captioned(tiles[k], label) for label, tiles in columns]), captions[scene.name])
        for k, scene in enumerate(scenes[:limit])
    ]
    return _with_count(grid(lines, 1), len(lines), len(scenes))


def _with_count(sheet: Picture, shown: int, count: int) -> Picture:
    """Adds a line that says how many scenes are left out, if any are."""
    return captioned(sheet, f"  {shown} of {count} scenes shown") if shown < count else sheet


def _psnr(image: Float[Tensor, "3 H W"], truth: Float[Tensor, "3 H W"]) -> str:
    return f"{metrics.psnr(image[None], truth[None]).item():.1f} dB"


# Scales


def depth_range(shown: RenderedImages) -> tuple[float, float]:
    """Returns the 1st and 99th percentile of depth where opacity exceeds 0.7."""
    solid = shown.depth[shown.opacity > 0.7]
    if solid.numel() < 2:
        return shown.depth.min().item(), shown.depth.max().item() + 1e-6
    ordered = solid.sort().values
    return ordered[int(0.01 * len(ordered))].item(), ordered[int(0.99 * (len(ordered) - 1))].item() + 1e-6


def channel_tiles(latents: Float[Tensor, "v c h w"], like: Float[Tensor, "n c h w"], height: int) -> Pictures:
    """Shows every channel in gray, in several rows of tiles if there are many. Black to white is the range of
    the channel in `like`, without the outermost 0.5 % at each end. All rows together are `height` pixels
    tall."""
    count = latents.shape[1]
    lines = 1 if count < 3 else 2 if count <= 8 else math.ceil(count / 6)
    columns = math.ceil(count / lines)
    gap = 2
    tall = (height - (lines - 1) * gap) / lines
    wide = round(tall * latents.shape[3] / latents.shape[2])
    canvas = np.full((len(latents), height, columns * wide + (columns - 1) * gap, 3), 200, np.uint8)
    for channel in range(count):
        values = like[:, channel].flatten()
        sample = values[:: max(1, len(values) // 100_000)]
        low, high = torch.quantile(sample, torch.tensor([0.005, 0.995])).tolist()
        line, column = divmod(channel, columns)
        top, bottom = round(line * (tall + gap)), round(line * (tall + gap) + tall)
        left = column * (wide + gap)
        tile = gray(latents[:, channel].numpy(), (low, high))
        canvas[:, top:bottom, left : left + wide] = enlarge(tile, (bottom - top, wide))
    return canvas


def _color_code(
    latents: Float[Tensor, "v c h w"], like: Float[Tensor, "n c h w"], opacity: Float[Tensor, "v H W"]
) -> Pictures:
    """Colors latents by the first three principal components of `like`, as red, green and blue, over
    white."""
    points = like.movedim(1, -1).flatten(0, 2)
    middle = points.mean(0)
    axes = torch.linalg.svd((points - middle).T @ (points - middle)).Vh[:3]
    axes = axes * torch.where(axes.sum(1, keepdim=True) < 0, -1.0, 1.0)
    reference = ((points - middle) @ axes.T)[:: max(1, len(points) // 100_000)]
    ends = torch.quantile(reference, torch.tensor([0.01, 0.99]), dim=0)
    codes = ((latents.movedim(1, -1) - middle) @ axes.T - ends[0]) / (ends[1] - ends[0]).clamp_min(1e-6)
    solid = torch.nn.functional.adaptive_avg_pool2d(opacity[:, None], latents.shape[2:]).movedim(1, -1)
    colors = codes.clamp(0, 1) * solid + 1 - solid
    return torch.nn.functional.pad(255 * colors, (0, 3 - colors.shape[-1]), value=127).round().byte().numpy()


def check_picture(path: Path) -> None:
    """Refuses, before anything is rendered, a name that `save_image` cannot write to."""
    if path.suffix.lower() not in PICTURES:
        raise UserError(f"{path}: pictures are written as .png, .jpg or .webp.")
    check_place(path)


def save_image(path: str | Path, picture: Picture) -> None:
    """Writes one picture. The ending decides the format (.png, .jpg, .webp)."""
    check_picture(Path(path))
    save_file(path, image_bytes(Path(path), picture))


def image_bytes(path: Path, picture: Picture) -> bytes:
    """Returns a picture in the format of the ending of `path`."""
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, PICTURES[path.suffix.lower()])
    return stream.getvalue()


def save_file(path: str | Path, content: bytes) -> int:
    """Writes a file, and the folders it lies in if they are absent. Returns its size in bytes."""
    return write_files({Path(path): content})
