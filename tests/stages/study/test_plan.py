"""The content of a study's file, and the one-line errors about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stages.errors import UsageError, UserError
from stages.study.plan import StudyPlan

STUDY: dict[str, Any] = {
    "seeds": [0, 1],
    "datasets": {"data": ["num_trajectories=12", "teacher.pretrained_model_name_or_path=stages/embedded/mnist_dit"]},
    "adapters": {"one": {"data": "data", "overrides": []}, "two": {"data": "data", "overrides": [], "seeds": [7]}},
    "evaluations": {"scales": {"adapters": ["one", "two"], "overrides": ["num_samples=4"]}},
}
CLAIM: dict[str, Any] = {
    "text": "It works",
    "judgement": "closes_gap",
    "evaluation": "scales",
    "adapters": ["one"],
    "threshold": 0.9,
}


def claiming(**changes: Any) -> dict[str, Any]:
    return {"claims": {"a": CLAIM | changes}}


def plan_of(folder: Path, root: str = "runs/study", **changes: Any) -> StudyPlan:
    path = folder / "study.yaml"
    path.write_text(json.dumps(STUDY | changes))
    return StudyPlan(str(path), Path(root))


def test_each_step_names_the_folders_it_needs(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, root="a, [b]")
    steps = {str(step): step for kind in plan.steps.values() for step in kind}
    assert list(steps) == ["generate data", "train one-0", "train one-1", "train two-7", "evaluate scales"]
    assert steps["train two-7"].needs == [steps["generate data"].output]
    evaluation = steps["evaluate scales"]
    assert evaluation.needs == [steps[name].output for name in ("train one-0", "train one-1", "train two-7")]
    assert [run.folder for run in plan.runs("two")] == evaluation.needs[2:]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"datasets": {"a/b": []}}, "datasets: a/b: a name has letters"),
        ({"datasets": {"data": "overrides"}}, "datasets.data: Value 'overrides'"),
        ({"datasets": {"data": ["num_trajectories=many"]}}, "generate data: num_trajectories=many"),
        ({"datasets": {"data": ["output_dir=x"]}}, "datasets.data: overrides: output_dir=x: the study sets output_dir"),
        (
            {"adapters": STUDY["adapters"] | {"one": {"data": "data", "overrides": ["seed=3"]}}},
            "adapters.one: overrides: seed=3: the study sets seed itself: leave it out$",
        ),
        (
            {"evaluations": {"a": {"adapters": ["one"], "overrides": ["adapter_dir=x"]}}},
            "evaluations.a: overrides: adapter_dir=x: the study sets adapter_dir itself",
        ),
        (
            {"datasets": {"data": [*STUDY["datasets"]["data"], "prompts=nowhere.txt"]}},
            "generate data: prompts=nowhere.txt: not readable",
        ),
        *(
            ({"evaluations": {"a": {"adapters": ["one"], "overrides": [given]}}}, f"evaluate a: {given}: {message}")
            for given, message in (
                ("prompts=nowhere.csv", "not readable"),
                ("reference=nowhere", "no such folder: name a folder of real images, or null$"),
            )
        ),
        (
            {"evaluations": {"a": {"adapters": ["one"], "overrides": ["preference=[nowhere_scores:Score]"]}}},
            "evaluate a: preference=nowhere_scores:Score: no module nowhere_scores is found",
        ),
        (claiming(threshold=float("nan")), "claims.a.threshold=nan: not a finite number$"),
        ({"datasets": {"data": ["--help"]}}, "generate data: --help: not understood"),
        ({"adapters": {"one": {"data": "other", "overrides": []}}}, "adapters.one.data: other: not among the datasets"),
        (
            {"adapters": STUDY["adapters"] | {"two": {"data": "data", "overrides": ["x=1"]}}},
            "train two-0: x: no such key",
        ),
        ({"adapters": {"one": {"data": None, "overrides": []}}}, "adapters.one.data: "),
        ({"seeds": []}, r"adapters.one: seeds=\[\]: name at least one"),
        ({"seeds": [0, 0]}, r"adapters.one: seeds=\[0, 0\]: name at least one, each once"),
        ({"seeds": [-1]}, "train one--1: seed=-1: at least 0"),
        ({"evaluations": {"a": {"adapters": "one", "overrides": []}}}, "evaluations.a.adapters: must be a list$"),
        (
            {"evaluations": {"a": {"adapters": ["x"], "overrides": []}}},
            "evaluations.a.adapters: x: not among the adapters",
        ),
        ({"evaluations": {"a": {"adapters": [], "overrides": []}}}, r"evaluations.a: adapters=\[\]: name at least one"),
        (
            {"evaluations": {"a": {"adapters": ["one"], "overrides": ["num_samples=0"]}}},
            "evaluate a: num_samples=0: at",
        ),
        (
            {"datasets": {"data": [*STUDY["datasets"]["data"], "guidance_scale=[3,1]"]}},
            "generate data: guidance_scale=",
        ),
        (
            {"adapters": STUDY["adapters"] | {"one": {"data": "data", "overrides": ["adapter.variant=none"]}}},
            "train one-0: adapter.variant=none",
        ),
        (
            {"adapters": STUDY["adapters"] | {"one": {"data": "data", "overrides": ["quantization=int8"]}}},
            "train one-0: quantization=int8: ",
        ),
        ({"evaluations": {"a": {"adapters": ["one"], "overrides": ["methods=[x]"]}}}, "evaluate a: methods=x: some of"),
        (
            {"evaluations": {"a": {"adapters": ["one"], "overrides": ["guidance_scale=[0.5]"]}}},
            "evaluate a: guidance_scale=",
        ),
        (claiming(judgement="closes_gaps"), "claims.a.judgement=closes_gaps: one of closes_gap, "),
        (claiming(evaluation="scale"), "claims.a.evaluation: scale: not among the evaluations: scales$"),
        (
            claiming(adapters=["three"]),
            "claims.a.adapters: three: not among the adapters of the evaluation scales: one, two$",
        ),
        (
            claiming(judgement="matches", against=["three"]),
            "claims.a.against: three: not among the adapters of the evaluation scales: one, two$",
        ),
        (
            claiming(judgement="matches", against=["one"]),
            "claims.a.against: one: is among the claim's adapters too: remove it from one of them$",
        ),
        (claiming(adapters=[]), r"claims.a: adapters=\[\]: name at least one, each once$"),
        (claiming(judgement="outperforms", threshold=None), "claims.a.against: not given: outperforms needs it$"),
        (claiming(threshold=None), "claims.a.threshold: not given: closes_gap needs it$"),
        (claiming(judgement="keeps_gap"), "claims.a.home: not given: keeps_gap needs it$"),
        (claiming(judgement="keeps_gap", home="none"), "claims.a.home: none: not among the evaluations: scales$"),
        (claiming(against=["two"]), r"claims.a.against=\['two'\]: closes_gap takes no against: leave it out$"),
        (claiming(threshold="much"), "claims.a.threshold: must be a number"),
        (claiming(goal=1), "claims.a.goal: "),
        ({"claims": {"a": {}}}, "claims.a.adapters: not given"),
        ({"claims": {"a b": CLAIM}}, "claims: a b: a name has letters"),
    ],
)
def test_an_error_names_the_file(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^{tmp_path}/study.yaml: {message}"):
        plan_of(tmp_path, **changes)


def test_a_claim_compares_adapters_of_its_evaluation(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, **claiming(judgement="matches", against=["two"]))
    claim = plan.file.claims["a"]
    assert (claim.text, claim.adapters, claim.against, claim.threshold) == ("It works", ["one"], ["two"], 0.9)
    assert plan_of(tmp_path).file.claims == {}


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="^missing.yaml: No such file or directory$"):
        StudyPlan("missing.yaml", tmp_path)


def test_a_key_that_the_file_lacks_is_one_to_add(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(json.dumps({key: value for key, value in STUDY.items() if key != "seeds"}))
    with pytest.raises(UsageError, match="study.yaml: seeds: not given: add this key$"):
        StudyPlan(str(tmp_path / "study.yaml"), tmp_path)
