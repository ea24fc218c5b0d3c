"""A repository on a hub that files are uploaded to: what is there already is not sent again."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from re import Pattern

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoCard
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import disable_progress_bars, validate_repo_id  # type: ignore[attr-defined]
from yaml import YAMLError

from stages.errors import ChangedError, StorageError, UserError
from stages.progress import progress
from stages.records.shard import hash_file
from stages.storage.folder import Folder
from stages.storage.hub import hub_errors
from stages.streams import standard_error

DATASET, MODEL = "dataset", "model"
README = "README.md"
OF_EVERY_REPOSITORY = {".gitattributes", README, "LICENSE"}  # what a hub makes, or its form for a new one
HEADER = re.compile(rb"\A\s*---\r?\n.*?\n---\s*", re.DOTALL)
LONGEST = 300  # characters of a hub's own words
FILES_PER_COMMIT = 100  # a hub limits commits per hour; what it has of a killed batch, it knows by the hash


@dataclass(frozen=True)
class LocalFile:
    """A file to upload, and the SHA-256 that it must have."""

    path: Path
    sha256: str

    @staticmethod
    def of(path: Path) -> LocalFile:
        with path.open("rb") as file:
            return LocalFile(path, hash_file(file))

    def check(self, found: str | None = None) -> None:
        """
        Args:
            found: the SHA-256 of the file; by default it is read.

        Raises:
            ChangedError: it is another one.
        """
        try:
            found = found or LocalFile.of(self.path).sha256
        except FileNotFoundError:
            found = None
        if found != self.sha256:
            raise changed(self.path)


def changed(what: Path | Folder) -> ChangedError:
    """Return the error for a file or a folder that changes during its upload."""
    way_out = "wait until nothing writes there, and give the same command again"
    return ChangedError(f"{what}: has changed since the upload began: {way_out}")


def address_of(repo_id: str, kind: str) -> str:
    return f"{HfApi().endpoint}/{'datasets/' if kind == DATASET else ''}{repo_id}"


def check_access(repo_id: str, kind: str) -> None:
    """Check a repository's name, and that the token is valid; whether it may write there shows later.

    Raises:
        StorageError: they are not, or the hub does not answer.
    """
    with hub_errors(address_of(repo_id, kind), "written"):
        validate_repo_id(repo_id)
        HfApi().whoami()


def check_card(card: bytes, repo_id: str, kind: str) -> None:
    """Have the hub check the header of a card.

    Raises:
        UserError: it refuses the header, for one because it does not know the licence; nothing was uploaded.
        StorageError: the hub does not answer.
    """
    address = address_of(repo_id, kind)
    with hub_errors(address, "written"):
        try:
            RepoCard(card.decode()).validate(repo_type=kind)
        except (ValueError, YAMLError) as error:
            refused = f"{address}: the hub refuses the header of the card: {_found_wrong(str(error))}"
            raise UserError(f"{refused}; nothing was uploaded") from error


def _found_wrong(answer: str) -> str:
    with suppress(ValueError, KeyError, TypeError):  # what is not as hubs answer stays as it is
        answer = "; ".join(error["message"] for error in json.loads(answer)["errors"])
    return " ".join(answer.split())[:LONGEST]


class Repository:
    """A branch of a repository, made if it does not exist.

    Attributes:
        private: whether only those with a right to it can read it.
        head: its last commit.
        sha256: of each large file there, by name.
        names: of all files there.

    Raises:
        StorageError: the hub refused, or does not answer.
        UserError: `private` is asked for, and the repository is public.
    """

    def __init__(self, repo_id: str, kind: str, private: bool = False, branch: str | None = None) -> None:
        disable_progress_bars()  # there is one bar over all files
        self.api, self.kind, self.branch = HfApi(), kind, branch or "main"
        self.address = address_of(repo_id, kind)
        with hub_errors(self.address, "written"):
            made = self.api.create_repo(repo_id, repo_type=kind, private=private or None, exist_ok=True)
            self.repo_id = made.repo_id
            if branch is not None:
                self.api.create_branch(self.repo_id, branch=branch, repo_type=kind, exist_ok=True)
            info = self.api.repo_info(self.repo_id, repo_type=kind, revision=self.branch)
            tree = list(self.api.list_repo_tree(self.repo_id, recursive=True, revision=info.sha, repo_type=kind))
        if private and not info.private:
            raise UserError(f"{self.address}: is public already: make it private on its page, or take another repo_id")
        self.private, self.head = bool(info.private), str(info.sha)
        files = [entry for entry in tree if isinstance(entry, RepoFile)]
        self.names = {entry.path for entry in files}
        self.sha256 = {entry.path: entry.lfs.sha256 for entry in files if entry.lfs}

    def check_own(self, what: str, left: Pattern[str] | None = None) -> None:
        """Refuse to write into a repository of something else.

        Args:
            what: is to be uploaded.
            left: the names of files that an upload which broke off may have left.

        Raises:
            UserError: it holds other files.
        """
        others = sorted(name for name in self.names - OF_EVERY_REPOSITORY if not (left and left.fullmatch(name)))
        if others:
            raise UserError(f"{self.address}: holds {others[0]}, and is no repository of {what}: take another repo_id")
        if README in self.names and HEADER.sub(b"", self.read(README)).strip():
            raise UserError(
                f"{self.address}: holds somebody's README.md, and is no repository of {what}: take another repo_id, or "
                "remove that page"
            )

    def announce(self) -> None:
        """Say where an upload goes, and who can read it there."""
        readers = "private" if self.private else "public: everyone can read it"
        standard_error().write(f"upload to {self.address}, branch {self.branch}, {readers}\n")

    def read(self, name: str) -> bytes:
        """Return the content of a small file."""
        with hub_errors(f"{self.address}/{name}", "read"):
            path = self.api.hf_hub_download(self.repo_id, name, repo_type=self.kind, revision=self.head)
            return Path(path).read_bytes()

    def missing(self, files: dict[str, LocalFile]) -> dict[str, LocalFile]:
        """Return the files that are not there as they are here."""
        return {name: file for name, file in files.items() if self.sha256.get(name) != file.sha256}

    def upload(self, files: dict[str, LocalFile], what: str) -> int:
        """Upload the files that are missing, in several commits; return how many.

        Raises:
            ChangedError: a file changes meanwhile; the commits before its own stay.
            StorageError: the hub refused, or does not answer.
        """
        missing = self.missing(files)
        with progress(len(files), "upload", what, initial=len(files) - len(missing)) as bar:
            for batch in _batches(missing):
                self.commit(batch, {}, f"{len(batch)} {what}")
                bar.update(len(batch))
        return len(missing)

    def commit(
        self, files: dict[str, LocalFile], contents: dict[str, bytes], message: str, leave_out: set[str] | None = None
    ) -> None:
        """Upload files and contents by name, and remove the names in `leave_out`, all in one commit.

        Raises:
            ChangedError: a file changes meanwhile; nothing is committed.
            StorageError: the hub refused, does not answer, or has a newer commit.
        """
        try:
            with hub_errors(self.address, "written"):
                additions = {name: CommitOperationAdd(name, str(file.path)) for name, file in files.items()}
                self.api.preupload_lfs_files(
                    self.repo_id, additions.values(), repo_type=self.kind, revision=self.branch, free_memory=False
                )  # fmt: skip
                found = {name: addition.upload_info.sha256.hex() for name, addition in additions.items()}
        except StorageError:
            for file in files.values():  # the hub refuses what is not of the announced SHA-256
                file.check()
            raise
        for name, file in files.items():
            file.check(found[name])
        removed = [CommitOperationDelete(name) for name in sorted(leave_out or set())]
        written = [CommitOperationAdd(name, content) for name, content in contents.items()]
        with hub_errors(self.address, "written"):
            self.head = self.api.create_commit(
                self.repo_id,
                [*removed, *additions.values(), *written],
                commit_message=message,
                repo_type=self.kind,
                revision=self.branch,
                parent_commit=self.head,
            ).oid


def _batches(files: dict[str, LocalFile]) -> Iterator[dict[str, LocalFile]]:
    left = iter(files.items())
    while batch := dict(islice(left, FILES_PER_COMMIT)):
        yield batch
