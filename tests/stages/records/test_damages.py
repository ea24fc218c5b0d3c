"""Every damage of tests/support/damages.py is found and named, never read silently, and repaired."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

import pytest
import torch
import webdataset

from stages.errors import DamageError, UserError
from stages.generate.driver import Driver
from stages.generate.in_process import InProcessFleet
from stages.records.dataset import Dataset
from stages.records.repair import repair
from stages.records.trajectory import decode
from stages.records.verification import survey, verify
from stages.storage.folder import open_folder
from stages.train.selection import SelectedSample
from stages.train.stream import RecordStream
from tests.conftest import generate_config
from tests.stages.generate.test_driver import assert_same_records, records
from tests.stages.train.test_stream import identity
from tests.support.damages import DAMAGES, ESCAPED, SEALED, UNPICKLED, Damage
from tests.support.faults_table import survived

pytestmark = pytest.mark.usefixtures("layout_found_once")
ALL = DAMAGES | SEALED
UNREADABLE = [name for name in SEALED if "tensor" in name or "header" in name or "records" in name]


@pytest.fixture(autouse=True)
def nothing_gets_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run in a separate folder, and fail if unpickling or a name in a shard made a file."""
    monkeypatch.chdir(tmp_path)
    outside = [Path("/tmp") / ESCAPED, *(folder / ESCAPED for folder in (tmp_path, *tmp_path.parents))]
    yield
    assert not [path for path in outside if path.exists()]
    assert not Path(UNPICKLED).exists()
    assert {path.name for path in tmp_path.iterdir()} <= {"damaged"}


def generate_again(root: Path | str, teacher: Path) -> None:
    config = generate_config(teacher, root)
    driver = Driver(config)
    if not driver.finished:
        driver.run(InProcessFleet(config))


def mend(root: Path | str) -> list[dict[str, str]]:
    return repair(survey(open_folder(root), deep=True), grace=0)


@pytest.mark.parametrize("damage", ALL.values(), ids=ALL)
def test_damage_is_found_and_named_in_a_line(damaged: Path, damage: Damage) -> None:
    names = damage(damaged)
    found = verify(damaged)
    assert sorted(problem["shard"] for problem in found["problems"]) == sorted(names)
    assert found["ok"] == (not names)
    for problem in found["problems"]:
        assert problem.keys() == {"shard", "expected", "found"}
        assert all(value and "\n" not in value for value in problem.values())


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_never_read_silently(damaged: Path, shared_dataset: Path, damage: Damage) -> None:
    """A reader returns the original samples, and refuses the others or skips them by choice."""
    known = records(shared_dataset)
    damage(damaged)
    for check_sizes in (True, False):
        with suppress(UserError):
            dataset = Dataset(damaged, check_sizes=check_sizes)
            assert len(dataset.manifest) == 12
            for row in dataset.manifest.to_pylist():
                with suppress(DamageError), dataset.open(row["shard"]) as file:
                    sample = dataset.read(file, row)
                    assert all(torch.equal(value, known[row["key"]][name]) for name, value in sample.items())


@pytest.mark.parametrize("name", [*DAMAGES, *UNREADABLE])
def test_a_stream_leaves_damage_out_or_names_it(damaged: Path, shared_dataset: Path, name: str) -> None:
    rows = Dataset(shared_dataset).manifest.to_pylist()
    whole = RecordStream(Dataset(shared_dataset), [*map(SelectedSample, rows)], 1, 0, 1 << 30)
    known = {identity(batch)[0]: batch.latent for batch in islice(whole, 48)}
    ALL[name](damaged)
    try:
        dataset = Dataset(damaged, check_sizes=False)
    except UserError:
        return
    samples = [*map(SelectedSample, dataset.manifest.to_pylist())]
    stream = RecordStream(dataset, samples, 1, 0, 1 << 30, skip_damaged=True)
    read = {identity(batch)[0]: batch.latent for batch in islice(stream, 48 - 12)}
    assert all(torch.equal(latent, known[key]) for key, latent in read.items())
    if stream.skipped:
        with pytest.raises(DamageError, match=next(iter(stream.skipped)).split()[0]):
            list(islice(RecordStream(dataset, samples, 1, 0, 1 << 30), 48))
    if name in UNREADABLE:
        assert sum(stream.skipped.values()) >= 1


@pytest.mark.parametrize("name", ALL)
def test_repaired_and_generated_again_it_equals_the_original_dataset(
    damaged: Path, shared_dataset: Path, tiny_teacher: Path, name: str
) -> None:
    before = Dataset(shared_dataset).fingerprint
    ALL[name](damaged)
    done = mend(damaged)
    set_aside = {Path(line["done"].split()[-1]).name for line in done if line["done"].startswith("moved")}
    found = verify(damaged)
    if missing := [problem for problem in found["problems"] if "without" in problem["found"]]:
        assert found["problems"] == missing
        with pytest.raises(UserError, match="unfinished, [23] of 4 units"):
            Dataset(damaged)
    else:
        assert found["ok"]
    generate_again(damaged, tiny_teacher)
    found = verify(damaged)
    assert found["problems"] == []
    assert_same_records(damaged, shared_dataset)
    assert Dataset(damaged).fingerprint == before
    assert set_aside == {path.name for path in damaged.glob("quarantine/*/*")}
    survived(name, "dataset")


def test_a_shard_of_hostile_names_is_read_by_the_stock_reader_without_a_trace(damaged: Path) -> None:
    (shard,) = SEALED["names that lead out of a shard, sealed"](damaged)
    list(webdataset.WebDataset(str(damaged / shard), shardshuffle=False))


def test_a_pickle_is_not_opened_by_our_decoder(damaged: Path) -> None:
    (shard,) = SEALED["a pickle in place of tensors, sealed"](damaged)
    with pytest.raises(ValueError, match="not a sample of records"):
        list(webdataset.WebDataset(str(damaged / shard), shardshuffle=False, handler=reraise).map(decode))


def reraise(error: Exception) -> bool:
    raise error


def test_damage_is_kept_beside_earlier_damage(damaged: Path, tiny_teacher: Path) -> None:
    for _ in range(3):
        (damaged / "commits" / "00001.json").write_bytes(b"")
        mend(damaged)
        generate_again(damaged, tiny_teacher)
    aside = sorted(path.name for path in (damaged / "quarantine" / "commits").iterdir())
    assert aside == ["00001.json", "00001.json.1", "00001.json.2"]
    assert len(list((damaged / "quarantine" / "shards").iterdir())) == 3
    assert verify(damaged)["ok"]


def test_several_damages_are_repaired_together(damaged: Path, shared_dataset: Path, tiny_teacher: Path) -> None:
    for name in ("a flipped bit in a payload", "two shards swapped", "a missing manifest", "an extra shard"):
        DAMAGES[name](damaged)
    assert len(verify(damaged)["problems"]) == 3
    assert {line["shard"].split("/")[0] for line in mend(damaged)} == {"commits", "shards"}
    generate_again(damaged, tiny_teacher)
    assert verify(damaged)["ok"]
    assert_same_records(damaged, shared_dataset)
