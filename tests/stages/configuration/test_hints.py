from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stages.configuration.parsing import parse
from stages.errors import UsageError
from stages.evaluate.config import EvaluateConfig, SampleConfig
from stages.generate.config import GenerateConfig
from stages.train.config import TrainConfig

NEEDED = {
    TrainConfig: ["data_dir=d", "output_dir=o"],
    GenerateConfig: ["teacher.pretrained_model_name_or_path=t", "output_dir=o"],
    EvaluateConfig: ["adapter_dir=a"],
    SampleConfig: ["adapter_dir=a"],
}


@pytest.mark.parametrize(
    ("kind", "override", "message"),
    [
        (TrainConfig, "lr=1", "lr: no such key: did you mean learning_rate or lr_scheduler or lr_warmup_steps?"),
        (TrainConfig, "bs=2", "bs: no such key: did you mean train_batch_size?"),
        (TrainConfig, "model=x", "model: no such key: did you mean pretrained_model_name_or_path?"),
        (TrainConfig, "wd=x", "wd: no such key: did you mean adam_weight_decay?"),
        (TrainConfig, "epochs=2", "epochs: no such key: --help lists the keys"),
        (GenerateConfig, "size=x", "size: no such key: did you mean teacher.sizes or batch_size?"),
        (EvaluateConfig, "scale=2", "scale: no such key: did you mean guidance_scale?"),
        (TrainConfig, "--data_dir=X", "--data_dir=X: not understood: options are given without dashes: say data_dir=X"),
        (TrainConfig, "--data-dir", "--data-dir: not understood: options are given without dashes: say data_dir=..."),
        (TrainConfig, "--quiet", "--quiet: not understood: give `--config FILE`, `--help` or `key=value`"),
        (TrainConfig, "=3", "=3: not understood: give `--config FILE`, `--help` or `key=value`"),
        (TrainConfig, "learning_rate=1e-4x", "learning_rate=1e-4x: must be a number"),
        (TrainConfig, "max_train_steps=1.5", "max_train_steps=1.5: must be a whole number"),
        (TrainConfig, "use_ema=maybe", "use_ema=maybe: must be true or false"),
        (TrainConfig, "scale_range=[a,2]", "scale_range=[a,2]: must be a number"),
        (TrainConfig, "seed=", "seed=null: must have a value"),
        (GenerateConfig, "resources=3", "resources=3: contains entries: say resources.NAME=..."),
        (GenerateConfig, "resources.gpu=x", "resources.gpu: must be a number"),
        (GenerateConfig, "guidance_scale=1.5,6", "guidance_scale=1.5,6: must be a list: say guidance_scale=[1.5,6]"),
        (GenerateConfig, "teacher.sizes=64x64", "teacher.sizes=64x64: must be a list: say teacher.sizes=[[64,64]]"),
        (GenerateConfig, "teacher.sizes=all", "teacher.sizes=all: must be a list, such as [[1,2]]"),
        (EvaluateConfig, "size=64x48", "size=64x48: must be a list: say size=[64,48]"),
        (SampleConfig, "prompts=a,b", "prompts=a,b: must be a list: say prompts=[a,b]"),
        (SampleConfig, "class_labels=a", "class_labels=a: must be a list, such as [1,2]"),
    ],
)
def test_what_is_mistyped_leads_to_what_is_meant(kind: Any, override: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        parse(kind, [*NEEDED[kind], override])
    assert str(error.value) == message


def test_a_path_alone_leads_to_its_option(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").touch()
    for path, hint in (
        (tmp_path / "train.yaml", f"say --config {tmp_path}/train.yaml"),
        (tmp_path, f"say what it is, such as data_dir={tmp_path}"),
    ):
        with pytest.raises(UsageError, match=f"{path}: not understood: {hint}$"):
            parse(TrainConfig, [*NEEDED[TrainConfig], str(path)])


def test_a_file_may_be_named_behind_an_equals_sign(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text("seed: 7\n")
    assert parse(TrainConfig, [*NEEDED[TrainConfig], f"--config={tmp_path}/train.yaml"]).seed == 7
