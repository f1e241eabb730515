"""Claims of work that several machines share: leases that lapse when their holder dies.

They are small files on a board (boards.py), a folder or a bucket:

    ITEM.N.claim      the N-th claim of an item; holds the name of its owner
    ITEM.done.OWNER   the owner has finished the item

The newest claim counts. A claim is made by creating its file, which must not exist yet: of several processes,
one succeeds. Its holder renews it by giving the file another version (its time; in a bucket, its ETag). A
process that watched a claim for as long as a lease without seeing the version change makes the next claim. It
measures this with its own clock, and compares versions only for being equal, so clocks need not agree.

A process may hang although the thread that renews its claims does not. So it must also say that its work
moves on (`progress`). If it does not for as long as `patience`, its claims are no longer renewed, and lapse.

A holder that was merely slow may go on after its claim was taken over. So work must be such that it does no
harm if two processes do it. Files of `done` say who has finished an item; if two have, the first by name
counts, so all readers choose alike.
"""

import math
import threading
import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from latentscenes.core.errors import UserError
from latentscenes.core.files import make_folder, sync, writing_to
from latentscenes.training.sharing.boards import Board, FolderBoard, created

CLAIM, DONE = "claim", "done"
RENEWALS = 4
"""Renewals of a claim in the time of a lease."""
MOST_CLAIMS = 8
"""Claims after which an item is given up: it seems to end every process that works on it."""


@dataclass
class State:
    """The state of all items on a board."""

    newest: dict[str, int] = field(default_factory=dict)
    """The number of the newest claim of each item."""
    done: dict[str, str] = field(default_factory=dict)
    """Who has finished each finished item."""


class Claims:
    """The claims of one process on a board. Within `renewing`, they are renewed by a thread."""

    def __init__(self, place: Path | Board, owner: str, lease: float, patience: float = math.inf):
        """`place`: the board, or its folder; `owner`: a name that no other process uses at the same time;
        `lease`, `patience`: seconds."""
        self.board = FolderBoard(place) if isinstance(place, Path) else place
        self.owner, self.lease, self.patience = owner, lease, patience
        self._moved = time.monotonic()
        self._held: dict[str, str] = {}
        """The file of the claim of each item that this process holds."""
        self._seen: dict[str, tuple[int, Hashable, float]] = {}
        """Number and version of a claim of another process, and since when they are so."""

    @property
    def pause(self) -> float:
        """Seconds to wait before looking again for free items."""
        return min(self.board.pause, self.lease / 8)

    @contextmanager
    def renewing(self) -> Iterator["Claims"]:
        """Renews all claims until the end of the block. Then they lapse, unless their items are done."""
        stopped = threading.Event()

        def repeat() -> None:
            while not stopped.wait(self.lease / RENEWALS):
                self.renew()

        thread = threading.Thread(target=repeat, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            stopped.set()
            thread.join()

    def renew(self) -> None:
        """Renews all claims, if their work moved on within `patience`."""
        if time.monotonic() - self._moved > self.patience:
            return
        for file in list(self._held.values()):
            with suppress(OSError, UserError):  # the board may be away for a while
                self.board.renew(file)

    def progress(self) -> None:
        """Reports progress on the items held."""
        self._moved = time.monotonic()

    def state(self) -> State:
        """Reads the board."""
        found = State()
        for name in sorted(self.board.names()):
            item, _, rest = name.partition(".")
            kind, _, owner = rest.partition(".")
            if kind == DONE and owner:
                found.done.setdefault(item, owner)
            elif kind.isdigit() and owner == CLAIM:
                found.newest[item] = max(found.newest.get(item, 0), int(kind))
        return found

    def take(self, item: str) -> bool:
        """Claims an item that nobody has claimed yet. Returns whether this process holds it now."""
        return self._claim(item, 1)

    def take_over(self, item: str, newest: int) -> bool:
        """Claims an item again after its claim number `newest`, if that has lapsed. Returns whether this
        process holds the item now."""
        return self.has_lapsed(item, newest) and self._claim(item, newest + 1)

    def has_lapsed(self, item: str, number: int) -> bool:
        """Returns whether a claim was made under the same owner before, or was not renewed for a lease."""
        found = self.board.read(_file(item, number))
        if found is None:
            return False
        owner, version = found
        if owner == self.owner:
            return item not in self._held
        seen = self._seen.get(item)
        if seen is None or seen[:2] != (number, version):
            self._seen[item] = number, version, time.monotonic()
            return False
        return time.monotonic() - seen[2] >= self.lease

    def finish(self, item: str) -> None:
        """Notes that an item is finished; its result must be on the disk."""
        self.board.create(f"{item}.{DONE}.{self.owner}", "", keep=True)
        self.drop(item)

    def drop(self, item: str) -> None:
        """Stops renewing the claim of an item."""
        self._held.pop(item, None)

    def forget(self, item: str) -> None:
        """Removes all claims of an item that this process holds, so that it can be claimed anew."""
        self.drop(item)
        for name in self.board.names():
            if name.startswith(f"{item}.") and name.endswith(f".{CLAIM}"):
                self.board.remove(name)

    def _claim(self, item: str, number: int) -> bool:
        file = _file(item, number)
        if not self.board.create(file, self.owner):
            return False
        self.progress()
        self._held[item] = file
        return True


def _file(item: str, number: int) -> str:
    return f"{item}.{number}.{CLAIM}"


@contextmanager
def own_name(folder: Path, stem: str) -> Iterator[str]:
    """Yields a name that no other process uses: STEM, STEM-2 and so on. A name goes to one process after
    another: of the same machine if its process ended in any way, of any machine if it was not killed.

    A file FOLDER/NAME states the machine, by the number of its boot; a lock that ends with the process tells
    processes of one machine apart.
    """
    boot, number = this_boot(), 1
    with writing_to(folder):
        make_folder(folder)
    while True:
        name = stem if number == 1 else f"{stem}-{number}"
        file, lock = folder / name, FileLock(folder / f"{name}.lock", thread_local=False)
        number += 1
        with writing_to(folder):
            try:
                lock.acquire(blocking=False)
            except Timeout:
                continue
        try:
            if not created(file, boot) and file.read_text() != boot:
                continue
            try:
                yield name
            finally:
                with suppress(OSError):  # another process may have removed the folder, with what it holds
                    file.unlink()
                    sync(folder)
            return
        finally:
            lock.release()


def this_boot() -> str:
    """Returns an identity of this machine since its start, which no other has."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        import uuid

        return f"{uuid.getnode():x}"
