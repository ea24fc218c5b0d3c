from __future__ import annotations

from pathlib import Path
from typing import Any

from stages.evaluate.methods import CFG, ONE_PASS
from stages.study.report import over_seeds, section


def row(method: str, value: float, name: str | None = None, seed: int | None = None, spent: int = 0) -> dict[str, Any]:
    curve = {"guidance_scale": 2.0, "timestep": [900.0, 100.0], "error": [value, 2 * value]}
    info = {"method": method, "guidance_scale": 2.0, "frechet_distance": value, "gap_closed": value / 10}
    info |= {"adapter": None if name is None else f"{name}-{seed}", "name": name, "seed": seed}
    info |= {"error_by_timestep": [curve] if name else []}
    return info | ({"teacher_evaluations": spent} if name else {})


def test_the_seeds_of_an_adapter_are_averaged_into_one_row() -> None:
    rows = [row(CFG, 1.0), row(ONE_PASS, 4.0, "lora", 0), row(ONE_PASS, 6.0, "lora", 1), row(ONE_PASS, 7.0, "full", 0)]
    cfg, lora, full = over_seeds(rows)
    assert (cfg["frechet_distance"], full["frechet_distance"], full["adapter"]) == (1.0, 7.0, "full")
    assert (lora["adapter"], lora["frechet_distance"], lora["gap_closed"]) == ("lora", 5.0, 0.5)
    assert lora["error_by_timestep"][0]["error"] == [5.0, 10.0]


def test_adapters_of_different_cost_are_plotted_against_the_teachers_evaluations(tmp_path: Path) -> None:
    def titles(spent: int) -> list[str]:
        rows = [row(CFG, 1.0), row(ONE_PASS, 4.0, "many", 0, 100), row(ONE_PASS, 6.0, "few", 0, spent)]
        return [picture["title"] for picture in section("data_cost", tmp_path, rows)["pictures"]]

    assert any("evaluations" in title for title in titles(800))
    assert not any("evaluations" in title for title in titles(100))
