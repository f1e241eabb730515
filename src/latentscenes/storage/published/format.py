"""The format of published libraries: names of files, sizes, pages and buckets (docs/published.md)."""

import gzip
import hashlib
import json
import math
import re
import zlib
from dataclasses import dataclass
from typing import Any

from latentscenes.core.errors import UserError
from latentscenes.core.names import short
from latentscenes.core.reading import MOST_TEXT, parse_json
from latentscenes.storage.entries import SceneInfo

FORMAT = "latentscenes published 1"
DESCRIPTION = "published.json"
PACK_BYTES = 8 << 20
"""Most bytes of a pack of several scenes."""
PAGE = 1000
"""Scenes of a page."""
BUCKET = 256
"""Most scenes of a bucket, on average."""
SIDE = 10
"""Thumbnails along each side of an atlas."""
CELL = 96
"""Pixels along each side of a thumbnail's cell."""
MOST, MOST_CELL = 1 << 50, 512
"""The largest count or size that a description may state; pixels of the largest cell that a reader takes."""
FLAT = 5000
"""Atlases that lie in one folder; further ones lie in folders inside, so that no folder has 10,000 files."""
ENDINGS = {
    "model": ".safetensors", "packs": ".pack", "index": ".json.gz", "names": ".json.gz", "weights": ".f32",
    "thumbnails": ".webp",
}  # fmt: skip
"""Folders of a published library, and how the names of their files end."""
NAME = re.compile(
    r"(packs/[0-9a-f]{2}/[0-9a-f]{32}\.pack|model/[0-9a-f]{32}(\.web)?\.safetensors|weights/[0-9a-f]{32}\.f32"
    r"|(index|names)/[0-9a-f]{32}\.json\.gz|thumbnails/([0-9a-f]{2}/)?[0-9a-f]{32}\.webp)"
)
"""Paths of all files but DESCRIPTION, below the folder."""
LISTS = "packs", "pages", "weights", "names", "atlases"
"""Entries of DESCRIPTION that list files."""
MODELS = "model", "start", "web_model"
"""Entries of DESCRIPTION that name one file."""
HIDDEN = {"dataset", "split", "source"}
"""Fields of SceneInfo that are not published: paths and names of the publisher's machine."""
INFO = {name: name for name in SceneInfo.__dataclass_fields__ if name not in HIDDEN | {"bytes"}}
INFO["stored"] = "bytes"
"""Columns of a page that hold metadata, and their fields of SceneInfo."""
PLACE = "pack", "offset", "bytes", "sha256", "payload", "atlas", "cell"
"""Columns of a page that say where a scene and its thumbnail are."""
ENTRY = "pack", "offset", "bytes", "atlas", "cell", "sha256"
"""What a bucket says of a scene, after its row."""
FACTS = [column for column in INFO if column != "name"]
"""Metadata of a scene in its bucket."""
NO_NAME = ""
"""The key of the metadata in a bucket: a text that names no scene, so earlier versions skip it."""


NUMBERS = {*PLACE, "stored", "seconds", "cpu_seconds", "psnr", "psnr_lost"} - {"sha256", "payload"}
"""Columns of numbers."""
COLUMN_KINDS = dict.fromkeys(("name", "sha256", "payload"), {str}) | {
    name: {int} if name in (*PLACE, "stored") else {int, float, type(None)} for name in NUMBERS
}
"""Types of the values in columns that readers compute with."""


@dataclass(frozen=True)
class PublishedFile:
    """A file of a published library, which never changes."""

    file: str
    """Path below the folder."""
    bytes: int
    sha256: str

    @classmethod
    def of(
        cls, folder: str, content: bytes, ending: str | None = None, inner: bool = False
    ) -> "PublishedFile":
        """Names a file after its content. A pack, and with `inner` any file, lies in a folder of those whose
        names begin alike."""
        digest = hashlib.sha256(content).hexdigest()
        inner = f"{digest[:2]}/" if inner or folder == "packs" else ""
        return cls(f"{folder}/{inner}{digest[:32]}{ending or ENDINGS[folder]}", len(content), digest)

    @classmethod
    def read(cls, entry: Any, where: str) -> "PublishedFile":
        """Reads an entry of DESCRIPTION. Raises a UserError if it names no file of the format."""
        fits = (
            isinstance(entry, dict)
            and isinstance(entry.get("file"), str)
            and NAME.fullmatch(entry["file"])
            and _within(entry.get("bytes"), 0, MOST)
            and isinstance(entry.get("sha256"), str)
            and re.fullmatch("[0-9a-f]{64}", entry["sha256"])
        )
        if not fits:
            raise UserError(f"{where}: {short(entry)} names no published file. Publish the library again.")
        return cls(entry["file"], entry["bytes"], entry["sha256"])


def check_description(content: Any, where: str) -> dict[str, Any]:
    """Returns the content of DESCRIPTION with its files as `PublishedFile`. Raises a UserError, which begins
    with `where`, if it is of another format or damaged."""
    if not isinstance(content, dict) or not str(content.get("format", "")).startswith(
        FORMAT.rsplit(" ", 1)[0]
    ):
        raise UserError(f"{where}: describes no published library.")
    if content["format"] != FORMAT:
        raise UserError(
            f"{where}: a library published as {short(content['format'])}, but this version reads {FORMAT!r}. "
            "Install a newer version."
        )
    damaged = UserError(f"{where}: damaged. Publish the library again.")
    if not isinstance(content.get("library"), dict) or not isinstance(content.get("config"), str):
        raise damaged
    psnr = content.get("psnr")
    numbers = (("scenes", 0, MOST), ("bytes", 0, MOST), ("page_size", 1, 10_000), ("thumbnail", 1, MOST_CELL))
    known = psnr is None or (type(psnr) in (int, float) and abs(psnr) < MOST)
    if (
        "psnr" not in content
        or not known
        or not all(_within(content.get(name), *ends) for name, *ends in numbers)
    ):
        raise damaged
    scenes = content["scenes"]
    found = dict(content)
    for name in LISTS:
        if not isinstance(content.get(name), list):
            raise damaged
        found[name] = [PublishedFile.read(entry, where) for entry in content[name]]
    for name in MODELS:
        found[name] = PublishedFile.read(content.get(name), where)
    pages, buckets = -(-scenes // content["page_size"]), len(found["names"])
    if (
        len(found["pages"]) != pages
        or len(found["weights"]) not in (0, pages)
        or not buckets
        or buckets & (buckets - 1)
    ):
        raise damaged
    return found


def _within(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def check_page(page: Any, count: int | None = None) -> None:
    """Raises a ValueError if a page lacks a column, if a column has other than `count` values (None: as many
    as there are names), or if values are of another kind. Metadata are checked by `scene_info`."""
    if not isinstance(page, dict) or not isinstance(page.get("name"), list):
        raise ValueError("it holds no names")
    count = len(page["name"]) if count is None else count
    page.setdefault("silhouettes", [None] * count)  # of earlier versions
    for column in (*PLACE, *INFO):
        values = page.get(column)
        if not isinstance(values, list) or len(values) != count:
            raise ValueError(f"it has no {count} values of {column}")
        kinds = set(map(type, values))
        if kinds - COLUMN_KINDS.get(column, kinds):
            raise ValueError(f"a value of {column} is none")
        if column in NUMBERS:
            known = [value for value in values if value is not None] if type(None) in kinds else values
            if known and not -MOST <= min(known) <= max(known) <= MOST:
                raise ValueError(f"a value of {column} is too large")


def files_of(description: dict[str, Any]) -> list[PublishedFile]:
    """Returns all files that a description, as `check_description` returns it, names."""
    if not description:
        return []
    return [*(description[name] for name in MODELS), *(file for name in LISTS for file in description[name])]


def bucket_count(scenes: int) -> int:
    """Returns the number of buckets of names: the smallest power of two with at most BUCKET scenes in each,
    on average."""
    return 1 << max(0, math.ceil(math.log2(max(1, scenes) / BUCKET)))


def bucket_of(name: str, buckets: int) -> int:
    """Returns the bucket of a scene's name: its 32-bit FNV-1a hash, modulo the number of buckets.

    Source: Fowler, Noll, Vo; RFC 9923.
    """
    number = 0x811C9DC5
    for byte in name.encode(errors="surrogatepass"):  # text that is no UTF-8 names no scene
        number = (number ^ byte) * 0x01000193 & 0xFFFFFFFF
    return number % buckets


def bucket_text(scenes: list[tuple[str, str, str]]) -> str:
    """Returns the JSON of a bucket of scenes: their names, places and metadata, as JSON."""
    places, facts = (",".join(f"{one[0]}:{one[part]}" for one in scenes) for part in (1, 2))
    return f'{{{places}{"," if scenes else ""}"{NO_NAME}":{{{facts}}}}}'


def as_json(content: Any) -> str:
    """Returns strict JSON without spaces."""
    return json.dumps(content, separators=(",", ":"), allow_nan=False)


def packed(text: str) -> bytes:
    """Returns gzipped text; the same bytes for the same text."""
    return gzip.compress(text.encode(), 9, mtime=0)


def unpacked_json(content: bytes, most: int = MOST_TEXT) -> Any:
    """Returns the content of gzipped JSON. Raises a ValueError if it is damaged or unfolds to more than
    `most` bytes."""
    inflating = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    try:
        text = inflating.decompress(content, most)
    except zlib.error as error:
        raise ValueError(str(error)) from None
    if not inflating.eof:
        raise ValueError(f"it is cut, or unfolds to more than {most >> 20} MiB")
    return parse_json(text.decode())
