"""Light on surfaces, and colors between sRGB values and linear light."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32

from latentscenes.data.options import LightName


@dataclass(frozen=True)
class Lights:
    """Lambertian light, as a factor of a surface's color. It depends on the normal only, unless `camera` is
    set."""

    ambient: float = 0.52
    """Light on every surface."""
    sky: float = 0.12
    """Light added to surfaces that face up and removed from surfaces that face down."""
    directions: tuple[tuple[float, float, float], ...] = ((0.45, 0.55, 0.75), (-0.7, -0.5, 0.45))
    """Directions toward the lamps, of any length."""
    strengths: tuple[float, ...] = (0.36, 0.22)
    camera: float = 0.0
    """Strength of a lamp at the camera."""

    def shade(
        self, normals: Float32[np.ndarray, "n 3"], rays: Float32[np.ndarray, "n 3"] | None = None
    ) -> Float32[np.ndarray, "n"]:
        """Returns the light on surfaces with these unit normals that these rays (unit directions) meet."""
        light = self.ambient + self.sky * normals[:, 2]
        for direction, strength in zip(self.directions, self.strengths, strict=True):
            toward = np.asarray(direction, np.float32) / np.float32(np.linalg.norm(direction))
            light += np.float32(strength) * np.maximum(normals @ toward, 0)
        if self.camera and rays is not None:
            light += np.float32(self.camera) * np.maximum(-(normals * rays).sum(-1), 0)
        return light


LIGHTS: dict[LightName, Lights] = {
    "studio": Lights(
        0.66,
        0.1,
        ((0.35, -0.8, 0.6), (0.6, 0.7, 0.4), (-0.9, 0.2, 0.4), (-0.4, -0.8, 0.3)),
        (0.2, 0.12, 0.12, 0.08),
    ),
    "flat": Lights(1.0, 0.0, (), ()),
    "camera": Lights(0.6, 0.05, (), (), 0.4),
}
"""Light for imported meshes, in linear light, the same for every object. `studio`: bright and even, from all
sides, a little stronger from the front (−y); white stays below 1 almost everywhere. `flat`: the surface's own
color. `camera`: a lamp that moves with the camera, so that an object looks different from view to view."""

_ENCODED = np.arange(256) / 255
SRGB_TO_LINEAR: Float32[np.ndarray, "256"] = np.where(
    _ENCODED <= 0.04045, _ENCODED / 12.92, ((_ENCODED + 0.055) / 1.055) ** 2.4
).astype(np.float32)
"""Linear light of every byte (IEC 61966-2-1)."""


def to_linear(encoded: Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
    """Converts sRGB values in [0, 1] to linear light (IEC 61966-2-1)."""
    return np.where(encoded <= 0.04045, encoded / 12.92, ((np.maximum(encoded, 0) + 0.055) / 1.055) ** 2.4)


def to_srgb(light: Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
    """Converts linear light to sRGB values, clipped to [0, 1] (IEC 61966-2-1)."""
    light = np.clip(light, 0, 1)
    curved = 1.055 * np.maximum(light, 1e-9) ** np.float32(1 / 2.4) - np.float32(0.055)
    return np.where(light <= 0.0031308, np.float32(12.92) * light, curved)
