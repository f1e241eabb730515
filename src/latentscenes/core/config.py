"""All settings of training, as frozen dataclasses with a docstring for each field.

Building a Config with contradictory settings raises a UserError. `config_io` reads and writes YAML. Neither
file loads torch.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from latentscenes.core.config_checks import refuse_contradictions

Aggregation = Literal["sum", "product"]
Axes = Literal["xy,xz,yz", "eg3d"]
Kernel = Literal["auto", "native", "triton", "torch"]
MatmulPrecision = Literal["float32", "tf32", "bfloat16"]


@dataclass(frozen=True)
class CodecConfig:
    """The image autoencoder. Scenes are learned in its latent space."""

    kind: Literal["convolutional", "guided", "identity", "diffusers", "tiny"] = "convolutional"
    """`guided`: the built-in one whose latents start with colors. `convolutional`: the built-in one that
    starts with principal components. `identity`: latents are the pixels, which gives RGB
    tri-planes. `diffusers`: AutoencoderKL or AutoencoderTiny. `tiny`: a TAESD-like pair of weight files."""
    path: str | None = None
    """Pretrained weights: a folder or hub name for `diffusers`, a folder for `tiny`, a run with the same
    codec for the built-in ones (unset: stages train it from scratch)."""
    subfolder: str | None = None
    """Folder of the autoencoder inside `path`. A local pipeline's `vae` is found automatically."""
    allow_download: bool = False
    """Let `diffusers` download weights from the hub; otherwise only local files are used."""
    downsampling: int = 4
    """Image pixels per latent pixel, along each side (built-in: 2, 4 or 8)."""
    channels: int = 8
    """Latent channels (built-in). With `guided`, 3 of them are colors."""
    width: int = 64
    """Channels of the inner layers at latent resolution (built-in)."""
    bfloat16: bool = True
    """Convolve in bfloat16 if the processor supports it in hardware (built-in)."""

    @property
    def has_colors(self) -> bool:
        """Whether latents start with the colors of pixels."""
        return self.kind in ("guided", "identity")


@dataclass(frozen=True)
class NormalizerConfig:
    """How latents are mapped to (−1, 1), the range of the renderer's features."""

    kind: Literal["none", "tanh", "minmax", "meanstd", "meanstd_tanh"] = "none"
    """`none`; `tanh` of the scaled latent (published); minimum and maximum, or mean and deviation, of recent
    latents."""
    scale: float = 0.02
    """Slope of `tanh`."""
    window: int = 100
    """Number of recent batches that the statistics of the last three kinds cover."""


@dataclass(frozen=True)
class PlanesConfig:
    """Tri-planes: the private part of each scene and the part shared by all scenes."""

    resolution: int = 64
    """Texels along a plane's side."""
    micro: int = 10
    """Features of a scene's own planes. With 0, a scene stores only its weights (ultra-light scenes)."""
    macro: int = 22
    """Features of the shared base planes; 0 for none."""
    bases: int = 50
    """Number M of base tri-planes."""
    fusion: Literal["concat", "sum"] = "concat"
    """How a scene's micro and macro planes are combined."""
    bias: bool = False
    """Add one learned number per scene to its macro planes."""
    mixing: bool = False
    """Give each scene its own linear map of the fused features: features² numbers."""
    aggregation: Aggregation = "sum"
    """How the features of a point from the three planes are combined."""
    axes: Axes = "xy,xz,yz"
    """`eg3d` samples the third plane at (z, x), as the published code does; for comparison only."""
    initial_std: float = 0.1
    """Standard deviation of newly initialized planes (published: 1)."""

    @property
    def features(self) -> int:
        """Features of the fused planes."""
        return self.micro + self.macro if self.fusion == "concat" else max(self.micro, self.macro)


@dataclass(frozen=True)
class FieldConfig:
    """The small network that maps plane features to density and latent."""

    hidden: int = 64
    """Units of the hidden layer."""
    frequencies: int = 0
    """Octaves of positional encoding, in addition to the plane features."""
    view_direction: bool = False
    """Let features depend on the ray's direction."""


@dataclass(frozen=True)
class RenderConfig:
    """Ray marching."""

    coarse: int = 48
    """Stratified samples per ray."""
    fine: int = 48
    """Additional samples per ray, placed where the coarse samples found density."""
    half_side: float | None = None
    """Half the side of a cubic scene box around the dataset's center; unset: the dataset's box."""
    near: float | None = None
    """Distance at which rays start; unset: where the ray enters the box."""
    far: float | None = None
    """Distance at which rays end; unset: where the ray leaves the box."""
    preview: bool = False
    """Also render low-resolution RGB."""
    kernel: Kernel = "auto"
    """`native`: the compiled CPU kernel; `triton`: the GPU kernels; `torch`: the readable path; `auto`: the
    fastest one that supports the settings."""
    precision: MatmulPrecision = "float32"
    """Precision of the matrix products in the GPU kernels; the other kernels always use float32."""


@dataclass(frozen=True)
class LossWeights:
    """Weight λ of each loss term; 0 turns it off. All except `edges` are mean squared errors."""

    latent: float = 0.0
    """Rendered latents against encoded images."""
    color: float = 0.0
    """Rendered colors against images, where latents start with colors. With `rays`, the rays go through
    pixels of the image."""
    rgb: float = 0.0
    """Decoded renders against images."""
    autoencoder: float = 0.0
    """Reconstructed (encoded, then decoded) images against images."""
    equivariance: float = 0.0
    """Rescaled and flipped latents, decoded, against images treated alike (cf. EQ-VAE, arXiv 2502.09509)."""
    edges: float = 0.0
    """Absolute error of image gradients, added to `rgb` and `autoencoder` if they are on."""
    tv: float = 0.0
    """Total variation of the fused planes."""
    depth_tv: float = 0.0
    """Total variation of rendered depth."""
    preview: float = 0.0
    """Rendered low-resolution RGB against downsampled images."""


@dataclass(frozen=True)
class Rates:
    """Learning rates (Adam). A part with rate 0 is frozen."""

    encoder: float = 0.0
    """The codec's encoder."""
    decoder: float = 0.0
    """The codec's decoder."""
    micro: float = 0.0
    """Micro planes of the scenes."""
    weights: float = 0.0
    """Mixing weights of the scenes over the base planes, and their bias."""
    mixing: float = 0.0
    """Linear feature maps of the scenes."""
    bases: float = 0.0
    """Base planes, shared by all scenes."""
    field: float = 0.0
    """The network from plane features to density and latent."""
    colors: float = 0.0
    """Corrections of each view's colors (gain and offset by channel), where exposures differ: the weight of
    its newest rays, from 0 to 1. Needs codec.kind: identity or guided."""
    cameras: float = 0.0
    """Corrections of each view's camera (turn and shift), where cameras are a little off: the part of a
    Gauss-Newton step, from 0 to 1."""


@dataclass(frozen=True)
class StageConfig:
    """One stage of training: losses, learning rates and duration."""

    name: str
    """Name of the stage in metrics and in --set. Also seeds its random numbers."""
    epochs: int
    """Passes over all training views of all scenes of the stage."""
    scenes: int
    """Scenes per batch."""
    views: int
    """Views per scene in a batch."""
    losses: LossWeights
    rates: Rates
    rays: int = 0
    """Random rays per view; 0: those of `crop`."""
    crop: int = 0
    """Side, in latent pixels, of the random square of each view that is rendered and decoded; 0: whole
    views."""
    focus: float = 0.0
    """Share of the rays or crops sampled where the error was large before; the others are uniform."""
    hull: bool = False
    """Rays that meet the scene's visual hull sample inside it only, where the dataset has silhouettes. So
    samples are denser there. Not while `rates.cameras` corrects cameras."""
    random_background: float = 0.0
    """Share of the rays behind which truth and render get the same random color instead of white, where the
    dataset has silhouettes (alpha). It keeps white matter from growing around objects. Needs rays whose
    targets are colors."""
    schedule: Literal["constant", "exponential", "cosine"] = "constant"
    """Schedule of all learning rates: constant; × `decay` per epoch; or a half cosine down to × `decay`."""
    decay: float = 1.0
    """Factor used by `schedule`."""
    beta2: float = 0.999
    """Adam's β₂, the decay of the mean squared gradient."""
    field_epochs: int | None = None
    """Freeze the field after this many epochs; unset: never."""
    weights_epochs: int | None = None
    """Freeze scenes' weights after this many epochs (faster if base planes are frozen); unset: never."""


@dataclass(frozen=True)
class Config:
    """All settings of a run except its data."""

    seed: int = 0
    """Seed of all random numbers of a run."""
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
    """Start new scenes with a newly initialized field, as published, instead of the learned one."""
    exploit_start: Literal["mean", "random"] = "mean"
    """Initial parameters of new scenes: the mean of the learned scenes, or random, as published."""
    storage: Literal["auto", "memory", "disk"] = "auto"
    """Where `train` keeps micro planes and their Adam moments: in memory, or in memory-mapped files of the
    run folder. `auto` uses files if they would fill more than half of this machine's memory."""

    def __post_init__(self) -> None:
        refuse_contradictions(self)


SHARED = ("encoder", "decoder", "bases", "field")
"""Names of the rates of shared parts."""


def shared_rates(stages: Sequence[StageConfig]) -> list[str]:
    """Returns the names of the shared parts that any of these stages learns."""
    return [name for name in SHARED if any(getattr(stage.rates, name) for stage in stages)]


def frozen(config: Config) -> Config:
    """Freezes shared parts in all exploit stages, and drops stages that then learn nothing."""
    stages = []
    for stage in config.exploit:
        rates = dataclasses.replace(stage.rates, **dict.fromkeys(SHARED, 0.0))
        if rates != Rates():
            stages.append(dataclasses.replace(stage, rates=rates, field_epochs=None))
    return dataclasses.replace(config, exploit=tuple(stages), exploit_fresh_field=False)


def learning_shared(config: Config) -> Config:
    """Returns the configuration in which exploit stages also learn shared parts, as published.

    Base planes and field learn in every exploit stage, the decoder in stages with an `rgb` loss, all at the
    learning rates of the last `train` stage; scenes' weights are never frozen. If any exploit stage already
    has a rate for a shared part, the configuration is returned unchanged.
    """
    if shared_rates(config.exploit) or not config.train:
        return config
    last = config.train[-1].rates
    stages = []
    for stage in config.exploit:
        decoder = last.decoder if stage.losses.rgb else 0.0
        rates = dataclasses.replace(stage.rates, bases=last.bases, field=last.field, decoder=decoder)
        stages.append(dataclasses.replace(stage, rates=rates, weights_epochs=None))
    return dataclasses.replace(config, exploit=tuple(stages))


def with_scenes(
    config: Config, stages: Literal["train", "exploit"], scenes: int | Mapping[str, int]
) -> Config:
    """Returns the configuration with other numbers of scenes a step: one for all stages, or by stage."""
    found = []
    for stage in getattr(config, stages):
        number = scenes if isinstance(scenes, int) else scenes.get(stage.name, stage.scenes)
        found.append(dataclasses.replace(stage, scenes=number))
    return dataclasses.replace(config, **{stages: tuple(found)})


def scenes_as_in(config: Config, other: Config, stages: Literal["train", "exploit"]) -> Config:
    """Returns the configuration with as many scenes a step as the stages of that name in another one have."""
    return with_scenes(config, stages, {stage.name: stage.scenes for stage in getattr(other, stages)})
