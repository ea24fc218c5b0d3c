"""An adapter on its way to a hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from markupsafe import escape
from safetensors.torch import save_file

from stages.adapters import GuidanceAdapter
from stages.adapters.export import export
from stages.adapters.folder import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE
from stages.errors import ChangedError, StorageError, UserError
from stages.publish import adapter as publishing
from stages.publish.adapter import publish_adapter
from stages.publish.places import public_texts
from stages.publish.repository import Repository
from tests.support.faulty_s3 import Fault
from tests.support.hub import READER, WRITER, Hub

REPO = "someone/adapter"


@pytest.fixture
def writable(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A hub that this process may write to."""
    hub.point_to(monkeypatch, WRITER)
    return hub


@pytest.fixture
def folder(tiny_adapter: Path, tmp_path: Path) -> Path:
    """An adapter with an export, and an evaluation of which a part is left."""
    copy = Path(shutil.copytree(tiny_adapter, tmp_path / "adapter"))
    export(GuidanceAdapter.from_pretrained(copy), copy / "exports" / "2", 2.0, "peft")
    (copy / "evaluation" / "parts").mkdir(parents=True)
    for name in ("report.html", "evaluation.json", "parts/00000.safetensors", "reference_features.safetensors"):
        (copy / "evaluation" / name).write_text("{}")
    return copy


def test_an_adapter_goes_with_its_exports_and_its_report(
    writable: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, names = publish_adapter(folder, REPO, private=True)
    repo = writable.repos[REPO]
    assert repo.private
    assert sorted(names) == sorted(set(repo.files) - {".gitattributes"})
    own = {CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, "evaluation/report.html", "evaluation/evaluation.json"}
    assert own == {name for name in names if not name.startswith("exports/2/")} < set(names)
    assert "exports/2/adapter_model.safetensors" in names
    writable.point_to(monkeypatch, READER)
    again = GuidanceAdapter.from_pretrained(REPO, cache_dir=tmp_path / "cache")
    for one, other in zip(
        GuidanceAdapter.from_pretrained(folder).state_dict().values(), again.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other)


def test_what_is_no_longer_there_goes(writable: Hub, folder: Path) -> None:
    publish_adapter(folder, REPO)
    shutil.rmtree(folder / "exports")
    publish_adapter(folder, REPO)
    assert not [name for name in writable.repos[REPO].files if name.startswith("exports/")]


def test_an_upload_that_breaks_commits_nothing_and_goes_on(writable: Hub, folder: Path) -> None:
    writable.faults = [Fault("POST", "/commit/", 403)]
    with pytest.raises(StorageError, match=f"{writable.url}/{REPO}: cannot be written: the token has no right to it"):
        publish_adapter(folder, REPO)
    assert set(writable.repos[REPO].files) == {".gitattributes"}
    writable.requests.clear()
    publish_adapter(folder, REPO)
    assert writable.count("PUT", "/large/") == 0
    assert WEIGHTS_FILE in writable.repos[REPO].files


def test_weights_that_change_meanwhile_end_the_upload(
    writable: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*given: object) -> Repository:
        (folder / WEIGHTS_FILE).write_bytes(b"others")
        return Repository(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(publishing, "Repository", opened)
    with pytest.raises(ChangedError, match=f"{WEIGHTS_FILE}: has changed since the upload began"):
        publish_adapter(folder, REPO)
    assert set(writable.repos[REPO].files) == {".gitattributes"}


def test_a_folder_without_an_adapter_is_refused(writable: Hub, folder: Path) -> None:
    with pytest.raises(UserError, match="adapter_dir=nowhere: no such folder on this machine"):
        publish_adapter("nowhere", REPO)
    (folder / CONFIG_FILE).unlink()
    with pytest.raises(UserError, match=f"{folder}: not an adapter"):
        publish_adapter(folder, REPO)
    assert writable.requests == []


@pytest.mark.parametrize(
    "files", [{"model.safetensors": b"x"}, {CONFIG_FILE: b'{"peft_type": "LORA"}', WEIGHTS_FILE: b"x"}]
)
def test_a_repository_of_something_else_is_not_replaced(writable: Hub, folder: Path, files: dict[str, bytes]) -> None:
    writable.add(REPO, files)
    with pytest.raises(UserError, match=f"{REPO}: holds .*, and is no repository of such an adapter: take another"):
        publish_adapter(folder, REPO)
    assert writable.repos[REPO].files == files


def test_no_place_on_this_machine_is_published(writable: Hub, folder: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    used = {"output_dir": str(tmp_path / "out é"), "reference": ["/x"], "data_dir": str(tmp_path)}
    (folder / "evaluation" / "config.yaml").write_text(yaml.safe_dump(used, allow_unicode=True))
    (folder / "evaluation" / "evaluation.json").write_text(json.dumps(used))
    text = f"<p>{tiny_teacher} {tmp_path}/out é/part {{0}}</p><x></x> data:image/png;base64,ab/x+/x=="
    (folder / "evaluation" / "report.html").write_text(text.format(0))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    publish_adapter(folder, REPO)
    files = writable.repos[REPO].files
    for name, content in files.items():
        for place in (tmp_path, tiny_teacher.parent):
            assert str(place).encode() not in content, name
    assert files["evaluation/report.html"].decode() == (
        "<p>tiny_dit out é/part 0</p><x></x> data:image/png;base64,ab/x+/x=="
    )
    assert json.loads(files["evaluation/evaluation.json"])["output_dir"] == "out é"
    assert json.loads(files[CONFIG_FILE])["base"]["pretrained_model_name_or_path"] == "tiny_dit"
    assert json.loads(files["exports/2/adapter_config.json"])["base_model_name_or_path"] == "tiny_dit"
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    head = writable.repos[REPO].branches["main"]
    publish_adapter(folder, REPO)
    assert writable.repos[REPO].branches["main"] == head


def test_a_place_is_found_however_a_file_spells_it() -> None:
    """YAML doubles a quotation mark, and breaks long lines at spaces; Jinja escapes in its own way."""
    place = '/home/O\'Neill & "Co": a/' + "folder with spaces/" * 9 + "run"
    config = yaml.safe_dump({"adapter_dir": [place], "reference": "& <b>", "prompts": f"{place}/../p.csv"})
    page = f"<p>{escape(place)}, {place}</p>"
    found = public_texts({"a.yaml": config.encode(), "a.json": b'{"rows": []}', "a.html": page.encode()})
    assert yaml.safe_load(found["a.yaml"]) == {"adapter_dir": ["run"], "reference": "& <b>", "prompts": "p.csv"}
    assert (found["a.json"], found["a.html"]) == (b'{"rows": []}', b"<p>run, run</p>")


def test_an_export_that_names_the_place_of_the_base_is_refused(writable: Hub, folder: Path, tiny_teacher: Path) -> None:
    file = folder / "exports" / "2" / "adapter_model.safetensors"
    save_file({"a": torch.zeros(1)}, file, metadata={"modelspec.title": f"One pass for {tiny_teacher}"})
    with pytest.raises(UserError, match=f"{file}: names {tiny_teacher}, a place on this machine: export it again"):
        publish_adapter(folder, REPO)
    assert writable.requests == []


@pytest.mark.parametrize("card", [b"---\nlicense: [\n---\n", b"---\nlicense: nope\n---\n", b"\xff"])
def test_a_card_that_the_hub_refuses_is_one_line(writable: Hub, folder: Path, card: bytes) -> None:
    (folder / CARD_FILE).write_bytes(card)
    with pytest.raises(UserError, match=f"{REPO}: the hub refuses the header of the card: .*; nothing was uploaded$"):
        publish_adapter(folder, REPO)
    assert writable.repos == {}


def test_a_damaged_evaluation_is_refused(writable: Hub, folder: Path) -> None:
    (folder / "evaluation" / "evaluation.json").write_text("{")
    with pytest.raises(UserError, match=r"evaluation/evaluation.json: is damaged: .*nothing was uploaded"):
        publish_adapter(folder, REPO)
    assert writable.repos == {}
