"""The arguments of an attached pipeline's call: the adapter's scale, and what the pipeline gets in its place."""

from __future__ import annotations

import inspect
import re
from typing import Any

import diffusers
import torch
from diffusers.guiders import BaseGuidance

from stages.adapters.denoiser_controller import DenoiserController
from stages.adapters.guidance import Scales, as_scales
from stages.adapters.metadata import AdapterMetadata
from stages.adapters.user_warnings import warn
from stages.base.denoiser import denoisers_of
from stages.base.sampling import scale_keyword
from stages.errors import UserError

NO_GUIDANCE = 1.0  # diffusers' pipelines run the unconditional pass only above 1
SCALE = "guidance_scale"  # the callers' name for the adapter's scale, in any pipeline
# Names of arguments that shape the guidance.
SETTING = re.compile(r"(^|_)(guidance|cfg|pag|sag|slg|stg|apg|rescale|renorm)(_|$)")
NO_SETTING = re.compile(r"^control_guidance_|_(latents|positions)$")
MAX_LISTED = 8  # classes that a warning lists


class CallArguments:
    """The arguments of one call of a pipeline.

    Args:
        signature: of the stock `__call__`; controllers: of the guided denoisers, by component name.

    Attributes:
        given: the arguments that the caller passed.
        keyword: the name of the pipeline's own scale; None if a guider holds it.
    """

    def __init__(
        self,
        pipe: Any,
        signature: inspect.Signature,
        controllers: dict[str, DenoiserController],
        args: Any,
        kwargs: dict[str, Any],
    ) -> None:
        self.pipe, self.controllers, self.keyword = pipe, controllers, keyword_of(pipe, signature)
        self.added = {SCALE: kwargs.pop(SCALE)} if self.keyword is None and SCALE in kwargs else {}
        self.bound = signature.bind(pipe, *args, **kwargs)
        self.given = dict(self.bound.arguments) | self.added
        self.bound.apply_defaults()
        self.arguments = self.bound.arguments

    def scale_of(self, component: str, fused_scale: float | None) -> Scales:
        """Return the scale `w` of `u + w (c - u)` that the call requests for a component.

        Args:
            fused_scale: the default of a call that names no scale.
        """
        own = self.keyword_of(component)
        if own is not None and own != self.keyword and self.arguments.get(own) is not None:
            return self._scales(component, self.arguments[own])
        for name in (self.keyword, SCALE):
            if name in self.given and (name == self.keyword or self.given[name] is not None):
                return self._scales(component, self.given[name])
        if fused_scale is not None:
            return fused_scale
        return self._scales(component, self.arguments[self.keyword] if self.keyword else guider_scale(self.pipe))

    def _scales(self, component: str, number: Scales) -> torch.Tensor:
        """Convert the pipeline's number to scales `w`: 1 up to the number that switches guidance off."""
        metadata = self.controllers[component].metadata
        offset = metadata.scale_offset
        scales = as_scales(number, offset)
        off = metadata.no_guidance.get(self.keyword or "", 1.0 - offset)
        return torch.where(scales <= off + offset, 1.0, scales)

    def keyword_of(self, component: str) -> str | None:
        """Return the name of a component's scale: `guidance_scale_2` for `transformer_2`."""
        number = re.search(r"_\d+$", component)
        numbered = f"{self.keyword}{number.group()}" if number else None
        return numbered if numbered in self.arguments else self.keyword

    def switch_off(self) -> dict[str, Any]:
        """Switch the pipeline's own guidance off, so that it runs one pass; return the settings used."""
        off: dict[str, Any] = {} if self.keyword is None else {self.keyword: NO_GUIDANCE}
        for controller in self.controllers.values():
            off |= controller.metadata.no_guidance
        if self.keyword is not None:
            numbered = [name for name in self.arguments if re.fullmatch(rf"{self.keyword}_\d+", name)]
            off |= {name: off.get(name, off[self.keyword]) for name in numbered if self.arguments[name] is not None}
            off = {
                name: value for name, value in off.items() if name not in numbered or self.arguments[name] is not None
            }
        embedded = self._embedded()
        off = {name: value for name, value in off.items() if name in self.arguments and name not in embedded}
        self.arguments.update(embedded | off)
        return off

    def _embedded(self) -> dict[str, Any]:
        """Return the scale that a distilled pipeline embeds: the caller's, if both are given, else the recorded one."""
        if self.keyword in (None, SCALE) or SCALE not in self.arguments:
            return {}
        if self.keyword in self.given and SCALE in self.given:
            return {SCALE: self.given[SCALE]}
        return {SCALE: self.recorded(SCALE)}

    def recorded(self, name: str) -> Any:
        """Return an argument's value in the recorded calls."""
        default = self.bound.signature.parameters[name].default
        for controller in self.controllers.values():
            metadata = controller.metadata
            default = metadata.guidance_rule.get(name, metadata.arguments.get(name, default))
        return default

    # Warnings

    def warn(self) -> None:
        """Warn of arguments that have no effect in one pass."""
        for controller in self.controllers.values():
            self._warn_of_negatives(controller)
            self._warn_of_classes(controller)
        scales = {self.keyword, *map(self.keyword_of, self.controllers)}
        if self.keyword in (None, SCALE) or self.keyword not in self.given:
            scales.add(SCALE)
        for name, value in self.given.items():
            if name not in scales and is_setting(name) and not is_same(value, self.recorded(name)):
                warn(
                    f"{name}={value} does not change the guidance of this adapter, which was recorded with "
                    f"{name}={self.recorded(name)}: leave it out, or train an adapter on such records"
                )
        for name in denoisers_of(self.pipe).keys() - self.controllers.keys():
            warn(f"{name} carries no adapter, so its steps run without guidance: attach the adapter made for it too")

    def _warn_of_negatives(self, controller: DenoiserController) -> None:
        """Warn once of a negative prompt that the adapter was not trained to see."""
        if controller.sees_negative:
            return
        recorded = {
            name: value for name, value in controller.metadata.arguments.items() if name.startswith("negative_")
        }
        known = {""} | {value.strip() for value in recorded.values() if isinstance(value, str)}
        for name, value in self.given.items():
            if not name.startswith("negative_") or value is None or is_same(value, recorded.get(name)):
                continue
            texts = [value] if isinstance(value, str) else value
            is_text = isinstance(texts, (list, tuple)) and all(isinstance(text, str) for text in texts)
            unseen = [f" ({text})" for text in texts if text.strip() not in known] if is_text else [""]
            if unseen:
                controller.warn_once(
                    f"{name}{unseen[0]} does nothing: this adapter was not trained to see negative prompts "
                    "(adapter.conditions=[...,negative_tokens])",
                    topic="negative prompts",
                )
                return

    def _warn_of_classes(self, controller: DenoiserController) -> None:
        trained = controller.metadata.sampled.get("class_labels", [])
        labels = self.given.get("class_labels")
        if not trained or labels is None:
            return
        unseen = [label for label in torch.as_tensor(labels).flatten().tolist() if label not in trained]
        if unseen:
            known = f"{', '.join(map(str, trained[:MAX_LISTED]))}{', ...' if len(trained) > MAX_LISTED else ''}"
            warn(
                f"class_labels={unseen[0]} is not among the classes that this adapter was trained on ({known}): "
                "name one of these, or train on records of it"
            )


# The pipeline


def guiders_of(pipe: Any) -> dict[str, Any]:
    """Return a pipeline's guiders by component name."""
    return {name: value for name, value in vars(pipe).items() if isinstance(value, BaseGuidance)}


def guider_scale(pipe: Any) -> float:
    """Return the scale of a pipeline's guider."""
    scales = [guider.guidance_scale for guider in guiders_of(pipe).values() if hasattr(guider, "guidance_scale")]
    return float(scales[0]) if scales else NO_GUIDANCE


def keyword_of(pipe: Any, signature: inspect.Signature) -> str | None:
    """Return the name of the scale in a pipeline's stock call; None if a guider holds the scale.

    Raises:
        UserError: the pipeline has neither a scale nor a guider.
    """
    if guiders_of(pipe) and SCALE not in signature.parameters:
        return None
    return scale_keyword(pipe)


def check_pipeline(metadata: AdapterMetadata, pipe: Any, stock: type[Any]) -> None:
    """
    Raises:
        UserError: the pipeline has no scale, or guides by another rule than the recorded one.
    """
    keyword, off = keyword_of(pipe, inspect.signature(stock.__call__)), metadata.no_guidance
    recorded = recorded_class(metadata)
    if recorded is None or recorded.__name__ == stock.__name__ or guiders_of(pipe):
        return
    name, recorded_keyword = recorded.__name__, scale_keyword(object.__new__(recorded))
    if keyword != recorded_keyword:
        raise UserError(
            f"{stock.__name__} guides by {keyword}, the {name} of the records by {recorded_keyword}: {WAY_OUT}"
        )
    ours, theirs = (inspect.signature(each.__call__).parameters for each in (stock, recorded))
    for setting, parameter in ours.items():
        if is_setting(setting) and setting not in theirs and setting not in off and parameter.default:
            raise UserError(f"{stock.__name__} guides by {setting}, the {name} of the records does not: {WAY_OUT}")
    for setting in off:
        if setting in theirs and setting not in ours:
            raise UserError(f"{stock.__name__} does not guide by {setting}, the {name} of the records does: {WAY_OUT}")


def recorded_class(metadata: AdapterMetadata) -> type[Any] | None:
    """Return the class of the recorded pipeline; None if it is unknown, or a guider guided it."""
    name = metadata.guidance_rule.get("pipeline") or metadata.base.pipeline_class
    kind = getattr(diffusers, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline)):
        return None
    return kind if SCALE in inspect.signature(kind.__call__).parameters else None


WAY_OUT = "attach the adapter to the recorded pipeline class, or train one on records of this class"


def is_setting(name: str) -> bool:
    """Whether an argument shapes the guidance, judged by its name."""
    return bool(SETTING.search(name)) and not NO_SETTING.search(name)


def is_same(one: Any, other: Any) -> bool:
    """Whether two values of an argument mean the same; never true of tensors."""
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return False
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return list(one) == list(other)
    return bool(one == other) or (not one and not other)
