"""Teachers with picture conditions, by the commands: a column of paths beside the prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import pipeline.sample
from stages.base.prompts import read_prompts
from stages.base.sampling import Request
from stages.configuration.parsing import parse
from stages.errors import UserError
from stages.evaluate.comparisons import Setting, arguments_of, load_pair, sample_setting
from stages.evaluate.config import SampleConfig
from stages.evaluate.methods import CFG, ONE_PASS
from stages.generate.config import TeacherConfig
from stages.records.dataset import Dataset
from stages.train.trainer import Trainer
from tests.conftest import generate, generate_config, small_adapter, train_config
from tests.pipelines_zoo.gathered import gather

ZOO = gather()


def made(folder: Path, name: str) -> tuple[Path, list[dict[str, Any]]]:
    """A dataset of a specimen pipeline, with pictures next to its prompts."""
    specimen = ZOO[name]
    (folder / "shown").mkdir()
    rows = []
    for i, condition in enumerate(specimen.conditions):
        Image.open(condition["image"]).save(folder / f"shown/{i}.png")
        rows.append({**condition, "image": f"shown/{i}.png"})
    columns = [column for column in ("prompt", "image") if column in rows[0]]
    table = "\n".join([",".join(columns), *(",".join(row[column] for column in columns) for row in rows)])
    (folder / "prompts.csv").write_text(table)
    config = generate_config(
        specimen.save(folder / "teacher"),
        folder / "data",
        prompts=str(folder / "prompts.csv"),
        num_trajectories=4,
        num_inference_steps=2,
        shift_timesteps=False,
        preview=2,
    )
    config.teacher = TeacherConfig(str(folder / "teacher"), call=dict(specimen.arguments))
    return generate(config), rows


@pytest.mark.parametrize("name", ["StableDiffusionInstructPix2PixPipeline", "WanImageToVideoPipeline"])
def test_a_picture_goes_through_all_commands(name: str, tmp_path: Path) -> None:
    data, rows = made(tmp_path, name)
    dataset = Dataset(data)
    assert len(dataset.manifest) == 4
    assert (data / "preview.png").is_file()
    run = train_config(data, tmp_path / "run", max_train_steps=1, adapter=small_adapter())
    Trainer(run).run()
    pipe, adapter = load_pair(run.output_dir, None, "cpu")
    conditions = read_prompts(str(tmp_path / "prompts.csv"))
    request = Request(conditions[:1], [0], 2, arguments_of(pipe, adapter))
    guided, one_pass = (sample_setting(pipe, adapter, Setting(method, 3.0), request) for method in (CFG, ONE_PASS))
    assert one_pass.denoiser_evaluations < guided.denoiser_evaluations
    overrides = [
        f"adapter_dir={run.output_dir}",
        f"output={tmp_path / 'grid.png'}",
        "num_inference_steps=2",
        "device=cpu",
    ]
    shown = [f"prompts=[{rows[0]['prompt']}]", f"image=[{tmp_path / 'shown/0.png'}]"]
    pipeline.sample.main(parse(SampleConfig, [*overrides, *shown]))
    assert Image.open(tmp_path / "grid.png").size[1] > 0
    with pytest.raises(UserError, match="image: give as many as prompts"):
        pipeline.sample.main(parse(SampleConfig, [*overrides, shown[0], "image=[a.png,b.png]"]))


def test_a_missing_picture_is_refused_with_its_row_before_the_first_unit(tmp_path: Path) -> None:
    specimen = ZOO["StableDiffusionInstructPix2PixPipeline"]
    (tmp_path / "prompts.csv").write_text(f"prompt,image\na cat,{specimen.conditions[0]['image']}\na dog,gone.png\n")
    config = generate_config(
        specimen.save(tmp_path / "teacher"), tmp_path / "data", prompts=str(tmp_path / "prompts.csv")
    )
    with pytest.raises(UserError, match=r"prompts\.csv: row 2: image=gone\.png: .*is not readable as a picture"):
        generate(config)
    assert not (tmp_path / "data").exists()
