"""How good an adapter is at trajectories it was not trained on."""

from __future__ import annotations

import torch
from accelerate import PartialState

from stages.errors import UserError
from stages.records.dataset import Dataset
from stages.train.bins import BinnedMean, Range
from stages.train.objective import squared_error
from stages.train.selection import SelectedSample
from stages.train.student import Student
from stages.train.window import load

SAMPLES_AT_ONCE = 32
LEAST_EXPLAINED = 0.5  # of what guidance adds; with less, what an adapter adds is no weaker guidance but another change


class Validation:
    """The mean squared error over held-out samples, whatever the loss, split between the processes.

    Attributes:
        skipped: the number of records of each sample of this process that was found damaged, by its name.
    """

    def __init__(
        self,
        dataset: Dataset,
        samples: list[SelectedSample],
        batch_size: int,
        scale_range: Range,
        timestep_range: Range,
        device: str,
        skip_damaged: bool = False,
    ) -> None:
        processes = PartialState()
        self.dataset, self.batch_size, self.device = dataset, batch_size, device
        self.samples = samples[processes.process_index :: processes.num_processes]
        self.skip_damaged = skip_damaged
        self.skipped: dict[str, int] = {}
        self.errors = BinnedMean(scale_range, timestep_range, device)

    @torch.no_grad()
    def measure(self, student: Student, guided: bool = True) -> tuple[float, dict[str, float]]:
        """(over all records, by bin of scale and of timestep); not guided, of the base without guidance.

        Raises:
            UserError: there is no intact record.
        """
        for start in range(0, len(self.samples), SAMPLES_AT_ONCE):
            window = load(self.dataset, self.samples[start : start + SAMPLES_AT_ONCE], self.skip_damaged)
            self.skipped |= window.damaged
            intact = window.intact.nonzero().flatten()
            for chosen in intact.split(self.batch_size) if len(intact) else ():
                batch = window.take(chosen).to(self.device, student.dtype)
                errors = squared_error(student.predict(batch, guided), batch.target)
                self.errors.add(errors, batch.scale, batch.timestep)
        mean, by_bin = self.errors.means()
        if not by_bin:
            raise UserError(
                f"{self.dataset.root}: every record to validate with is damaged: "
                f"`python -m pipeline.verify {self.dataset.root.override('data_dir')} repair=true` tells how to make them anew; a new run "
                "with another seed holds out others"
            )
        return mean, by_bin


def guidance_gain(loss: float, unguided_loss: float) -> float:
    """The factor by which more guidance is asked of an adapter, so that its change of a prediction is as large as guidance's.

    What a regression predicts is smaller than its target: of the target's mean square it has the share that it explains,
    `1 - loss / unguided_loss`, the mean squared errors with the adapter and of the base without guidance.
    """
    explained = 1 - loss / unguided_loss if unguided_loss else 0.0
    return explained**-0.5 if explained >= LEAST_EXPLAINED else 1.0
