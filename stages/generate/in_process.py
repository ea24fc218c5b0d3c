"""The twin of the Ray fleet: one worker in the driver's own process, for tests and for debugging a teacher."""

from __future__ import annotations

from stages.generate.config import GenerateConfig
from stages.generate.driver import Failed, Loaded, Made
from stages.generate.unit import UnitWorker


class InProcessFleet:
    """A fleet of one; whatever is dispatched is made in the next `poll`."""

    def __init__(self, config: GenerateConfig) -> None:
        self.worker = UnitWorker(config)
        self.loaded = False
        self.unit: int | None = None

    def idle(self) -> int:
        return int(self.loaded and self.unit is None)

    def dispatch(self, unit: int) -> None:
        self.unit = unit

    def poll(self, timeout: float) -> list[Loaded | Made | Failed]:
        unit, self.unit = self.unit, None
        try:
            if unit is not None:
                return [Made(unit, self.worker.make(unit))]
            facts = self.worker.load()
            self.loaded = True
            return [Loaded(facts)]
        except Exception as error:
            return [Failed(unit, error)]

    def close(self) -> None:
        self.loaded = False
