"""Where a dataset is: a folder on disk, or a prefix in a bucket, with the same guarantees."""

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
    """The folder at a local path, or at `s3://bucket/prefix`, `gs://...`, `az://...`; it need not exist yet.

    Raises:
        UserError: there is no such kind of place, or the environment tells too little of it.
    """
    from stages.storage.bucket import SCHEMES, open_bucket  # not above: both modules import the interface from this one
    from stages.storage.disk import DiskFolder

    address = str(address)
    if "://" not in address:
        return DiskFolder(address)
    if not address.startswith(SCHEMES):
        raise UserError(f"{address}: neither a local folder nor one of {', '.join(SCHEMES)}")
    return open_bucket(address)


def absolute(address: str) -> str:
    """The same place, named so that another process finds it."""
    return address if "://" in address else str(Path(address).resolve())


class Folder(ABC):
    """Files by name, such as `shards/00000-1a2b3c4d.tar`; each is whole or not there. As a string, its address as it was given.

    Raises:
        StorageError: in every method: a bucket refused, or a disk that was to be written to.
    """

    def __init__(self, address: str) -> None:
        self.address = address

    def __str__(self) -> str:
        return self.address

    def override(self, key: str) -> str:
        """`KEY=ADDRESS` for a command line."""
        return shlex.quote(f"{key}={self}")

    @abstractmethod
    def where(self, name: str) -> str:
        """The address of a file."""

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """The content of a file, or None where there is none."""

    @abstractmethod
    def open(self, name: str) -> BinaryIO:
        """A file to read parts of.

        Raises:
            FileNotFoundError: there is none.
        """

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Whether a file is there."""

    @abstractmethod
    def list(self, folder: str) -> dict[str, int]:
        """The files directly in a folder: their names, in order, and sizes."""

    @abstractmethod
    def whole_file(self, name: str) -> AbstractContextManager[BinaryIO]:
        """Open a file for writing that appears only when the block ends well, replacing what was there."""

    def write(self, name: str, content: bytes) -> None:
        """Write a file, replacing what was there."""
        with self.whole_file(name) as file:
            file.write(content)

    @abstractmethod
    def create(self, name: str, content: bytes) -> bool:
        """Write a file if none is there yet; False if another one is. Of many at once, one wins."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove a file, if it is there."""

    @abstractmethod
    def move(self, name: str, to: str) -> bool:
        """Give a file another name; False if that is taken. Killed half way, it is there under both.

        Raises:
            FileNotFoundError: there is none.
        """

    @abstractmethod
    def leftovers(self, folder: str) -> dict[str, int]:
        """The files directly in a folder that were written aside and are not in place: their names and sizes."""

    @abstractmethod
    def modified(self, name: str) -> float:
        """When a file was last written, in seconds by the clock of the place.

        Raises:
            FileNotFoundError: there is none.
        """

    @abstractmethod
    def probe(self, way_out: str = "take another output_dir") -> None:
        """Refuse a place that cannot be written to before there is work to lose: makes a file, and removes it.

        Raises:
            StorageError: it cannot; it ends with the way out.
        """

    @abstractmethod
    def free(self) -> int | None:
        """Bytes that there is room for, or None where nobody knows."""

    def now(self) -> float:
        """The time by the same clock, which need not be this machine's."""
        self.write(CLOCK, b"")
        try:
            return self.modified(CLOCK)
        finally:
            self.delete(CLOCK)


def unreadable(root: Folder, name: str) -> StorageError:
    """A file that is another user's is not damaged: nothing is to be skipped, and nothing set aside."""
    return StorageError(
        f"{root.where(name)}: may not be read by this user: let its owner run `chmod -R a+rX` on the dataset"
    )
