"""The error of an adapter on held-out trajectories."""

from __future__ import annotations

import torch
from accelerate import PartialState

from stages.errors import UserError
from stages.records.dataset import Dataset
from stages.train.bins import BinnedMean, Bins
from stages.train.objective import squared_error
from stages.train.selection import SelectedSample
from stages.train.sharding import is_asked
from stages.train.student import Student
from stages.train.window import load

SAMPLES_AT_ONCE = 32
LEAST_EXPLAINED = 0.5  # share of the guidance; an adapter that explains less is not weaker guidance but another change


class ValidationLoss:
    """The mean squared error on held-out samples, for any training loss; the processes share the samples.

    Attributes:
        skipped: the number of records of each damaged sample of this process, by the sample's name.
    """

    def __init__(
        self,
        dataset: Dataset,
        samples: list[SelectedSample],
        batch_size: int,
        bins: Bins,
        device: str,
        skip_damaged: bool = False,
    ) -> None:
        processes = PartialState()
        self.dataset, self.batch_size, self.device = dataset, batch_size, device
        # Processes that share a split base run the same passes; others share the samples.
        own = samples if is_asked() else samples[processes.process_index :: processes.num_processes]
        self.samples = {size: [s for s in own if s.size == size] for size in dict.fromkeys(s.size for s in own)}
        self.skip_damaged = skip_damaged
        self.skipped: dict[str, int] = {}
        self.errors = BinnedMean(bins, device)

    @torch.no_grad()
    def measure(self, student: Student, guided: bool = True) -> tuple[float, dict[str, float]]:
        """Return the mean error over all records, and that of each bin of scale and of timestep.

        Args:
            guided: whether the adapter acts; else the base predicts alone.

        Raises:
            UserError: there is no intact record.
        """
        together = [
            s[i : i + SAMPLES_AT_ONCE] for s in self.samples.values() for i in range(0, len(s), SAMPLES_AT_ONCE)
        ]
        for samples in together:
            window = load(self.dataset, samples, self.skip_damaged)
            self.skipped |= window.damaged
            intact = window.intact.nonzero().flatten()
            for chosen in intact.split(self.batch_size) if len(intact) else ():
                batch = window.take(chosen).to(self.device, student.dtype)
                errors = squared_error(student.predict(batch, guided), batch.target)
                self.errors.add(errors, batch)
        mean, by_bin = self.errors.means()
        if not by_bin:
            raise UserError(
                f"{self.dataset.root}: every record to validate with is damaged: "
                f"`python -m pipeline.verify {self.dataset.root.override('data_dir')} repair=true` says how to "
                "regenerate them; a new run with another seed holds out others"
            )
        return mean, by_bin


def guidance_gain(loss: float, unguided_loss: float) -> float:
    """The factor on the requested guidance that makes an adapter's change of a prediction as large as guidance's.

    A regression's prediction is smaller than its target: its mean square is the explained share of the target's,
    `1 - loss / unguided_loss`, where the losses are the mean squared errors with the adapter and of the unguided base.
    """
    explained = 1 - loss / unguided_loss if unguided_loss else 0.0
    return explained**-0.5 if explained >= LEAST_EXPLAINED else 1.0
