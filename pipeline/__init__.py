"""The commands: parse, compose, run."""

import os
import sys
import tempfile


def check_surroundings() -> None:
    """End with a line where to import torch and diffusers would end with an abort or a traceback: they ask for these folders."""
    try:
        os.getcwd()  # noqa: PTH109
    except OSError as error:
        sys.exit(f"error: the folder that this was started in: {error.strerror}: cd to one that is there")
    try:
        tempfile.gettempdir()
    except OSError:
        sys.exit("error: no folder for temporary files can be written to: name one with TMPDIR")
    if compiled := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        try:
            os.makedirs(compiled, exist_ok=True)  # noqa: PTH103  sooner than pathlib
        except OSError as error:
            sys.exit(f"error: TORCHINDUCTOR_CACHE_DIR={compiled}: {error.strerror}: unset it, or name another folder")


check_surroundings()
