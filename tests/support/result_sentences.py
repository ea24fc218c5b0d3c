"""Sentences of the pages that state figures of the committed results, outside of generated tables."""

from __future__ import annotations

import statistics
from typing import Any

from tests.pipelines_zoo.gathered import gather
from tests.pipelines_zoo.refusals import REFUSALS
from tests.support.result_tables import EMBEDDED, read, study_rows


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
        "stages/train/README.md": step(),
        "stages/adapters/README.md": [time_of("digits")],
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
    closed = mean(one_pass("digits", "digits"), "gap_closed", 4)
    return [
        f"{len(failed)} of the {len(judged)} claims",
        f"the default adapter closes {closed:.3f} of the gap at scale 4",
    ]


def step() -> list[str]:
    dit, sd = (read(f"step/{shape}.json")["training"] for shape in ("dit_xl_2_256", "sd15"))
    counted = [f"{training['operations_over_floor']:.2f} times as many" for training in (dit, sd)]
    taken = ["{median:.2f} ({from:.2f} to {to:.2f})".format_map(training["step_over_floor"]) for training in (dit, sd)]
    return [f"{counted[0]} for DiT-XL/2 and {counted[1]} for SD 1.5", f"{taken[0]} and {taken[1]} times as long"]


def seconds_of_the_study() -> list[str]:
    made = read("claims/claims.json")["seconds"]
    datasets, adapters, evaluations = (made[kind] / 60 for kind in ("datasets", "adapters", "evaluations"))
    parts = f"{datasets:.0f} of generation, {adapters:.0f} of training, {evaluations:.0f} of sampling"
    return [f"{sum(made.values()) / 60:.0f} minutes", parts]


def one_pass(evaluation: str, name: str) -> list[dict[str, Any]]:
    return [row for row in study_rows(evaluation) if row["method"] == "one_pass" and row["name"] == name]


def by_method(evaluation: str, method: str) -> list[dict[str, Any]]:
    return [row for row in study_rows(evaluation) if row["method"] == method]


def mean(rows: list[dict[str, Any]], key: str, scale: float) -> float:
    return statistics.fmean(row[key] for row in rows if row["guidance_scale"] == scale)


def at_scales(rows: list[dict[str, Any]], key: str, scales: tuple[float, ...], decimals: int = 2) -> str:
    return " / ".join(f"{mean(rows, key, scale):.{decimals}f}" for scale in scales)


def time_of(name: str) -> str:
    times = [row["time_relative_to_none"] for row in one_pass("digits", name)]
    return f"{min(times):.2f}x to {max(times):.2f}x"


def study() -> list[str]:
    return [*study_of_emoji(), *study_of_digits()]


def study_of_emoji() -> list[str]:
    emoji, few_steps = one_pass("emoji", "emoji"), one_pass("emoji_few_steps", "emoji")
    guided, diffusion = (one_pass("emoji_trajectories", f"emoji_{kind}") for kind in ("guided", "diffusion"))
    longer = [row for row in read("emoji/longer.json")["rows"] if row["method"] == "one_pass"]
    every_second = by_method("emoji_alternatives", "cfg_every_2")
    two, three = by_method("emoji_alternatives", "cfg"), by_method("emoji_three_passes", "cfg")
    adherence = [f"{mean(rows, 'retrieval_top1', 4):.2f}" for rows in (three, two)]
    distances = [f"{mean(rows, 'frechet_distance', 4):.0f}" for rows in (three, two)]
    top1 = [f"{statistics.fmean(row['retrieval_top1'] for row in rows):.3f}" for rows in (diffusion, guided)]
    theirs = by_method("emoji_few_steps", "cfg")
    return [
        f"asked for 6, it is nearest to CFG of {mean(emoji, 'effective_scale', 6):.1f}",
        f"closes {at_scales(longer, 'gap_closed', (2, 4, 6))} at scales 2 / 4 / 6",
        f"closes {at_scales(every_second, 'gap_closed', (2, 4))} at scales 2 / 4",
        f"with {every_second[0]['denoiser_evaluations']:.0f} evaluations",
        f"({' instead of '.join(adherence)} at scale 4)",
        f"({' instead of '.join(distances)})",
        f"closes {at_scales(one_pass('emoji_three_passes', 'emoji_three_passes'), 'gap_closed', (2, 4))} of the gap",
        f"{mean(theirs, 'frechet_distance', 4):.0f} instead of {mean(theirs, 'frechet_distance', 2):.0f} at 2",
        f"{mean(few_steps, 'frechet_distance', 4):.0f} at 4",
        f"({' and '.join(top1)})",
    ]


def study_of_digits() -> list[str]:
    digits, full = one_pass("digits", "digits"), one_pass("digits", "full")
    half, every_second = by_method("digits", "cfg_first_50"), by_method("digits", "cfg_every_2")
    nearest = [f"{mean(half, 'effective_scale', scale):.1f} at {scale}" for scale in (3, 4)]
    distances = [f"{mean(half, 'frechet_distance', scale):.1f}" for scale in (3, 4)]
    return [
        f"takes {time_of('digits')} the time of no guidance",
        f"takes {time_of('full')}",
        f"At scale 4 `digits` closes {mean(digits, 'gap_closed', 4):.3f}",
        f"the nearest CFG is that of {mean(digits, 'effective_scale', 4):.1f}",
        f"({', '.join(nearest)})",
        f"({' and '.join(distances)})",
        f"closes {min(row['gap_closed'] for row in every_second):.3f} or more",
        f"`full` closes only {mean(full, 'gap_closed', 1.5):.2f} at scale 1.5",
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
