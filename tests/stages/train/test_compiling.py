from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor.exc import InvalidCxxCompiler

from stages.errors import UserError
from stages.train.compiling import compile_errors
from stages.train.trainer import Trainer
from tests.conftest import train_config

ADVICE = (
    r"give it a C\+\+ compiler, such as g\+\+, and a folder to write to \(TORCHINDUCTOR_CACHE_DIR\), or leave it out$"
)


def test_without_a_compiler_a_run_ends_before_its_first_step(
    shared_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def backend(*_: Any) -> None:
        raise InvalidCxxCompiler

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    trainer = Trainer(train_config(shared_dataset, tmp_path, torch_compile=True))
    with pytest.raises(
        UserError, match=rf"^torch_compile=true: .*No working C\+\+ compiler found.*: {ADVICE}"
    ) as raised:
        trainer.run()
    assert "\n" not in str(raised.value)
    assert trainer.step == 0
    torch.compiler.reset()


def raised_in(file: str, error: Exception) -> None:
    """As if code of that file had."""
    exec(compile("raise error", file, "exec"), {"error": error})


@pytest.mark.parametrize(
    ("file", "error"),
    [
        (
            "/lib/torch/_inductor/runtime/cache_dir_utils.py",
            FileNotFoundError(2, "No such file or directory", "/home/x"),
        ),
        ("/lib/torch/_inductor/cpp_builder.py", KeyError("getpwuid(): uid not found: 12345")),
        ("/lib/triton/runtime/build.py", ImportError("no Python.h")),
    ],
)
def test_what_a_compiler_lacks_is_told_in_a_line(file: str, error: Exception) -> None:
    with pytest.raises(UserError, match=rf"^torch_compile=true: .*: {ADVICE}"), compile_errors():
        raised_in(file, error)
    with pytest.raises(type(error)), compile_errors(asked=False):
        raised_in(file, error)


@pytest.mark.parametrize("error", [ZeroDivisionError(), torch.OutOfMemoryError("out of memory"), UserError("other")])
def test_what_is_none_of_a_compilers_stays_what_it_is(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, compile_errors():
        raised_in("/lib/torch/_inductor/output_code.py", error)
    assert raised.value is error
    with pytest.raises(OSError, match="No space"), compile_errors():
        raised_in("/lib/stages/records/storage.py", OSError(28, "No space left on device"))
