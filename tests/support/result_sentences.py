"""Sentences of the pages that state figures of the committed results, outside of generated tables."""

from __future__ import annotations

import statistics
from typing import Any

from tests.pipelines_zoo.gathered import gather
from tests.pipelines_zoo.refusals import REFUSALS
from tests.support.result_tables import EMBEDDED, read, study_rows

NUMBERS = (
    "none", "one", "two", "three", "four", "five", "six", "seven", "eight",
    "nine", "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen",
)  # fmt: skip


def sentences() -> list[tuple[str, str]]:
    """Return pairs of a page and a part of a sentence that it must contain."""
    first = [*demo(), *emoji(), *claims()]
    works = f"{len(gather()) - len(REFUSALS)} of the {len(gather())} pipelines"
    tried = f"[{len(gather())} guided pipelines](tests/pipelines_zoo/README.md)"
    refused = f"Of {tried} that were tried, {len(REFUSALS)} are refused"
    pages = {
        "README.md": [*first, refused],
        "stages/generate/README.md": [*scale(read("scale/scale.json")), works],
        "stages/embedded/README.md": embedded(),
        "stages/adapters/README.md": [time_of("best")],
        "stages/study/README.md": [*seconds_of_the_study(), *study(), *default()],
    }
    return [(page, sentence) for page, held in pages.items() for sentence in held]


def demo() -> list[str]:
    generation, training = read("mnist_dit/generation.json"), read("mnist_dit/training.json")
    share = f"{training['adapter_share']:.1%} of"
    losses = f"validation loss {training['validation_loss']:.5f} (without guidance {training['validation_loss_unguided']:.5f})"
    return [
        f"{generation['trajectories']} trajectories, {generation['records']} records, {generation['units_committed']} shards",
        f"made in {generation['seconds']:.0f} s ({generation['records_per_second']:.0f} records/s)",
        f"{training['adapter_parameters']:,} parameters",
        f"{share} the base",
        f"{share} a denoiser",
        f"{training['steps']} steps, {losses}, {training['records_per_second']:.0f} records/s",
    ]


def emoji() -> list[str]:
    generation, training = read("emoji/generation.json"), read("emoji/training.json")
    rows = read("emoji/evaluation.json")["rows"]
    closed = next(row for row in rows if row["method"] == "one_pass" and row["guidance_scale"] == 4)["gap_closed"]
    return [
        f"in {(generation['seconds'] + training['seconds']) / 60:.0f} minutes",
        f"{training['adapter_share']:.1%} of its base",
        f"closes {closed:.2f} of the gap at scale 4",
    ]


def claims() -> list[str]:
    judged = read("claims/claims.json")["claims"]
    failed = [claim for claim in judged if not claim["holds"]]
    closed = mean(rows_of("one_pass", "best"), "gap_closed", 4)
    return [
        f"{NUMBERS[len(failed)].capitalize()} of the {NUMBERS[len(judged)]} claims",
        f"the best adapter closes {closed:.3f} of the gap at scale 4",
    ]


def seconds_of_the_study() -> list[str]:
    made = read("claims/claims.json")["seconds"]
    datasets, adapters, evaluations = (made[kind] / 60 for kind in ("datasets", "adapters", "evaluations"))
    parts = f"{datasets:.0f} of generation, {adapters:.0f} of training, {evaluations:.0f} of sampling"
    return [f"{sum(made.values()) / 60:.0f} minutes", parts]


def rows_of(method: str, name: str | None = None, evaluation: str = "scales") -> list[dict[str, Any]]:
    rows = study_rows(evaluation)
    return [row for row in rows if row["method"] == method and row["name"] == name]


def mean(rows: list[dict[str, Any]], key: str, scale: float) -> float:
    return statistics.fmean(row[key] for row in rows if row["guidance_scale"] == scale)


def time_of(name: str) -> str:
    times = [row["time_relative_to_none"] for row in rows_of("one_pass", name)]
    return f"{min(times):.2f}x to {max(times):.2f}x"


def study() -> list[str]:
    best, full, half = rows_of("one_pass", "best"), rows_of("one_pass", "full"), rows_of("cfg_first_50")
    nearest = [f"{mean(half, 'effective_scale', scale):.1f} at {scale}" for scale in (3, 4)]
    distances = [f"{mean(half, 'frechet_distance', scale):.1f}" for scale in (3, 4)]
    return [
        f"takes {time_of('best')} the time of no guidance",
        f"takes {time_of('full')}",
        f"At scale 4 `best` closes {mean(best, 'gap_closed', 4):.3f}",
        f"the nearest CFG is that of {mean(best, 'effective_scale', 4):.1f}",
        f"({', '.join(nearest)})",
        f"({' and '.join(distances)})",
        f"`full` closes only {mean(full, 'gap_closed', 1.5):.2f} at scale 1.5",
        f"and `best` {best[0]['teacher_evaluations']:,}",
    ]


def default() -> list[str]:
    (none,) = (row for row in read("default/digits.json")["rows"] if row["method"] == "none")
    return [f"No guidance has a Frechet distance of {none['frechet_distance']:.1f}"]


def scale(measured: dict[str, Any]) -> list[str]:
    memory, resume = measured["memory"]["bytes_at_the_peak"], measured["resume"]
    return [
        f"{measured['workers'][-1]['worker_bytes'] / 1e6:.0f} MB",
        f"{memory / 1e9:.2f} GB of the driver's memory",
        f"Over {resume['commits']:,} commits on disk the driver dispatches again after {resume['seconds_to_resume']:.0f} s",
    ]


def embedded() -> list[str]:
    dit, sd, bold = (read(EMBEDDED / name / "training.json") for name in ("mnist_dit", "mnist_sd", "mnist_dit_bold"))
    before, drawn = bold["before_fine_tuning"], read(EMBEDDED / "emoji" / "training.json")["parameters"]
    return [
        f"({drawn['transformer'] / 1e6:.1f} M parameters)",
        f"{dit['denoiser_parameters'] / 1e6:.1f} M parameters",
        f"{sd['unet_parameters'] / 1e6:.1f} M parameters",
        f"CLIP text encoder of {sd['text_encoder_parameters'] / 1e3:.0f} k",
        f"classifies {bold['classifier_accuracy']:.3f} of them correctly",
        f"has a Frechet distance of {before['frechet_distance']:.1f} at scale {before['guidance_scale']:g}",
    ]
