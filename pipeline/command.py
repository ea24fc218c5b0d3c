"""What the commands share: the command line, one-line errors, and exit statuses."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from stages.configuration.parsing import Config, help_text, parse
from stages.errors import UsageError, UserError
from stages.signals import end_on_sigterm
from stages.streams import print_warnings_in_one_line, steady

FAILURE, WRONG_USAGE = 1, 2
MULTIRUN, DRY_RUN = "--multirun", "--dry-run"
# Errors of the disk, not defects of this project.
REFUSALS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTDIR,
    errno.EISDIR, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE,
}  # fmt: skip


@steady()
def run(
    config_class: type[Config],
    main: Callable[[Config], None],
    description: str,
    multirun: Callable[[list[str]], None] | None = None,
    argument: str | None = None,
    dry_run: Callable[[Config], None] | None = None,
) -> NoReturn:
    """Parse the command line into `config_class`, call `main`, and exit: 0 done, 1 a failure, 2 wrong usage.

    Args:
        multirun: called instead of `main` for `--multirun`, with the other arguments.
        argument: the option that the first argument may give without its key.
        dry_run: called instead of `main` for `--dry-run`.
    """
    end_on_sigterm()
    overrides = sys.argv[1:]
    if {"-h", "--help"} & set(overrides):
        flags = [name for name, has in ((DRY_RUN, dry_run), (MULTIRUN, multirun)) if has]
        print(help_text(config_class, description, flags))
        sys.exit(0)
    print_warnings_in_one_line()
    try:
        check_encoding(overrides)
        if argument and overrides and is_path(overrides[0]):
            overrides[0] = f"{argument}={overrides[0]}"
        if dry_run and DRY_RUN in overrides:
            if MULTIRUN in overrides:
                raise UsageError(f"{DRY_RUN}: not with {MULTIRUN}: try one combination")
            dry_run(parse(config_class, [override for override in overrides if override != DRY_RUN]))
        elif multirun and MULTIRUN in overrides:
            multirun([override for override in overrides if override != MULTIRUN])
        else:
            main(parse(config_class, overrides))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(WRONG_USAGE if isinstance(error, UsageError) else FAILURE)
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        way_out = "pip install '.[generate]', or to train and evaluate on one GPU set CUDA_VISIBLE_DEVICES=0"
        print(f"error: ray is not installed: {way_out}", file=sys.stderr)
        sys.exit(FAILURE)
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        print(f"error: {error.filename or 'writing'}: {error.strerror}", file=sys.stderr)
        sys.exit(FAILURE)
    except (KeyboardInterrupt, SystemExit) as ended:
        if isinstance(ended, SystemExit) and ended.code != signal.SIGTERM:  # raised by Ray during its start
            raise
        print("error: interrupted; what was written before is kept", file=sys.stderr)
        sys.exit(FAILURE)
    sys.exit(0)


def is_path(argument: str) -> bool:
    """Whether an argument is a path, not an option `key=value`; a path may contain `=`."""
    key, equals, _ = argument.partition("=")
    return not argument.startswith("-") and (not equals or os.sep in key or Path(argument).is_file())


def check_encoding(overrides: list[str]) -> None:
    """
    Raises:
        UsageError: an argument cannot be decoded in the encoding of this environment.
    """
    for override in overrides:
        if any("\ud800" <= character <= "\udfff" for character in override):  # a byte that Python could not decode
            way_out = "set PYTHONUTF8=1 if it is UTF-8, else give it another name"
            raise UsageError(f"{override}: not text in {sys.getfilesystemencoding()}: {way_out}")
