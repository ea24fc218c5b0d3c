"""A fleet without Ray: one worker in the driver's process, for tests and for debugging a teacher."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from stages.base.sampling import Condition
from stages.generate.config import GenerateConfig
from stages.generate.events import Event, Failed, Loaded, Made
from stages.generate.unit import Unit
from stages.generate.worker import UnitWorker

NAME = "this process"


class InProcessFleet:
    """A fleet of one worker, which makes a dispatched unit in the next `poll`.

    No command uses it: `Driver(config).run(InProcessFleet(config))` generates without Ray, in one process.
    """

    def __init__(self, config: GenerateConfig) -> None:
        self.worker = UnitWorker(config)
        self.loaded = False
        self.examples: Sequence[Condition] = ()
        self.unit: Unit | None = None

    def start(self, examples: Sequence[Condition]) -> None:
        self.examples = examples

    def free(self, alone: bool) -> bool:
        return self.loaded and self.unit is None

    def dispatch(self, unit: Unit, alone: bool) -> None:
        self.unit = unit

    def poll(self, timeout: float) -> list[Event]:
        unit, self.unit = self.unit, None
        try:
            if unit is not None:
                self.worker.sample(unit)
                records, seconds = self.worker.commit(unit.index)
                return [Made(unit.index, records, NAME, seconds)]
            facts = self.worker.load(self.examples)
            self.loaded = True
            return [Loaded(facts, NAME)]
        except Exception as error:
            return [Failed(None if unit is None else unit.index, error, worker=NAME)]

    def states(self) -> Counter[str]:
        return Counter(["idle" if self.loaded else "loading"])

    def close(self) -> None:
        self.loaded = False
