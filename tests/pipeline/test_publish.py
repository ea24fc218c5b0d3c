"""The command: from a folder to a hub, and one line for what cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.publish import PublishConfig, main
from stages.configuration.parsing import parse
from stages.errors import UsageError
from stages.records.verification import verify
from tests.support.hub import READER, WRITER, Hub
from tests.support.pages import run_as_main


def test_a_dataset_and_an_adapter(
    hub: Hub,
    shared_dataset: Path,
    tiny_adapter: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hub.point_to(monkeypatch, WRITER)
    main(parse(PublishConfig, [f"data_dir={shared_dataset}", "repo_id=someone/tiny", "private=true"]))
    repo = hub.repos["datasets/someone/tiny"]
    address = f"hf://datasets/someone/tiny@{repo.branches['main']}"
    assert capsys.readouterr().out == f"{address}: 4 shards, of which 4 were uploaded now\n"
    assert repo.private
    assert verify(address)["ok"]
    main(parse(PublishConfig, [f"adapter_dir={tiny_adapter}", "repo_id=someone/adapter"]))
    assert capsys.readouterr().out.splitlines() == [
        f"{hub.url}/someone/adapter: 3 files: README.md, adapter_config.json, adapter_model.safetensors",
        'loaded by GuidanceAdapter.from_pretrained("someone/adapter")',
    ]


def test_a_repository_needs_an_owner() -> None:
    with pytest.raises(UsageError, match="repo_id=tiny: has no owner: give OWNER/NAME"):
        main(parse(PublishConfig, ["repo_id=tiny", "data_dir=a"]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "give one of data_dir=FOLDER and adapter_dir=FOLDER"),
        (["data_dir=a", "adapter_dir=b"], "give one of data_dir=FOLDER and adapter_dir=FOLDER"),
        (
            ["data_dir=a", "repo_id=hf://datasets/a/b"],
            "repo_id=hf://datasets/a/b: is an address: give OWNER/NAME alone",
        ),
        (["adapter_dir=b", "license=mit"], "license: only for a dataset"),
        (["data_dir=a", "private=perhaps"], "private=perhaps"),
        (["data_dir=a", "license=CC BY 4.0"], "license=CC BY 4.0: not as a hub spells it: such as mit or cc-by-4.0"),
        (["data_dir=a", "license=[mit]"], "not as a hub spells it"),
        (["data_dir=a", "revision=a b"], "revision=a b: not a name of a branch"),
    ],
)
def test_invalid_options_are_wrong_usage(overrides: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        main(parse(PublishConfig, ["repo_id=someone/tiny", *overrides]))


def test_a_failure_is_one_line_and_exit_status_1(
    hub: Hub, shared_dataset: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.point_to(monkeypatch, READER)
    with pytest.raises(SystemExit) as ended:
        run_as_main("pipeline.publish", [f"data_dir={shared_dataset}", "repo_id=someone/tiny"])
    assert ended.value.code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("verify: ")]
    assert line.startswith(f"error: {hub.url}/datasets/someone/tiny: cannot be written: the token has no right to it")
