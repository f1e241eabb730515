"""A small library for tests of publishing, and web servers with and without ranges."""

import io
import re
from dataclasses import asdict
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path

import torch
from conftest import TINY
from PIL import Image
from results import made_run

import latentscenes
from latentscenes.core import config_io
from latentscenes.model.planes import random_parameters
from latentscenes.storage.library import LibraryFolder, NewScene
from latentscenes.storage.quantize import pack
from tests.servers import served_by


def made_library(folder: Path, solids) -> Path:
    """Makes a library of four solids with random parameters."""
    run = made_run(folder / "run", config_io.parse(TINY, "tiny"), solids, "train")
    latentscenes.create_library(folder / "library", run.path, device="cpu").close()
    return folder / "library"


def add(library: LibraryFolder, *names: str, seed: int = 0) -> None:
    """Adds scenes of random parameters, with a thumbnail and tags."""
    generator, png = torch.Generator().manual_seed(seed), io.BytesIO()
    Image.new("RGBA", (40, 30), (10, 200, 30, 255)).save(png, "PNG")
    old = library.index.infos()[0]
    scenes = []
    for number, name in enumerate(names):
        payload = pack(random_parameters(1, library.config.planes, generator), "int8")
        tags = {"category": "Box", "number": number, "odd": float("inf")}
        info = type(old)(**asdict(old) | {"name": name, "tags": tags})
        scenes.append(NewScene(info, payload, png.getvalue()))
    library.append(scenes)


class WholeFiles(SimpleHTTPRequestHandler):
    """A server that ignores ranges, as `python -m http.server` does."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers["Range"]))
        if self.server.failing:
            self.server.failing -= 1
            self.send_error(503)
        else:
            self.answer()

    def answer(self) -> None:
        super().do_GET()


class Parts(WholeFiles):
    """A server that sends parts of files."""

    def answer(self) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"] or "")
        file = Path(self.translate_path(self.path))
        if not asked or not file.is_file():
            super().answer()
            return
        content, (begin, end) = file.read_bytes(), map(int, asked.groups())
        part = content[begin : end + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {begin + self.server.shift}-{end}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)


def serving(folder: Path, kind: type = Parts):
    """Serves a folder on this machine. `server.asked` holds paths and ranges of all requests; the next
    `server.failing` requests are answered with 503."""
    return served_by(partial(kind, directory=str(folder)), asked=[], failing=0, shift=0)
