"""Pictures of 3D Gaussian splats, computed one splat at a time: a plain reference of the published formulas.

Notable:
- Source: Kerbl et al., 3D Gaussian Splatting (arXiv 2308.04079), section 4, and the projection of EWA
  splatting (Zwicker et al., IEEE Visualization 2001), with 0.3 square pixels of low-pass, as is usual.
"""

import numpy as np
from jaxtyping import Float, UInt8

from latentscenes.core.cameras import Cameras
from latentscenes.export.splats import Splats

LOW_PASS = 0.3
"""Added to the variances in the picture, square pixels."""
REACH = 3.0
"""Standard deviations at which a splat ends."""


def splat_pictures(splats: Splats, cameras: Cameras, size: tuple[int, int]) -> UInt8[np.ndarray, "v H W 3"]:
    """Renders splats over white, front to back by their distance from the camera."""
    return np.stack([_picture(splats, cameras[k : k + 1], size) for k in range(len(cameras))])


def _picture(splats: Splats, camera: Cameras, size: tuple[int, int]) -> UInt8[np.ndarray, "H W 3"]:
    (matrix,), (intrinsics,) = camera.cam2world.double().numpy(), camera.intrinsics.double().numpy()
    height, width = size
    turn, eye = matrix[:, :3].T, matrix[:, 3]
    seen = (splats.positions - eye) @ turn.T
    order = np.argsort(np.linalg.norm(seen, axis=1))
    order = order[seen[order, 2] > 1e-3]
    x, y, z = seen[order].T
    fx, fy = intrinsics[0] * width, intrinsics[1] * height
    middles = np.stack([fx * x / z + intrinsics[2] * width, fy * y / z + intrinsics[3] * height], 1)
    zero = np.zeros_like(z)
    slopes = np.stack([fx / z, zero, -fx * x / z**2, zero, fy / z, -fy * y / z**2], 1).reshape(-1, 2, 3)
    flat = slopes @ turn @ (splats.rotations[order] * splats.scales[order, None])
    spread = flat @ flat.transpose(0, 2, 1) + LOW_PASS * np.eye(2)
    inverse = np.linalg.inv(spread)
    reach = REACH * np.sqrt(np.stack([spread[:, 0, 0], spread[:, 1, 1]], 1))
    first = np.maximum(np.ceil(middles - reach - 0.5), 0).astype(int)
    last = np.minimum(np.floor(middles + reach - 0.5) + 1, [width, height]).astype(int)
    color, rest = np.zeros((height, width, 3)), np.ones((height, width))
    opacities, colors = splats.opacities[order], splats.colors[order]
    for k in np.flatnonzero((first < last).all(1)):
        (left, top), (right, bottom) = first[k], last[k]
        part = slice(top, bottom), slice(left, right)
        if rest[part].max() < 1e-3:
            continue
        across = np.arange(left, right) + 0.5 - middles[k, 0]
        down = (np.arange(top, bottom) + 0.5 - middles[k, 1])[:, None]
        (a, b), (_, c) = inverse[k]
        power = a * across**2 + 2 * b * across * down + c * down**2
        share = rest[part] * np.where(power < REACH**2, opacities[k] * np.exp(-0.5 * power), 0)
        color[part] += share[..., None] * colors[k]
        rest[part] -= share
    return _bytes(color + rest[..., None])


def _bytes(values: Float[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W 3"]:
    return np.round(255 * values.clip(0, 1)).astype(np.uint8)
