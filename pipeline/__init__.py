"""The commands: parse, compose, run."""

import os
import sys
import tempfile


def check_surroundings() -> None:
    """Exit with a one-line error if a folder is missing without which importing torch or diffusers aborts."""
    try:
        os.getcwd()  # noqa: PTH109
    except OSError as error:
        sys.exit(f"error: the working directory: {error.strerror}: cd to one that exists")
    try:
        tempfile.gettempdir()
    except OSError:
        sys.exit("error: no folder for temporary files is writable: name one with TMPDIR")
    if compiled := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        try:
            os.makedirs(compiled, exist_ok=True)  # noqa: PTH103  pathlib is not imported yet
        except OSError as error:
            sys.exit(f"error: TORCHINDUCTOR_CACHE_DIR={compiled}: {error.strerror}: unset it, or name another folder")


check_surroundings()
# transformers says which backend it takes for each image processor of a pipeline.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
