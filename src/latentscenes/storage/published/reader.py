"""A published library, read from a web server, a bucket or a folder (docs/published.md)."""

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from latentscenes.core import config_io
from latentscenes.core.errors import UserError
from latentscenes.core.names import short
from latentscenes.core.reading import reason
from latentscenes.storage.description import SHARED
from latentscenes.storage.library import START, LibraryFolder
from latentscenes.storage.published.addresses import Files, open_files
from latentscenes.storage.published.files import PublishedFiles
from latentscenes.storage.published.format import DESCRIPTION, ENTRY, bucket_of
from latentscenes.storage.published.index import PublishedIndex, is_published
from latentscenes.storage.quantize import Payload
from latentscenes.storage.source import LibraryInfo, SceneSource
from latentscenes.storage.verifying import Damage


class PublishedLibrary(SceneSource):
    """An opened published library. It is for reading."""

    remedy = "Publish the library again."

    def __init__(self, files: Files):
        """Raises a UserError if there is no published library at the files' address, or it is damaged."""
        self._files = PublishedFiles(files)
        self.path = files.address
        self.index = PublishedIndex(self._files)
        self._about = about = self.index.about
        where, known = f"{self.path}/{DESCRIPTION}", LibraryInfo.__dataclass_fields__
        facts, text = about["library"], about["config"]
        if len(text) > config_io.MOST_YAML:
            raise UserError(f"{where}: its configuration is too long. {self.remedy}")
        facts = {name: facts[name] for name in known if name in facts}
        self.info = config_io.build(LibraryInfo, facts, where)
        self.info.box.check(where)
        self.info.view.check(where)
        self.config = config_io.parse(text, f"{where}: config")
        self.checksums = {SHARED: about["model"].sha256, START: about["start"].sha256}

    @classmethod
    def open(cls, path: str | Path) -> "PublishedLibrary":
        """Opens the library at an address or in a folder. Raises a UserError if there is none."""
        return cls(open_files(path))

    def close(self) -> None:
        self.index.close()

    def refuse_change(self) -> NoReturn:
        """Raises the UserError of all changes."""
        raise UserError(
            f"{self.path}: a published library is for reading; change the library that it was published "
            "from, then publish that again."
        )

    # The model

    @property
    def shared_file(self) -> Path:
        return self._files.local(self._about["model"])

    def check_model(self) -> None:
        self._files.content(self._about["model"])

    def check_start(self) -> Path:
        return self._files.local(self._about["start"])

    # Scenes

    def payload(self, name: str) -> Payload:
        location = self.index.location(name)
        if location is None:
            self.index.require([name])
        pack = self._about["packs"][location.pack]
        content = self._files.part(pack, location.offset, location.bytes, location.sha256)
        try:
            return load(content)
        except (SafetensorError, ValueError, KeyError) as error:
            raise UserError(
                f"{self.path}: scene {short(name)} cannot be read ({reason(error)}). {self.remedy}"
            ) from None

    def all_weights(self) -> tuple[list[str], Float[Tensor, "n M"]]:
        planes, names = self.config.planes, self.index.names()
        bases = planes.bases if planes.macro else 0
        table = np.zeros((len(names), bases), np.float32)
        begin = 0
        for file in self._about["weights"] if bases else ():
            count = min(self._about["page_size"], len(names) - begin)
            content = self._files.content(file)
            if len(content) != 4 * count * bases:
                raise UserError(f"{self.path}/{file.file}: holds no {count} x {bases} numbers. {self.remedy}")
            table[begin : begin + count] = np.frombuffer(content, "<f4").reshape(count, bases)
            begin += count
        if bases and begin != len(names):
            raise UserError(
                f"{self.path}: the weights of {len(names) - begin} scenes are absent. {self.remedy}"
            )
        return names, torch.from_numpy(table)

    def metrics(self) -> list[dict[str, Any]]:
        """Returns no steps: how scenes were learned is not published."""
        return []

    # Damage

    def verify(self) -> list[Damage]:
        """Reads all files and compares them with their checksums, and pages with buckets."""
        about, found, places = self._about, [], defaultdict(list)
        plain = [about[name] for name in ("model", "start", "web_model")]
        for file in (*plain, *about["weights"], *about["atlases"], *about["pages"], *about["names"]):
            try:
                self._files.content(file)
            except UserError as error:
                found.append(Damage(file.file, self._short(error)))
        if any(damage.name.startswith(("index/", "names/")) for damage in found):
            return found
        for row, name, place in self._rows():
            location = self.index.location(name)
            stated = location and [location.row, *(getattr(location, key) for key in ENTRY)]
            if stated != [row, *place]:
                file = about["names"][bucket_of(name, len(about["names"]))].file
                found.append(Damage(name, f"its entry in {file} is not that of its page"))
            elif self.index.info(name) != self.index.info_in_page(name):
                file = about["names"][bucket_of(name, len(about["names"]))].file
                found.append(Damage(name, f"its metadata in {file} are not those of its page"))
            else:
                places[location.pack].append((name, location))
        for number, file in enumerate(about["packs"]):
            try:
                content = self._files.content(file)
            except UserError as error:
                found.append(Damage(file.file, self._short(error)))
                continue
            for name, location in places[number]:
                part = content[location.offset : location.offset + location.bytes]
                if hashlib.sha256(part).hexdigest() != location.sha256:
                    found.append(Damage(name, f"its bytes in {file.file} are not those that were published"))
        return found

    def _rows(self) -> Iterator[tuple[int, str, list]]:
        row = 0
        for page in self.index.pages():
            for name, *place in zip(page["name"], *(page[key] for key in ENTRY), strict=True):
                yield row, name, place
                row += 1

    def _short(self, error: UserError) -> str:
        return str(error).removeprefix(f"{self.path}/").partition(": ")[2]


def open_source(path: str | Path) -> SceneSource:
    """Opens a library: a folder, or the folder or address of a published one. Raises a UserError if there is
    none, or it cannot be read."""
    return PublishedLibrary.open(path) if is_published(path) else LibraryFolder.open(path)
