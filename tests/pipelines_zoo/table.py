"""The page of the zoo: `python -m tests.pipelines_zoo.table > tests/pipelines_zoo/README.md`."""

from __future__ import annotations

import sys

from tests.pipelines_zoo.gathered import gather
from tests.pipelines_zoo.refusals import REFUSALS

HEAD = """# Pipelines

`make test-all` builds these guided pipelines of diffusers 0.42 tiny, with random weights, and takes each from end to
end (`tests/test_pipelines.py`):

- The records are what the untouched pipeline does.
- A student that predicts the records exactly ends where two passes end.
- One pass of an untrained adapter is no guidance, with one row for each sample in each step.
- An adapter is trained for two steps, gives the same fused as with hooks, and is exported.

"""


def page() -> str:
    zoo = gather()
    works = sorted(name for name in zoo if name not in REFUSALS)
    rows = [f"| `{name}` | works |" for name in works]
    rows += [f"| `{name}` | refused: {REFUSALS[name]} |" for name in sorted(REFUSALS)]
    count = f"Of {len(zoo)}, {len(works)} work. Generation refuses the others before it makes a trajectory, in a line that says:"
    return "\n".join([HEAD + count, "", "| pipeline | |", "| --- | --- |", *rows, ""])


if __name__ == "__main__":
    sys.stdout.write(page())
