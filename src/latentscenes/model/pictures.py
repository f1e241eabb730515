"""Rendered views as pictures: cut out, and over a background.

Notable:
- Fields leave faint matter around objects, and solid parts a little translucent. Over white neither shows,
  but over black both do. So opacities below FAINT become 0 and those above 1 − FAINT become 1.
- docs/export.md states what this does to the error over white and over black.
"""

import io
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from latentscenes.core.cameras import Cameras, Viewpoint
from latentscenes.data.images import white_background
from latentscenes.model.model import Model, RenderedImages, render_images, to_uint8
from latentscenes.model.planes import SceneParameters

Backdrop = Literal["white", "black", "transparent"]
FAINT = 0.1
"""Opacities up to this are haze, and those that are as near to 1 are solid."""
THUMBNAIL = 96
"""Pixels of a thumbnail's longer side."""
THUMBNAIL_ANGLES = 25.0, 40.0
"""Elevation and azimuth of a thumbnail's camera, degrees. `web/camera.js` has the same."""
THUMBNAIL_REACH = 0.48
"""How far the box reaches from the middle of a thumbnail, as a fraction of its side; `web/camera.js` has the
same."""


def with_alpha(shown: RenderedImages, silhouettes: bool = False) -> UInt8[np.ndarray, "v H W 4"]:
    """Converts rendered pictures to straight alpha, without haze.

    Where pictures were learned without `silhouettes`, fields may grow white matter around the object. White
    that is connected to the border is then transparent, and pixels beside such matter get the smallest alpha
    that their color allows. With them, opacity is what it says, and white parts of the object stay.
    """
    over_white = shown.images
    opacity = _enlarged(shown.opacity, over_white.shape[2:])
    least = 1 - over_white.amin(
        1
    )  # the smallest alpha with which a color in [0, 1] gives the pixel over white
    ground = torch.zeros_like(opacity, dtype=torch.bool)
    if not silhouettes:
        ground = torch.from_numpy(white_background(to_uint8(over_white)))
    matter = (ground & (opacity > 0.5)).float()
    beside = nn.functional.max_pool2d(matter[:, None], 3, 1, 1)[:, 0] > 0
    raw = torch.where(beside, least, torch.maximum(least, opacity))
    color = 1 - (1 - over_white) / raw.clamp_min(1e-3)[:, None]
    alpha = torch.where(ground, 0, (raw - FAINT) / (1 - 2 * FAINT)).clamp(0, 1)
    return to_rgba(color, alpha)


def _enlarged(opacity: Float[Tensor, "v a b"], size: torch.Size) -> Float[Tensor, "v H W"]:
    """Resizes opacities of latent pixels to those of pictures."""
    if opacity.shape[1:] == size:
        return opacity
    return nn.functional.interpolate(opacity[:, None], tuple(size), mode="bilinear")[:, 0]


def to_rgba(color: Float[Tensor, "v 3 H W"], alpha: Float[Tensor, "v H W"]) -> UInt8[np.ndarray, "v H W 4"]:
    """Converts colors and alpha to bytes; transparent pixels become white."""
    color = torch.where(alpha[:, None] > 0, color, 1.0)
    both = torch.cat([color, alpha[:, None]], 1).clamp(0, 1)
    return (255 * both).round().byte().permute(0, 2, 3, 1).contiguous().numpy()


def over(
    pictures: UInt8[np.ndarray, "v H W 4"], background: Backdrop
) -> UInt8[np.ndarray, "v H W 4"] | UInt8[np.ndarray, "v H W 3"]:
    """Composites pictures over white or black, or leaves them transparent."""
    if background == "transparent":
        return pictures
    alpha = pictures[..., 3:].astype(np.float32) / 255
    behind = 255.0 if background == "white" else 0.0
    return np.round(pictures[..., :3] * alpha + behind * (1 - alpha)).astype(np.uint8)


@torch.no_grad()
def thumbnail(model: Model, rows: SceneParameters, view: Viewpoint, silhouettes: bool = False) -> bytes:
    """Renders a small PNG of a scene, cut out (see `with_alpha`). The image just holds the scene's box, and
    the camera looks from the same side for all."""
    camera = view.around(rows.own_box).orbit(1, *THUMBNAIL_ANGLES)
    corners = (rows.own_box or model.box).corners()
    reach = (camera.project(corners)[0] - 0.5).abs().max()
    near = Cameras(
        camera.cam2world,
        camera.intrinsics * torch.tensor([1, 1, 0, 0]) * (THUMBNAIL_REACH / reach)
        + torch.tensor([0, 0, 0.5, 0.5]),
    )
    shown = render_images(
        model, model.compose(rows, bounded=True), near, view.size, geometry=False, adaptive=True
    )
    image = Image.fromarray(with_alpha(shown, silhouettes)[0])
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return stream.getvalue()
