"""What a scene costs: bytes and seconds, shared parts divided over N scenes.

Two published conventions:
- `amortized`: (shared)/N + per scene (3Da-AE, arXiv 2403.11678). Used unless another is named.
- `counting`: scenes of stage 1 are among the N: t(N) = t₁ + (N − N₁) τ (Fused-Planes, arXiv 2410.23742).
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from latentscenes.core.config import CodecConfig, Config, PlanesConfig
from latentscenes.core.errors import UserError
from latentscenes.storage.scene_set import StoredScenes

MIB = 1024 * 1024
FLOAT_BYTES = 4
COUNTS = (10, 100, 1000, 10_000)
"""Collection sizes that tables show."""

KNOWN_CODECS = {
    "stable-diffusion": 83_653_863,
    "sd-vae": 83_653_863,
    "sdxl-vae": 83_653_863,
    "taesd": 2_445_063,
}
"""Parameters of published autoencoders, by a part of their name; for those whose weights are not at hand."""


@dataclass(frozen=True)
class Memory:
    """Bytes of a collection, float32."""

    codec: int
    bases: int
    field: int
    scene: int
    """One scene: its micro planes, weights, bias and mixing."""

    @property
    def shared(self) -> int:
        return self.codec + self.bases + self.field

    def per_scene(self, count: int) -> float:
        """Bytes per scene with the shared parts divided over `count` scenes."""
        return self.shared / count + self.scene


@dataclass(frozen=True)
class Time:
    """Seconds of learning a collection."""

    stage_one: float
    """All of stage 1; 0 where scenes share nothing that has to be learned first."""
    stage_one_scenes: int
    scene: float | None
    """One new scene; None if none has been learned yet."""

    def per_scene(self, count: int) -> float | None:
        """Seconds per new scene with stage 1 divided over `count` of them (`amortized`)."""
        return None if self.scene is None else self.stage_one / count + self.scene

    def per_scene_counting(self, count: int) -> float | None:
        """Seconds per scene where those of stage 1 are among the `count` (`counting`)."""
        return (
            None
            if self.scene is None
            else seconds_counting(self.stage_one, self.stage_one_scenes, self.scene, count) / count
        )


@dataclass(frozen=True)
class Account:
    """What one way of learning scenes costs."""

    config: Config
    memory: Memory
    time: Time | None = None
    stored: tuple[int, float] | None = None
    """Bytes of files: shared parts, and one scene's share of the others. None without a run."""


def account(config: Config) -> Account:
    """Of a configuration alone."""
    return Account(config, memory(config, codec_parameters(config.codec)))


def account_learned(learned: StoredScenes, config: Config | None = None) -> Account:
    """Of learned scenes (with other settings in `config`: then of memory, beside the seconds they took)."""
    used = memory(
        config or learned.config,
        codec_parameters(config.codec) if config else stored_codec_parameters(learned.shared_file),
    )
    count = len(learned.names)
    if learned.stage_one:
        time = Time(*learned.stage_one, learned.seconds / count)
    elif not used.codec and not used.bases:
        time = Time(0.0, 0, learned.seconds / count)
    else:
        time = Time(learned.seconds, count, None)
    return Account(
        config or learned.config, used, time, (learned.shared_file.stat().st_size, learned.scene_bytes)
    )


def plane_bytes(planes: PlanesConfig) -> tuple[int, int]:
    """Bytes of one scene's rows, and of all base planes."""
    texels = 3 * planes.resolution**2
    bases = planes.bases if planes.macro else 0
    scene = (
        texels * planes.micro + bases + int(planes.bias and bases > 0) + planes.mixing * planes.features**2
    )
    return FLOAT_BYTES * scene, FLOAT_BYTES * texels * planes.macro * bases


def memory(config: Config, codec_parameters: int) -> Memory:
    """Memory of a collection learned with `config`; `codec_parameters` as counted in the codec."""
    scene, bases = plane_bytes(config.planes)
    return Memory(
        codec=FLOAT_BYTES * codec_parameters,
        bases=bases,
        field=FLOAT_BYTES * field_parameters(config),
        scene=scene,
    )


def field_parameters(config: Config) -> int:
    """Numbers in the tiny network (of a codec of known channels: see `latent_channels`)."""
    field = config.field
    inputs = config.planes.features + 6 * field.frequencies + 3 * field.view_direction
    outputs = 1 + latent_channels(config) + 3 * config.render.preview
    return (inputs + 1) * field.hidden + (field.hidden + 1) * outputs


def latent_channels(config: Config) -> int:
    """Channels of the latent, where the configuration alone tells them."""
    return {"convolutional": config.codec.channels, "identity": 3}.get(config.codec.kind, 4)


def codec_parameters(config: CodecConfig) -> int:
    """Numbers in a codec: counted in ours; of pretrained ones by name, or in the weights if they are at
    hand."""
    from latentscenes.model.model import build_codec

    if config.kind in ("convolutional", "identity"):
        with torch.device("meta"):  # shapes without memory
            return sum(parameter.numel() for parameter in build_codec(config, pretrained=False).parameters())
    if not Path(config.path or "").expanduser().is_dir():
        for name, count in KNOWN_CODECS.items():
            if name in (config.path or "").lower():
                return count
        raise UserError(
            f"codec.path: {config.path!r} is no folder here, and its size is not known by name ({', '.join(KNOWN_CODECS)} are)."
        )
    return sum(parameter.numel() for parameter in build_codec(config).parameters())


def stored_codec_parameters(path: Path) -> int:
    """Numbers of the codec in a checkpoint's shared.safetensors, from its header alone."""
    with safe_open(path, "pt") as stored:
        return sum(
            math.prod(stored.get_slice(name).get_shape())
            for name in stored.keys()
            if name.startswith("codec.")
        )  # noqa: SIM118


def break_even(shared: float | int, ours: float | int, other: float | int) -> float | None:
    """The number of scenes N from which shared/N + ours < other; None if never. `shared` is what ours shares
    beyond what the other does; if that is less than nothing, ours is ahead from the first scene on."""
    return max(shared / (other - ours), 0.0) if other > ours else None


def memory_break_even(ours: Memory, other: Memory) -> float | None:
    return break_even(ours.shared - other.shared, ours.scene, other.scene)


def time_break_even(ours: Time, other: Time) -> float | None:
    """By the amortized convention."""
    if ours.scene is None or other.scene is None:
        return None
    return break_even(ours.stage_one - other.stage_one, ours.scene, other.scene)


def saving(ours: float | int, other: float | int) -> float:
    """Change against the other in percent: −44 means 44 % less."""
    return 100 * (ours / other - 1)


def seconds_counting(stage_one: float, stage_one_scenes: int, per_scene: float, count: int) -> float:
    """Total time for `count` scenes where those of stage 1 are among them."""
    return stage_one + max(0, count - stage_one_scenes) * per_scene
