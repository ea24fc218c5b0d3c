"""A dataset on a Hugging Face hub, read at one commit. `HF_ENDPOINT` and `HF_TOKEN` are those of the hub's own client."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import BinaryIO, NoReturn

from huggingface_hub import HfApi, get_token, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.errors import HTTPError as ClientError  # type: ignore[attr-defined]  # of its HTTP library
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff  # type: ignore[attr-defined]

from stages.errors import StorageError, UserError
from stages.storage.folder import Folder
from stages.storage.ranges import ranged_file

HUB = "hf://"
REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
ADDRESS = re.compile(r"hf://datasets/([^/@]+/[^/@]+)(?:@(.+?))?/?")
COMMIT = re.compile(r"[0-9a-f]{40}")
PARTIAL_CONTENT = 206
UNAUTHORIZED, FORBIDDEN, PRECONDITION_FAILED = 401, 403, 412
LONGEST = 300  # characters of the client's own words
SECONDS = 60  # a read without any byte for so long is tried again


def open_hub(address: str) -> HubFolder:
    """Open a dataset at the commit that a branch or tag names now, by default the branch `main`.

    Raises:
        UserError: the address is incomplete.
        StorageError: there is no such dataset or revision, this user may not read it, or the hub does not answer.
    """
    match = ADDRESS.fullmatch(address)
    if match is None:
        raise UserError(
            f"{address}: not the address of a dataset on the hub: write hf://datasets/OWNER/NAME, or "
            "hf://datasets/OWNER/NAME@REVISION"
        )
    repo_id, revision = match.groups()
    if revision is None or not COMMIT.fullmatch(revision):
        with hub_errors(address, "read"):
            revision = HfApi().dataset_info(repo_id, revision=revision, expand=["sha"], timeout=SECONDS).sha
    return HubFolder(repo_id, str(revision))


def hub_hint(folder: Folder) -> str:
    """How `data_dir` names a dataset on the hub, if a folder that does not exist may be meant as one."""
    name = str(folder)
    if not REPOSITORY.fullmatch(name) or Path(name).exists():
        return ""
    return f"; if it is on the hub, say data_dir={HUB}datasets/{name}"


class HubFolder(Folder):
    """A commit of a dataset on the hub. It never changes, so its names are listed once; no method writes.

    The hub's client tries again after 429, 5xx and lost connections.
    """

    def __init__(self, repo_id: str, commit: str) -> None:
        super().__init__(f"{HUB}datasets/{repo_id}@{commit}")
        self.repo_id, self.commit = repo_id, commit

    @cached_property
    def sizes(self) -> dict[str, int]:
        """The sizes of all files in bytes, by name."""
        with hub_errors(self.address, "listed"):
            tree = HfApi().list_repo_tree(self.repo_id, recursive=True, revision=self.commit, repo_type="dataset")
            return {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile)}

    def where(self, name: str) -> str:
        return f"{self.address}/{name}"

    def read(self, name: str) -> bytes | None:
        try:
            return self._get(name)
        except FileNotFoundError:
            return None

    def open(self, name: str) -> BinaryIO:
        if name not in self.sizes:
            raise FileNotFoundError(name)
        return ranged_file(partial(self.read_range, name), self.sizes[name])

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """Read `length` bytes of a file, from `start` on."""
        return self._get(name, start, length)

    def _get(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """
        Raises:
            FileNotFoundError: the file does not exist.
        """
        api = HfApi()
        url = hf_hub_url(self.repo_id, name, repo_type="dataset", revision=self.commit, endpoint=api.endpoint)
        headers = build_hf_headers() | {"Accept-Encoding": "identity"}
        if length is not None:
            headers["Range"] = f"bytes={start}-{start + length - 1}"
        with hub_errors(self.where(name), "read"):
            answer = http_backoff("GET", url, headers=headers, timeout=SECONDS)
            hf_raise_for_status(answer)
            if length is None or answer.status_code == PARTIAL_CONTENT:
                return answer.content
            return answer.content[start : start + length]

    def exists(self, name: str) -> bool:
        return name in self.sizes

    def list(self, folder: str) -> dict[str, int]:
        return {name: size for name, size in sorted(self.sizes.items()) if name.rpartition("/")[0] == folder}

    def leftovers(self, folder: str) -> dict[str, int]:
        return {}  # a commit holds whole files

    def free(self) -> int | None:
        return None

    def probe(self, way_out: str = "take another output_dir") -> None:
        raise StorageError(f"{self}: cannot be written: a dataset on the hub is only read: {way_out}")

    def whole_file(self, name: str) -> AbstractContextManager[BinaryIO]:
        self._refuse(name)

    def create(self, name: str, content: bytes) -> bool:
        self._refuse(name)

    def delete(self, name: str) -> None:
        self._refuse(name)

    def move(self, name: str, to: str) -> bool:
        self._refuse(name)

    def modified(self, name: str) -> float:
        self._refuse(name)  # only what writes asks for it

    def _refuse(self, name: str) -> NoReturn:
        way_out = "work on a local copy, and `python -m pipeline.publish` uploads it"
        raise StorageError(f"{self.where(name)}: cannot be written: a dataset on the hub is only read; {way_out}")


@contextmanager
def hub_errors(what: str, done: str) -> Iterator[None]:
    """Turn the errors of the hub's client into one line that names what could not be `done`, and a way out.

    Raises:
        FileNotFoundError: the repository has no such file.
        StorageError: for every other error.
    """
    try:
        yield
    except EntryNotFoundError as error:
        raise FileNotFoundError(what) from error
    except (ClientError, OSError, ValueError, RuntimeError) as error:
        # The client wraps what happens in its threads.
        cause = error.__cause__ if type(error) is RuntimeError and isinstance(error.__cause__, Exception) else error
        raise StorageError(f"{what}: cannot be {done}: {reason(cause)}") from error


def reason(error: Exception) -> str:
    """Return why the hub's client failed, with a way out, in one line."""
    endpoint = HfApi().endpoint
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, ClientError):
        error = error.__cause__  # the client tells at length what its cache lacks
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, GatedRepoError):
        return f"{endpoint} asks for an agreement: give it on the repository's page, and set HF_TOKEN to your token"
    if isinstance(error, RepositoryNotFoundError):
        way_out = "check the name, and what HF_TOKEN may read" if get_token() else "check the name, or set HF_TOKEN"
        return f"{endpoint} has no such repository, or it is private: {way_out}"
    if isinstance(error, RevisionNotFoundError):
        return "the repository has no such revision: name a branch, a tag or a commit"
    if isinstance(error, HFValidationError):
        return f"not a name of a repository: write OWNER/NAME: {_in_one_line(error)}"
    if status == UNAUTHORIZED or isinstance(error, LocalTokenNotFoundError):
        found = "HF_TOKEN is not valid" if get_token() else "no token is given"
        return f"{found}: make one at {endpoint}/settings/tokens, and set HF_TOKEN to it"
    if status == FORBIDDEN:
        return f"the token has no right to it: give it the right at {endpoint}/settings/tokens: {_in_one_line(error)}"
    if status == PRECONDITION_FAILED:
        return "it has a newer commit, of someone else: give the same command again"
    if status is None and isinstance(error, ClientError):
        return f"{endpoint} does not answer: {_in_one_line(error)}: check the network and HF_ENDPOINT"
    return _in_one_line(error)


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:LONGEST] or type(error).__name__
