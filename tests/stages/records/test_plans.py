from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stages.errors import UserError
from stages.records.commits import read_commits
from stages.records.dataset import Dataset
from stages.records.manifest import fingerprint
from stages.records.plans import is_of_plan, plan_digests, read_info
from stages.storage.files import seal, unseal
from stages.storage.folder import open_folder


def change_info(root: Path, **changes: Any) -> None:
    (root / "dataset.json").write_bytes(seal(unseal((root / "dataset.json").read_bytes()) | changes))


def test_the_description_tells_what_the_dataset_is(dataset: Dataset) -> None:
    info = dataset.info
    assert info["counts"] == {
        "units": 4,
        "trajectories": 12,
        "samples": 12,
        "records": 48,
        "bytes": info["counts"]["bytes"],
    }
    assert info["teacher"]["pipeline_class"] == "DiTPipeline"
    assert info["teacher"]["denoiser_class"] == "DiTTransformer2DModel"
    assert info["teacher"]["denoiser_subfolder"] == "transformer"
    assert info["teacher"]["prediction_type"] == "epsilon"
    assert info["guidance"] == {
        "rule": {"name": "ClassifierFreeGuidance", "pipeline": "DiTPipeline"},
        "scale_range": [1.0, 6.0],
    }
    assert info["tensors"]["latent"] == {"dtype": "float16", "shape": [4, 8, 8]}
    assert dataset.fingerprint == info["plans"][0]["fingerprint"] == fingerprint(dataset.manifest)


def test_another_schema_is_refused(damaged: Path) -> None:
    change_info(damaged, schema_version=3)
    with pytest.raises(UserError, match="schema 3 is newer than 2"):
        Dataset(damaged)
    change_info(damaged, schema_version=1)
    with pytest.raises(UserError, match="schema 1 is of an earlier version than 2: generate the dataset anew"):
        Dataset(damaged)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema_version": "x"}', '{"schema_version": 2}', "\x00"])
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


def test_a_digest_tells_what_decides_and_nothing_else() -> None:
    plan = {"units": 2, "trajectories": 6, "config": {"seed": 0}}
    info = {"teacher": {"denoiser_fingerprint": "a"}, "plans": [plan, plan | {"units": 3}]}
    ((first_end, first), (second_end, second)) = plan_digests(info)
    assert (first_end, second_end) == (2, 5)
    made = plan | {"counts": {}, "manifest_sha256": "b", "fingerprint": "c"}
    assert plan_digests(info | {"complete": True, "plans": [made]}) == [(2, first)]
    for changed in ({"teacher": {"denoiser_fingerprint": "b"}}, {"plans": [plan | {"config": {"seed": 1}}]}):
        assert plan_digests(info | changed)[0][1] != first
    digests = [(first_end, first), (second_end, second)]
    for unit, digest, own in (
        (1, first, True),
        (2, first, False),
        (4, second, True),
        (1, None, True),
        (9, first, True),
    ):
        assert is_of_plan({"unit": unit, "plan": digest}, digests) == own
