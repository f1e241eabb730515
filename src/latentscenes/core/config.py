"""Every setting, as frozen dataclasses with a docstring for each field.

Settings that contradict each other are refused when a Config is built. `config_io` reads and writes YAML. Neither file
loads torch.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from latentscenes.core.errors import UserError

Aggregation = Literal["sum", "product"]
Axes = Literal["xy,xz,yz", "eg3d"]
Kernel = Literal["auto", "native", "triton", "torch"]
MatmulPrecision = Literal["float32", "tf32", "bfloat16"]
StoragePrecision = Literal["float32", "float16", "int8", "int6", "int5", "int4", "int3"]
"""How scenes are stored in a library, from exact to coarse."""


@dataclass(frozen=True)
class CodecConfig:
    """The image autoencoder whose latent space scenes live in."""

    kind: Literal["convolutional", "identity", "diffusers", "tiny"] = "convolutional"
    """`convolutional`: our own small one. `identity`: latents are the pixels themselves, which gives RGB tri-planes.
    `diffusers`: AutoencoderKL or AutoencoderTiny. `tiny`: a TAESD-like pair of weight files."""
    path: str | None = None
    """Where pretrained weights lie: a folder (or hub name) for `diffusers`, a folder for `tiny`, a run that learned the
    same codec for `convolutional` (unset: a codec stage warms it up from nothing)."""
    subfolder: str | None = None
    """Folder inside `path` where the autoencoder lies; a pipeline's `vae` is found by itself in local folders."""
    allow_download: bool = False
    """Let `diffusers` fetch weights from the hub; without it only local files are used."""
    downsampling: int = 4
    """Image pixels per latent pixel, along each side (`convolutional`: 2, 4 or 8)."""
    channels: int = 8
    """Latent channels (`convolutional`)."""
    width: int = 64
    """Feature channels of the inner layers at latent resolution (`convolutional`)."""
    bfloat16: bool = True
    """Convolve in bfloat16 where the processor has it in hardware (`convolutional`)."""


@dataclass(frozen=True)
class NormalizerConfig:
    """How latents are brought into (−1, 1), where the renderer's features live."""

    kind: Literal["none", "tanh", "minmax", "meanstd", "meanstd_tanh"] = "none"
    """`none`; `tanh` of the scaled latent (published); or min and max, or mean and deviation, of recent latents."""
    scale: float = 0.02
    """Slope of `tanh`."""
    window: int = 100
    """Batches that the sliding statistics of the last three kinds remember."""


@dataclass(frozen=True)
class PlanesConfig:
    """Tri-planes: what each scene owns and what all share."""

    resolution: int = 64
    """Texels along a plane's side."""
    micro: int = 10
    """Features of a scene's own planes; 0 leaves the weights alone (ultra-light scenes)."""
    macro: int = 22
    """Features of the shared base planes; 0 for none."""
    bases: int = 50
    """Number M of base tri-planes."""
    fusion: Literal["concat", "sum"] = "concat"
    """How a scene's micro and macro planes meet."""
    bias: bool = False
    """One learned number per scene, added to its macro planes."""
    mixing: bool = False
    """Let each scene own a linear mixing of its fused features: features² numbers."""
    aggregation: Aggregation = "sum"
    """How a point's three plane features meet."""
    axes: Axes = "xy,xz,yz"
    """`eg3d` reads its third plane along (z, x), as the published code does; for comparison."""
    initial_std: float = 0.1
    """Standard deviation of fresh planes (published: 1)."""

    @property
    def features(self) -> int:
        """Features of the fused planes."""
        return self.micro + self.macro if self.fusion == "concat" else max(self.micro, self.macro)


@dataclass(frozen=True)
class FieldConfig:
    """The tiny network from plane features to density and latent."""

    hidden: int = 64
    """Units of the hidden layer."""
    frequencies: int = 0
    """Octaves of positional encoding beside the plane features."""
    view_direction: bool = False
    """Let features depend on where the ray comes from."""


@dataclass(frozen=True)
class RenderConfig:
    """Ray marching."""

    coarse: int = 48
    """Stratified samples per ray."""
    fine: int = 48
    """Further samples, placed where the first found matter."""
    half_side: float | None = None
    """Half the side of a cubic scene box about the dataset's center; unset: the box fitted to the objects."""
    near: float | None = None
    """First distance of every ray; unset: where the ray enters the box."""
    far: float | None = None
    """Last distance of every ray; unset: where the ray leaves the box."""
    preview: bool = False
    """Render low-resolution RGB beside the latent."""
    kernel: Kernel = "auto"
    """`native`: the compiled CPU kernel; `triton`: the GPU kernels; `torch`: the readable path; `auto`: the fastest that
    serves the settings."""
    precision: MatmulPrecision = "float32"
    """Of the numbers that the GPU kernels' matrix products multiply; the other kernels know float32 alone."""


@dataclass(frozen=True)
class LossWeights:
    """λ of each term; 0 leaves it out. All but `edges` are means of squared errors."""

    latent: float = 0.0
    """Rendered against encoded latents."""
    rgb: float = 0.0
    """Decoded renders against images."""
    autoencoder: float = 0.0
    """Decoded encodings against images."""
    equivariance: float = 0.0
    """Decoded rescaled and flipped encodings against rescaled and flipped images (cf. EQ-VAE, arXiv 2502.09509)."""
    edges: float = 0.0
    """Absolute error of image gradients, added to whichever of `rgb` and `autoencoder` are on."""
    tv: float = 0.0
    """Total variation of the fused planes."""
    depth_tv: float = 0.0
    """Total variation of rendered depth."""
    preview: float = 0.0
    """Rendered low-resolution RGB against shrunken images."""


@dataclass(frozen=True)
class Rates:
    """Learning rates (Adam); what has rate 0 is frozen."""

    encoder: float = 0.0
    """The codec's encoder."""
    decoder: float = 0.0
    """The codec's decoder."""
    micro: float = 0.0
    """Planes of the scenes themselves."""
    weights: float = 0.0
    """Scenes' weights over the base planes, and their bias."""
    mixing: float = 0.0
    """Scenes' mixing of features."""
    bases: float = 0.0
    """Base planes that all scenes share."""
    field: float = 0.0
    """The network from plane features to density and latent."""


@dataclass(frozen=True)
class StageConfig:
    """One stretch of training: what learns, from which losses, for how long."""

    name: str
    """Names the stage in metrics and in --set; its random numbers depend on it."""
    epochs: int
    """Passes over all fitted views of all scenes of the stage."""
    scenes: int
    """Scenes in a batch."""
    views: int
    """Views of each scene in a batch."""
    losses: LossWeights
    rates: Rates
    rays: int = 0
    """Rays per view, drawn at random; 0: all (needed by losses that decode)."""
    focus: float = 0.0
    """Share of the rays that is drawn where rays were wrong before; the others are uniform."""
    schedule: Literal["constant", "exponential", "cosine"] = "constant"
    """Course of all rates: constant; × `decay` per epoch; or half a cosine down to `decay` of themselves."""
    decay: float = 1.0
    """What `schedule` multiplies with or goes down to."""
    beta2: float = 0.999
    """Adam's β₂: how slowly it forgets the squares of gradients."""
    field_epochs: int | None = None
    """Freeze the field after so many epochs; unset: never."""
    weights_epochs: int | None = None
    """Freeze scenes' weights after so many epochs; unset: never. With frozen base planes, steps are quicker from then on."""


@dataclass(frozen=True)
class Config:
    """Everything that shapes a run, beside its data."""

    seed: int = 0
    """Decides all random numbers of a run."""
    codec: CodecConfig = CodecConfig()
    normalizer: NormalizerConfig = NormalizerConfig()
    planes: PlanesConfig = PlanesConfig()
    field: FieldConfig = FieldConfig()
    render: RenderConfig = RenderConfig()
    train: tuple[StageConfig, ...] = ()
    """Stages of `latentscenes train`, in order."""
    exploit: tuple[StageConfig, ...] = ()
    """Stages of `latentscenes exploit`, in order."""
    exploit_fresh_field: bool = False
    """Start new scenes with a fresh field, as published, instead of the learned one."""
    exploit_start: Literal["mean", "random"] = "mean"
    """Where new scenes start: at the mean of the learned ones, or at random, as published."""
    storage: Literal["auto", "memory", "disk"] = "auto"
    """Where the micro planes of `train` and their moments lie: in memory, or in memory-mapped files of the run folder;
    `auto` takes files where they would fill more than half of this machine's memory."""

    def __post_init__(self) -> None:
        for stages in (self.train, self.exploit):
            names = [stage.name for stage in stages]
            _require(
                len(set(names)) == len(names), f"stages {', '.join(map(repr, names))}: names must differ"
            )
            for stage in stages:
                _check_stage(self, stage)
        planes, render = self.planes, self.render
        _require(
            not self.exploit_fresh_field or any(stage.rates.field for stage in self.exploit),
            "exploit_fresh_field: no stage of `exploit` has a rate for the field, so it would stay random",
        )
        _require(
            min(planes.micro, planes.macro, planes.bases, self.field.frequencies) >= 0,
            "planes and field: counts must not be negative",
        )
        _require(
            planes.resolution > 0 and self.field.hidden > 0,
            "planes.resolution and field.hidden must be at least 1",
        )
        _require(
            self.codec.channels > 0 and self.codec.width > 0, "codec: channels and width must be at least 1"
        )
        _require(render.half_side is None or render.half_side > 0, "render.half_side must be above 0")
        _require(
            planes.micro + planes.macro > 0, "planes: micro and macro are both 0; a scene needs features"
        )
        _require(
            planes.macro == 0 or planes.bases > 0, "planes.bases: must be at least 1 when planes.macro > 0"
        )
        _require(
            planes.fusion == "concat" or planes.micro == planes.macro or 0 in (planes.micro, planes.macro),
            f"planes.fusion: sum needs micro = macro, but they are {planes.micro} and {planes.macro}",
        )
        _require(
            render.coarse >= 2 and render.fine >= 0, "render: coarse must be at least 2 and fine at least 0"
        )
        _require(
            (render.near is None) == (render.far is None), "render: set near and far together, or neither"
        )
        _require(render.near is None or 0 <= render.near < render.far, "render: 0 <= near < far must hold")
        _require(
            self.codec.kind != "convolutional" or self.codec.downsampling in (2, 4, 8),
            f"codec.downsampling: 2, 4 or 8, not {self.codec.downsampling}",
        )
        _require(
            self.codec.kind not in ("diffusers", "tiny") or bool(self.codec.path),
            f"codec.path: {self.codec.kind} needs the folder of its weights",
        )


def _check_stage(config: Config, stage: StageConfig) -> None:
    losses, where = stage.losses, f"stage {stage.name!r}"
    _require(
        stage.epochs > 0 and stage.scenes > 0 and stage.views > 0,
        f"{where}: epochs, scenes and views must be at least 1",
    )
    for values in (stage.rates, losses):
        for name, value in dataclasses.asdict(values).items():
            _require(
                math.isfinite(value) and value >= 0,
                f"{where}: {name} is {value}, but rates and loss weights must be 0 or above",
            )
    _require(any(dataclasses.astuple(stage.rates)), f"{where}: all rates are 0, so nothing would be learned")
    _require(any(dataclasses.astuple(losses)), f"{where}: all losses are 0, so nothing would be learned")
    _require(
        not (stage.rays and (losses.rgb or losses.depth_tv)),
        f"{where}: rays: some rays alone make no image, but rgb or depth_tv needs one; set rays to 0",
    )
    _require(
        not losses.edges or bool(losses.rgb or losses.autoencoder),
        f"{where}: losses.edges is added to rgb or autoencoder; give one of them a weight",
    )
    _require(stage.rays >= 0, f"{where}: rays must not be negative")
    _require(0 <= stage.focus <= 1, f"{where}: focus must be in [0, 1]")
    _require(
        not stage.focus or bool(stage.rays and losses.latent),
        f"{where}: focus chooses rays by what they were wrong by; give rays and losses.latent",
    )
    _require(
        not stage.rates.mixing or config.planes.mixing, f"{where}: rates.mixing needs planes.mixing: true"
    )
    codec_only = not any((losses.latent, losses.rgb, losses.tv, losses.depth_tv, losses.preview))
    _require(
        not codec_only or stage.rates.encoder > 0 or stage.rates.decoder > 0,
        f"{where}: its losses reach encoder and decoder alone, but their rates are 0",
    )
    _require(
        not losses.preview or config.render.preview, f"{where}: losses.preview needs render.preview: true"
    )
    _require(0 <= stage.beta2 < 1, f"{where}: beta2 must be in [0, 1)")
    _require(stage.schedule == "constant" or 0 < stage.decay <= 1, f"{where}: decay must be in (0, 1]")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(f"configuration: {message}")


SHARED = ("encoder", "decoder", "bases", "field")
"""Rates of what all scenes share."""


def shared_rates(stages: Sequence[StageConfig]) -> list[str]:
    """Shared parts that some of these stages learn."""
    return [name for name in SHARED if any(getattr(stage.rates, name) for stage in stages)]


def frozen(config: Config) -> Config:
    """The same with shared parts frozen in all exploit stages; stages that would learn nothing are left out."""
    still = {name: 0.0 for name in SHARED}
    rates = [dataclasses.replace(stage.rates, **still) for stage in config.exploit]
    stages = [
        dataclasses.replace(stage, rates=rate, field_epochs=None)
        for stage, rate in zip(config.exploit, rates, strict=True)
        if rate != Rates()
    ]
    return dataclasses.replace(config, exploit=tuple(stages), exploit_fresh_field=False)


def learning_shared(config: Config) -> Config:
    """As published: base planes and field learn in every exploit stage, and the decoder where images are compared, at
    the rates of the last stage of `train`, and weights never rest. Stages that have rates for shared parts keep theirs."""
    if shared_rates(config.exploit) or not config.train:
        return config
    last = config.train[-1].rates
    stages = []
    for stage in config.exploit:
        decoder = last.decoder if stage.losses.rgb else 0.0
        rates = dataclasses.replace(stage.rates, bases=last.bases, field=last.field, decoder=decoder)
        stages.append(dataclasses.replace(stage, rates=rates, weights_epochs=None))
    return dataclasses.replace(config, exploit=tuple(stages))
