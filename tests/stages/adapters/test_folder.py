from __future__ import annotations

import json
import pickle
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from stages.adapters import GuidanceAdapter
from stages.adapters.folder import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE
from stages.errors import StorageError, UserError
from tests.conftest import tiny_dit
from tests.stages.adapters.test_contract import new_adapter
from tests.support.faulty_s3 import FaultyS3
from tests.support.hub import WRITER, Hub


@pytest.fixture
def adapter() -> GuidanceAdapter:
    return new_adapter(tiny_dit().transformer, "offset")


def test_the_folder_holds_what_a_user_needs_to_know(tiny_adapter: Path) -> None:
    info = json.loads((tiny_adapter / CONFIG_FILE).read_text())
    assert info["adapter"]["variant"] == "lora"
    assert info["adapter"]["conditions"] == []
    assert info["sites"]["transformer_blocks.0.attn1.to_q"] == [16, 16]
    assert info["scale_range"] == [1.0, 6.0]
    assert info["prediction_type"] == "epsilon"
    assert info["format_version"] == 3
    assert {"pretrained_model_name_or_path", "revision", "denoiser_fingerprint"} <= set(info["base"])
    assert info["training"]["steps"] == 12
    assert info["training"]["trajectories"] == 12  # of the dataset


def test_the_card_has_the_header_for_hubs(tiny_adapter: Path) -> None:
    _, header, text = (tiny_adapter / CARD_FILE).read_text().split("---\n", 2)
    info = yaml.safe_load(header)
    assert info.keys() & {"base_model", "base_model_relation"} == set()  # a hub refuses a folder
    assert {"guidance-distillation", "lora"} <= set(info["tags"])
    assert "model-index" not in info
    assert "| trained scales | 1 to 6 |" in text
    assert "| trained on | 40 records of 10 guided trajectories |\n| held out | 8 records of 2 guided" in text
    assert "| width x height x frames | the pipeline's own, latents [4, 8, 8] |" in text
    assert "Measured" not in text


def test_the_card_names_no_place_on_this_machine(tiny_adapter: Path, tiny_teacher: Path) -> None:
    text = (tiny_adapter / CARD_FILE).read_text()
    assert str(tiny_teacher.parent) not in text
    assert 'DiTPipeline.from_pretrained("tiny_dit")' in text
    assert "| base | tiny_dit, a local folder of its author: its weights are not on the hub |" in text
    assert "the Python package `adapter-guidance-distillation`" in text


def test_the_card_tells_the_size_that_the_teacher_was_called_with(adapter: GuidanceAdapter, tmp_path: Path) -> None:
    counts = {"trajectories": 2, "records": 8}
    training = counts | {"kind": "guided", "steps": 1, "validation_loss": 1.0, "validation_loss_unguided": 1.0}
    adapter.metadata = replace(adapter.metadata, arguments={"height": 64, "width": 32}, training=training)
    adapter.save_pretrained(tmp_path)
    assert "| dataset | 8 records of 2 guided trajectories |" in (tmp_path / CARD_FILE).read_text()
    selected = {"trained": counts, "held_out": counts, "sizes": {"default": [4, 8, 4]}}
    adapter.metadata = replace(adapter.metadata, training=training | selected)
    adapter.save_pretrained(tmp_path)
    assert "| width x height x frames | 32x64, latents [4, 8, 4] |" in (tmp_path / CARD_FILE).read_text()


def test_the_card_of_a_shipped_base_finds_it(adapter: GuidanceAdapter, tmp_path: Path) -> None:
    base = replace(adapter.metadata.base, pretrained_model_name_or_path="stages/embedded/mnist_dit")
    adapter.metadata = replace(adapter.metadata, base=base)
    adapter.save_pretrained(tmp_path)
    code = (tmp_path / CARD_FILE).read_text().split("```python\n")[1].split("GuidanceAdapter.from_pretrained")[0]
    names: dict[str, Any] = {}
    exec(code, names)
    assert type(names["pipe"]).__name__ == "DiTPipeline"


def test_the_card_names_a_base_on_the_hub(adapter: GuidanceAdapter, tmp_path: Path) -> None:
    base = replace(adapter.metadata.base, pretrained_model_name_or_path="someone/base")
    adapter.metadata = replace(adapter.metadata, base=base)
    adapter.save_pretrained(tmp_path)
    info = yaml.safe_load((tmp_path / CARD_FILE).read_text().split("---\n")[1])
    assert (info["base_model"], info["base_model_relation"]) == ("someone/base", "adapter")


def test_the_card_shows_the_measurements(adapter: GuidanceAdapter, tmp_path: Path) -> None:
    row = {"guidance_scale": 2.0, "effective_scale": 1.9, "frechet_distance": 20.4, "gap_closed": 0.9}
    row["denoiser_evaluations"] = 25.0
    row |= {"num_samples": 1000, "num_inference_steps": 20}
    rows = [row | {"method": "cfg"}, row | {"method": "one_pass"}]
    rows.append(row | {"method": "one_pass", "guidance_scale": 1.0001, "frechet_distance": 50.0, "gap_closed": None})
    adapter.metadata = replace(adapter.metadata, evaluation=rows)
    adapter.save_pretrained(tmp_path)
    _, header, text = (tmp_path / CARD_FILE).read_text().split("---\n", 2)
    assert "| one_pass | 2 | 1.90 | 20.4 | 0.900 | 25 |" in text
    assert "| one_pass | 1.0001 | 1.90 | 50.0 | none | 25 |" in text
    assert "1,000 images a row, 20 steps, the same noise in every row." in text
    assert "| guidance gain | the adapter gets 1.250 times the requested guidance, up to scale 6 |" in text
    (result,) = yaml.safe_load(header)["model-index"][0]["results"]
    assert [(metric["type"], metric["value"]) for metric in result["metrics"]] == [
        ("frechet_distance", 20.4),
        ("gap_closed", 0.9),
        ("frechet_distance", 50.0),
    ]


def test_the_card_shows_the_effect_of_strength(adapter: GuidanceAdapter, tmp_path: Path) -> None:
    dial = [{"strength": 0.5, "guidance_scale": 4.0}, {"strength": 1.0, "guidance_scale": 7.321}]
    adapter.metadata = replace(adapter.metadata, dial={"7.5": dial})
    adapter.save_pretrained(tmp_path)
    text = (tmp_path / CARD_FILE).read_text()
    assert "exported at guidance scale 7.5" in text
    assert "| 0.5 | 4.00 |\n| 1 | 7.32 |\n" in text
    assert GuidanceAdapter.from_pretrained(tmp_path).metadata.dial == adapter.metadata.dial


def test_a_save_that_fails_leaves_the_older_adapter_whole(adapter: GuidanceAdapter, tmp_path: Path) -> None:
    adapter.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    torch.nn.init.ones_(next(adapter.parameters()))

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)  # simulates a full disk: both fail in the middle of a write
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(StorageError, match="cannot be written: File too large"):
            adapter.save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale_range": None}, "scale_range is NoneType, not list"),
        ({"scale_range": [2.0]}, r"scale_range=\[2.0\] is not a lowest and a highest scale"),
        ({"scale_range": [1.0, "six"]}, r"scale_range\[1\] is str, not float"),
        ({"timestep_scale": "fast"}, "timestep_scale is str, not float"),
        ({"gain": 1.5}, "gain is not known"),
        ({"teacher": {"guider": None, "scheduler_class": None}}, "teacher.scheduler_config is missing"),
        ({"base": None}, "base.denoiser_class is missing"),
        ({"base": {}}, "base.denoiser_class is missing"),
    ],
)
def test_edited_metadata_is_a_one_line_error(
    adapter: GuidanceAdapter, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    adapter.save_pretrained(tmp_path)
    info = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps(info | changes))
    with pytest.raises(UserError, match=f"not an adapter: {message}$"):
        GuidanceAdapter.from_pretrained(tmp_path)


def test_a_folder_without_a_gain_is_refused(adapter: GuidanceAdapter, tmp_path: Path) -> None:
    adapter.save_pretrained(tmp_path)
    info = json.loads((tmp_path / CONFIG_FILE).read_text())
    del info["guidance_gain"]
    (tmp_path / CONFIG_FILE).write_text(json.dumps(info))
    with pytest.raises(UserError, match="not an adapter: guidance_gain is missing"):
        GuidanceAdapter.from_pretrained(tmp_path)


def test_a_strangers_folder_cannot_run_code(adapter: GuidanceAdapter, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "sprung",))  # type: ignore[return-value]

    adapter.save_pretrained(tmp_path)
    trap = pickle.dumps(Trap())
    for name in (WEIGHTS_FILE, "adapter_model.bin", "pytorch_model.bin"):
        (tmp_path / name).write_bytes(trap)
    with pytest.raises(UserError, match="not an adapter"):
        GuidanceAdapter.from_pretrained(tmp_path)
    assert not (tmp_path / "sprung").exists()


def test_to_a_hub_and_back(adapter: GuidanceAdapter, tmp_path: Path, hub: Hub) -> None:
    commit = adapter.push_to_hub("mine", token=WRITER, commit_message="First")
    assert commit.startswith(hub.url)
    repo = hub.repos["someone/mine"]
    assert {CARD_FILE, CONFIG_FILE, WEIGHTS_FILE} == set(repo.files) - {".gitattributes"}
    assert repo.messages[1:] == ["First"]
    again = GuidanceAdapter.from_pretrained("someone/mine", cache_dir=tmp_path)
    missing = "someone/nothing: no such folder, and no adapter on the hub: .* no such repository, or it is priv"
    with pytest.raises(UserError, match=missing):
        GuidanceAdapter.from_pretrained("someone/nothing", cache_dir=tmp_path)
    with pytest.raises(UserError, match="hf://someone/mine: leave out hf://: say someone/mine"):
        GuidanceAdapter.from_pretrained("hf://someone/mine")
    with pytest.raises(UserError, match="runs/a/b: no such folder, and not the name of a repository on the hub"):
        GuidanceAdapter.from_pretrained("runs/a/b")
    assert again.metadata == adapter.metadata
    for one, other in zip(adapter.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    base = replace(adapter.metadata.base, pretrained_model_name_or_path=str(tmp_path / "base"))
    adapter.metadata = replace(adapter.metadata, base=base)
    adapter.push_to_hub("mine", token=WRITER)
    assert json.loads(repo.files[CONFIG_FILE])["base"]["pretrained_model_name_or_path"] == "base"
    assert not [name for name, content in repo.files.items() if str(tmp_path).encode() in content]


def test_it_is_read_from_a_bucket(adapter: GuidanceAdapter, tmp_path: Path, s3: FaultyS3) -> None:
    adapter.save_pretrained(tmp_path)
    s3.put(f"runs/offset/{CONFIG_FILE}", (tmp_path / CONFIG_FILE).read_bytes())
    with pytest.raises(
        UserError, match=f"s3://bucket/runs/offset/{WEIGHTS_FILE}: cannot be read as a file of an adapter"
    ):
        GuidanceAdapter.from_pretrained("s3://bucket/runs/offset")
    s3.put(f"runs/offset/{WEIGHTS_FILE}", (tmp_path / WEIGHTS_FILE).read_bytes())
    read = GuidanceAdapter.from_pretrained("s3://bucket/runs/offset/").state_dict()
    assert read.keys() == adapter.state_dict().keys()
    assert all(torch.equal(value, read[name]) for name, value in adapter.state_dict().items())
