"""What compiling fails with where something is missing, told in a line."""

from __future__ import annotations

import subprocess
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from stages.errors import UserError

COMPILERS = (
    "torch._inductor",
    "torch._dynamo",
    "triton",
)  # not imported: that alone fails without a folder to write to
BACKENDS = ("torch._inductor", "triton")  # what the tracer itself refuses is an error of this project
OF_THE_MACHINE = (OSError, ImportError, LookupError, subprocess.SubprocessError)  # no folder, no header, no user's name
FRAMES, MAX_MESSAGE_LENGTH = 4, 300


@contextmanager
def compile_errors(asked: bool = True) -> Iterator[None]:
    """
    Args:
        asked: whether anything is compiled at all.

    Raises:
        UserError: something could not be compiled.
    """
    try:
        yield
    except Exception as error:
        if not (asked and _of_a_compiler(error)):
            raise
        message = " ".join(str(error).partition("Set TORCHDYNAMO_VERBOSE")[0].split())[:MAX_MESSAGE_LENGTH]
        way_out = (
            "give it a C++ compiler, such as g++, and a folder to write to (TORCHINDUCTOR_CACHE_DIR), or leave it out"
        )
        raise UserError(f"torch_compile=true: {message or type(error).__name__}: {way_out}") from error


def _of_a_compiler(error: Exception) -> bool:
    """Whether a compiler refused, or stumbled over what this machine lacks."""
    kinds = type(error).__mro__
    if any(kind.__module__.startswith(BACKENDS) or kind.__name__ == "BackendCompilerFailed" for kind in kinds):
        return True
    frames = traceback.extract_tb(error.__traceback__)[-FRAMES:]
    inside = any(f"/{name.replace('.', '/')}/" in frame.filename for name in COMPILERS for frame in frames)
    return inside and isinstance(error, OF_THE_MACHINE)
