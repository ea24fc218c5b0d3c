"""What the commands share: how each starts, and how it ends, with errors in one line."""

from __future__ import annotations

import errno
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from stages.configuration.parsing import Config, help_text, parse
from stages.errors import UsageError, UserError
from stages.signals import end_on_sigterm
from stages.streams import print_warnings_in_one_line, steady

FAILURE, WRONG_USAGE = 1, 2
MULTIRUN = "--multirun"
# A disk's, not a defect of ours.
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
) -> NoReturn:
    """Parse the command line into `config_class`, call `main`, and exit: 0 done, 1 a failure, 2 wrong usage.

    Args:
        multirun: what `--multirun` calls instead of `main`, with the other words as they are.
        argument: the option that the first word gives, without its key.
    """
    end_on_sigterm()
    overrides = sys.argv[1:]
    if {"-h", "--help"} & set(overrides):
        print(help_text(config_class, description))
        sys.exit(0)
    print_warnings_in_one_line()
    try:
        check_encoding(overrides)
        if argument and overrides and "=" not in overrides[0] and not overrides[0].startswith("-"):
            overrides[0] = f"{argument}={overrides[0]}"
        if multirun and MULTIRUN in overrides:
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
        if isinstance(ended, SystemExit) and ended.code != signal.SIGTERM:  # with which Ray ends while it starts
            raise
        print("error: interrupted; what was written before is kept", file=sys.stderr)
        sys.exit(FAILURE)
    sys.exit(0)


def check_encoding(overrides: list[str]) -> None:
    """
    Raises:
        UsageError: a word cannot be read in the encoding of this environment, and so names no file and no prompt.
    """
    for override in overrides:
        if any("\ud800" <= character <= "\udfff" for character in override):  # bytes that Python could not read
            way_out = "set PYTHONUTF8=1 if it is UTF-8, else give it another name"
            raise UsageError(f"{override}: not text in {sys.getfilesystemencoding()}: {way_out}")
