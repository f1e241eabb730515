"""Visual hulls of scenes: where matter can be, by the silhouettes of their training views.

While a scene is learned, rays that meet its hull sample inside it only. The others sample in the whole box,
so that what lies outside becomes empty.
"""

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from latentscenes.core.cameras import Box
from latentscenes.data.boxes import allowed_wrong, carving_views, small_masks, visual_hull
from latentscenes.data.dataset import PosedImages, Scene
from latentscenes.rendering.occupancy import SIDE, bound_rays, dilated
from latentscenes.rendering.render import camera_rays

SEEN = 8
"""Alpha (0 to 255) above which a pixel belongs to a silhouette."""
SOLID = 48
"""Alpha from which a pixel must lie in front of the hull. Glass has little."""
CHECKED = 32
"""Rows and columns of each silhouette that are compared with the hull."""
MISSED = 0.002
"""Share of these pixels that a hull may miss. Where it misses more, masks or cameras are wrong."""


class Hulls:
    """The hulls of scenes, each carved when it is first asked for. One takes about 0.04 CPU seconds."""

    def __init__(self, images: PosedImages, scenes: list[Scene], boxes: Float[Tensor, "n 6"]):
        """`boxes`: center and half sides of each scene's box."""
        self.images, self.scenes, self.boxes = images, scenes, boxes.cpu()
        self._packed: dict[int, UInt8[np.ndarray, "b"]] = {}

    def of(self, scenes: list[int]) -> UInt8[Tensor, "s n n n"]:
        """Returns the cells of some scenes' hulls (see `carved`)."""
        for scene in scenes:
            if scene not in self._packed:
                self._packed[scene] = np.packbits(carved(self.images, self.scenes[scene], self.boxes[scene]))
        cells = np.unpackbits(np.stack([self._packed[scene] for scene in scenes]), axis=1)
        return torch.from_numpy(cells).view(-1, SIDE, SIDE, SIDE)


def carved(images: PosedImages, scene: Scene, box: Float[Tensor, "6"]) -> UInt8[np.ndarray, "n n n"]:
    """Returns the cells of a box that a scene may occupy: its visual hull, and the cells next to it. If its
    silhouettes contradict each other, so that the hull misses a part of the object, all cells. In twelve
    or more views, one in 33 may be wrong."""
    fitted = scene.views("fit")
    index = [fitted[k] for k in carving_views(len(fitted))]
    alpha, cameras = np.asarray(images.alpha[index]), images.cameras[torch.tensor(index)]
    hull = visual_hull(small_masks(alpha > SEEN), cameras, Box.of(box), SIDE)
    cells = dilated(torch.from_numpy(hull)[None].float())
    # Compare with the silhouettes
    rows, columns = ((np.arange(CHECKED) + 0.5) / CHECKED * side for side in alpha.shape[1:])
    solid = alpha[:, rows.astype(int)][:, :, columns.astype(int)] >= SOLID
    rays = camera_rays(cameras, box[None], CHECKED, CHECKED)
    bounded = bound_rays(rays, cells)
    missed = (rays.far > rays.near) & (bounded.far <= bounded.near)
    looked = torch.from_numpy(solid).flatten(1)
    missed = (missed.view_as(looked) & looked).sum(1)
    agreeing = missed.argsort()[: len(index) - allowed_wrong(len(index))]  # a wrong mask or two do not count
    if missed[agreeing].sum() > MISSED * looked[agreeing].sum():
        return np.ones_like(hull, dtype=np.uint8)
    return cells[0].numpy()
