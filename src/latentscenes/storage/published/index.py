"""The names, metadata and thumbnails of a published library, read page by page, without torch."""

import fnmatch
import io
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from latentscenes.core.errors import UserError
from latentscenes.core.names import MOST_COMPARED, short, tagged, tags_text, unknown_scene
from latentscenes.core.reading import reason
from latentscenes.storage.entries import SceneInfo, Totals, scene_info
from latentscenes.storage.index import Place
from latentscenes.storage.published.addresses import address_of, open_files
from latentscenes.storage.published.files import PublishedFiles
from latentscenes.storage.published.format import (
    DESCRIPTION,
    FACTS,
    INFO,
    NO_NAME,
    SIDE,
    PublishedFile,
    bucket_of,
    check_page,
    unpacked_json,
)

FEW = 16
"""Up to so many names are looked up in buckets; for more, the names of all scenes are read."""
PAGES, BUCKETS, ATLASES = 4, 64, 4
"""Pages, buckets and atlases kept in memory."""
SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class SceneLocation:
    """Where a scene and its thumbnail are: what a bucket says of it."""

    row: int
    """Number of the scene in the order of addition."""
    pack: int
    offset: int
    bytes: int
    atlas: int
    cell: int
    sha256: str


class PublishedIndex:
    """The scenes of a published library. Its methods are those of `Index`. Threads may share it."""

    version = 0
    """What was opened stays as it is."""

    def __init__(self, files: PublishedFiles):
        """Raises a UserError if there is no published library, or its description is damaged."""
        self.files, self.about = files, files.description()
        self._page = lru_cache(PAGES)(self._read_page)
        self._bucket = lru_cache(BUCKETS)(self._read_bucket)
        self._atlas = lru_cache(ATLASES)(self._read_atlas)

    @classmethod
    def open(cls, path: str | Path) -> "PublishedIndex":
        """Opens the library at an address or in a folder. Raises as `PublishedIndex`."""
        return cls(PublishedFiles(open_files(path)))

    def close(self) -> None:
        """Forgets what was read."""
        for kept in (self._page, self._bucket, self._atlas):
            kept.cache_clear()

    def __len__(self) -> int:
        return self.about["scenes"]

    # Reading

    def _json(self, file: PublishedFile) -> dict[str, Any]:
        try:
            content = unpacked_json(self.files.content(file))
        except ValueError as error:
            raise UserError(f"{self.files.address}/{file.file}: cannot be read ({reason(error)}).") from None
        if not isinstance(content, dict):
            raise self._damage(file, "no JSON object")
        return content

    def _damage(self, file: PublishedFile, what: str) -> UserError:
        return UserError(f"{self.files.address}/{file.file}: damaged ({what}). Publish the library again.")

    def _count(self, page: int) -> int:
        """Returns the number of scenes of a page."""
        size = self.about["page_size"]
        return min(size, len(self) - page * size)

    def _read_page(self, number: int) -> dict[str, list]:
        file = self.about["pages"][number]
        page, count = self._json(file), self._count(number)
        try:
            check_page(page, count)
        except ValueError as error:
            raise self._damage(file, reason(error)) from None
        return page

    def _read_bucket(self, number: int) -> dict[str, Any]:
        return self._json(self.about["names"][number])

    def _read_atlas(self, number: int) -> Any:
        from PIL import Image

        file, cell = self.about["atlases"][number], self.about["thumbnail"]
        try:
            image = Image.open(io.BytesIO(self.files.content(file)), formats=["WEBP"])
            if image.width != SIDE * cell or image.height > SIDE * cell:
                raise self._damage(file, f"it has {image.width}x{image.height} pixels")
            return image.convert("RGBA")
        except (OSError, ValueError, SyntaxError) as error:
            raise self._damage(file, reason(error)) from None

    def location(self, name: str) -> SceneLocation | None:
        """Returns where a scene is; None if there is no such scene. Reads one bucket."""
        buckets = self.about["names"]
        if not buckets:
            return None
        number = bucket_of(name, len(buckets))
        entry = self._bucket(number).get(name)
        if entry is None or name == NO_NAME:
            return None
        if not self._is_location(entry):
            raise self._damage(buckets[number], f"its entry of {short(name)}")
        return SceneLocation(*entry)

    def _is_location(self, entry: Any) -> bool:
        if not isinstance(entry, list) or len(entry) != 7 or not all(type(one) is int for one in entry[:6]):
            return False
        row, pack, offset, size, atlas, cell, sha256 = entry
        packs, atlases = self.about["packs"], self.about["atlases"]
        return (
            0 <= row < len(self)
            and 0 <= pack < len(packs)
            and 0 <= offset <= offset + size <= packs[pack].bytes
            and -1 <= atlas < len(atlases)
            and -1 <= cell < SIDE * SIDE
            and isinstance(sha256, str)
            and SHA256.fullmatch(sha256) is not None
        )

    def pages(self) -> Iterator[dict[str, list]]:
        """Yields all pages, read once each."""
        return (self._page(number) for number in range(len(self.about["pages"])))

    # As of Index

    @cached_property
    def _names(self) -> list[str]:
        return [name for page in self.pages() for name in page["name"]]

    def names(self) -> list[str]:
        """Returns all names in the order of addition. Reads all pages, once."""
        return self._names

    def _info(self, page: dict[str, list], row: int) -> SceneInfo:
        return self._known_info({field: page[column][row] for column, field in INFO.items()})

    def _known_info(self, values: dict[str, Any]) -> SceneInfo:
        values |= {"dataset": None, "split": None, "source": values["name"]}
        info = scene_info([values[field] for field in SceneInfo.__dataclass_fields__])
        if info is None:
            raise UserError(
                f"{self.files.address}: the entry of scene {short(values['name'])} is damaged. Publish the "
                "library again."
            )
        return info

    def totals(self) -> Totals:
        """As `Index.totals`."""
        size, psnr = self.about["bytes"], self.about["psnr"]
        return Totals(len(self), size, None if psnr is None else float(psnr))

    def first(self, count: int) -> list[SceneInfo]:
        """As `Index.first`. Reads the first pages."""
        pages = range(min(-(-count // self.about["page_size"]), len(self.about["pages"])))
        found = (self._info(self._page(page), row) for page in pages for row in range(self._count(page)))
        return list(itertools.islice(found, count))

    def infos(self, match: str = "*", where: Sequence[str] = ()) -> list[SceneInfo]:
        """As `Index.infos`. Reads all pages."""
        infos = [
            self._info(page, row)
            for page in self.pages()
            for row, name in enumerate(page["name"])
            if match == "*" or fnmatch.fnmatchcase(name, match)
        ]
        kept = set(tagged({info.name: info.tags for info in infos}, where)) if where else None
        return [info for info in infos if kept is None or info.name in kept]

    @cached_property
    def _abouts(self) -> dict[str, str]:
        return {info.name: tags_text(info.tags) if info.tags else "" for info in self.infos()}

    def descriptions(self) -> dict[str, str]:
        """As `Index.descriptions`. Reads all pages, once."""
        return self._abouts

    def _row(self, name: str) -> tuple[dict[str, list], int] | None:
        """Returns a scene's page and its row there; None if there is no such scene."""
        location = self.location(name)
        if location is None:
            return None
        number, row = divmod(location.row, self.about["page_size"])
        page = self._page(number)
        if page["name"][row] != name:
            raise self._damage(self.about["pages"][number], f"its row of {short(name)}")
        return page, row

    def info(self, name: str) -> SceneInfo | None:
        """As `Index.info`. Reads a bucket; of a library that an earlier version published, also a page."""
        if self.location(name) is None:
            return None
        number = bucket_of(name, len(self.about["names"]))
        facts = self._bucket(number).get(NO_NAME)
        if facts is None:
            return self.info_in_page(name)
        values = facts.get(name) if isinstance(facts, dict) else None
        if not isinstance(values, list) or len(values) != len(FACTS):
            raise self._damage(self.about["names"][number], f"its metadata of {short(name)}")
        return self._known_info(
            {INFO[column]: value for column, value in zip(FACTS, values, strict=True)} | {"name": name}
        )

    def info_in_page(self, name: str) -> SceneInfo | None:
        """As `info`, from the scene's page."""
        found = self._row(name)
        return found and self._info(*found)

    def place(self, name: str) -> Place | None:
        """As `Index.place`; the shard is the number of the pack, and the row that of all scenes."""
        location, found = self.location(name), self._row(name)
        return (
            Place(location.pack, location.row, str(found[0]["payload"][found[1]]))
            if location and found
            else None
        )

    def places(self) -> dict[str, Place]:
        """As `Index.places`."""
        places = {}
        for page in self.pages():
            for name, pack, payload in zip(page["name"], page["pack"], page["payload"], strict=True):
                places[name] = Place(pack, len(places), str(payload))
        return places

    def known(self, names: Sequence[str]) -> set[str]:
        """As `Index.known`."""
        if len(names) > FEW:
            return set(names) & set(self.names())
        return {name for name in names if isinstance(name, str) and self.location(name)}

    def require(self, names: Sequence[str]) -> None:
        """As `Index.require`; the nearest names are sought among the first MOST_COMPARED."""
        known = self.known(names)
        for name in names:
            if name not in known:
                pages = -(-MOST_COMPARED // self.about["page_size"])
                numbers = range(min(pages, len(self.about["pages"])))
                near = [one for number in numbers for one in self._page(number)["name"]]
                raise unknown_scene(self.files.address, str(name), near)

    def thumbnail(self, name: str) -> bytes | None:
        """As `Index.thumbnail`. Reads a bucket and an atlas."""
        location = self.location(name)
        if location is None or location.atlas < 0 or location.cell < 0:
            return None
        side, stream = self.about["thumbnail"], io.BytesIO()
        x, y = location.cell % SIDE * side, location.cell // SIDE * side
        self._atlas(location.atlas).crop((x, y, x + side, y + side)).save(stream, "PNG")
        return stream.getvalue()


def is_published(path: str | Path) -> bool:
    """Returns whether a path is an address, or a folder in which a library was published."""
    if address_of(path) is not None:
        return True
    return (Path(path) / DESCRIPTION).is_file() and not (Path(path) / "library.json").is_file()
