"""The interface for reading a library, whether it is a folder or published."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from latentscenes.core.cameras import Box, Viewpoint
from latentscenes.core.config import Config
from latentscenes.core.console import Spent
from latentscenes.core.errors import UserError
from latentscenes.core.names import short
from latentscenes.core.options import StoragePrecision
from latentscenes.model.model import Model
from latentscenes.model.planes import SceneParameters, zero_mixing
from latentscenes.storage.entries import SceneInfo, Totals
from latentscenes.storage.index import Place
from latentscenes.storage.quantize import Payload, unpack
from latentscenes.storage.tensors import holds_boxes, read_tensors, stored_model


@dataclass(frozen=True)
class LibraryInfo:
    """Facts about a library, fixed at its creation."""

    box: Box
    """Scene box, world units."""
    view: Viewpoint
    """Typical camera of the images that the model learned from."""
    precision: StoragePrecision
    """Default for new scenes."""
    parent: str
    """Folder of the run that the shared parts come from."""
    parent_seconds: float
    """Wall time of that run."""
    parent_scenes: int
    """Number of scenes in that run."""
    finetuned_from: str | None = None
    """Folder of the run or library whose shared parts were finetuned with this library's first scenes."""
    parent_cpu_seconds: float | None = None
    """CPU time of that run; None if an earlier version learned it."""

    @property
    def parent_spent(self) -> Spent:
        """Time of that run."""
        return Spent(self.parent_seconds, self.parent_cpu_seconds)


class SceneIndex(Protocol):
    """The names, metadata and thumbnails of a library's scenes: `Index`, or the pages of a published library.
    The methods are those of `Index`."""

    version: Any

    def __len__(self) -> int: ...
    def names(self) -> list[str]: ...
    def totals(self) -> Totals: ...
    def first(self, count: int) -> list[SceneInfo]: ...
    def infos(self, match: str = "*", where: Sequence[str] = ()) -> list[SceneInfo]: ...
    def descriptions(self) -> dict[str, str]: ...
    def info(self, name: str) -> SceneInfo | None: ...
    def place(self, name: str) -> Place | None: ...
    def places(self) -> dict[str, Place]: ...
    def known(self, names: Sequence[str]) -> set[str]: ...
    def require(self, names: Sequence[str]) -> None: ...
    def thumbnail(self, name: str) -> bytes | None: ...
    def close(self) -> None: ...


class SceneSource(ABC):
    """An opened library, for reading. Threads may share it."""

    path: Path | str
    """Its folder or address; `path.name` is its name."""
    config: Config
    info: LibraryInfo
    checksums: dict[str, str]
    """SHA-256 of the files with the shared parts and with the initial values, by their names in a folder."""
    index: SceneIndex
    remedy = "Restore it from a copy of this library."
    """The remedy for damage, a sentence of error messages."""

    # The model

    @property
    @abstractmethod
    def shared_file(self) -> Path:
        """The file with the weights of the shared parts."""

    @abstractmethod
    def check_model(self) -> None:
        """Raises a UserError if the file of the shared parts is absent or damaged."""

    @abstractmethod
    def check_start(self) -> Path:
        """Returns the file of initial values. Raises a UserError if it is absent or damaged."""

    def model(self, device: torch.device | str = "cpu") -> Model:
        """Returns the shared parts, frozen. Raises a UserError if their file is absent or damaged."""
        self.check_model()
        model = stored_model(self.config, self.info.box, self.shared_file, self.remedy)
        return model.to(device).eval().requires_grad_(False)

    @property
    def has_boxes(self) -> bool:
        """Whether scenes have boxes of their own."""
        return holds_boxes(self.check_start(), self.remedy)

    def starting_scene(self) -> SceneParameters:
        """Returns the initial values of new scenes (n = 1). Libraries of earlier versions store no mixing.
        Raises a UserError if their file is absent or damaged."""
        file = self.check_start()
        tables = {
            name: table[0].float()
            for name, table in read_tensors(file, self.remedy).items()
            if len(table) == 1
        }
        if not self.config.planes.mixing or "mixing" not in tables:
            tables["mixing"] = zero_mixing(1, self.config.planes)[0]
        return self.unpacked(tables, str(file))

    def starting(self, device: torch.device | str = "cpu") -> tuple[Model, SceneParameters]:
        """Returns the model on a device, and `starting_scene`."""
        return self.model(device), self.starting_scene()

    # Scenes

    @abstractmethod
    def payload(self, name: str) -> Payload:
        """Reads one scene as stored. Raises as `parameters`."""

    @abstractmethod
    def all_weights(self) -> tuple[list[str], Float[Tensor, "n M"]]:
        """Reads the names of all scenes, in the order of addition, and their weights over the M base planes.
        Raises a UserError if they cannot be read."""

    @abstractmethod
    def close(self) -> None:
        """Closes all files."""

    def parameters(self, name: str) -> SceneParameters:
        """Reads one scene (n = 1) without the others. Raises a UserError if there is no such scene, or its
        shard cannot be read."""
        return self.unpacked(self.payload(name), f"scene {short(name)}")

    def unpacked(self, payload: Payload, what: str = "a scene") -> SceneParameters:
        """Returns the parameters (n = 1) of a payload. Raises a UserError that names `what` if it
        does not fit the library's configuration."""
        try:
            return unpack(payload, self.config.planes)
        except ValueError as error:
            raise UserError(f"{self.path}: {what} cannot be read ({error}). {self.remedy}") from None
