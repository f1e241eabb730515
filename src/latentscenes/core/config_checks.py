"""Contradictions among settings, each with a message that says what to change. Loads no torch."""

import dataclasses
import math
from typing import TYPE_CHECKING

from latentscenes.core.errors import UserError

if TYPE_CHECKING:
    from latentscenes.core.config import Config, StageConfig


def refuse_contradictions(config: "Config") -> None:
    """Raises a UserError if settings contradict each other."""
    for stages in (config.train, config.exploit):
        names = [stage.name for stage in stages]
        names_differ = len(set(names)) == len(names)
        _require(names_differ, f"stages {', '.join(map(repr, names))}: names must differ")
        for stage in stages:
            _check_stage(config, stage)
    codec, planes, render, hidden = config.codec, config.planes, config.render, config.field.hidden
    counts = (planes.micro, planes.macro, planes.bases, config.field.frequencies)
    limits = [limit for limit in (render.near, render.far) if limit is not None]
    summable = planes.micro == planes.macro or 0 in (planes.micro, planes.macro)
    field_learns = any(stage.rates.field for stage in config.exploit)
    for holds, message in (
        (
            field_learns or not config.exploit_fresh_field,
            "exploit_fresh_field: no `exploit` stage has a rate for the field, so it would stay random",
        ),
        (min(counts) >= 0, "planes and field: counts must not be negative"),
        (planes.resolution > 0 and hidden > 0, "planes.resolution and field.hidden must be at least 1"),
        (codec.channels > 0 and codec.width > 0, "codec: channels and width must be at least 1"),
        (render.half_side is None or render.half_side > 0, "render.half_side must be above 0"),
        (any(counts[:2]), "planes: micro and macro are both 0; a scene needs features"),
        (not planes.macro or planes.bases, "planes.bases: must be at least 1 when planes.macro > 0"),
        (
            planes.fusion == "concat" or summable,
            f"planes.fusion: sum needs micro = macro, but they are {planes.micro} and {planes.macro}",
        ),
        (render.coarse >= 2, "render: coarse must be at least 2"),
        (render.fine >= 0, "render: fine must be at least 0"),
        (len(limits) != 1, "render: set near and far together, or neither"),
        (len(limits) < 2 or 0 <= limits[0] < limits[1], "render: 0 <= near < far must hold"),
        (
            not limits or not any(stage.hull for stage in (*config.train, *config.exploit)),
            "stages with hull need rays that end at the box; unset render.near and render.far",
        ),
        (
            codec.kind not in ("convolutional", "guided") or codec.downsampling in (2, 4, 8),
            f"codec.downsampling: 2, 4 or 8, not {codec.downsampling}",
        ),
        (codec.kind != "guided" or codec.channels > 3, "codec.channels: guided has 3 colors, and features"),
        (
            codec.kind not in ("diffusers", "tiny") or codec.path,
            f"codec.path: {codec.kind} needs the folder of its weights",
        ),
    ):
        _require(holds, message)


def _check_stage(config: "Config", stage: "StageConfig") -> None:
    where, losses, rates = f"stage {stage.name!r}", stage.losses, stage.rates
    for values in (rates, losses):
        for name, value in dataclasses.asdict(values).items():
            fault = f"{where}: {name} is {value}, but rates and loss weights must be 0 or above"
            _require(math.isfinite(value) and value >= 0, fault)
    codec_only = not any(
        (losses.latent, losses.color, losses.rgb, losses.tv, losses.depth_tv, losses.preview)
    )
    kind = config.codec.kind
    pixelwise = stage.rays and (losses.color or losses.latent and kind == "identity")
    for holds, message in (
        (min(stage.epochs, stage.scenes, stage.views) > 0, "epochs, scenes and views must be at least 1"),
        (any(dataclasses.astuple(rates)), "all rates are 0, so nothing would be learned"),
        (any(dataclasses.astuple(losses)), "all losses are 0, so nothing would be learned"),
        (
            not stage.rays or not (losses.rgb or losses.depth_tv or stage.crop),
            "rays: crop, rgb and depth_tv need neighboring pixels; set rays to 0",
        ),
        (not losses.color or config.codec.has_colors, "losses.color needs codec.kind: guided or identity"),
        (
            not (losses.color and stage.rays) or not (losses.latent or losses.preview),
            "rays: those of `color` go through pixels of the image, those of latent and preview do not",
        ),
        (
            not losses.edges or losses.rgb or losses.autoencoder,
            "losses.edges is added to rgb or autoencoder; give one of them a weight",
        ),
        (min(stage.rays, stage.crop) >= 0, "rays and crop must not be negative"),
        (0 <= stage.focus <= 1, "focus must be in [0, 1]"),
        (0 <= stage.random_background <= 1, "random_background must be in [0, 1]"),
        (
            not stage.random_background or pixelwise,
            "random_background needs rays, and losses.color or codec.kind: identity",
        ),
        (
            not stage.focus or (losses.rgb if stage.crop else stage.rays and (losses.latent or losses.color)),
            "focus samples by errors; give rays and losses.latent or color, or crop and losses.rgb",
        ),
        (not rates.mixing or config.planes.mixing, "rates.mixing needs planes.mixing: true"),
        (
            not codec_only or rates.encoder or rates.decoder,
            "its losses reach only encoder and decoder, but their rates are 0",
        ),
        (
            not rates.colors or config.codec.has_colors,
            "rates.colors needs codec.kind: identity or guided, because other latents do not brighten like "
            "images",
        ),
        (max(rates.colors, rates.cameras) <= 1, "rates.colors and rates.cameras must not exceed 1"),
        (
            not (rates.colors or rates.cameras) or allows_corrections(stage),
            "rates.colors and rates.cameras need losses.latent, or losses.color with rays, and no rgb, "
            "preview or depth_tv",
        ),
        (not losses.preview or config.render.preview, "losses.preview needs render.preview: true"),
        (0 <= stage.beta2 < 1, "beta2 must be in [0, 1)"),
        (stage.schedule == "constant" or 0 < stage.decay <= 1, "decay must be in (0, 1]"),
    ):
        _require(holds, f"{where}: {message}")


def allows_corrections(stage: "StageConfig") -> bool:
    """Whether corrections of views can be learned from a stage's losses: these compare rays one by one."""
    losses = stage.losses
    compared = losses.latent or losses.color and stage.rays
    return bool(compared) and not (losses.rgb or losses.preview or losses.depth_tv)


def _require(holds: object, message: str) -> None:
    if not holds:
        raise UserError(f"configuration: {message}")
