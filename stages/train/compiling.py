"""Turn compiler failures into a one-line error."""

from __future__ import annotations

import subprocess
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from stages.errors import UserError

# Named, not imported: importing them fails without a writable folder.
COMPILERS = (
    "torch._inductor",
    "torch._dynamo",
    "triton",
)
BACKENDS = ("torch._inductor", "triton")  # not the tracer: what it rejects is a defect of this project
# E.g. no writable folder, no header file, no user name.
OF_THE_MACHINE = (
    OSError,
    ImportError,
    LookupError,
    subprocess.SubprocessError,
)
FRAMES, MAX_MESSAGE_LENGTH = 4, 300


@contextmanager
def compile_errors(compiling: bool = True) -> Iterator[None]:
    """
    Args:
        compiling: whether anything is compiled at all.

    Raises:
        UserError: compilation failed.
    """
    try:
        yield
    except Exception as error:
        if not (compiling and _from_compiler(error)):
            raise
        message = " ".join(str(error).partition("Set TORCHDYNAMO_VERBOSE")[0].split())[:MAX_MESSAGE_LENGTH]
        way_out = (
            "give it a C++ compiler, such as g++, and a folder to write to (TORCHINDUCTOR_CACHE_DIR), or leave it out"
        )
        raise UserError(f"torch_compile=true: {message or type(error).__name__}: {way_out}") from error


def _from_compiler(error: Exception) -> bool:
    """Whether a compiler raised the error, or this machine lacks something that the compiler needs."""
    kinds = type(error).__mro__
    if any(kind.__module__.startswith(BACKENDS) or kind.__name__ == "BackendCompilerFailed" for kind in kinds):
        return True
    frames = traceback.extract_tb(error.__traceback__)[-FRAMES:]
    inside = any(f"/{name.replace('.', '/')}/" in frame.filename for name in COMPILERS for frame in frames)
    return inside and isinstance(error, OF_THE_MACHINE)
