"""Libraries of learned scenes in Python: open or create a library, render, compare and add scenes.

library = latentscenes.open_library("cars")
scene = library["car-12"]
views = scene.render(library.orbit(8))        # numpy arrays: rgb, latents, depth, opacity
similar = library.nearest("car-12", count=5)
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import ArrayLike

from latentscenes.core import runtime
from latentscenes.core.cameras import Box, Cameras
from latentscenes.core.config import Config, frozen
from latentscenes.core.errors import UserError
from latentscenes.core.options import StoragePrecision
from latentscenes.data.dataset import PosedImages
from latentscenes.model.model import Model, render_images
from latentscenes.model.planes import Metric, SceneParameters, base_products
from latentscenes.rendering.field import FusedPlanes
from latentscenes.storage import maintenance, verifying
from latentscenes.storage.index import SceneInfo
from latentscenes.storage.library import LibraryFolder
from latentscenes.storage.neighbors import Neighbor, WeightTable
from latentscenes.storage.pretrained import library_from_model, open_parent
from latentscenes.storage.published.reader import PublishedLibrary, open_source
from latentscenes.storage.source import SceneSource
from latentscenes.training.add import learn_from_pictures, quick_weights
from latentscenes.training.append import library_from_run


@dataclass(frozen=True)
class RenderedViews:
    """Renders of a scene from v cameras, float32."""

    rgb: Float[np.ndarray, "v H W 3"]
    """Colors in [0, 1], over white."""
    latents: Float[np.ndarray, "v h w c"]
    """Rendered latents in (−1, 1), which the codec decoded to `rgb`."""
    depth: Float[np.ndarray, "v a b"]
    """Expected distance along the ray from the camera, world units; the ray's end where it meets nothing."""
    opacity: Float[np.ndarray, "v a b"]
    """In [0, 1]."""

    @property
    def images(self) -> UInt8[np.ndarray, "v H W 3"]:
        """`rgb` as uint8, 0 to 255."""
        return np.round(255 * self.rgb).astype(np.uint8)


class LearnedScene:
    """One scene of a library. Its planes are read at first use and kept with this object."""

    def __init__(self, library: "Library", name: str):
        self.library, self.name = library, name

    def __repr__(self) -> str:
        return f"<latentscenes scene {self.name!r} of {self.library.path}>"

    @property
    def metadata(self) -> SceneInfo:
        """Origin, size, learning time and PSNR. Raises a UserError if the scene was removed or renamed."""
        info = self.library.folder.index.info(self.name)
        if info is None:
            raise UserError(f"{self.library.path}: scene {self.name!r} was removed or renamed meanwhile.")
        return info

    @property
    def thumbnail(self) -> bytes:
        """A small PNG file."""
        return self.library.thumbnail(self.name)

    @property
    def weights(self) -> Float[np.ndarray, "M"]:
        """Weights over the base planes."""
        return self.rows.weights[0].cpu().numpy()

    @cached_property
    def rows(self) -> SceneParameters:
        """The scene's own parameters (n = 1), on the library's device."""
        return self.library.folder.parameters(self.name).to(self.library.device)

    @cached_property
    def planes(self) -> FusedPlanes:
        """Fused tri-planes, for `library.model.render`."""
        with torch.no_grad():
            return self.library.model.compose(self.rows, bounded=True)

    @property
    def box(self) -> Box:
        """The scene's box, world units: its own, or the library's."""
        return self.rows.own_box or self.library.box

    def orbit(self, count: int, elevation: float = 25.0, azimuth: float = 0.0) -> Cameras:
        """Returns cameras as `Library.orbit` does, around the scene's own box if it has one."""
        return self.library.folder.info.view.around(self.rows.own_box).orbit(count, elevation, azimuth)

    def render(
        self,
        cameras: Cameras,
        size: int | tuple[int, int] | None = None,
        geometry: bool = True,
        adaptive: bool = False,
    ) -> RenderedViews:
        """Renders the scene. Raises a UserError if `cameras` is empty or no `Cameras`, or `size` does not
        suit the codec.

        Args:
            cameras: v cameras in the world of the library.
            size: height and width in pixels, or one number for both; None: the size of the training images.
            geometry: whether depth and opacity are as fine as `rgb`; otherwise as `latents`, which is faster.
            adaptive: whether large pictures are rendered from fewer rays, as in films.
        """
        if not isinstance(cameras, Cameras):
            raise UserError(
                f"render: cameras must be latentscenes.Cameras, not {type(cameras).__name__}. "
                "Use library.orbit(8), or Cameras.from_matrices for camera-to-world matrices."
            )
        if not len(cameras):
            raise UserError("render: no cameras given; at least one is needed.")
        size = self.library.picture_size(size)
        shown = render_images(self.library.model, self.planes, cameras, size, geometry, adaptive)
        return RenderedViews(
            rgb=shown.images.movedim(1, -1).contiguous().numpy(),
            latents=shown.latents.movedim(1, -1).contiguous().numpy(),
            depth=shown.depth.numpy(),
            opacity=shown.opacity.numpy(),
        )


class Library:
    """An opened library. Threads may share it. Reading never waits for a writer."""

    def __init__(self, folder: SceneSource, device: torch.device | str = "cpu"):
        self.folder, self.device = folder, torch.device(device)
        self._kept: dict[str, tuple[object, Any]] = {}

    def __repr__(self) -> str:
        return f"<latentscenes library {self.path}, {len(self)} scene{'s' * (len(self) != 1)}>"

    @property
    def path(self) -> Path | str:
        """Folder, or address of a published library."""
        return self.folder.path

    @property
    def _own(self) -> LibraryFolder:
        """The folder, for changes. Raises a UserError for a published library."""
        if isinstance(self.folder, PublishedLibrary):
            self.folder.refuse_change()
        return self.folder

    @property
    def config(self) -> Config:
        """The model's configuration."""
        return self.folder.config

    @property
    def box(self) -> Box:
        """The scene box, world units; for scenes with boxes of their own, one around those of stage 1."""
        return self.folder.info.box

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the training images, pixels."""
        return self.folder.info.view.size

    @cached_property
    def model(self) -> Model:
        """The shared parts: codec, field, base planes. Read at first use."""
        return self.folder.model(self.device)

    # Scenes

    def __len__(self) -> int:
        return len(self.folder.index)

    @property
    def names(self) -> list[str]:
        """Names of all scenes in the order of addition."""
        return list(self._current("names", self.folder.index.names))

    def _current(self, key: str, read: Callable[[], Any]) -> Any:
        """Returns `read()`, kept under a key until the library changes."""
        version = self.folder.index.version
        if key not in self._kept or self._kept[key][0] != version:
            self._kept[key] = version, read()
        return self._kept[key][1]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.folder.index.place(name) is not None

    def __iter__(self) -> Iterator[LearnedScene]:
        return (LearnedScene(self, name) for name in self.names)

    def __getitem__(self, name: str) -> LearnedScene:
        """Returns a scene. Raises a UserError that states the nearest names if there is none."""
        self.folder.index.require([name])
        return LearnedScene(self, name)

    def infos(self, match: str = "*", where: Sequence[str] = ()) -> list[SceneInfo]:
        """Returns the metadata of scenes with such names (* and ?) and tags (TAG=PATTERN), oldest first."""
        return self.folder.index.infos(match, where)

    def thumbnail(self, name: str) -> bytes:
        """Returns a PNG file, rendered when the scene was stored, from the same camera for all."""
        self.folder.index.require([name])
        return self.folder.index.thumbnail(name) or b""

    # Cameras

    def orbit(self, count: int, elevation: float = 25.0, azimuth: float = 0.0) -> Cameras:
        """Returns `count` cameras on a circle around the box, the first at `azimuth`; angles in degrees.
        Distance and focal lengths are the medians of the training views."""
        return self.folder.info.view.orbit(count, elevation, azimuth)

    def picture_size(self, size: int | tuple[int, int] | None = None) -> tuple[int, int]:
        """Returns height and width; one number stands for both, None for `self.size`. Raises a UserError if
        a side is no multiple of the codec's downsampling."""
        height, width = self.size if size is None else (size, size) if isinstance(size, int) else size
        step = self.model.codec.downsampling
        for side in (height, width):
            if side < step or side % step:
                near = max(step, round(side / step) * step)
                raise UserError(f"size {side}: no multiple of the codec's downsampling, {step}; try {near}.")
        return height, width

    # Similar scenes

    def weights(self, names: Sequence[str] | None = None) -> Float[np.ndarray, "n M"]:
        """Returns weights over the M base planes: of some scenes, or of all in the order of `self.names`."""
        if names is None:
            return self._weights().table.numpy().copy()
        self.folder.index.require(names)
        return self._weights().of(names).numpy()

    def nearest(
        self, to: str | Float[np.ndarray, "M"], count: int = 5, metric: Metric = "planes"
    ) -> list[Neighbor]:
        """Returns the `count` scenes with the most similar weights, nearest first.

        Args:
            to: name of a scene, which is left out of the result, or weights.
            metric: `planes`: root mean square difference of macro planes, √((v − w)ᵀ G (v − w)), where G
                holds the mean products of base planes. `cosine`: 1 − v·w / |v||w|, independent of lengths;
                for weights learned with other settings, fewer steps or fewer views than the library's.

        Raises:
            UserError: the scene is unknown, or the library has no base planes or another number of them.
        """
        if not self._products.numel():
            raise UserError(
                f"{self.path}: its scenes have no base planes in common (planes.macro = 0), "
                "so there are no weights to compare."
            )
        if isinstance(to, str):
            self.folder.index.require([to])
        wanted = to if isinstance(to, str) else torch.as_tensor(np.asarray(to, np.float32))
        return self._weights().nearest(wanted, count, self._products, metric)

    @cached_property
    def _products(self) -> Float[torch.Tensor, "M M"]:
        return base_products(self.model.bases.detach().cpu())

    def _weights(self) -> WeightTable:
        return self._current("weights", lambda: WeightTable(*self.folder.all_weights()))

    def search(self, views: PosedImages, name: str, count: int = 5) -> list[Neighbor]:
        """Returns the scenes most similar to a scene of a dataset, by the cosine between weights. Learns the
        weights of that scene in a second or two and stores nothing. Raises a UserError if the dataset holds
        no such scene, or if the configuration cannot learn weights from latents."""
        return self.nearest(quick_weights(self.folder, views, name, self.device), count, "cosine")

    # Changes

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
        """Learns a scene from images with the library's exploit stages and stores it.

        Args:
            images: (v, H, W, 3), uint8 or floats in [0, 1]; over white, unless masks are given.
            cameras: v cameras in the world of the library.
            masks: (v, H, W), silhouettes: booleans, floats in [0, 1], or uint8. The rest becomes white.
            precision: None: the library's default.
            tags: notes to store with the scene (JSON).

        Raises:
            UserError: the name is taken, or images, masks and cameras do not fit each other or the library.
            Interrupted: Ctrl-C; nothing is stored.
        """
        folder, device = self._own, self.device
        return self[learn_from_pictures(folder, name, images, cameras, masks, precision, tags, device)]

    def remove(self, *names: str) -> None:
        """Removes all given scenes, or none and raises a UserError. `compact` frees their space."""
        self._own.remove(names)

    def rename(self, old: str, new: str) -> None:
        """Renames a scene. Raises a UserError if it is unknown or the new name is empty or taken."""
        self._own.rename(old, new)

    def tag(self, name: str, **tags: Any) -> None:
        """Sets notes of a scene (JSON); None removes a note. Raises a UserError if the scene is unknown."""
        self._own.tag(name, tags)

    def export(self, names: Sequence[str], out: str | Path) -> int:
        """Copies scenes to a new library or to one with the same model. Returns the number of new ones.
        Raises a UserError if a name is unknown, or `out` has another model or another scene of that name."""
        self.folder.index.require(names)
        return maintenance.export(self.folder, names, out)

    def repack(self, precision: StoragePrecision) -> int:
        """Stores scenes of finer precision at `precision`, notes the lost PSNR, and returns their number."""
        return maintenance.repack(self._own, precision, self.device)

    def precision_costs(self) -> list[maintenance.PrecisionCost]:
        """Measures bytes per scene and lost PSNR (dB) at each precision, on some scenes."""
        return maintenance.precision_costs(self._own, self.device)

    def verify(self) -> list[verifying.Damage]:
        """Compares all files with their checksums and returns the differences."""
        folder = self.folder
        return folder.verify() if isinstance(folder, PublishedLibrary) else verifying.verify(folder)

    def compact(self) -> int:
        """Merges small shards and frees the space of removed scenes. Returns the freed bytes."""
        return maintenance.compact(self._own)

    def close(self) -> None:
        """Closes all files; the library cannot be used afterwards."""
        self.folder.close()

    def __enter__(self) -> "Library":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_library(path: str | Path, device: str = "auto", wait: bool = True) -> Library:
    """Opens a library made by `latentscenes exploit` or `create_library`, or one that was published.

    Args:
        path: its folder; of a published library, its folder or address (https://…, http://…, s3://…, gs://…).
        device: cpu, cuda, cuda:1 …; auto: a GPU if there is one.
        wait: changes wait for other writers. False: they raise a UserError.

    Raises:
        UserError: there is no library at `path`, or it cannot be read.
    """
    folder = open_source(path)
    if isinstance(folder, LibraryFolder):
        folder.wait = wait
    return Library(folder, runtime.set_up(device=device))


def create_library(
    path: str | Path,
    run: str | Path,
    *,
    data: str | Path | None = None,
    precision: StoragePrecision = "int8",
    scenes: bool = True,
    device: str = "auto",
) -> Library:
    """Creates a library from a finished run of `latentscenes train`, or an empty one from a pretrained model.

    Args:
        run: folder of the run; or a model: `cars`, which comes with the package, or a folder written by
            `latentscenes library model`.
        data: the run's dataset, if it has moved.
        precision: how scenes are stored.
        scenes: store the scenes of the run.

    Raises:
        UserError: `run` is no finished run or model, or `path` is a library already or holds other files.
    """
    opened, chosen = open_parent(Path(run)), runtime.set_up(device=device)
    if isinstance(opened, LibraryFolder):
        folder = library_from_model(Path(path), opened, opened.config, precision)
    else:
        views = PosedImages.open(data or opened.info.data)
        folder = library_from_run(path, opened, views, frozen(opened.config), precision, scenes, chosen)
    return Library(folder, chosen)
