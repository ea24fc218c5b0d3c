from __future__ import annotations

from stages.evaluate.styles import marker_of, style_of

METHODS = [
    "none",
    "cfg",
    "cfg_first_50",
    "cfg_first_60",
    "cfg_interval_20_80",
    "cfg_interval_40_60",
    "cfg_adaptive_0.99",
    "cfg_every_2",
    "cfg_every_3",
]


def test_every_method_looks_different() -> None:
    looks = [(style_of(method, None, []), marker_of(method)) for method in METHODS]
    looks += [
        (style_of(method, name, ["mine", "yours"]), marker_of(method))
        for method in ("one_pass", "one_pass_interval_20_80")
        for name in ("mine", "yours")
    ]
    assert len({(str(style["color"]), style["linestyle"], marker) for style, marker in looks}) == len(looks)
    assert len({style["label"] for style, _ in looks}) == len(looks)
