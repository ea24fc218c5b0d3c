"""The claims of a study's file, and their judging."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from stages.configuration.options import option
from stages.errors import UsageError
from stages.study.claims_table import Claim
from stages.study.judgements import JUDGEMENTS
from stages.study.rows import MissingRowsError, Row, Rows


@dataclass
class ClaimPlan:
    """A claim as a study's file states it."""

    text: str = option(MISSING, "the claim, as the report prints it")
    judgement: str = option(MISSING, "how it is judged: a name in `JUDGEMENTS`")
    evaluation: str = option(MISSING, "the evaluation whose rows it is judged by")
    adapters: list[str] = option(MISSING, "adapters of that evaluation; of several, the best one is judged")
    against: list[str] | None = option(None, "adapters of that evaluation to compare with, if the judgement compares")
    home: str | None = option(None, "the evaluation to compare with, where sampling is as in training, if it has one")
    threshold: float | None = option(None, "the goal's figure, if the judgement has one")

    def arguments(self) -> dict[str, Any]:
        """The judgement's arguments, by name, that the file gives."""
        given = {
            "adapters": self.adapters,
            "against": self.against,
            "home": self.home,
            "threshold": self.threshold,
        }
        return {name: value for name, value in given.items() if value is not None}


def judge(plans: Mapping[str, ClaimPlan], rows: list[Row]) -> list[Claim]:
    """Judge the claims, in their order; one whose rows are missing is not judged, and says what is missing."""
    claims = []
    for plan in plans.values():
        own, arguments = Rows(rows).where(evaluation=plan.evaluation), plan.arguments()
        if plan.home is not None:
            arguments["home"] = Rows(rows).where(evaluation=plan.home)
        try:
            claims.append(Claim(plan.text, *JUDGEMENTS[plan.judgement](own, **arguments)))
        except MissingRowsError as missing:
            claims.append(Claim(plan.text, "", f"there is {missing}", None))
    return claims


def check_arguments(key: str, plan: ClaimPlan) -> None:
    """
    Raises:
        UsageError: there is no such judgement, or the claim lacks an argument of it or has one too many.
    """
    if plan.judgement not in JUDGEMENTS:
        raise UsageError(f"{key}.judgement={plan.judgement}: one of {', '.join(JUDGEMENTS)}")
    needed = [*inspect.signature(JUDGEMENTS[plan.judgement]).parameters][1:]
    given = plan.arguments()
    for name in needed:
        if name not in given:
            raise UsageError(f"{key}.{name}: not given: {plan.judgement} needs it")
    if plan.threshold is not None and not math.isfinite(plan.threshold):
        raise UsageError(f"{key}.threshold={plan.threshold}: not a finite number")
    for name in given:
        if name not in needed:
            raise UsageError(f"{key}.{name}={given[name]}: {plan.judgement} takes no {name}: leave it out")
