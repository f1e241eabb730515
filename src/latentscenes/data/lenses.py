"""Lenses that transforms.json describes: focal lengths in all their spellings, distortion undone, others
refused.

Distortion is that of OpenCV's perspective model with k1, k2, k3 (radial) and p1, p2 (tangential). A point at
(x, y) in front of the camera, at depth 1 and distance r from the axis, appears at

    x' = x (1 + k1 r² + k2 r⁴ + k3 r⁶) + 2 p1 x y + p2 (r² + 2 x²)
    y' = y (1 + k1 r² + k2 r⁴ + k3 r⁶) + p1 (r² + 2 y²) + 2 p2 x y

(OpenCV's documentation of camera calibration). nerfstudio and instant-ngp mean the same by these keys.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch.nn.functional import grid_sample

from latentscenes.core.errors import UserError

RADIAL, TANGENTIAL = ("k1", "k2", "k3"), ("p1", "p2")
UNDONE = (*RADIAL, *TANGENTIAL)
AMBIGUOUS = ("k4", "k5", "k6")
"""More coefficients. They divide in OpenCV's model and multiply in nerfstudio's, so they are refused."""
OTHER_LENSES = (
    "is_fisheye", "fisheye_crop_radius", "ftheta_p0", "ftheta_p1", "ftheta_p2", "ftheta_p3", "ftheta_p4",
    "latlong", "equirectangular", "orthographic", "distortion_params",
)  # fmt: skip
"""Keys of instant-ngp and nerfstudio that, unless false or zero, describe lenses without pinhole cameras."""
PINHOLES = {
    "", "OPENCV", "PINHOLE", "SIMPLE_PINHOLE", "PERSPECTIVE", "SIMPLE_RADIAL", "RADIAL", "FULL_OPENCV",
}  # fmt: skip
"""Camera models that are pinholes but for k1 … p2."""
SIDES = ("w", "h")
FOCAL = {"x": ("fl_x", "camera_angle_x", "x_fov"), "y": ("fl_y", "camera_angle_y", "y_fov")}
"""Spellings of the focal length: pixels, angle of view in radians, and in degrees."""
LENS_KEYS = {
    *SIDES, "cx", "cy", *FOCAL["x"], *FOCAL["y"], "camera_model", *UNDONE, *AMBIGUOUS, *OTHER_LENSES,
}  # fmt: skip
AGREE = 0.02
"""Relative difference up to which two statements of one focal length agree."""
MOST_ZOOM = 2.0
"""Undistorted pictures are enlarged until no pixel lies outside the source; more than this is refused."""
ROWS = 256
"""Rows of a picture that are resampled at a time, so that little memory is needed."""


@dataclass(frozen=True)
class Lens:
    """The distortion of a camera, and the pinhole camera that replaces it."""

    coefficients: tuple[float, float, float, float, float]
    """k1, k2, k3, p1, p2."""
    intrinsics: tuple[float, float, float, float]
    """fx, fy, cx, cy of the distorted camera, as fractions of the image."""
    zoom: float
    """Focal length of the pinhole camera relative to the distorted one; no pixel lies outside the source."""

    @property
    def pinhole(self) -> tuple[float, float, float, float]:
        """fx, fy, cx, cy of the undistorted picture, as fractions of the image."""
        fx, fy, cx, cy = self.intrinsics
        return fx * self.zoom, fy * self.zoom, cx, cy

    def places(
        self, across: Float[np.ndarray, "*b"], down: Float[np.ndarray, "*b"]
    ) -> tuple[Float[np.ndarray, "*b"], Float[np.ndarray, "*b"]]:
        """Returns where places of the undistorted picture lie in the source, as fractions of both."""
        fx, fy, cx, cy = self.intrinsics
        x, y = (across - cx) / (fx * self.zoom), (down - cy) / (fy * self.zoom)
        x, y = _distorted(x, y, self.coefficients)
        return fx * x + cx, fy * y + cy

    def undistorted(self, pixels: UInt8[np.ndarray, "H W c"]) -> UInt8[np.ndarray, "H W c"]:
        """Returns the picture, of the same size, as the pinhole camera sees it (bilinear)."""
        height, width, channels = pixels.shape
        found = np.empty_like(pixels)
        across = (np.arange(width) + 0.5) / width
        for channel in range(channels):
            source = torch.from_numpy(pixels[..., channel].astype(np.float32))[None, None]
            for top in range(0, height, ROWS):
                down = (np.arange(top, min(top + ROWS, height)) + 0.5) / height
                x, y = self.places(*np.meshgrid(across, down))
                grid = torch.from_numpy(np.stack([2 * x - 1, 2 * y - 1], -1).astype(np.float32))[None]
                values = grid_sample(source, grid, padding_mode="border", align_corners=False)[0, 0]
                found[top : top + len(down), :, channel] = values.add(0.5).clamp(0, 255).byte().numpy()
        return found


def _distorted(
    x: Float[np.ndarray, "*b"], y: Float[np.ndarray, "*b"], coefficients: tuple[float, ...]
) -> tuple[Float[np.ndarray, "*b"], Float[np.ndarray, "*b"]]:
    k1, k2, k3, p1, p2 = coefficients
    square = x * x + y * y
    radial = 1 + square * (k1 + square * (k2 + square * k3))
    return (
        x * radial + 2 * p1 * x * y + p2 * (square + 2 * x * x),
        y * radial + p1 * (square + 2 * y * y) + 2 * p2 * x * y,
    )


def read_lens(
    frame: dict[str, Any], intrinsics: tuple[float, float, float, float], label: str
) -> Lens | None:
    """Returns the distortion that a frame states; None for a pinhole camera.

    Args:
        frame: the frame's keys, over those of its file.
        intrinsics: fx, fy, cx, cy as fractions of the image.
        label: of the frame, for messages.

    Raises:
        UserError: the lens is a fisheye or panorama, has coefficients whose meaning differs between programs,
            or shows places twice.
    """
    _refuse_others(frame, label)
    if not any(is_set(frame.get(key)) for key in UNDONE):
        return None
    try:
        numbers = tuple(float(frame.get(key) or 0) for key in UNDONE)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{label}: {', '.join(UNDONE)} must be numbers ({error}).") from None
    stated = ", ".join(f"{key} = {number:g}" for key, number in zip(UNDONE, numbers) if number)
    if not all(map(math.isfinite, (*numbers, *intrinsics))) or min(intrinsics[:2]) <= 0:
        raise UserError(f"{label}: {stated} and its focal lengths must be finite, and these above 0.")
    for zoom in np.geomspace(1, MOST_ZOOM, 141):  # steps of 0.5 %
        lens = Lens(numbers, intrinsics, float(zoom))
        if _inside(lens):
            if _folds(lens):
                break
            return lens
    raise UserError(
        f"{label}: a lens with {stated} shows places twice or not at all, so its pictures cannot be "
        "undistorted. Correct the coefficients, or undistort the pictures (such as by COLMAP's "
        "image_undistorter), write the new focal lengths, and remove them."
    )


def _inside(lens: Lens) -> bool:
    """Returns whether the border of the undistorted picture lies inside the source."""
    along, low, high = np.linspace(0, 1, 129), np.zeros(129), np.ones(129)
    across = np.concatenate([along, along, low, high])
    down = np.concatenate([low, high, along, along])
    return all(((place >= -1e-6) & (place <= 1 + 1e-6)).all() for place in lens.places(across, down))


def _folds(lens: Lens) -> bool:
    """Returns whether the lens maps two places of the picture to one: its area would change sign."""
    sides = np.linspace(0, 1, 65)
    x, y = lens.places(*np.meshgrid(sides, sides))
    (x_down, x_across), (y_down, y_across) = np.gradient(x), np.gradient(y)
    return bool((x_across * y_down - x_down * y_across <= 0).any())


def _refuse_others(frame: dict[str, Any], label: str) -> None:
    if other := [key for key in OTHER_LENSES if is_set(frame.get(key))]:
        raise UserError(
            f"{label}: {other[0]} = {frame[other[0]]} says that the camera is no pinhole camera. Undistort "
            f"the images first (such as by OpenCV's fisheye module), and remove {', '.join(other)}."
        )
    model = str(frame.get("camera_model") or "").upper()
    if model not in PINHOLES:
        raise UserError(
            f"{label}: camera_model {model!r} is no pinhole camera. Undistort the images first (for "
            "instance with COLMAP's image_undistorter)."
        )
    if more := [key for key in AMBIGUOUS if is_set(frame.get(key))]:
        raise UserError(
            f"{label}: {more[0]} = {frame[more[0]]} means different things in OpenCV and nerfstudio. "
            "Undistort the images (COLMAP's image_undistorter, or OpenCV's undistort), write the new focal "
            f"lengths, and set {', '.join((*UNDONE, *more))} to 0."
        )


def is_set(value: Any) -> bool:
    """Returns whether the value of a key is not false or zero, as a number, a text, or a list of them."""
    if isinstance(value, dict | list):
        return any(map(is_set, value.values() if isinstance(value, dict) else value))
    if isinstance(value, str):
        try:
            return float(value) != 0
        except ValueError:
            return value.lower() not in ("", "false", "none")
    return bool(value)


def read_intrinsics(
    levels: tuple[dict[str, Any], ...], real: tuple[int, int], label: str
) -> tuple[float, float, float, float]:
    """Returns fx, fy, cx, cy as fractions of the image. Pixels refer to the stated w and h, or else to the
    image.

    Args:
        levels: where keys are looked up: the frame, then its file.
        real: height and width of the image, in pixels.
        label: of the frame, for messages.

    Raises:
        UserError: no focal length, contradicting ones, or w and h of another shape than the image.
    """
    known = [_numbers(level, label) for level in levels]
    merged = {key: value for level in reversed(known) for key, value in level.items()}
    height, width = real
    if "w" in merged and "h" in merged:
        width, height = merged["w"], merged["h"]
    if min(width, height) <= 0 or abs(width * real[0] / (height * real[1]) - 1) > AGREE:
        raise UserError(
            f"{label}: states images of {width:g}x{height:g} (w x h), but this one is {real[1]}x{real[0]}, "
            "another shape. Correct w and h, to which fl_x, fl_y, cx and cy refer."
        )
    sides = {"x": width, "y": height}
    for level in known:  # the frame's own focal lengths replace both of the file
        fl_x, fl_y = (_focal(level, axis, side, label) for axis, side in sides.items())
        if fl_x is not None or fl_y is not None:
            break
    else:
        raise UserError(f"{label}: no focal length; give fl_x (pixels) or camera_angle_x (radians).")
    fl_x, fl_y = fl_y if fl_x is None else fl_x, fl_x if fl_y is None else fl_y
    cx, cy = merged.get("cx", width / 2), merged.get("cy", height / 2)
    return fl_x / width, fl_y / height, cx / width, cy / height


def _numbers(level: dict[str, Any], label: str) -> dict[str, float]:
    keys = (*SIDES, "cx", "cy", *FOCAL["x"], *FOCAL["y"])
    try:
        return {key: float(level[key]) for key in keys if level.get(key) is not None}
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{label}: intrinsics must be numbers ({error}).") from None


def _focal(level: dict[str, float], axis: str, side: int | float, label: str) -> float | None:
    """Returns the focal length along an axis in pixels, from any of its spellings; None if there is none."""
    pixels, radians, degrees = FOCAL[axis]
    found = {pixels: level[pixels]} if pixels in level else {}
    for key, half_turn, unit in ((radians, math.pi, "pi"), (degrees, 180.0, "180 degrees")):
        if key in level:
            if not 0 < level[key] < half_turn:
                raise UserError(f"{label}: {key} = {level[key]:g} must lie between 0 and {unit}.")
            found[key] = 0.5 * side / math.tan(level[key] / half_turn * math.pi / 2)
    if not found:
        return None
    first, *others = found
    for other in others:
        if abs(found[other] - found[first]) > AGREE * abs(found[first]):
            raise UserError(
                f"{label}: {first} = {level[first]:g} and {other} = {level[other]:g} contradict each other "
                f"({found[first]:.1f} and {found[other]:.1f} pixels). Remove the wrong one."
            )
    return found[first]
