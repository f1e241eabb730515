"""MTL, the materials of Wavefront OBJ.

Honored: Kd, Ke, d, Tr, map_Kd and map_d with their options -s, -o, -clamp, -mm. A texture replaces Kd:
exporters leave grays and browns in Kd that the renderers of these catalogs ignore. `multiply` multiplies
instead, as the format's text says. Without Kd the factor is 1. Faces without texture coordinates have the
texture's mean color. Decimal commas and colors up to 255, which some programs write, are read as they are
meant. Source: Wavefront's "MTL material format".
"""

import codecs
import itertools
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from latentscenes.core.errors import UserError
from latentscenes.core.reading import MOST_MESH, read_bytes
from latentscenes.data.meshes.surfaces import Material, Remarks, read_texture, unit_colors
from latentscenes.data.raycast import BLEND, OPAQUE
from latentscenes.data.shading import SRGB_TO_LINEAR, to_linear

OPTIONS = dict.fromkeys(
    ("blendu", "blendv", "boost", "bm", "cc", "clamp", "colorspace", "imfchan", "texres", "type"), 1
)  # fmt: skip
"""Options of a texture with a fixed number of arguments; -mm has two, -o, -s and -t have one to three
numbers."""
LEFT_OUT = (
    (("ks", "map_ks"), "highlights (Ks) are"),
    (("bump", "map_bump", "norm", "disp"), "relief (bump and normal maps) is"),
    (("map_ke",), "emission textures are"),
)
"""Statements of MTL that are left out, and how the remark begins."""
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")
MTL = re.compile(r"\S.*?\.mtl(?=\s|$)", re.IGNORECASE)
"""A file name among several on a line, which may hold spaces."""
COMMA = re.compile(r"(?<=\d),(?=\d)")
"""The decimal point of programs that write numbers as some languages do."""


@dataclass(frozen=True)
class ObjMaterial:
    """A material: as it looks on faces without texture coordinates, and with them; how these are moved."""

    plain: Material = Material()
    textured: Material | None = None
    scale: tuple[float, float] = (1.0, 1.0)
    offset: tuple[float, float] = (0.0, 0.0)


@dataclass
class _Map:
    """A texture statement of MTL."""

    file: str
    scale: tuple[float, float] = (1.0, 1.0)
    offset: tuple[float, float] = (0.0, 0.0)
    clamp: bool = False
    base: float = 0.0
    gain: float = 1.0


def read_materials(
    path: Path, libraries: list[str], remarks: Remarks, multiply: bool
) -> dict[str, ObjMaterial]:
    """Returns the materials of an OBJ file's libraries by name. `multiply`: a texture is multiplied by Kd."""
    found = {}
    for name in libraries:
        plain = name.replace("\\ ", " ")  # some programs write a backslash before spaces
        for names in ([name], [plain], MTL.findall(plain), name.split()):
            if files := list(filter(None, (find_beside(path, one) for one in names))):
                break
        if not files and (beside := find_beside(path, f"{path.stem}.mtl")):
            remarks.add(f"its material library (MTL) is not there; {beside.name} is taken for it")
            files = [beside]
        if not files:
            remarks.add("its material library (MTL) is not there; without it, faces are white")
        for one in files:
            for key, entry in _statements(read_lines(one)).items():
                found.setdefault(key, _material(one, path, key, entry, remarks, multiply))
    return found


def _statements(text: str) -> dict[str, dict[str, str]]:
    """The statements of each material of an MTL file; keywords in lower case."""
    found: dict[str, dict[str, str]] = {}
    current: dict[str, str] = {}
    for line in text.splitlines():
        key, _, rest = line.strip().partition(" ") if " " in line.strip() else line.strip().partition("\t")
        if key.lower() == "newmtl":
            current = found.setdefault(rest.strip(), {})
        elif key and not key.startswith("#"):
            named = "map" in key.lower() or key.lower() in ("bump", "disp", "norm")  # a name may hold a #
            current[key.lower()] = (rest if named else f" {rest}".partition(" #")[0]).strip()
    return found


def _material(
    file: Path, obj: Path, name: str, entry: dict[str, str], remarks: Remarks, multiply: bool
) -> ObjMaterial:
    alpha = _alpha(entry, name, remarks)
    for keys, meaning in LEFT_OUT:
        if any(entry.get(key) and (key != "ks" or any(_color(entry, key, name, Remarks()))) for key in keys):
            remarks.add(f"{meaning} left out")
    color, emission = (
        tuple(to_linear(np.clip(_color(entry, key, name, remarks), 0, 1)).tolist()) for key in ("kd", "ke")
    )
    plain = Material((*color, alpha), cutoff=OPAQUE if alpha == 1 else BLEND, emission=emission)
    texture = _map(entry["map_kd"]) if entry.get("map_kd") else None
    picture = _picture(file, obj, texture, remarks) if texture else None
    mask = _picture(file, obj, _map(entry["map_d"]), remarks) if entry.get("map_d") else None
    if picture is None and mask is None:
        return ObjMaterial(plain)
    texture = texture if picture is not None else _map(entry["map_d"])
    factor = plain.factor if multiply or picture is None else (1.0, 1.0, 1.0, alpha)
    cutoff = plain.cutoff
    if mask is not None:
        picture, cutoff = _masked(picture, mask), BLEND
    elif (picture[..., 3] < 255).any() and cutoff == OPAQUE:
        cutoff = 0.5
    wrap = ("clamp", "clamp") if texture.clamp else ("repeat", "repeat")
    material = Material(factor, picture, wrap, cutoff, emission)
    mean = (*_mean_light(picture), 1.0)  # white where there is only a mask
    unmapped = replace(plain, factor=tuple(a * b for a, b in zip(factor, mean, strict=True)))
    return ObjMaterial(unmapped, material, texture.scale, texture.offset)


def _mean_light(picture: np.ndarray) -> tuple[float, ...]:
    """The mean linear color of what a texture shows."""
    few = picture[:: max(1, picture.shape[0] // 256), :: max(1, picture.shape[1] // 256)].reshape(-1, 4)
    shares = few[:, 3] + 1e-6
    return tuple((SRGB_TO_LINEAR[few[:, :3]] * shares[:, None]).sum(0).astype(float) / shares.sum())


def _masked(picture: np.ndarray | None, mask: np.ndarray) -> np.ndarray:
    """A picture whose alpha is the brightness of a mask, or the mask's own alpha if it has one."""
    alpha = mask[..., 3] if (mask[..., 3] < 255).any() else mask[..., :3].mean(-1).round().astype(np.uint8)
    height, width = alpha.shape
    if picture is None:
        picture = np.full((height, width, 4), 255, np.uint8)
    rows = np.arange(picture.shape[0]) * height // picture.shape[0]
    columns = np.arange(picture.shape[1]) * width // picture.shape[1]
    return np.concatenate([picture[..., :3], alpha[rows][:, columns][..., None]], -1)


def _color(entry: dict[str, str], key: str, name: str, remarks: Remarks) -> np.ndarray:
    """A statement's three numbers, or one for all three; without it, white as Kd and else black."""
    text = entry.get(key, "").replace(", ", " ")
    text = text.replace(",", " ") if "." in text else COMMA.sub(".", text)
    numbers = [float(word) for word in itertools.takewhile(NUMBER.match, text.split()[:3])]
    what = f"{key.capitalize()} of material {name!r}"
    if not numbers:
        if text:
            remarks.add(f"{what}: {entry[key]!r} is no color and left out")
        return np.full(3, float(key == "kd"))
    return unit_colors(np.array(numbers if len(numbers) == 3 else numbers[:1] * 3), what, remarks)


def _alpha(entry: dict[str, str], name: str, remarks: Remarks) -> float:
    """Opacity in (0, 1]: d, or 1 − Tr. A material that would be invisible (d 0, Tr 1) is meant to be
    opaque."""

    def number(key: str) -> float | None:
        words = COMMA.sub(".", entry.get(key, "")).split()
        found = [float(word) for word in words if NUMBER.match(word)]
        return found[0] if found else None

    dissolve, transparency = number("d"), number("tr")
    alpha = dissolve if dissolve is not None else 1.0 if transparency is None else 1 - transparency
    if alpha <= 0:
        remarks.add(f"material {name!r} would be invisible (d 0 or Tr 1); it is taken as opaque")
        return 1.0
    return min(alpha, 1.0)


def _map(text: str) -> _Map:
    """A texture statement: options, then a file name that may hold spaces."""
    words, options = text.split(), {}
    place = 0
    while place < len(words) - 1 and words[place].startswith("-") and not NUMBER.match(words[place]):
        key = words[place][1:].lower()
        place += 1
        if key in OPTIONS:
            most, numeric = OPTIONS[key], False
        elif key in ("s", "o", "t", "mm"):
            most, numeric = 2 if key == "mm" else 3, True
        else:
            break
        values = []
        while len(values) < most and place < len(words) - 1 and (not numeric or NUMBER.match(words[place])):
            values.append(words[place])
            place += 1
        options[key] = values
    found = _Map(" ".join(words[place:]).strip('"'))
    for key, name in (("s", "scale"), ("o", "offset")):
        if values := [float(value) for value in options.get(key, [])]:
            setattr(found, name, (values[0], values[1] if len(values) > 1 else getattr(found, name)[1]))
    found.clamp = options.get("clamp", [""])[0].lower() == "on"
    if len(values := options.get("mm", [])) == 2:
        found.base, found.gain = map(float, values)
    return found


def _picture(file: Path, obj: Path, texture: _Map, remarks: Remarks) -> np.ndarray | None:
    names = (texture.file, texture.file.partition(" #")[0].strip().strip('"'))  # perhaps with a comment
    places = (find_beside(beside, name) for name in names for beside in (file, obj))
    if (found := next(filter(None, places), None)) is None:
        remarks.add(f"the texture {texture.file!r} is not there")
        return None
    try:
        picture = read_texture(found, found.name)
    except UserError as error:
        remarks.add(str(error))
        return None
    if (texture.base, texture.gain) != (0.0, 1.0):
        light = texture.base + texture.gain * picture[..., :3].astype(np.float64) / 255
        picture = np.concatenate(
            [np.round(255 * np.clip(light, 0, 1)).astype(np.uint8), picture[..., 3:]], -1
        )
    return picture


def read_lines(path: Path) -> str:
    """Returns a text file of any encoding; lines that end in a backslash go on."""
    content = read_bytes(path, MOST_MESH)
    wide = content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    text = content.decode("utf-16" if wide else "utf-8-sig", errors="replace")
    return text.replace("\\\r\n", " ").replace("\\\n", " ")


def find_beside(file: Path, name: str) -> Path | None:
    """The file that a file names: at that path beside it, else by the bare name, whatever the case of
    letters.

    Backslashes separate folders. A drive letter or an absolute path is never followed.
    """
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    if not parts:
        return None
    absolute = name.replace("\\", "/").startswith("/") or ":" in parts[0]
    for chosen in [parts[-1:]] if absolute else [parts, parts[-1:]]:
        place = file.parent
        for part in chosen:
            place = place.parent if part == ".." else _entry(place, part)
            if place is None:
                break
        if place is not None and place.is_file():
            return place
    return None


def _entry(folder: Path, name: str) -> Path | None:
    """An entry of a folder by its name; if there is none, by its name in other letters' case."""
    if os.path.exists(folder / name):  # False also for a name that is too long
        return folder / name
    if not folder.is_dir():
        return None
    return next((entry for entry in folder.iterdir() if entry.name.lower() == name.lower()), None)
