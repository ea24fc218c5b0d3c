"""The size of an image or a video: in a condition, in the pipeline's call, and as a name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

SIZE_KEYS = ("width", "height", "num_frames")
DEFAULT_SIZE = "default"  # names the pipeline's own size, where nothing asks for another
LEAST = 8
VIDEO_DIMS = 5


@dataclass(frozen=True)
class Size:
    """Width and height in pixels, and the number of frames of a video."""

    width: int
    height: int
    num_frames: int | None = None

    @staticmethod
    def from_list(values: Any) -> Size:
        """Read `[width, height]` or `[width, height, num_frames]`.

        Raises:
            ValueError: it is something else.
        """
        whole = isinstance(values, Sequence) and all(type(value) is int for value in values)
        if not whole or len(values) not in (2, 3):
            raise ValueError("give [width,height] in pixels, or [width,height,frames] of a video")
        return Size(*values).checked()

    @staticmethod
    def from_columns(values: Mapping[str, Any]) -> Size | None:
        """Read the keys of `SIZE_KEYS` in a condition or in a row of the manifest; None if they name no size.

        Raises:
            ValueError: some of them are missing.
        """
        given = {key: values[key] for key in SIZE_KEYS if values.get(key) is not None}
        if not given:
            return None
        if missing := [key for key in ("width", "height") if key not in given]:
            raise ValueError(f"{next(iter(given))} without {missing[0]}: give width and height")
        return Size(**given).checked()

    def checked(self) -> Size:
        """
        Raises:
            ValueError: it is too small.
        """
        if min(self.width, self.height) < LEAST or (self.num_frames is not None and self.num_frames < 1):
            raise ValueError(f"{self.name} is too small: at least {LEAST}x{LEAST} pixels, and one frame of a video")
        return self

    def made(self, shape: Sequence[int]) -> Size:
        """The size of what was made when this one was asked for.

        Args:
            shape: of the images or videos, `[n, c, height, width]` or `[n, c, frames, height, width]`.
        """
        frames = self.num_frames if self.num_frames is None or len(shape) != VIDEO_DIMS else shape[2]
        return Size(shape[-1], shape[-2], frames)

    @property
    def name(self) -> str:
        """Such as `832x1216`, or `832x480x81` for a video."""
        return "x".join(str(value) for value in self.columns.values())

    @property
    def columns(self) -> dict[str, int]:
        """The size by `SIZE_KEYS`, which are also the names of the arguments of a pipeline's call."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def size_name(values: Mapping[str, Any]) -> str:
    """Name the size in a condition or in a row of the manifest."""
    size = Size.from_columns(values)
    return DEFAULT_SIZE if size is None else size.name
