"""The page: what to show and a slider above, the pictures of the methods side by side below."""

from __future__ import annotations

import base64
import io
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from stages.app.sampler import SIDE, SMALL, Sample, Sampler, Subject
from stages.errors import UserError
from stages.evaluate.comparisons import settings
from stages.evaluate.config import MAX_SEED
from stages.evaluate.methods import CFG, NONE, ONE_PASS

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr
from fastapi import FastAPI

TITLE = "One pass instead of two"
SYSTEM_FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
CSS = Path(__file__).with_name("page.css")
TITLES = {NONE: "no guidance", CFG: "CFG, two passes", ONE_PASS: "one pass"}  # from left to right
SHOWN = tuple(TITLES)
STEPS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
MOST_POSITIONS = 60
ROUNDING = 1e-5  # of a position in the browser
HINT = "Type what the pictures shall show, and press Enter."
Outputs = list[Any]  # a figure per method and the note


@dataclass(frozen=True)
class Scales:
    """The slider's positions: from just above no guidance to beyond the trained scales."""

    trained: tuple[float, float]
    step: float
    lowest: float
    highest: float
    first: float

    @staticmethod
    def around(lowest: float, highest: float) -> Scales:
        """
        Args:
            lowest, highest: of the trained scales.
        """
        end, middle = highest + (highest - 1) / 4, (lowest + highest) / 2
        step = next((step for step in STEPS if (end - 1) / step <= MOST_POSITIONS), STEPS[-1])
        if (highest - lowest) < step < middle - 1:  # a position that is trained, even of a single scale
            step = (middle - 1) / round((middle - 1) / step)

        def position(scale: float) -> float:
            return round(max(1, round((scale - 1) / step)) * step + 1, 6)

        highest_position = max(position(end), position(1 + 2 * step))
        return Scales((lowest, highest), step, position(1 + step), highest_position, position(middle))

    def share(self, scale: float) -> float:
        """The place of a scale on the slider, from 0 at its left end to 1."""
        return min(1.0, max(0.0, (scale - self.lowest) / (self.highest - self.lowest)))

    @property
    def trained_in_words(self) -> str:
        low, high = self.trained
        return f"{low:g}" if low == high else f"{low:g} to {high:g}"

    def note(self, scale: float) -> str:
        low, high = self.trained
        if low - ROUNDING <= scale <= high + ROUNDING:
            return ""
        return f"{scale:g} is outside the trained scales, {self.trained_in_words}: one pass may differ from CFG"


def application(sampler: Sampler, title: str) -> Any:
    """The page as an ASGI application.

    Not by the page's own `launch`, which looks itself up through whatever proxy the environment names.
    """
    return gr.mount_gradio_app(
        FastAPI(),
        build(sampler, title),
        path="/",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        theme=gr.themes.Default(primary_hue="orange", **SYSTEM_FONTS),
        css_paths=CSS,
    )


def build(sampler: Sampler, title: str) -> gr.Blocks:
    """The app's page.

    Args:
        title: a line about the pipeline.
    """
    scales = Scales.around(*sampler.adapter.metadata.scale_range)
    first = first_samples(sampler, scales)
    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.HTML(f"<h1>{TITLE}</h1><p>{escape(title)}</p>{marks(scales)}", elem_id="head")
        with gr.Row(elem_id="subject"):
            shown, negative = subject_fields(sampler)
            # Without bounds: gradio prints a traceback for a number outside of them.
            seed = gr.Number(0, label="seed", precision=0, min_width=80, elem_id="seed")
            another = gr.Button("another seed", scale=0, min_width=130, elem_id="another")
        with gr.Row(elem_id="pictures"):
            figures = [gr.HTML(figure(method, first.get(method)), elem_id=method, min_width=80) for method in SHOWN]
        scale = gr.Slider(
            scales.lowest,
            scales.highest,
            scales.first,
            step=scales.step,
            label="guidance scale",
            info=f"trained: {scales.trained_in_words}; hatched: not trained",
            buttons=[],
            elem_id="scale",
        )
        note = gr.HTML(note_of("" if first else HINT), elem_id="note")

        def follow(scale: float, seed: int | None, shown: Any, negative: str = "") -> Iterator[Outputs]:
            if seed is None or shown in (None, ""):
                yield [gr.skip()] * len([*figures, note])
                return
            check_seed(seed)
            yield from drawn(sampler, scales, scale, Subject(shown, seed, negative))

        another.click(
            lambda: random.randint(0, MAX_SEED), outputs=seed, show_progress="hidden", api_visibility="private"
        )
        gr.on(
            [scale.input, seed.change, *triggers(shown), *triggers(negative)],
            follow,
            [scale, seed, shown, *([negative] if negative else [])],
            [*figures, note],
            show_progress="minimal",
            show_progress_on=note,
            trigger_mode="always_last",  # while pictures are made, of the events that follow only the last is kept
            concurrency_limit=1,
            api_visibility="private",
        )
    return page


def first_samples(sampler: Sampler, scales: Scales) -> dict[str, Sample]:
    """The pictures with which the page opens, made before a browser takes its part of the machine; none of a prompt."""
    if sampler.classes is None:
        return {}
    subject = Subject(sampler.classes[0][1], seed=0)
    return {setting.method: sampler.sample(setting, subject) for setting in settings([scales.first])}


def subject_fields(sampler: Sampler) -> tuple[Any, Any]:
    """The fields of what is shown, and of the negative prompt; None where the pipeline takes none."""
    if sampler.classes is not None:
        return gr.Dropdown(sampler.classes, value=sampler.classes[0][1], label="class", elem_id="shown", scale=3), None
    one_line = {"lines": 1, "max_lines": 1, "placeholder": "a prompt, then Enter"}
    shown = gr.Textbox(label="prompt", elem_id="shown", scale=4, **one_line)
    if not sampler.takes_negative:
        return shown, None
    label = "negative prompt" if sampler.adapter.sees_negative else "negative prompt (CFG only)"
    return shown, gr.Textbox(label=label, lines=1, max_lines=1, elem_id="negative", scale=3)


def check_seed(seed: int) -> None:
    if not 0 <= seed <= MAX_SEED:
        raise gr.Error(f"seed {seed}: 0 to {MAX_SEED}", duration=None, print_exception=False)


def triggers(field: Any) -> list[Any]:
    return [] if field is None else [field.submit if isinstance(field, gr.Textbox) else field.change]


def drawn(sampler: Sampler, scales: Scales, scale: float, subject: Subject) -> Iterator[Outputs]:
    """What the page shows after each sample; what costs least comes first."""
    outputs: Outputs = [gr.skip() for _ in SHOWN]
    left = sorted(settings([scale]), key=lambda setting: (NONE, ONE_PASS, CFG).index(setting.method))
    try:
        while left:
            setting = left.pop(0)
            outputs[SHOWN.index(setting.method)] = figure(setting.method, sampler.sample(setting, subject))
            yield [*outputs, note_of(scales.note(scale), is_last=not left)]
    except UserError as error:
        raise gr.Error(str(error), duration=None, print_exception=False) from error


def note_of(text: str, is_last: bool = True) -> str:
    """The line below the slider.

    Args:
        is_last: no further pictures are being sampled.
    """
    return f'<p role="status" class="{"done" if is_last else "sampling"}">{escape(text)}</p>'


def figure(method: str, sample: Sample | None) -> str:
    """The pictures of a method with their cost; an empty frame before there are any."""
    title, picture, cost = TITLES[method], "", ""
    if sample is not None:
        file = io.BytesIO()
        sample.sheet.save(file, format="png")
        source = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        size = "small" if sample.sheet.width <= SIDE * SMALL else "large"  # sharp pixels, or a smooth picture
        picture = f'<img src="{source}" alt="{TITLES[method]}" class="{size}">'
        title += ", fused" if sample.fused else ""
        cost = (
            f'<span><b class="evaluations">{sample.denoiser_evaluations}</b> evaluations</span>'
            f'<span><b class="milliseconds">{sample.milliseconds:.0f}</b> ms</span>'
        )
    return (
        f'<figure class="{method}"><div class="frame">{picture}</div><figcaption><span class="title">{title}</span>'
        f'<span class="cost">{cost}</span></figcaption></figure>'
    )


def marks(scales: Scales) -> str:
    """The places on the slider between which its scales were trained, for `page.css`; before its end if they reach it."""
    begin, end = map(scales.share, scales.trained)
    begin = begin or -1
    return f"<style>#scale {{ --trained-from: {begin:.3f}; --trained-to: {end:.3f} }}</style>"
