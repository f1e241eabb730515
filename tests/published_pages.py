"""Small published libraries, and a server of static files, for tests in a browser."""

import contextlib
import functools
import http.server
import io
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from PIL import Image

from latentscenes.core import config_io
from latentscenes.core.cameras import Box, Cameras, Viewpoint
from latentscenes.core.files import now
from latentscenes.core.options import StoragePrecision
from latentscenes.model.model import Model
from latentscenes.model.planes import SceneParameters, mean_parameters, random_parameters
from latentscenes.storage.index import SceneInfo
from latentscenes.storage.library import LibraryFolder, LibraryInfo, NewScene
from latentscenes.storage.published.publishing import publish
from latentscenes.storage.published.targets import open_target
from latentscenes.storage.quantize import CODES, DIFFERENCES, Payload, pack
from tests.servers import served_by

MODULES = Path(__file__).resolve().parents[1] / "src" / "latentscenes" / "web"
BOX = Box((0.05, -0.1, 0.02), (0.5, 0.3, 0.25))
VIEW = Viewpoint((40, 48), 1.6, (1.1, 1.32), BOX.center)
COLORS = """
codec: {kind: identity}
planes: {resolution: 12, micro: 3, macro: 4, bases: 3, bias: true, mixing: true}
field: {hidden: 18}
render: {coarse: 10, fine: 8}
"""
"""Micro and macro planes with mixing; all parts have sizes that no texture or vector has."""


def random_model(settings: str, seed: int = 3) -> Model:
    """Returns a model whose random scenes are cloudy blobs with sharp changes of density and color."""
    model = Model(config_io.parse(settings, "settings"), BOX)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.bases.copy_(torch.randn(model.bases.shape, generator=generator))
        for parameter in model.field.parameters():
            parameter.copy_(0.7 * torch.randn(parameter.shape, generator=generator))
        hidden, out = model.field.hidden, model.field.out
        out.weight[0] *= 12
        out.bias[0] = -1 - out.weight[0] @ torch.nn.functional.softplus(
            hidden.bias
        )  # clear around the planes
    return model.eval().requires_grad_(False)


def random_scene(model: Model, seed: int, box: Sequence[float] = ()) -> SceneParameters:
    """Returns a scene (n = 1) with random parameters, in a box of its own if one is given."""
    generator = torch.Generator().manual_seed(seed)
    rows = random_parameters(1, model.config.planes, generator)
    rows.micro = torch.randn(rows.micro.shape, generator=generator)
    rows.bias = torch.randn(rows.bias.shape, generator=generator)
    rows.mixing = 0.3 * torch.randn(rows.mixing.shape, generator=generator)
    if box:
        rows.box = torch.tensor([list(box)])
    return rows


def library_of(
    path: Path,
    model: Model,
    scenes: dict[str, SceneParameters],
    precision: StoragePrecision = "int8",
    tags: Mapping[str, dict[str, Any]] = MappingProxyType({}),
    silhouettes: bool | None = None,
    packed: Callable[[SceneParameters, StoragePrecision], Payload] = pack,
) -> LibraryFolder:
    """Writes a library of these scenes, all with a green thumbnail, and with tags by name."""
    png = io.BytesIO()
    Image.new("RGBA", (40, 30), (10, 200, 30, 255)).save(png, "PNG")
    known = []
    for name, rows in scenes.items():
        info = SceneInfo(
            name=name, dataset=None, split=None, source=name, precision=precision, bytes=1, origin="exploit",
            added=now(), seconds=None, cpu_seconds=None, psnr=None, psnr_lost=None,
            silhouettes=silhouettes, tags=tags.get(name, {}),
        )  # fmt: skip
        known.append(NewScene(info, packed(rows, precision), png.getvalue()))
    info = LibraryInfo(BOX, VIEW, precision, "run", 1.0, 1)
    start = mean_parameters(1, next(iter(scenes.values())))
    return LibraryFolder.create(path, model.config, info, model, start, known)


def packed_before(rows: SceneParameters, precision: StoragePrecision) -> Payload:
    """Returns a payload as earlier versions wrote it: deflated codes, not their differences."""
    payload = pack(rows, precision)
    codes = (rows.micro[0] / payload["micro.scale"][:, None, None]).round().to(torch.int8)
    content = zlib.compress(codes.permute(0, 3, 1, 2).contiguous().numpy().tobytes(), 6)
    del payload[DIFFERENCES]
    return payload | {CODES: torch.frombuffer(bytearray(content), dtype=torch.uint8)}


def published(folder: Path, library: LibraryFolder) -> Path:
    """Publishes a library into a folder."""
    publish(library, open_target(str(folder)))
    return folder


class Files(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; with ranges, if the server says so."""

    def log_message(self, *_: object) -> None:
        pass

    def send_head(self):
        """Answers requests for a part of a file."""
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        file = Path(self.translate_path(self.path))
        if not (self.server.ranges and wanted and file.is_file()):
            return super().send_head()
        first, last = int(wanted[1]), min(int(wanted[2]), file.stat().st_size - 1)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{file.stat().st_size}")
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        return io.BytesIO(file.read_bytes()[first : last + 1])

    def end_headers(self) -> None:
        self.send_header("Access-Control-Allow-Origin", "*")
        super().end_headers()


@dataclass(frozen=True)
class Site:
    """A served folder."""

    folder: Path
    address: str
    server: http.server.ThreadingHTTPServer

    def page(self, name: str, body: str, policy: str = "") -> str:
        """Writes a page and returns its address."""
        rule = f'<meta http-equiv="Content-Security-Policy" content="{policy}">' if policy else ""
        text = (
            f'<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,">{rule}<title>{name}</title>'
        )
        (self.folder / f"{name}.html").write_text(text + body)
        return f"{self.address}/{name}.html"


@contextlib.contextmanager
def served(folder: Path, ranges: bool = True, modules: bool = True) -> Iterator[Site]:
    """Serves a folder on 127.0.0.1, and the modules below /web, if they are not in it already."""
    folder.mkdir(exist_ok=True)
    if modules:
        (folder / "web").symlink_to(MODULES)
    with served_by(functools.partial(Files, directory=str(folder)), ranges=ranges) as server:
        yield Site(folder, server.address, server)


def as_in_browser(cameras: Cameras, number: int) -> dict[str, list[float]]:
    """Returns a camera as the renderer in the browser takes it."""
    matrix = cameras.cam2world[number]
    return {
        "axes": matrix[:, :3].t().flatten().tolist(),
        "eye": matrix[:, 3].tolist(),
        "lens": cameras.intrinsics[number].tolist(),
    }
