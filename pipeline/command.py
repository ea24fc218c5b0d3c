"""What the commands share: a configuration from a file and `key=value` words, help, and errors in one line."""

from __future__ import annotations

import difflib
import errno
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from stages.errors import UsageError, UserError
from stages.signals import end_on_sigterm

Config = TypeVar("Config")
FAILURE, WRONG_USAGE = 1, 2
MULTIRUN = "--multirun"
# A disk's, not a defect of ours.
REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.ENAMETOOLONG}


def run(
    config_class: type[Config],
    main: Callable[[Config], None],
    description: str,
    multirun: Callable[[list[str]], None] | None = None,
) -> NoReturn:
    """Parse the command line into `config_class`, call `main`, and exit: 0 done, 1 a failure, 2 wrong usage.

    Where a command has a `multirun`, `--multirun` calls that instead, with the other words as they are.
    """
    end_on_sigterm()
    words = sys.argv[1:]
    if {"-h", "--help"} & set(words):
        print(help_text(config_class, description))
        sys.exit(0)
    tell_plainly()
    try:
        if multirun and MULTIRUN in words:
            multirun([word for word in words if word != MULTIRUN])
        else:
            main(parse(config_class, words))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(WRONG_USAGE if isinstance(error, UsageError) else FAILURE)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # who read us has gone: nothing is left to tell
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


def tell_plainly() -> None:
    """Have warnings told in a line, and libraries say no more than their errors."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries, to us; a user can do nothing about them
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    for library in ("diffusers", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)


def parse(config_class: type[Config], words: list[str]) -> Config:
    """The defaults of `config_class`, then the file after `--config`, then each `key=value`, checked key by key.

    Raises:
        UsageError: an unknown key, a value of another type, a missing one, or a file that cannot be read.
    """
    files, words = files_and_words(words)
    layers = [read_file(Path(file)) for file in files]
    for word in words:
        if "=" not in word or word.startswith("-"):
            raise UsageError(f"{word}: not understood: options are `--config FILE`, `--help` and `key=value`")
        layers.append(read_word(word))
    config = OmegaConf.structured(config_class)
    for layer in layers:
        merge(config, layer)
    try:
        if missing := sorted(OmegaConf.missing_keys(config)):
            raise UsageError(f"{missing[0]}: not given: say {missing[0]}=...")
        result = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise UsageError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    assert isinstance(result, config_class)
    return result


def files_and_words(words: list[str]) -> tuple[list[str], list[str]]:
    """What follows each `--config`, and the other words."""
    files, words = [], list(words)
    while "--config" in words:
        place = words.index("--config")
        if place + 1 == len(words):
            raise UsageError("--config: name a YAML file after it")
        files.append(words[place + 1])
        del words[place : place + 2]
    return files, words


def read_file(path: Path) -> DictConfig:
    try:
        layer = OmegaConf.load(path)
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}") from error
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(layer, DictConfig):
        raise UsageError(f"--config {path}: holds no keys")
    return layer


def read_word(word: str) -> DictConfig:
    try:
        return OmegaConf.from_dotlist([word])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UsageError(f"{word}: not readable as key=value") from error


def merge(config: DictConfig, layer: DictConfig) -> None:
    """Merge one layer, a key at a time, so that an error names its key."""
    known = {name: kind for name, kind, *_ in options(OmegaConf.get_type(config))}
    for key, value in leaves(layer, known):
        if key not in known:
            if any(name.startswith(f"{key}.") for name in known):
                raise UsageError(f"{key}: holds keys of its own: say {key}.NAME=..., --help lists them")
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f": did you mean {near[0]}?" if near else ": --help lists the keys"
            raise UsageError(f"{key}: no such key{hint}")
        if value is False and known[key] in (str, str | None):
            value = "no"  # as YAML 1.1 reads a bare `no`, which diffusers' scripts take for mixed_precision
        try:
            OmegaConf.update(config, key, value)
            OmegaConf.select(config, key)
        except OmegaConfBaseException as error:
            told = str(error).splitlines()[0]
            within = error.full_key if str(error.full_key).startswith(f"{key}.") else None
            if "is not a ListConfig" in told:
                told = "a list is asked for" if within else f"a list is asked for: say {key}=[{value}]"
            raise UsageError(f"{within or f'{key}={value}'}: {told}") from error


def leaves(layer: Any, known: Collection[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys with their values, going no deeper than the keys that are known."""
    for key in layer:
        name, value = f"{prefix}{key}", layer._get_node(key)
        if isinstance(value, DictConfig) and name not in known and not value._is_none():
            yield from leaves(value, known, f"{name}.")
        else:
            yield name, OmegaConf.to_container(value) if OmegaConf.is_config(value) else value._value()


def options(config_class: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any, str]]:
    """(dotted key, type, default, meaning) of every option of a dataclass and of those inside it."""
    kinds = get_type_hints(config_class)
    for option in fields(config_class):
        kind = kinds[option.name]
        if is_dataclass(kind):
            yield from options(kind, f"{prefix}{option.name}.")
        else:
            default = option.default_factory() if callable(option.default_factory) else option.default
            yield prefix + option.name, kind, default, option.metadata.get("help", "")


def help_text(config_class: type[Any], description: str) -> str:
    lines = [description, "", "usage: --config FILE key=value ...", ""]
    for key, kind, default, meaning in options(config_class):
        name = kind.__name__ if isinstance(kind, type) and not hasattr(kind, "__args__") else str(kind)
        shown = "required" if default == MISSING else f"default {default}"
        lines.append(f"  {key}  ({name.replace('typing.', '')}, {shown})\n      {meaning}")
    return "\n".join(lines)
