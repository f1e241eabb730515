"""Writes pages that render scenes live, with the modules of `web`: one HTML file that works without a network
and holds a small published library, and the gallery beside a published library.

With fewer scenes than about two and a half times the base planes, the page holds each scene's fused planes
instead of the base planes, as scenes without base planes: that is smaller. Both are quantized to 8 bits.
"""

import base64
import re
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from latentscenes.core.config import Config
from latentscenes.core.console import tracked
from latentscenes.core.errors import UserError
from latentscenes.core.files import now
from latentscenes.core.names import one_line
from latentscenes.core.version import __version__
from latentscenes.export.pages import TEMPLATES, described, how_many, page_with
from latentscenes.export.sheets import save_file, short_names
from latentscenes.model.model import Model
from latentscenes.model.pictures import thumbnail
from latentscenes.model.planes import SceneParameters
from latentscenes.storage.entries import SceneInfo
from latentscenes.storage.library import LibraryFolder, LibraryInfo, NewScene
from latentscenes.storage.published.publishing import publish
from latentscenes.storage.published.targets import FolderTarget, Target
from latentscenes.storage.quantize import pack, payload_bytes
from latentscenes.storage.scene_set import StoredScenes

MODULES = Path(__file__).parents[1] / "web"
INDEX = "index.html"
MARK = b'<meta name="generator" content="latentscenes'
"""Text that marks an index.html as one of a gallery."""
ENTRY = "latent-scene.js"
"""The module that defines the element."""
SHARED_FROM = 2.5
"""Scenes per base tri-plane from which on base planes are inside. A number of a base plane takes two bytes;
one of a scene about 0.8, deflated."""
IMPORT = re.compile(r'^import \{([^}]*)\} from "\./([\w-]+\.js)";$', re.M)
UNREAD = "model/*.safetensors", "weights/*"
"""Files of a published library that the element does not read, besides the browser's model."""


def write_live_page(
    path: str | Path, loaded: StoredScenes, scenes: Sequence[str], *, title: str = "Learned scenes"
) -> int:
    """Writes the page and returns its size in bytes.

    Args:
        path: .html file.

    Raises:
        UserError: the latents of these scenes are no colors, so the page could not show them.
    """
    config = loaded.model.config
    if not config.codec.has_colors or config.normalizer.kind != "none":
        raise UserError(
            "--live: a browser shows scenes whose latents are colors (codec.kind: identity or guided, no "
            f"normalizer), but here it is {config.codec.kind}. Leave --live out to get a page of pictures."
        )
    with tempfile.TemporaryDirectory() as folder:
        library = _library_inside(Path(folder) / "library", loaded, scenes)
        target = FolderTarget(Path(folder) / "published")
        publish(library, target)
        library.close()
        files = _contents(target.path)
    captions = short_names(loaded.names)
    entries = [described(loaded, scene, captions[scene]) for scene in scenes]
    size = sum(len(content) for content in files.values())
    many = how_many(len(entries), len(loaded.names))
    page = page_with(
        bundle() + Path(__file__).with_name("live.js").read_text("utf-8"),
        {"files": files, "scenes": entries},
        title=one_line(title),
        summary=f"{many}, rendered live; {size / 2**20:.1f} MiB in one file.",
        aspect="1.333",
        least=240,
        more="; + and − zoom",
    )
    return save_file(path, page.encode())


def _contents(folder: Path) -> dict[str, str]:
    """Returns the files of a published library that the element reads, as base64 by path."""
    found = {}
    for file in sorted(folder.rglob("*")):
        unread = any(file.match(pattern) for pattern in UNREAD) and not file.name.endswith(".web.safetensors")
        if file.is_file() and not file.name.startswith(".") and not unread:
            found[file.relative_to(folder).as_posix()] = base64.b64encode(file.read_bytes()).decode()
    return found


def _library_inside(folder: Path, loaded: StoredScenes, scenes: Sequence[str]) -> LibraryFolder:
    """Writes a library of the chosen scenes alone."""
    model, planes = loaded.model, loaded.model.config.planes
    fuse = bool(planes.macro) and len(scenes) < SHARED_FROM * planes.bases
    small = without_bases(model) if fuse else model
    found = []
    for scene in tracked(scenes, "packing"):
        rows = loaded.parameters(scene)
        known = loaded.silhouettes(scene)
        picture = thumbnail(model, rows, loaded.view, known)
        payload = pack(fused(loaded, scene, rows) if fuse else rows, "int8")
        unknown = dict.fromkeys(("dataset", "split", "seconds", "cpu_seconds", "psnr", "psnr_lost"))
        info = SceneInfo(
            name=scene, source=scene, precision="int8", bytes=payload_bytes(payload), origin="exploit",
            added=now(), silhouettes=known, tags=loaded.tags(scene), **unknown,
        )  # fmt: skip
        found.append(NewScene(info, payload, picture))
    start = fused(loaded, scenes[0], rows) if fuse else rows
    info = LibraryInfo(loaded.box, loaded.view, "int8", "", 0.0, 0)
    return LibraryFolder.create(folder, small.config, info, small.cpu(), start.to("cpu"), found)


def without_bases(model: Model) -> Model:
    """Returns a model that renders the fused planes of scenes as micro planes."""
    config = replace(model.config, train=(), exploit=())
    planes = replace(
        config.planes, micro=config.planes.features, macro=0, fusion="concat", bias=False, mixing=False
    )
    small = Model(Config(**{**vars(config), "planes": planes}), model.box, pretrained=False)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "bases"}
    small.load_state_dict(state | {"bases": small.bases})
    return small.eval().requires_grad_(False)


def fused(loaded: StoredScenes, scene: str, rows: SceneParameters) -> SceneParameters:
    """Returns a scene's fused and mixed planes as the micro planes of a scene without base planes."""
    none = rows.weights.new_zeros(1, 0)
    return SceneParameters(loaded.planes(scene).texels, none, none, rows.weights.new_zeros(1, 0, 0), rows.box)


def bundle() -> str:
    """Returns the modules of `web` as one script: each is a function that returns its exports."""
    texts: dict[str, str] = {}

    def add(name: str) -> None:
        if name in texts:
            return
        text = (MODULES / name).read_text("utf-8")
        for _, other in IMPORT.findall(text):
            add(other)
        texts[name] = text

    add(ENTRY)
    exports: dict[str, set[str]] = {name: set() for name in texts}
    for text in texts.values():
        for names, other in IMPORT.findall(text):
            exports[other] |= {name.strip() for name in names.split(",")}
    exports[ENTRY], exports["source.js"] = {"provide"}, exports["source.js"] | {"InnerSource"}
    parts = ['"use strict";', "const modules = {};"]
    for name, text in texts.items():
        body = IMPORT.sub(lambda found: f'const {{{found[1]}}} = modules["{found[2]}"];', text)
        body = re.sub(r"^export ", "", body, flags=re.M)
        given = ", ".join(sorted(exports[name]))
        parts.append(f'modules["{name}"] = (() => {{\n{body}\nreturn {{{given}}};\n}})();')
    return "\n".join(parts).replace("</script", "<\\/script").replace("<!--", "<\\!--") + "\n"


# The gallery


def check_site(target: Target) -> None:
    """Raises a UserError if the target holds an index.html that is no gallery, which would be lost."""
    present = target.read(INDEX)
    if present is not None and MARK not in present:
        raise UserError(
            f"{target.address}/{INDEX}: is no gallery of this package. Move it, or leave --site out."
        )


def write_site(target: Target, title: str) -> int:
    """Writes the files of the gallery that are absent or other ones, index.html last. Returns their number.

    Raises:
        UserError: the target cannot be written, or holds another index.html.
    """
    check_site(target)
    files = {f"web/{file.name}": file.read_bytes() for file in sorted(MODULES.glob("*.[jc]s*"))}
    page = TEMPLATES.get_template("site.html").render(
        title=one_line(title), generator=f"latentscenes {__version__}"
    )
    written = 0
    with target.writing():
        for name, content in (files | {INDEX: page.encode()}).items():
            if target.read(name) != content:
                target.write(name, content)
                written += 1
    return written
