"""A library of learned scenes from Python: open it, take a scene, render it, look for its like, add another.

    library = latentscenes.open_library("cars")
    scene = library["car-12"]
    views = scene.render(library.orbit(8))        # numpy arrays: rgb, latents, depth, opacity
    alike = library.nearest("car-12", count=5)

The folder is store.py's; this is the door to it for programs, viewers and notebooks.
"""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import ArrayLike
from torch import Tensor

from latentscenes.core import runtime
from latentscenes.core.cameras import Box, Cameras
from latentscenes.core.config import Config, StoragePrecision, frozen
from latentscenes.core.errors import UserError
from latentscenes.data.dataset import PosedImages
from latentscenes.model.model import Model, render_images
from latentscenes.model.planes import SceneParameters
from latentscenes.rendering.field import FusedPlanes
from latentscenes.storage import maintenance as care
from latentscenes.storage.index import SceneInfo
from latentscenes.storage.library import LibraryFolder
from latentscenes.storage.pretrained import library_from_model, open_parent
from latentscenes.training.add import learn_from_pictures, quick_weights
from latentscenes.training.append import library_from_run


@dataclass(frozen=True)
class RenderedViews:
    """v views of a scene."""

    rgb: Float[np.ndarray, "v H W 3"]
    """In [0, 1], over white."""
    latents: Float[np.ndarray, "v h w c"]
    """What was rendered and then decoded to `rgb`; in (−1, 1)."""
    depth: Float[np.ndarray, "v a b"]
    """Expected distance along the ray from the camera, world units; where nothing is, that at which the ray ends."""
    opacity: Float[np.ndarray, "v a b"]
    """In [0, 1]."""

    @property
    def images(self) -> UInt8[np.ndarray, "v H W 3"]:
        """`rgb` as bytes, for PIL and others."""
        return np.round(255 * self.rgb).astype(np.uint8)


Metric = Literal["planes", "cosine"]


class Neighbor(NamedTuple):
    """A scene that is like another."""

    name: str
    distance: float
    """0 for the same."""


class LearnedScene:
    """One scene of a library. Its planes are read when first needed, and kept as long as this object."""

    def __init__(self, library: "Library", name: str):
        self.library, self.name = library, name

    def __repr__(self) -> str:
        return f"<latentscenes scene {self.name!r} of {self.library.path}>"

    @property
    def metadata(self) -> SceneInfo:
        """Where it came from, what it costs, how good it is."""
        info = self.library.store.index.info(self.name)
        if info is None:
            raise UserError(f"{self.library.path}: scene {self.name!r} was removed or renamed meanwhile.")
        return info

    @property
    def thumbnail(self) -> bytes:
        """A small picture of it, as the bytes of a PNG file."""
        return self.library.thumbnail(self.name)

    @property
    def weights(self) -> Float[np.ndarray, "M"]:
        """Its weights over the base planes."""
        return self.rows.weights[0].cpu().numpy()

    @cached_property
    def rows(self) -> SceneParameters:
        """What the scene owns (n = 1), on the library's device."""
        return self.library.store.parameters(self.name).to(self.library.device)

    @cached_property
    def planes(self) -> FusedPlanes:
        """Its fused tri-planes, for `library.model.render`."""
        with torch.no_grad():
            return self.library.model.compose(self.rows)

    def render(
        self, cameras: Cameras, size: int | tuple[int, int] | None = None, geometry: bool = True
    ) -> RenderedViews:
        """Pictures from some cameras.

        Args:
            size: pixels: height and width, or one number for both; unset: those that the model learned from. Multiples
                of the codec's downsampling.
            geometry: give depth and opacity for every pixel of `rgb` (a = H, b = W); without, for every one of
                `latents` (a = h, b = w), which is quicker.

        Raises:
            UserError: `cameras` are none, or `size` does not suit the codec.
        """
        if not isinstance(cameras, Cameras):
            raise UserError(
                f"render: cameras must be latentscenes.Cameras, not {type(cameras).__name__}. "
                "library.orbit(8) makes some; Cameras.from_matrices takes camera-to-world matrices."
            )
        if not len(cameras):
            raise UserError("render: there are no cameras in this set; give one at least.")
        shown = render_images(
            self.library.model, self.planes, cameras, self.library.picture_size(size), geometry
        )
        return RenderedViews(
            rgb=shown.images.movedim(1, -1).contiguous().numpy(),
            latents=shown.latents.movedim(1, -1).contiguous().numpy(),
            depth=shown.depth.numpy(),
            opacity=shown.opacity.numpy(),
        )


class Library:
    """An opened library. Reading never waits for a writer; changes that others make are seen at the next call.

    Threads may share it.
    """

    def __init__(self, store: LibraryFolder, device: torch.device | str = "cpu"):
        self.store, self.device = store, torch.device(device)
        self._names: tuple[object, list[str]] = (None, [])
        self._weights: tuple[object, tuple[list[str], Tensor]] = (None, ([], torch.empty(0)))

    def __repr__(self) -> str:
        return f"<latentscenes library {self.path}, {len(self)} scenes>"

    @property
    def path(self) -> Path:
        return self.store.path

    @property
    def config(self) -> Config:
        """The settings of its model."""
        return self.store.config

    @property
    def box(self) -> Box:
        """The box that holds every scene, world units."""
        return self.store.info.box

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the pictures that the model learned from."""
        return self.store.info.view.size

    @cached_property
    def model(self) -> Model:
        """What all scenes share: codec, field, base planes. Read when first needed."""
        return self.store.model(self.device)

    # Scenes

    def __len__(self) -> int:
        return len(self.store.index)

    @property
    def names(self) -> list[str]:
        """Of all scenes, in the order in which they came."""
        version = self.store.index.version
        if self._names[0] != version:
            self._names = (version, self.store.index.names())
        return list(self._names[1])

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.store.index.place(name) is not None

    def __iter__(self) -> Iterator[LearnedScene]:
        return (LearnedScene(self, name) for name in self.names)

    def __getitem__(self, name: str) -> LearnedScene:
        self._check(name)
        return LearnedScene(self, name)

    def infos(self, match: str = "*") -> list[SceneInfo]:
        """What is known of all scenes whose names match (* and ? stand for any letters), without reading any."""
        return self.store.index.infos(match)

    def thumbnail(self, name: str) -> bytes:
        """A small picture of a scene, from the same camera for all, as the bytes of a PNG file. It was taken when the
        scene came; nothing is rendered."""
        self._check(name)
        return self.store.index.thumbnail(name) or b""

    def _check(self, name: str) -> None:
        if name not in self:
            names = self.names
            if not names:
                raise UserError(f"{self.path}: no scene {name!r} here; the library is empty.")
            near = difflib.get_close_matches(str(name), names, n=3, cutoff=0)
            raise UserError(
                f"{self.path}: no scene {name!r} here; the nearest names are {', '.join(map(repr, near))}."
            )

    # Looking

    def orbit(self, count: int, elevation: float = 25.0, azimuth: float = 0.0) -> Cameras:
        """`count` cameras once around the box, the first at `azimuth`, degrees; as far away and with such focal
        lengths as those of the views learned from (medians)."""
        return self.store.info.view.orbit(count, elevation, azimuth)

    def picture_size(self, size: int | tuple[int, int] | None = None) -> tuple[int, int]:
        """Height and width, checked; one number stands for both, None for `self.size`."""
        height, width = self.size if size is None else (size, size) if isinstance(size, int) else size
        step = self.model.codec.downsampling
        for side in (height, width):
            if side < step or side % step:
                raise UserError(
                    f"size {side}: must be a multiple of the codec's downsampling, {step}; try {max(step, round(side / step) * step)}."
                )
        return height, width

    def weights(self, names: Sequence[str] | None = None) -> Float[np.ndarray, "n M"]:
        """Weights over the M base planes of all scenes, in the order of `names`; micro planes are not read."""
        if names is None:
            return self._all_weights()[1].numpy().copy()
        known, table = self._all_weights()
        place = {name: row for row, name in enumerate(known)}
        for name in names:
            self._check(name)
        return table[[place[name] for name in names]].numpy()

    def _all_weights(self) -> tuple[list[str], Float[Tensor, "n M"]]:
        """Names and weights of all scenes, read anew when the library has changed."""
        version, known = self._weights
        if version != self.store.index.version:
            version, known = self.store.index.version, self.store.all_weights()
            self._weights = version, known
        return known

    def nearest(
        self, to: str | Float[np.ndarray, "M"], count: int = 5, metric: Metric = "planes"
    ) -> list[Neighbor]:
        """The scenes whose weights are nearest to those of a scene (which is left out), or to some weights.

        Args:
            metric: `planes`: how far macro planes are apart, root mean square over texels, √((v − w)ᵀ G (v − w)) with G
                the base planes' inner products; base planes that are alike or large then count as such. `cosine`:
                1 − v·w / |v||w|, whatever the lengths; for weights that were learned otherwise than the library's,
                with fewer steps or from fewer views.

        Raises:
            UserError: there is no such scene, or scenes of this library have no weights.
        """
        bases = self.model.bases.detach().cpu().flatten(1)
        if not bases.numel():
            raise UserError(
                f"{self.path}: its scenes have no base planes in common (planes.macro = 0), so there are no weights to compare."
            )
        (names, table), own = self._all_weights(), None
        if isinstance(to, str):
            self._check(to)
            own = names.index(to)
            wanted = table[own]
        else:
            wanted = torch.as_tensor(np.asarray(to, np.float32))
            if wanted.shape != table.shape[1:]:
                raise UserError(
                    f"nearest: {tuple(wanted.shape)} weights given, but this library has {table.shape[1]} base planes."
                )
        if metric == "planes":
            offset = table - wanted
            distance = ((offset @ (bases @ bases.T / bases.shape[1])) * offset).sum(1).clamp_min(0).sqrt()
        else:
            distance = 1 - torch.cosine_similarity(table, wanted[None])
        order = distance.argsort(stable=True).tolist()
        return [Neighbor(names[k], float(distance[k])) for k in order if k != own][:count]

    def search(self, views: PosedImages, name: str, count: int = 5) -> list[Neighbor]:
        """The scenes that are most like one of a dataset, which is learned for a second or two for this, by the cosine
        between weights. Nothing is stored."""
        return self.nearest(quick_weights(self.store, views, name, self.device), count, "cosine")

    # Changing

    def add(
        self,
        name: str,
        images: ArrayLike,
        cameras: Cameras,
        masks: ArrayLike | None = None,
        *,
        precision: StoragePrecision | None = None,
        tags: dict[str, Any] | None = None,
    ) -> LearnedScene:
        """Learn a scene from pictures with the library's exploit stages, and store it. What exists is not touched.

        Args:
            images: (v, H, W, 3), bytes or numbers in [0, 1]; over white, unless there are masks.
            cameras: v of them, in the world that the library's scenes live in.
            masks: (v, H, W), where the object is: booleans, numbers in [0, 1], or bytes; elsewhere becomes white.
            precision: how to store it; unset: as the library says.
            tags: what to note beside it (JSON).

        Raises:
            UserError: the name is taken, or pictures, masks and cameras do not go together or with this library.
            Interrupted: Ctrl-C; nothing is added.
        """
        return self[
            learn_from_pictures(self.store, name, images, cameras, masks, precision, tags, self.device)
        ]

    def remove(self, *names: str) -> None:
        """Take scenes out. `compact` gives their room back."""
        for name in names:
            self._check(name)
        self.store.remove(names)

    def rename(self, old: str, new: str) -> None:
        """Give a scene another name."""
        self._check(old)
        self.store.rename(old, new)

    def tag(self, name: str, **tags: Any) -> None:
        """Note something beside a scene (JSON); None takes a note away."""
        self._check(name)
        self.store.tag(name, tags)

    def export(self, names: Sequence[str], out: str | Path) -> int:
        """Copy scenes bit by bit into a new library, or into another one of the same model; how many were not there."""
        for name in names:
            self._check(name)
        return care.export(self.store, names, out)

    def repack(self, precision: StoragePrecision) -> int:
        """Store scenes more coarsely, as far as they are finer than that; how many. What is lost stands in their
        metadata."""
        return care.repack(self.store, precision, self.device)

    def dial(self) -> list[care.Setting]:
        """Bytes per scene and dB lost at each precision, measured on some scenes."""
        return care.dial(self.store, self.device)

    def verify(self) -> list[care.Damage]:
        """What is not as it was written, by checksums; empty if all is well."""
        return care.verify(self.store)

    def compact(self) -> int:
        """Merge small shards and give back the room of removed scenes; how many bytes that were. Scenes keep every bit."""
        return care.compact(self.store)

    def close(self) -> None:
        """Let go of files; the library cannot be used afterwards."""
        self.store.close()

    def __enter__(self) -> "Library":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_library(path: str | Path, device: str = "auto", wait: bool = True) -> Library:
    """Open a library of learned scenes, made by `latentscenes exploit` or `create_library`.

    Args:
        device: cpu, cuda, cuda:1 …; auto takes a GPU where there is one.
        wait: changes wait for other writers; without, a UserError tells of them.

    Raises:
        UserError: no library lies there, or it cannot be read.
    """
    store = LibraryFolder.open(path)
    store.wait = wait
    return Library(store, runtime.set_up(device=device))


def create_library(
    path: str | Path,
    run: str | Path,
    *,
    data: str | Path | None = None,
    precision: StoragePrecision = "int8",
    scenes: bool = True,
    device: str = "auto",
) -> Library:
    """Make a library from a finished run of `latentscenes train`: its model and, with `scenes`, the scenes it learned; or an
    empty one from a model alone: `cars`, which comes with the package, or what `latentscenes library model` wrote.

    Args:
        run: the run's folder, or the model's name or folder.
        data: the run's dataset, if it has moved.
        precision: how scenes are stored.
    """
    opened, chosen = open_parent(Path(run)), runtime.set_up(device=device)
    if isinstance(opened, LibraryFolder):
        return Library(library_from_model(Path(path), opened, opened.config, precision), chosen)
    views = PosedImages.open(data or opened.info.data)
    return Library(
        library_from_run(path, opened, views, frozen(opened.config), precision, scenes, chosen), chosen
    )
