"""Published libraries in repositories of the Hugging Face hub.

The package `huggingface_hub` knows the user's token, the mirror (HF_ENDPOINT) and the cache.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from latentscenes.core.errors import UserError
from latentscenes.core.reading import MOST_TEXT, read_bytes, reason
from latentscenes.storage.library import LibraryFolder
from latentscenes.storage.maintenance import export
from latentscenes.storage.published.format import DESCRIPTION, ENDINGS, NAME
from latentscenes.storage.published.publishing import Published, publish
from latentscenes.storage.published.reader import PublishedLibrary
from latentscenes.storage.published.targets import Target

RepositoryKind = Literal["dataset", "model"]
COMMIT_BYTES, COMMIT_FILES = 256 << 20, 500
"""Most bytes and files of a commit."""
BESIDE = {".gitattributes", "README.md"}
"""Files of a repository in which nothing is published yet."""
WANTED = [DESCRIPTION, *(f"{folder}/*{ending}" for folder, ending in ENDINGS.items())]
"""Files that are copied from a repository; others stay there."""


class HubTarget(Target):
    """A repository. Files are uploaded in commits of many; the description has a commit of its own."""

    def __init__(self, repository: str, kind: RepositoryKind, private: bool):
        """`private`: whether the repository is made private if it does not exist."""
        self.address, self._kind, self._private = f"hub repository {repository}", kind, private
        self._place: dict[str, Any] = {"repo_id": repository, "repo_type": kind}
        self._hub, self._api = _hub(), _hub().HfApi()
        self._waiting: list[Any] = []
        self._bytes = 0

    @contextmanager
    def writing(self) -> Iterator[None]:
        with _asking(self.address):
            self._api.create_repo(**self._place, private=self._private, exist_ok=True)
        present = self._files()
        if DESCRIPTION not in present:
            for name in sorted(present.keys() - BESIDE):
                if not NAME.fullmatch(name):
                    raise UserError(
                        f"{self.address}: holds no published library, but {name!r}. Name another repository."
                    )
        yield
        self._commit("Remove files of earlier publications")

    def _files(self) -> dict[str, int]:
        with _asking(self.address):
            entries = self._api.list_repo_tree(**self._place, recursive=True)
            return {entry.path: entry.size for entry in entries if hasattr(entry, "size")}

    def sizes(self) -> dict[str, int]:
        return {name: size for name, size in self._files().items() if NAME.fullmatch(name)}

    def read(self, name: str, most: int = MOST_TEXT) -> bytes | None:
        with _asking(f"{self.address}/{name}"):
            try:
                return read_bytes(self._api.hf_hub_download(filename=name, **self._place), most)
            except (self._hub.errors.EntryNotFoundError, FileNotFoundError):
                return None

    def write(self, name: str, content: bytes) -> None:
        full = self._bytes + len(content) > COMMIT_BYTES or len(self._waiting) == COMMIT_FILES
        if name == DESCRIPTION or full:
            self._commit("Add scenes")
        self._waiting.append(self._hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=content))
        self._bytes += len(content)
        if name == DESCRIPTION:
            self._commit("Publish the library")

    def remove(self, name: str) -> None:
        self._waiting.append(self._hub.CommitOperationDelete(path_in_repo=name))

    def _commit(self, message: str) -> None:
        if self._waiting:
            with _asking(self.address):
                self._api.create_commit(**self._place, operations=self._waiting, commit_message=message)
        self._waiting, self._bytes = [], 0


def push(
    library: LibraryFolder, repository: str, kind: RepositoryKind, private: bool, replace: bool = False
) -> Published:
    """Publishes a library in a repository, or what is new in it. Raises a UserError as `publish`, or if the
    hub cannot be reached or refuses."""
    return publish(library, HubTarget(repository, kind, private), replace)


def pull(repository: str, kind: RepositoryKind, out: Path) -> int:
    """Copies all scenes of a library in a repository into the library `out`, which is made if absent. Returns
    the number of scenes that it did not hold yet.

    Raises:
        UserError: there is no such repository, or no published library in it, or `out` is of another model.
    """
    with _asking(f"hub repository {repository}"):
        folder = _hub().snapshot_download(
            repository, repo_type=kind, allow_patterns=WANTED, ignore_patterns=["model/*.web.safetensors"]
        )
    library = PublishedLibrary.open(folder)
    return export(library, library.index.names(), out)


def _hub() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ModuleNotFoundError as error:
        if error.name != "huggingface_hub":
            raise
        raise UserError(
            "The hub's repositories need huggingface_hub. Run: pip install latentscenes[hub]"
        ) from None
    return huggingface_hub


@contextmanager
def _asking(what: str) -> Iterator[None]:
    """Turns errors of the hub's package, and of the package that it speaks HTTP with, into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        package = type(error).__module__.partition(".")[0]
        if not isinstance(error, OSError) and package not in ("huggingface_hub", "httpx", "httpx2"):
            raise
        raise UserError(
            f"{what}: the hub refuses, or cannot be reached ({reason(error)}). Check the name, the network "
            "and the token (`hf auth login`)."
        ) from None
