"""Publishes a library as static files (docs/published.md), which web servers and buckets serve.

Files are named after their content, so none ever changes, and what an earlier publication wrote is used
again: scenes stay in their packs, and thumbnails in their atlases. Memory holds about 1 KiB a scene.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save

from latentscenes.core.errors import UserError
from latentscenes.core.files import CHECKSUM, file_checksum, now, object_checksum
from latentscenes.core.names import check_name, short
from latentscenes.core.reading import parse_json, reason
from latentscenes.core.version import __version__
from latentscenes.storage.description import identity_of, refuse_inside
from latentscenes.storage.entries import SceneInfo
from latentscenes.storage.index import Place
from latentscenes.storage.library import LibraryFolder
from latentscenes.storage.published.format import (
    CELL,
    DESCRIPTION,
    ENTRY,
    FACTS,
    FLAT,
    FORMAT,
    INFO,
    PACK_BYTES,
    PAGE,
    PLACE,
    SIDE,
    PublishedFile,
    as_json,
    bucket_count,
    bucket_of,
    bucket_text,
    check_description,
    check_page,
    files_of,
    packed,
    unpacked_json,
)
from latentscenes.storage.published.parts import (
    TagCounts,
    atlas,
    finite,
    library_facts,
    model_files,
    portable_config,
    render_facts,
)
from latentscenes.storage.published.targets import Target
from latentscenes.storage.quantize import payload_checksum

SHA256 = re.compile("[0-9a-f]{64}")
MOST_SMALL = 16
"""So many packs or atlases that are less than half full are merged."""
NOWHERE = (-1, -1)
"""Atlas and cell of a scene without a thumbnail."""


@dataclass(frozen=True)
class Published:
    """What a publication did."""

    scenes: int
    files: int
    """Files that were written."""
    bytes: int
    """Their size."""
    removed: int
    """Files of earlier publications that were deleted."""


@dataclass(frozen=True)
class PackedScene:
    """Where a scene lies in the packs."""

    pack: int
    offset: int
    bytes: int
    sha256: str


def publish(library: LibraryFolder, target: Target, replace: bool = False) -> Published:
    """Publishes a library, or what is new in it since it was last published there. Readers see the state
    before or after. If this is killed, the next publication takes up the files that it wrote.

    Args:
        replace: whether the publication of another library may be replaced.

    Raises:
        UserError: the target holds something else or cannot be written, or the library is damaged.
    """
    if target.folder is not None:
        refuse_inside(target.folder)
    with target.writing():
        writing = _Publication(library, target)
        if not replace:
            writing.refuse_other_library()
        with library.index.snapshot():
            description = writing.write_all()
        return writing.finish(description)


class _Publication:
    def __init__(self, library: LibraryFolder, target: Target):
        self.library, self.target = library, target
        self._present = target.sizes()
        self._old = self._description()
        self._packs: list[PublishedFile] = []
        self._atlases: list[PublishedFile] = []
        self._stored: dict[bytes, PackedScene] = {}
        self._pictured: dict[bytes, tuple[int, int]] = {}
        """Atlas and cell of scenes' thumbnails."""
        self._pack, self._cells = bytearray(), []
        self._files = self._bytes = 0

    def _description(self) -> dict[str, Any] | None:
        """What was published there before; None if nothing."""
        where = f"{self.target.address}/{DESCRIPTION}"
        text = self.target.read(DESCRIPTION)
        if text is None:
            return None
        try:
            content = parse_json(text.decode())
        except ValueError as error:
            raise UserError(
                f"{where}: cannot be read ({reason(error)}). Remove it and run this again."
            ) from None
        return check_description(content, where)

    def refuse_other_library(self) -> None:
        """Raises a UserError if another library was published there: its listing would be lost."""
        old = self._old
        if old is None:
            return
        ours, theirs = identity_of(self.library.path), old.get("identity")
        if old["model"].sha256 == file_checksum(self.library.shared_file) and None in (ours, theirs):
            return  # one of them is of an earlier version
        if ours is None or ours != theirs:
            raise UserError(
                f"{self.target.address}: another library is published there ({old['scenes']} scenes, "
                f"{short(old.get('made'))}). Name another place, or replace it with --replace."
            )

    # What is there already

    def _reused_files(self) -> None:
        """Finds the packs and atlases that stay, and the places of scenes and thumbnails in them."""
        if self._old is None:
            return
        live = {_key(text) for text in self.library.index.checksums() if SHA256.fullmatch(str(text))}
        packs, atlases = self._old["packs"], self._old["atlases"]
        stored, pictured = self._published_places(live, len(packs), len(atlases))
        used, shown = Counter(), Counter(number for number, _ in set(pictured.values()))
        for place in stored.values():
            used[place.pack] += place.bytes
        dying = {number for number, file in enumerate(packs) if 2 * used[number] < file.bytes}
        dying |= _mergeable(number for number in range(len(packs)) if 2 * used[number] < PACK_BYTES)
        fading = {number for number in range(len(atlases)) if not shown[number]}
        fading |= _mergeable(number for number in range(len(atlases)) if 2 * shown[number] < SIDE * SIDE)
        kept = self._keep(packs, dying, self._packs)
        pictures = self._keep(atlases, fading, self._atlases)
        self._stored = {
            key: replace(place, pack=kept[place.pack]) for key, place in stored.items() if place.pack in kept
        }
        self._pictured = {
            key: (pictures[number], cell) for key, (number, cell) in pictured.items() if number in pictures
        }

    def _keep(self, files: list[PublishedFile], worn: set[int], kept: list[PublishedFile]) -> dict[int, int]:
        """Keeps files that are whole and not worn. Returns their new numbers by their old ones."""
        numbers = {}
        for number, file in enumerate(files):
            if number not in worn and self._present.get(file.file) == file.bytes:
                numbers[number] = len(kept)
                kept.append(file)
        return numbers

    def _published_places(
        self, live: set[bytes], packs: int, atlases: int
    ) -> tuple[dict[bytes, PackedScene], dict[bytes, tuple[int, int]]]:
        """Returns where scenes that were published and are still in the library lie, and their thumbnails. A
        page that is absent or damaged counts as never published."""
        stored, pictured = {}, {}
        for file in self._old["pages"]:
            content = self.target.read(file.file)
            if content is None or PublishedFile.of("index", content) != file:
                continue
            try:
                check_page(page := unpacked_json(content))
            except ValueError:
                continue
            for pack, offset, size, sha256, payload, *picture in zip(
                *(page[column] for column in PLACE), strict=True
            ):
                key = _key(payload)
                if key in live and 0 <= pack < packs:
                    stored.setdefault(key, PackedScene(pack, offset, size, sha256))
                if key in live and 0 <= picture[0] < atlases:
                    pictured.setdefault(key, tuple(picture))
        return stored, pictured

    # What is new

    def write_all(self) -> dict[str, Any]:
        """Writes all files but the description, which it returns."""
        library, row = self.library, 0
        self._reused_files()
        pages, weights, tags, known = [], [], TagCounts(), True
        buckets: list[list[tuple[str, str, str]]] = [[] for _ in range(bucket_count(len(library.index)))]
        for entries in library.index.pages(PAGE):
            columns: dict[str, list] = {name: [] for name in (*PLACE, *INFO)}
            for info, place in entries:
                found = self._scene(info, place)
                for name, value in found.items():
                    columns[name].append(value)
                bucket = buckets[bucket_of(check_name(info.name, library.path), len(buckets))]
                entry = [row, *(found[name] for name in ENTRY)], [found[name] for name in FACTS]
                bucket.append((json.dumps(info.name), *map(as_json, entry)))
                tags.add(info.tags)
                known, row = known and bool(info.silhouettes), row + 1
            pages.append(self._write("index", packed(as_json(columns))))
            weights += self._weights([place for _, place in entries])
        self._close_pack()
        self._close_atlas()
        model, totals = library.model(), library.index.totals()
        return {
            "format": FORMAT, "version": __version__, "made": now(), "scenes": row, "bytes": totals.bytes,
            "psnr": finite(totals.psnr), "identity": identity_of(library.path),
            "library": library_facts(library), "config": portable_config(library.config),
            "render": render_facts(model),
            **{name: self._write(*made) for name, made in model_files(library, model).items()},
            "packs": self._packs, "pages": pages, "weights": weights,
            "names": [self._write("names", packed(bucket_text(bucket))) for bucket in buckets],
            "atlases": self._atlases, "page_size": PAGE, "thumbnail": CELL, "tags": tags.most_frequent(),
            "silhouettes": known,
        }  # fmt: skip

    def _scene(self, info: SceneInfo, place: Place) -> dict[str, Any]:
        """Returns a scene's values in the columns of its page; writes scene and thumbnail if they are new."""
        with self._damage(f"scene {short(info.name)}"):
            key = _key(place.checksum)
        if key not in self._stored:
            self._stored[key] = self._packed(info.name, place)
        if key not in self._pictured and (picture := self.library.index.thumbnail(info.name)):
            self._pictured[key] = len(self._atlases), len(self._cells)
            self._cells.append(picture)
            if len(self._cells) == SIDE * SIDE:
                self._close_atlas()
        atlas, cell = self._pictured.get(key, NOWHERE)
        metadata = {column: finite(getattr(info, name)) for column, name in INFO.items()}
        return {
            **asdict(self._stored[key]),
            "payload": place.checksum,
            "atlas": atlas,
            "cell": cell,
            **metadata,
        }

    def _packed(self, name: str, place: Place) -> PackedScene:
        """Appends a scene to the pack that is being filled."""
        with self._damage(f"scene {short(name)}"):
            payload = self.library.shards.read(place)
            if payload_checksum(payload) != place.checksum:
                raise ValueError("its bytes have changed since it was written")
        content = save(payload)
        if self._pack and len(self._pack) + len(content) > PACK_BYTES:
            self._close_pack()
        offset = len(self._pack)
        self._pack += content + bytes(-len(content) % 8)
        return PackedScene(len(self._packs), offset, len(content), hashlib.sha256(content).hexdigest())

    def _weights(self, places: list[Place]) -> list[PublishedFile]:
        """Writes the weights of a page's scenes. Returns nothing if there are no base planes."""
        with self._damage("the weights of a scene"):
            table = self.library.weights_at(places)
        return [self._write("weights", table.numpy().astype("<f4").tobytes())] if table.shape[1] else []

    @contextmanager
    def _damage(self, what: str) -> Iterator[None]:
        """Turns errors in reading shards into a UserError."""
        try:
            yield
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(
                f"{self.library.path}: {what} cannot be read ({reason(error)}). Nothing new is published. If "
                "another process changes the library, run this again; else `latentscenes library verify` "
                "lists the damage."
            ) from None

    def _close_pack(self) -> None:
        if self._pack:
            self._packs.append(self._write("packs", bytes(self._pack)))
            self._pack = bytearray()

    def _close_atlas(self) -> None:
        if self._cells:
            content, many = atlas(self._cells, self.library.path), len(self._atlases) >= FLAT
            self._atlases.append(self._write("thumbnails", content, inner=many))
            self._cells = []

    def _write(
        self, folder: str, content: bytes, ending: str | None = None, inner: bool = False
    ) -> PublishedFile:
        """Writes a file unless it is there."""
        file = PublishedFile.of(folder, content, ending, inner)
        if self._present.get(file.file) != file.bytes:
            self._put(file.file, content)
            self._present[file.file] = file.bytes
        return file

    def _put(self, name: str, content: bytes) -> None:
        self.target.write(name, content)
        self._files, self._bytes = self._files + 1, self._bytes + len(content)

    def finish(self, description: dict[str, Any]) -> Published:
        """Writes the description, then deletes files that neither it nor the one before names."""
        kept = {file.file for file in (*files_of(description), *files_of(self._old or {}))}
        plain = json.loads(json.dumps(description, default=asdict))
        sealed = plain | {CHECKSUM: object_checksum(plain)}
        text = json.dumps(sealed, indent=1).encode()
        self._put(DESCRIPTION, text)
        self._refuse_another(text, description)
        outdated = sorted(self._present.keys() - kept)
        for name in outdated:
            self.target.remove(name)
        return Published(description["scenes"], self._files, self._bytes, len(outdated))

    def _refuse_another(self, text: bytes, description: dict[str, Any]) -> None:
        """Deletes nothing if another process published there meanwhile, which buckets do not prevent."""
        sizes = self.target.sizes()
        lost = next((file.file for file in files_of(description) if sizes.get(file.file) != file.bytes), None)
        if lost or self.target.read(DESCRIPTION) != text:
            what = f"{lost} is absent" if lost else f"its {DESCRIPTION} is another one"
            raise UserError(
                f"{self.target.address}: another process published there meanwhile ({what}). Wait for it; "
                "then run this again."
            )


def _key(checksum: str) -> bytes:
    """Returns the first 16 bytes of a payload's checksum. Raises a ValueError if that is none."""
    if not SHA256.fullmatch(checksum):
        raise ValueError("the index holds no checksum of it")
    return bytes.fromhex(checksum[:32])


def _mergeable(small: Iterable[int]) -> set[int]:
    """Returns the numbers of small files if there are enough of them to be merged."""
    found = set(small)
    return found if len(found) >= MOST_SMALL else set()
