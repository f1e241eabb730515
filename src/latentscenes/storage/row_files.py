"""Scenes that do not fit in memory: their micro planes and Adam moments as memory-mapped files that survive any crash.

Three tables lie in files of their own and change in place while a run learns. What a checkpoint needs is that they can
be brought back to where they were at that checkpoint, without ever being copied whole:

    rows/micro.bin, first.bin, second.bin    float32, one row per scene; moments are sparse until first used
    rows/journal-N.bin                       what rows were at checkpoint N, written before they first change after it

Going back means copying the journal's rows into the tables. A row is in the journal, on the disk, before it changes; a
checkpoint counts from the moment its folder has its name, and journals of others are then void. So a kill or a power cut
at any point leaves either of the two checkpoints whole.
"""

import dataclasses
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from latentscenes.core.config import Config, PlanesConfig
from latentscenes.core.errors import UserError
from latentscenes.core.runtime import machine_memory
from latentscenes.model.planes import SceneParameters, random_parameters, zero_mixing

TABLES = ("micro", "first", "second")
"""Micro planes, and their Adam moments."""
CHUNK = 256
"""Scenes that fresh rows are made for at once."""


class RowFiles:
    """The files of n scenes' micro planes. Opened for writing by the one process that holds the run's lock."""

    def __init__(self, folder: Path, shape: tuple[int, ...]):
        self.folder, self.shape = folder, shape
        self.tables = {name: self._map(name) for name in TABLES}
        self._journal, self._journaled, self._total = None, np.zeros(shape[0], bool), 0

    def _map(self, name: str) -> np.ndarray:
        path = self.folder / f"{name}.bin"
        return np.memmap(path, np.float32, "r+" if path.exists() else "w+", shape=self.shape)

    @property
    def micro(self) -> Tensor:
        """The table itself, (n, 3, r, r, m): what is written to it is written to the file."""
        return torch.from_numpy(self.tables["micro"])

    @property
    def moments(self) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self.tables["first"]), torch.from_numpy(self.tables["second"])

    def clear_moments(self) -> None:
        """All zero, and taking no space."""
        for name in ("first", "second"):
            path = self.folder / f"{name}.bin"
            os.truncate(path, 0)
            os.truncate(path, self.tables[name].nbytes)

    def keep(self, rows: list[int]) -> None:
        """Write down what these rows are, if that was not done since the last checkpoint; then they may change."""
        new = [row for row in rows if not self._journaled[row]]
        if not new:
            return
        if self._journal is None:
            self._journal = open(self._journal_of(self._total), "ab", buffering=0)
        for row in new:
            record = [np.int64(row).tobytes(), *(self.tables[name][row].tobytes() for name in TABLES)]
            self._journal.write(b"".join(record))
        os.fdatasync(self._journal.fileno())
        self._journaled[new] = True

    def flush(self) -> None:
        """Everything on the disk. Call before a checkpoint gets its name."""
        for table in self.tables.values():
            table.flush()

    def begin(self, total: int) -> None:
        """A checkpoint after `total` steps counts from now on."""
        if self._journal is not None:
            self._journal.close()
        self._journal, self._total = None, total
        self._journaled[:] = False
        for path in self.folder.glob("journal-*.bin"):
            path.unlink()

    def go_back(self, total: int) -> None:
        """Bring the tables to where they were at the checkpoint after `total` steps, the newest there is."""
        path = self._journal_of(total)
        size = 8 + len(TABLES) * self.tables["micro"][0].nbytes
        if path.exists():
            with open(path, "rb") as stream:
                while (
                    len(record := stream.read(size)) == size
                ):  # the last one may be torn: then its row has not changed
                    row = int(np.frombuffer(record, np.int64, 1)[0])
                    values = np.frombuffer(record, np.float32, offset=8).reshape(len(TABLES), *self.shape[1:])
                    for name, value in zip(TABLES, values, strict=True):
                        self.tables[name][row] = value
            self.flush()
        self.begin(total)

    def _journal_of(self, total: int) -> Path:
        return self.folder / f"journal-{total}.bin"


def rows_on_disk(
    folder: Path, count: int, config: PlanesConfig, generator: torch.Generator
) -> tuple[SceneParameters, RowFiles]:
    """The rows of a run whose micro planes lie in files: random ones if the files are new. Weights stay in memory."""
    small = random_parameters(count, dataclasses.replace(config, micro=0), generator)
    folder.mkdir(exist_ok=True)
    whole = folder / "complete"
    files = RowFiles(folder, (count, 3, config.resolution, config.resolution, config.micro))
    if not whole.exists():
        for first in range(0, count, CHUNK):
            chunk = torch.randn(files.micro[first : first + CHUNK].shape, generator=generator)
            files.micro[first : first + CHUNK] = config.initial_std * chunk
        files.flush()
        whole.touch()
    return SceneParameters(files.micro, small.weights, small.bias, zero_mixing(count, config)), files


def read_micro(folder: Path, count: int, config: PlanesConfig) -> Tensor:
    """The micro planes of a run that stands still, mapped for reading (changes to the tensor are not written)."""
    if any(folder.glob("journal-*.bin")):
        raise UserError(
            f"{folder.parent}: this run is being learned, or was interrupted. Run its `latentscenes train` command again first."
        )
    shape = (count, 3, config.resolution, config.resolution, config.micro)
    return torch.from_numpy(np.memmap(folder / "micro.bin", np.float32, "c", shape=shape))


def belong_on_disk(count: int, config: Config) -> bool:
    """Whether micro planes and moments would fill more than half of the memory, or the configuration demands files."""
    needed = 3 * 4 * count * 3 * config.planes.resolution**2 * config.planes.micro
    return config.storage == "disk" or config.storage == "auto" and needed > machine_memory() // 2
