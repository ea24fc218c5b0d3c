"""A file that is read by requests for ranges of its bytes."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import BinaryIO, cast

from stages.storage.folder import READ_SIZE


def ranged_file(read_range: Callable[[int, int], bytes], size: int) -> BinaryIO:
    """Open a file of `size` bytes; `read_range(start, length)` is a request for a part of it."""
    return cast(BinaryIO, io.BufferedReader(_Ranges(read_range, size), READ_SIZE))


class _Ranges(io.RawIOBase):
    """The file, unbuffered: each read is a request."""

    def __init__(self, read_range: Callable[[int, int], bytes], size: int) -> None:
        self.read_range, self.size, self.offset = read_range, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.offset = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.offset, io.SEEK_END: self.size}[whence]
        return self.offset

    def tell(self) -> int:
        return self.offset

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        length = min(len(buffer), self.size - self.offset)
        if length <= 0:
            return 0
        content = self.read_range(self.offset, length)
        buffer[: len(content)] = content
        self.offset += len(content)
        return len(content)

    def readall(self) -> bytes:
        return self.read(self.size - self.offset) or b""  # the inherited method reads a few kilobytes at a time
