"""Micro planes and Adam moments that do not fit in memory, in memory-mapped files that survive crashes.

Three tables lie in files of their own and change in place while a run learns:

    rows/micro.bin, first.bin, second.bin    float32, one row per scene; moments are sparse until first used
    rows/journal-N.bin                       rows at checkpoint N, written before their first change

To restore checkpoint N, the rows of its journal are copied back into the tables. A row is written to the
journal, and flushed to disk, before it changes. A checkpoint counts once its folder has its name; other
journals are then void. After a kill or a power cut at any point, one of the two checkpoints is complete.

A checkpoint holds checksums of all rows. A row is compared with them when it changes for the first time after
files were opened, and all rows are when the micro planes of a stopped run are read.
"""

import dataclasses
import hashlib
import math
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from latentscenes.core.config import Config, PlanesConfig
from latentscenes.core.errors import UserError
from latentscenes.core.files import make_folder, sync, write_bytes
from latentscenes.core.runtime import machine_memory
from latentscenes.model.planes import SceneParameters, random_parameters, zero_mixing
from latentscenes.storage.tensors import read_tensors

TABLES = ("micro", "first", "second")
"""Micro planes and their Adam moments."""
CHUNK = 256
"""Rows initialized at once."""
SUMS = "sums"
"""Part of a checkpoint: checksums of all rows."""
SUM_BYTES = 16
"""Bytes of SHA-256 that are kept of each row."""


class RowFiles:
    """The files of n scenes' micro planes. Only the process that holds the run's lock opens them."""

    def __init__(self, folder: Path, shape: tuple[int, ...], complete: bool):
        """Opens the files, or makes them anew if they are not yet `complete`. Raises a UserError if one is
        absent or of another size."""
        self.folder, self.shape = folder, shape
        self.tables = {}
        for name in TABLES:
            if complete:
                _check_size(folder / f"{name}.bin", shape)
            mode = "r+" if complete else "w+"
            self.tables[name] = np.memmap(folder / f"{name}.bin", np.float32, mode, shape=shape)
        self._journal, self._journaled, self._total = None, np.zeros(shape[0], bool), 0
        self._sums: dict[str, np.ndarray] | None = None
        """Checksums of the rows at the last checkpoint; None if unknown."""
        self._compared = np.zeros(shape[0], bool)

    @property
    def micro(self) -> Tensor:
        """Micro planes, (n, 3, r, r, m). Writing to this tensor writes to the file."""
        return torch.from_numpy(self.tables["micro"])

    @property
    def moments(self) -> tuple[Tensor, Tensor]:
        """First and second moments, each (n, 3, r, r, m)."""
        return torch.from_numpy(self.tables["first"]), torch.from_numpy(self.tables["second"])

    def clear_moments(self) -> None:
        """Sets all moments to zero; the files then use no disk space."""
        for name in ("first", "second"):
            path = self.folder / f"{name}.bin"
            os.truncate(path, 0)
            os.truncate(path, self.tables[name].nbytes)
        self._sums = None

    def keep(self, rows: list[int]) -> None:
        """Writes rows that are about to change to the journal, once per checkpoint. Raises a UserError if one
        is damaged."""
        new = [row for row in rows if not self._journaled[row]]
        if not new:
            return
        for row in new:
            if self._sums is not None and not self._compared[row]:
                for name, table in self.tables.items():
                    _compare(self.folder / f"{name}.bin", row, table[row], self._sums[name])
            self._compared[row] = True
        if self._journal is None:
            self._journal = open(self._journal_of(self._total), "ab", buffering=0)
            sync(self.folder)
        for row in new:
            record = [np.int64(row).tobytes(), *(self.tables[name][row].tobytes() for name in TABLES)]
            self._journal.write(b"".join(record))
        os.fdatasync(self._journal.fileno())
        self._journaled[new] = True

    def flush(self) -> None:
        """Flushes all tables to disk. Call it before a checkpoint gets its name."""
        for table in self.tables.values():
            table.flush()

    def sums(self) -> dict[str, Tensor]:
        """Returns checksums of all rows by file, for the next checkpoint: (n, SUM_BYTES) uint8."""
        changed = range(self.shape[0])
        if self._sums is None:
            self._sums = {name: np.zeros((self.shape[0], SUM_BYTES), np.uint8) for name in TABLES}
        else:
            changed = np.flatnonzero(self._journaled)
        for name, table in self.tables.items():
            for row in changed:
                self._sums[name][row] = _sum(table[row])
        self._compared[:] = True
        return {f"{name}.bin": torch.from_numpy(found.copy()) for name, found in self._sums.items()}

    def begin(self, total: int) -> None:
        """Starts the journal of the checkpoint after `total` steps and removes all others."""
        if self._journal is not None:
            self._journal.close()
        self._journal, self._total = None, total
        self._journaled[:] = False
        for path in self.folder.glob("journal-*.bin"):
            path.unlink()

    def restore_to(self, total: int, sums: dict[str, Tensor] | None = None) -> None:
        """Restores the tables at the checkpoint after `total` steps, the newest one, with its `sums`.
        Checkpoints of earlier versions have none.

        The last record may be incomplete after a crash; its row has not changed then.
        """
        self._sums = sums and {name: sums[f"{name}.bin"].numpy() for name in TABLES}
        self._compared[:] = False
        path = self._journal_of(total)
        size = 8 + len(TABLES) * self.tables["micro"][0].nbytes
        if path.exists():
            with open(path, "rb") as stream:
                while len(record := stream.read(size)) == size:
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
    """Opens the micro planes in `folder`, or creates random ones. Returns the parameters of `count` scenes,
    with new random weights in memory, and the files."""
    small = random_parameters(count, dataclasses.replace(config, micro=0), generator)
    make_folder(folder)
    whole = folder / "complete"
    shape = (count, 3, config.resolution, config.resolution, config.micro)
    files = RowFiles(folder, shape, whole.exists())
    if not whole.exists():
        for first in range(0, count, CHUNK):
            chunk = torch.randn(files.micro[first : first + CHUNK].shape, generator=generator)
            files.micro[first : first + CHUNK] = config.initial_std * chunk
        files.flush()
        write_bytes(whole, b"")
    return SceneParameters(files.micro, small.weights, small.bias, zero_mixing(count, config)), files


def stored_sums(checkpoint: Path | None, remedy: str) -> dict[str, Tensor] | None:
    """Returns the checksums of rows in a checkpoint; None in those of earlier versions, or without one."""
    file = checkpoint and checkpoint / f"{SUMS}.safetensors"
    return read_tensors(file, remedy) if file and file.exists() else None


def read_micro(
    folder: Path, count: int, config: PlanesConfig, sums: dict[str, Tensor] | None = None
) -> Tensor:
    """Returns the micro planes of a stopped run, (n, 3, r, r, m). Changes to the tensor are not written.
    Raises a UserError if the run is in progress, or was interrupted, or a row has another checksum than in
    `sums`."""
    if is_at_work(folder):
        raise UserError(
            f"{folder.parent}: this run is in progress, or was interrupted. "
            "Run its `latentscenes train` command again first."
        )
    shape = (count, 3, config.resolution, config.resolution, config.micro)
    _check_size(folder / "micro.bin", shape)
    table = np.memmap(folder / "micro.bin", np.float32, "c", shape=shape)
    for row in range(count if sums else 0):
        _compare(folder / "micro.bin", row, table[row], sums["micro.bin"].numpy())
    return torch.from_numpy(table)


def is_at_work(folder: Path) -> bool:
    """Returns whether the run of these files is in progress, or was interrupted."""
    return any(folder.glob("journal-*.bin"))


def damaged_rows(folder: Path, count: int, config: PlanesConfig, sums: dict[str, Tensor]) -> list[str]:
    """Compares all rows of a stopped run with their checksums `sums`. Returns the first that differs in each
    file, one sentence a file."""
    shape, found = (count, 3, config.resolution, config.resolution, config.micro), []
    for name in TABLES:
        file = folder / f"{name}.bin"
        try:
            _check_size(file, shape)
            table = np.memmap(file, np.float32, "r", shape=shape)
            for row in range(count):
                _compare(file, row, table[row], sums[file.name].numpy())
        except UserError as error:
            found.append(str(error))
    return found


def _sum(row: np.ndarray) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(row.data).digest()[:SUM_BYTES], np.uint8)


def _compare(file: Path, row: int, values: np.ndarray, sums: np.ndarray) -> None:
    if not np.array_equal(_sum(values), sums[row]):
        raise UserError(
            f"{file}: the scene in row {row} is damaged (another checksum than at the last checkpoint). "
            "Restore the file from a copy, or start the run again in a new folder."
        )


def _check_size(file: Path, shape: tuple[int, ...]) -> None:
    found, right = file.stat().st_size if file.is_file() else None, 4 * math.prod(shape)
    if found != right:
        what = "absent" if found is None else f"{found} bytes long instead of {right}"
        raise UserError(f"{file}: {what}. Restore it from a copy, or start the run again in a new folder.")


def belong_on_disk(count: int, config: Config) -> bool:
    """Returns whether micro planes and moments exceed half of the memory, or the configuration says so."""
    needed = 3 * 4 * count * 3 * config.planes.resolution**2 * config.planes.micro
    return config.storage == "disk" or config.storage == "auto" and needed > machine_memory() // 2
