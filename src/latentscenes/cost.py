"""What a scene costs: bytes and seconds, shared parts divided over N scenes.

Two published conventions:
- `amortised`: (shared)/N + per scene (3Da-AE, arXiv 2403.11678).
- `counting`: scenes of stage 1 are part of the shared cost: t(N) = t₁ + (N − N₁) τ (Fused-Planes, arXiv 2410.23742).
"""

from dataclasses import dataclass

from latentscenes.config import Config, PlanesConfig

MIB = 1024 * 1024
FLOAT_BYTES = 4


@dataclass(frozen=True)
class Memory:
    """Bytes of a collection, float32."""

    codec: int
    bases: int
    field: int
    scene: int
    """One scene: its micro planes, weights and bias."""

    @property
    def shared(self) -> int:
        return self.codec + self.bases + self.field

    def per_scene(self, count: int) -> float:
        """Bytes per scene with the shared parts divided over `count` scenes."""
        return self.shared / count + self.scene


def plane_bytes(planes: PlanesConfig) -> tuple[int, int]:
    """Bytes of one scene's rows, and of all base planes."""
    texels = 3 * planes.resolution**2
    bases = planes.bases if planes.macro else 0
    scene = texels * planes.micro + bases + int(planes.bias and bases > 0)
    return FLOAT_BYTES * scene, FLOAT_BYTES * texels * planes.macro * bases


def memory(config: Config, codec_parameters: int) -> Memory:
    """Memory of a collection learned with `config`; `codec_parameters` as counted in the codec."""
    scene, bases = plane_bytes(config.planes)
    return Memory(codec=FLOAT_BYTES * codec_parameters, bases=bases, field=FLOAT_BYTES * field_parameters(config), scene=scene)


def field_parameters(config: Config) -> int:
    """Numbers in the tiny network (of a codec of known channels: see `latent_channels`)."""
    field = config.field
    inputs = config.planes.features + 6 * field.frequencies + 3 * field.view_direction
    outputs = 1 + latent_channels(config) + 3 * config.render.preview
    return (inputs + 1) * field.hidden + (field.hidden + 1) * outputs


def latent_channels(config: Config) -> int:
    """Channels of the latent, where the configuration alone tells them."""
    return {"convolutional": config.codec.channels, "identity": 3}.get(config.codec.kind, 4)


def break_even(shared: float, ours: float, other: float) -> float | None:
    """The number of scenes from which (shared)/N + ours < other; None if never."""
    return shared / (other - ours) if other > ours else None


def seconds_counting(stage_one: float, stage_one_scenes: int, per_scene: float, count: int) -> float:
    """Total time for `count` scenes where those of stage 1 are among them."""
    return stage_one + max(0, count - stage_one_scenes) * per_scene
