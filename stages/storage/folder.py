"""The folder of a dataset: one interface, with the same guarantees on a disk and in a bucket."""

from __future__ import annotations

import shlex
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO

from stages.errors import StorageError, UserError

READ_SIZE = 1 << 22
CLOCK = ".now"


def open_folder(address: str | Path) -> Folder:
    """Open the folder at a local path, or at `s3://bucket/prefix`, `gs://...` or `az://...`; it need not exist yet.

    Of a dataset on the hub, `hf://datasets/OWNER/NAME@REVISION`, it is the commit that the revision names now.

    Raises:
        UserError: the address has another scheme, the environment lacks what the bucket needs, or the hub has no such
            dataset.
    """
    from stages.storage.bucket import SCHEMES, open_bucket  # here, because these modules import `Folder` from this one
    from stages.storage.disk import DiskFolder
    from stages.storage.hub import HUB, open_hub

    address = str(address)
    if "://" not in address:
        return DiskFolder(address)
    if address.startswith(HUB):
        return open_hub(address)
    if not address.startswith(SCHEMES):
        raise UserError(f"{address}: neither a local folder nor one of {', '.join((*SCHEMES, HUB))}")
    return open_bucket(address)


def absolute(address: str) -> str:
    """Return the address in a form that does not depend on the current folder."""
    return address if "://" in address else str(Path(address).resolve())


class Folder(ABC):
    """Files by name, such as `shards/00000-1a2b3c4d.tar`. A file exists whole or not at all. `str` gives the address.

    Raises:
        StorageError: in every method: the bucket refused, or the disk refused a write.
    """

    def __init__(self, address: str) -> None:
        self.address = address

    def __str__(self) -> str:
        return self.address

    def override(self, key: str) -> str:
        """Return `KEY=ADDRESS`, quoted for a command line."""
        return shlex.quote(f"{key}={self}")

    @abstractmethod
    def where(self, name: str) -> str:
        """Return the address of a file."""

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """Return the content of a file, or None if it does not exist."""

    @abstractmethod
    def open(self, name: str) -> BinaryIO:
        """Open a file to read parts of it.

        Raises:
            FileNotFoundError: it does not exist.
        """

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Return whether a file exists."""

    @abstractmethod
    def list(self, folder: str) -> dict[str, int]:
        """Return the names of the files directly in a folder, in order, and their sizes in bytes."""

    @abstractmethod
    def whole_file(self, name: str) -> AbstractContextManager[BinaryIO]:
        """Open a file for writing. It appears, or replaces the old one, only if the block ends without an error."""

    def write(self, name: str, content: bytes) -> None:
        """Write a file, or replace it."""
        with self.whole_file(name) as file:
            file.write(content)

    @abstractmethod
    def create(self, name: str, content: bytes) -> bool:
        """Write a file unless it exists; return whether this call wrote it. Of concurrent calls, exactly one wins."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove a file if it exists."""

    @abstractmethod
    def move(self, name: str, to: str) -> bool:
        """Rename a file; return False if the new name is taken. A kill in between leaves the file under both names.

        Raises:
            FileNotFoundError: the file does not exist.
        """

    @abstractmethod
    def leftovers(self, folder: str) -> dict[str, int]:
        """Return the names of temporary files of unfinished writes directly in a folder, and their sizes in bytes."""

    @abstractmethod
    def modified(self, name: str) -> float:
        """Return when a file was last written, in seconds by the storage's clock.

        Raises:
            FileNotFoundError: the file does not exist.
        """

    @abstractmethod
    def probe(self, way_out: str = "take another output_dir") -> None:
        """Write a file and remove it, to find out before any work is done that the folder cannot be written to.

        Raises:
            StorageError: it cannot be written to; the message ends with the way out.
        """

    @abstractmethod
    def free(self) -> int | None:
        """Return the free space in bytes, or None if it is unknown."""

    def now(self) -> float:
        """Return the time in seconds by the storage's clock, which may differ from this machine's."""
        self.write(CLOCK, b"")
        try:
            return self.modified(CLOCK)
        finally:
            self.delete(CLOCK)


def unreadable(root: Folder, name: str) -> StorageError:
    """Return the error for a file of another user. It is no `DamageError`: a reader must not skip the file."""
    return StorageError(
        f"{root.where(name)}: may not be read by this user: let its owner run `chmod -R a+rX` on the dataset"
    )
