from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stages.base.size import DEFAULT_SIZE
from stages.errors import UserError
from stages.records.commits import read_commits
from stages.records.dataset import Dataset
from stages.records.manifest import fingerprint
from stages.records.plans import matches_plan, plan_digests, read_info
from stages.records.schema import Commit, Counts, GuidanceSpec, PublishedPlan, TensorSpec
from stages.storage.folder import open_folder
from stages.storage.sealing import seal, unseal
from tests.support.made_up import described, planned


def change_info(root: Path, **changes: Any) -> None:
    (root / "dataset.json").write_bytes(seal(unseal((root / "dataset.json").read_bytes()) | changes))


def test_dataset_json_describes_the_dataset(dataset: Dataset) -> None:
    info, plan = dataset.info, dataset.plan
    assert plan.counts == Counts(units=4, trajectories=12, samples=12, records=48, bytes=plan.counts.bytes)
    assert info.teacher.pipeline_class == "DiTPipeline"
    assert info.teacher.denoiser_class == "DiTTransformer2DModel"
    assert info.teacher.denoiser_subfolder == "transformer"
    assert info.teacher.prediction_type == "epsilon"
    rule = {"name": "ClassifierFreeGuidance", "pipeline": "DiTPipeline"}
    assert plan.guidance == GuidanceSpec(rule, scale_range=[1.0, 6.0])
    assert info.tensors["latent"] == TensorSpec("float16", [4, 8, 8])
    assert info.plans == (plan,)
    assert dataset.fingerprint == plan.fingerprint == fingerprint(dataset.manifest)


def test_another_schema_is_refused(damaged: Path) -> None:
    change_info(damaged, schema_version=4)
    with pytest.raises(UserError, match="schema 4 is newer than 3"):
        Dataset(damaged)
    change_info(damaged, schema_version=2)
    with pytest.raises(UserError, match="schema 2 is of an earlier version than 3: generate the dataset anew"):
        Dataset(damaged)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema_version": "x"}', '{"schema_version": 3}', "\x00"])
def test_an_unreadable_description_is_refused(damaged: Path, content: str) -> None:
    (damaged / "dataset.json").write_text(content)
    with pytest.raises(UserError, match="damaged: not as it was written"):
        read_info(open_folder(damaged))


def test_an_edited_description_or_commit_is_refused(damaged: Path) -> None:
    output = (damaged / "dataset.json").read_text()
    (damaged / "dataset.json").write_text(output.replace('"scale_range": [\n      1.0', '"scale_range": [\n      2.0'))
    assert (damaged / "dataset.json").read_text() != output
    with pytest.raises(UserError, match=r"dataset\.json: damaged: not as it was written"):
        Dataset(damaged)
    (damaged / "commits" / "00002.json").write_bytes((damaged / "commits" / "00001.json").read_bytes())
    with pytest.raises(UserError, match=r"00002\.json: damaged"):
        list(read_commits(open_folder(damaged)))


def test_the_newest_snapshot_is_at_the_top_of_the_file_too(dataset: Dataset) -> None:
    content = json.loads(dataset.root.read("dataset.json") or b"")
    (entry,) = content["plans"]
    top = {"config", "conditions", "guidance", "counts", "manifest_sha256"}
    assert {key: content[key] for key in top} == {key: entry[key] for key in top}
    assert content.keys() - top == {"schema_version", "complete", "teacher", "plans", "sizes", "checksum"}
    assert entry.keys() - top == {"units", "trajectories", "evaluations", "fingerprint"}
    grown = replace(dataset.info, plans=(dataset.plan, planned()))
    assert grown.to_json()["manifest_sha256"] == dataset.plan.manifest_sha256


def test_a_missing_or_mistyped_key_is_named(damaged: Path) -> None:
    content = unseal((damaged / "dataset.json").read_bytes())
    (entry,) = content["plans"]
    size = content["sizes"][DEFAULT_SIZE]
    for changes, message in (
        ({"complete": "yes"}, "complete is str, not bool"),
        ({"plans": {}}, "plans is dict, not list"),
        ({"plans": []}, "no plans"),
        ({"plans": [entry | {"units": 4.0}]}, r"plans\[0\].units is float, not int"),
        ({"plans": [{k: v for k, v in entry.items() if k != "fingerprint"}]}, r"no plans\[0\].fingerprint"),
        ({"teacher": content["teacher"] | {"layout": {}}}, "no teacher.layout.arguments"),
        (
            {"sizes": {DEFAULT_SIZE: size | {"tensors": {"latent": {"dtype": ""}}}}},
            r"no sizes.default.tensors.latent.shape",
        ),
    ):
        (damaged / "dataset.json").write_bytes(seal(content | changes))
        with pytest.raises(UserError, match=rf"dataset\.json: damaged: {message}; restore it"):
            read_info(open_folder(damaged))


def test_a_digest_depends_only_on_what_determines_the_units() -> None:
    plan = planned(2, 6, seed=0)
    info = described(plan, replace(plan, units=3), denoiser_fingerprint="a")
    ((first_end, first), (second_end, second)) = plan_digests(info)
    assert (first_end, second_end) == (2, 5)
    made = PublishedPlan(**vars(plan), counts=Counts(6, 6, 6, 2, 9), manifest_sha256="b", fingerprint="c")
    assert plan_digests(replace(info, complete=True, plans=(made,))) == [(2, first)]
    elsewhere = described(plan, denoiser_fingerprint="a", pretrained_model_name_or_path="elsewhere")
    assert plan_digests(elsewhere) == [(2, first)]
    for changed in (
        described(plan, denoiser_fingerprint="b"),
        described(planned(2, 6, seed=1), denoiser_fingerprint="a"),
    ):
        assert plan_digests(changed)[0][1] != first
    digests = [(first_end, first), (second_end, second)]
    for unit, digest, own in ((1, first, True), (2, first, False), (4, second, True), (9, first, True)):
        assert matches_plan(Commit(unit, digest, "", 0, "", {}, []), digests) == own
