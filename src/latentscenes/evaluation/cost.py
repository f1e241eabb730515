"""Memory and time per scene in a collection of N scenes, including a share of the common parts. Times are
CPU times, with wall times beside them.

There are two published conventions:
- `amortized`, the default: shared / N + per scene (3Da-AE, arXiv 2403.11678).
- `counting`: the N₁ scenes of stage 1 are among the N, so t(N) = t₁ + (N − N₁) τ (Fused-Planes, arXiv
  2410.23742).
"""

import math
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Literal

import torch

from latentscenes.core.config import CodecConfig, Config, PlanesConfig
from latentscenes.core.console import Spent
from latentscenes.core.errors import UserError
from latentscenes.core.files import open_tensors, reading_from
from latentscenes.storage.scene_set import StoredScenes

MIB = 1024 * 1024
FLOAT_BYTES = 4
COUNTS = (10, 100, 1000, 10_000)
"""Collection sizes N in tables."""

KNOWN_CODECS = {
    "stable-diffusion": 83_653_863,
    "sd-vae": 83_653_863,
    "sdxl-vae": 83_653_863,
    "taesd": 2_445_063,
}
"""Numbers of parameters of published autoencoders by a part of their name, used if the weights are not on
disk."""


@dataclass(frozen=True)
class MemoryCost:
    """Memory of a collection in bytes, as float32."""

    codec: int
    bases: int
    field: int
    scene: int
    """Micro planes, weights, bias and mixing of one scene."""

    @property
    def shared(self) -> int:
        return self.codec + self.bases + self.field

    def per_scene(self, count: int) -> float:
        """Bytes per scene if `count` scenes share the common parts."""
        return self.shared / count + self.scene


@dataclass(frozen=True)
class TimeCost:
    """Learning time of a collection."""

    stage_one: Spent
    """Time of stage 1; 0 if scenes share nothing that is learned first."""
    stage_one_scenes: int
    scene: Spent | None
    """Time of one new scene; None if no new scene has been learned."""

    def per_scene(self, count: int) -> Spent | None:
        """Time per scene if `count` new scenes share the time of stage 1 (`amortized`)."""
        return None if self.scene is None else self.stage_one.times(1 / count) + self.scene

    def per_scene_counting(self, count: int) -> Spent | None:
        """Time per scene if the `count` scenes include those of stage 1 (`counting`)."""
        if self.scene is None:
            return None
        later = self.scene.times(max(0, count - self.stage_one_scenes))
        return (self.stage_one + later).times(1 / count)


@dataclass(frozen=True)
class Costs:
    """Cost of one way of learning scenes."""

    config: Config
    memory: MemoryCost
    time: TimeCost | None = None
    stored: tuple[int, float] | None = None
    """Bytes on disk of the shared parts and of one scene. None without a run."""


def config_costs(config: Config) -> Costs:
    """Computes the memory cost of a configuration."""
    return Costs(config, memory_cost(config, codec_parameters(config.codec)))


def learned_costs(learned: StoredScenes, config: Config | None = None) -> Costs:
    """Computes the cost of learned scenes. With `config`, computes memory for that configuration instead of
    their own. Raises a UserError if their run is not finished."""
    learned.require_finished()
    used = memory_cost(
        config or learned.config,
        codec_parameters(config.codec) if config else stored_codec_parameters(learned.shared_file),
    )
    count = len(learned.names)
    each = learned.spent.times(1 / count)
    if learned.stage_one:
        time = TimeCost(*learned.stage_one, each)
    elif not used.codec and not used.bases:
        time = TimeCost(Spent(0.0, 0.0), 0, each)
    else:
        time = TimeCost(learned.spent, count, None)
    stored = learned.shared_file.stat().st_size, learned.scene_bytes
    return Costs(config or learned.config, used, time, stored)


def plane_bytes(planes: PlanesConfig) -> tuple[int, int]:
    """Returns the bytes of one scene's parameters and of all base planes."""
    texels = 3 * planes.resolution**2
    bases = planes.bases if planes.macro else 0
    scene = (
        texels * planes.micro + bases + int(planes.bias and bases > 0) + planes.mixing * planes.features**2
    )
    return FLOAT_BYTES * scene, FLOAT_BYTES * texels * planes.macro * bases


def memory_cost(config: Config, codec_parameters: int) -> MemoryCost:
    """Memory of a collection learned with `config`, whose codec has `codec_parameters` parameters."""
    scene, bases = plane_bytes(config.planes)
    return MemoryCost(
        codec=FLOAT_BYTES * codec_parameters,
        bases=bases,
        field=FLOAT_BYTES * field_parameters(config),
        scene=scene,
    )


def field_parameters(config: Config) -> int:
    """Number of parameters of the field's network, for a codec with `latent_channels` channels."""
    field = config.field
    inputs = config.planes.features + 6 * field.frequencies + 3 * field.view_direction
    outputs = 1 + latent_channels(config) + 3 * config.render.preview
    return (inputs + 1) * field.hidden + (field.hidden + 1) * outputs


def latent_channels(config: Config) -> int:
    """Number of latent channels according to the configuration; 4 for pretrained codecs."""
    channels = config.codec.channels
    return {"convolutional": channels, "guided": channels, "identity": 3}.get(config.codec.kind, 4)


def codec_parameters(config: CodecConfig) -> int:
    """Number of parameters of a codec. Our own codecs are built and counted. Pretrained codecs are counted
    from their weights if these are on disk, and otherwise looked up by name."""
    from latentscenes.model.model import build_codec

    if config.kind in ("convolutional", "guided", "identity"):
        with torch.device("meta"):  # shapes without memory
            return sum(parameter.numel() for parameter in build_codec(config, pretrained=False).parameters())
    if not Path(config.path or "").expanduser().is_dir():
        for name, count in KNOWN_CODECS.items():
            if name in (config.path or "").lower():
                return count
        raise UserError(
            f"codec.path: {config.path!r} is not a folder here, and its size is not known by name "
            f"(known: {', '.join(KNOWN_CODECS)})."
        )
    return sum(parameter.numel() for parameter in build_codec(config).parameters())


def stored_codec_parameters(path: Path) -> int:
    """Number of codec parameters in a checkpoint's shared.safetensors. Reads only the header."""
    remedy = "Restore it from a copy, or learn it again."
    with reading_from(path, remedy), open_tensors(path, "np") as stored:
        names = [name for name in stored.keys() if name.startswith("codec.")]
        return sum(math.prod(stored.get_slice(name).get_shape()) for name in names)


def break_even(shared: float | int, ours: float | int, other: float | int) -> float | None:
    """The number of scenes N above which shared / N + ours < other; None if there is none. `shared` is the
    excess of our shared parts over the other's; if it is negative, ours is ahead from the first scene on."""
    return max(shared / (other - ours), 0.0) if other > ours else None


def memory_break_even(ours: MemoryCost, other: MemoryCost) -> float | None:
    return break_even(ours.shared - other.shared, ours.scene, other.scene)


def clock(*times: TimeCost) -> Literal["cpu", "wall"]:
    """The clock by which times compare: CPU time, or wall time where a time of one side was recorded without
    CPU time."""
    spent = [one for time in times for one in (time.stage_one, time.scene) if one]
    return "wall" if any(one.cpu is None for one in spent) else "cpu"


def time_break_even(ours: TimeCost, other: TimeCost) -> float | None:
    """The break-even N in time, by the amortized convention and `clock`; None if there is none, or a side has
    learned no new scene."""
    if ours.scene is None or other.scene is None:
        return None
    seconds = attrgetter(clock(ours, other))
    return break_even(seconds(ours.stage_one - other.stage_one), seconds(ours.scene), seconds(other.scene))


def saving(ours: float | int, other: float | int) -> float:
    """Change from `other` to `ours` in percent: −44 means that ours is 44 % less."""
    return 100 * (ours / other - 1)
