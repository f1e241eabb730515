"""Parts of a publication: atlases of thumbnails, models, counts of tags, facts for browsers."""

import io
import math
from collections import Counter, defaultdict
from dataclasses import asdict, replace
from pathlib import Path, PurePath
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save

from latentscenes.core import config_io
from latentscenes.core.config import Config
from latentscenes.core.errors import UserError
from latentscenes.core.reading import MOST_MODEL, read_bytes, reason
from latentscenes.model.model import Model
from latentscenes.storage.library import LibraryFolder
from latentscenes.storage.published.format import CELL, SIDE

QUALITY = 85
"""WebP quality of thumbnails, out of 100."""
LARGEST_PICTURE = 4096
"""Pixels of the longest side of a thumbnail that is read."""
MOST_TAGS, MOST_VALUES, LONGEST_VALUE = 20, 100, 80
"""Tags that are counted, values of each that are listed, letters of a value."""
MOST_KINDS = 5000
"""Different values beyond which a tag is not counted, such as names."""
BUILT_IN = "identity", "guided", "convolutional"
"""Codecs whose architecture is known without their files."""


def atlas(pictures: list[bytes], where: Path) -> bytes:
    """Returns a WebP file of up to SIDE x SIDE thumbnails (PNG files), each in the middle of its cell, in
    reading order. Raises a UserError, which names `where`, if one is damaged."""
    lines = math.ceil(len(pictures) / SIDE)
    sheet = Image.new("RGBA", (SIDE * CELL, lines * CELL))
    for place, picture in enumerate(pictures):
        try:
            with Image.open(io.BytesIO(picture), formats=["PNG"]) as image:
                if max(image.size) > LARGEST_PICTURE:
                    raise ValueError(f"it has {image.width}x{image.height} pixels")
                shown = image.convert("RGBA")
        except (OSError, ValueError, SyntaxError) as error:
            raise UserError(
                f"{where}: a thumbnail cannot be read ({reason(error)}). Restore index.sqlite from a copy."
            ) from None
        shown.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
        x, y = place % SIDE * CELL, place // SIDE * CELL
        sheet.paste(shown, (x + (CELL - shown.width) // 2, y + (CELL - shown.height) // 2))
    stream = io.BytesIO()
    sheet.save(stream, "WEBP", quality=QUALITY, method=4)
    return stream.getvalue()


def model_files(library: LibraryFolder, model: Model) -> dict[str, tuple]:
    """Returns the files of the model by their entries in the description, as arguments of `_write`."""
    exact = {"model": library.shared_file, "start": library.check_start()}
    files = {name: ("model", read_bytes(file, MOST_MODEL)) for name, file in exact.items()}
    return files | {"web_model": ("model", save(web_model(model)), ".web.safetensors")}


def web_model(model: Model) -> dict[str, torch.Tensor]:
    """Returns the parts of a model that a browser needs, in float16 (float32 where that is out of range):
    field, normalizer, and the decoder of a built-in codec; and the base planes as int8 codes, with a step for
    each plane and feature."""
    decoder = {id(parameter) for parameter in model.codec.decoder_parameters()}
    left_out = set()
    for name, parameter in model.codec.named_parameters():
        if id(parameter) not in decoder or model.config.codec.kind not in BUILT_IN:
            left_out.add(f"codec.{name}")
    if model.config.codec.kind not in BUILT_IN:
        left_out |= {f"codec.{name}" for name, _ in model.codec.named_buffers()}
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name in left_out:
            continue
        half = tensor.half() if tensor.is_floating_point() else tensor
        tensors[name] = (half if half.isfinite().all() else tensor.float()).contiguous()
    if model.bases.numel():
        bases = model.bases.detach().cpu().float()
        step = (bases.abs().amax((2, 3)) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        codes = (bases / step[:, :, None, None]).round().clamp(-127, 127).to(torch.int8)
        tensors |= {"bases": codes.contiguous(), "bases.scale": step}
    return tensors


def render_facts(model: Model) -> dict[str, Any]:
    """Returns the settings that a browser needs to render a scene."""
    config = model.config
    planes, field, codec = config.planes, config.field, config.codec
    return {
        "resolution": planes.resolution, "micro": planes.micro, "macro": planes.macro,
        "bases": planes.bases if planes.macro else 0, "fusion": planes.fusion, "bias": planes.bias,
        "mixing": planes.mixing, "axes": planes.axes, "aggregation": planes.aggregation,
        "hidden": field.hidden, "frequencies": field.frequencies, "view_direction": field.view_direction,
        "channels": model.codec.channels, "preview": config.render.preview,
        "coarse": config.render.coarse, "fine": config.render.fine,
        "near": config.render.near, "far": config.render.far,
        "normalizer": config.normalizer.kind,
        "codec": {"kind": codec.kind, "downsampling": model.codec.downsampling, "width": codec.width},
    }  # fmt: skip


def library_facts(library: LibraryFolder) -> dict[str, Any]:
    """Returns the content of library.json, without folders of the publisher's machine."""
    facts = asdict(library.info)
    for name in ("parent", "finetuned_from"):
        facts[name] = facts[name] and PurePath(facts[name]).name
    return facts


def portable_config(config: Config) -> str:
    """Returns the configuration as YAML, without a path that only learning needs."""
    if config.codec.kind in BUILT_IN:
        config = replace(config, codec=replace(config.codec, path=None))
    return config_io.dump(config)


def finite(value: Any) -> Any:
    """Returns the value with None in place of numbers that JSON cannot hold."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class TagCounts:
    """Counts the values of tags."""

    def __init__(self):
        self._counts: dict[str, Counter] = defaultdict(Counter)
        self._various: set[str] = set()

    def add(self, tags: dict[str, Any]) -> None:
        """Counts the tags of a scene. Of a list, every value counts."""
        for key, value in tags.items():
            if key in self._various:
                continue
            for one in set(map(str, value)) if isinstance(value, list) else (value,):
                if isinstance(one, str | int | float) and len(str(one)) <= LONGEST_VALUE:
                    self._counts[key][str(one)] += 1
            if len(self._counts[key]) > MOST_KINDS:
                self._various.add(key)
                del self._counts[key]

    def most_frequent(self) -> dict[str, dict[str, int]]:
        """Returns counts of the most frequent values of the most frequent tags, most frequent first."""
        totals = Counter({key: sum(values.values()) for key, values in self._counts.items() if values})
        return {key: dict(_first(self._counts[key], MOST_VALUES)) for key, _ in _first(totals, MOST_TAGS)}


def _first(counts: Counter, most: int) -> list[tuple[str, int]]:
    """Returns the largest counts; equal ones in the order of their names."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:most]
