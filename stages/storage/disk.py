"""A folder on a disk."""

from __future__ import annotations

import os
import shutil
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import BinaryIO

from stages.storage.files import TEMPORARY, check_folder, create, move, whole_file
from stages.storage.folder import Folder


class DiskFolder(Folder):
    """A folder on a disk that every process and node of a run can see."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.path = Path(address)

    def where(self, name: str) -> str:
        return str(self.path / name)

    def read(self, name: str) -> bytes | None:
        try:
            return (self.path / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def open(self, name: str) -> BinaryIO:
        return (self.path / name).open("rb")

    def exists(self, name: str) -> bool:
        return (self.path / name).exists()

    def list(self, folder: str) -> dict[str, int]:
        sizes = {}
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(self.path / folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # an attempt that lost removes its shard
                    if not entry.name.startswith("."):
                        sizes[f"{folder}/{entry.name}"] = entry.stat().st_size
        return dict(sorted(sizes.items()))

    def whole_file(self, name: str) -> AbstractContextManager[BinaryIO]:
        return whole_file(self.path / name)

    def create(self, name: str, content: bytes) -> bool:
        return create(self.path / name, content)

    def probe(self, way_out: str = "take another output_dir") -> None:
        check_folder(self.path, way_out)

    def free(self) -> int | None:
        return shutil.disk_usage(self.path).free

    def delete(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def move(self, name: str, to: str) -> bool:
        return move(self.path / name, self.path / to)

    def leftovers(self, folder: str) -> dict[str, int]:
        sizes = {}
        for path in sorted((self.path / folder).glob(TEMPORARY)):
            with suppress(FileNotFoundError):  # the write has finished since
                sizes[path.relative_to(self.path).as_posix()] = path.stat().st_size
        return sizes

    def modified(self, name: str) -> float:
        return (self.path / name).stat().st_mtime
