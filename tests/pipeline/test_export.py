"""The command: from an adapter's folder to a LoRA's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import safetensors

from pipeline.export import ExportConfig, main
from stages.adapters import GuidanceAdapter
from stages.configuration.parsing import parse
from stages.errors import UsageError, UserError
from tests.conftest import small_adapter, tiny_dit
from tests.stages.adapters.test_export import new_adapter


def test_an_export_prints_how_to_load_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new_adapter(tiny_dit(), ranks=(3, 3)).save_pretrained(tmp_path / "adapter")
    overrides = [
        f"adapter_dir={tmp_path / 'adapter'}",
        "guidance_scale=2.5",
        f"output={tmp_path / 'lora'}",
        "format=peft",
    ]
    main(parse(ExportConfig, overrides))
    file = tmp_path / "lora" / "adapter_model.safetensors"
    assert capsys.readouterr().out.splitlines() == [
        f"{file}: 21 layers at guidance scale 2.5",
        f'loaded by PeftModel.from_pretrained(pipe.transformer, "{file.parent}")',
    ]
    assert file.exists()
    assert (file.parent / "adapter_config.json").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [(["guidance_scale=1"], "guidance_scale=1.0: more than 1"), (["format=onnx"], "format=onnx: one of")],
)
def test_invalid_options_are_wrong_usage(overrides: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        main(parse(ExportConfig, ["adapter_dir=a", "output=o", "guidance_scale=2", *overrides]))


def test_an_adapter_other_than_a_lora_is_refused(tmp_path: Path) -> None:
    pipe = tiny_dit()
    metadata = new_adapter(pipe).metadata
    GuidanceAdapter.for_denoiser(small_adapter("offset"), pipe.transformer, metadata).save_pretrained(
        tmp_path / "adapter"
    )
    overrides = [f"adapter_dir={tmp_path / 'adapter'}", "guidance_scale=2", f"output={tmp_path / 'out'}"]
    with pytest.raises(
        UserError, match="an adapter of the variant offset is not a LoRA: train one with adapter.variant=lora"
    ):
        main(parse(ExportConfig, overrides))
    assert not (tmp_path / "out").exists()


def test_a_dial_is_measured_into_the_file_and_the_card(
    tiny_adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(tiny_adapter, tmp_path / "adapter"))
    overrides = [f"adapter_dir={folder}", "guidance_scale=2.5", f"output={tmp_path / 'lora'}", "format=peft"]
    main(parse(ExportConfig, [*overrides, "dial_samples=4", "num_inference_steps=3", "device=cpu"]))
    found = [line for line in capsys.readouterr().out.splitlines() if line.startswith("strength")]
    with safetensors.safe_open(tmp_path / "lora" / "adapter_model.safetensors", "pt") as file:
        dial = json.loads(file.metadata()["guidance.dial"])
    assert found == [f"strength {row['strength']:g}: guidance scale {row['guidance_scale']:.2f}" for row in dial]
    assert GuidanceAdapter.from_pretrained(folder).metadata.dial == {"2.5": dial}
    assert "## Strength of the file exported at guidance scale 2.5" in (folder / "README.md").read_text()
