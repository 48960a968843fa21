"""Which samples make up which optimizer step, on any number of processes; and the loader that decodes them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.utils.data import DataLoader


class StepBatches:
    """Endless batch sampler: optimizer step s uses samples s * G to (s + 1) * G - 1, G = global_batch.

    Micro-batch m of rank r is samples [(m * W + r) * micro_batch, ...) of the step, W = world_size: the step's set
    of samples does not depend on W or micro_batch, and a run resumed at step s sees what it would have seen.
    """

    def __init__(
        self, start_step: int, global_batch: int, micro_batch: int, rank: int = 0, world_size: int = 1
    ):
        if min(global_batch, micro_batch, world_size) < 1 or start_step < 0 or not 0 <= rank < world_size:
            raise ValueError(
                f"start_step={start_step}, global_batch={global_batch}, micro_batch={micro_batch}, rank={rank}, "
                f"world_size={world_size}: sizes must be at least 1, 0 <= rank < world_size, start_step >= 0"
            )
        if global_batch % (micro_batch * world_size):
            whole = micro_batch * world_size
            raise ValueError(
                f"global_batch={global_batch}: must be a multiple of micro_batch * world_size = {micro_batch} * "
                f"{world_size}, e.g. {whole * max(1, round(global_batch / whole))}"
            )
        self.start_step, self.global_batch, self.micro_batch = start_step, global_batch, micro_batch
        self.rank, self.world_size = rank, world_size

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one rank in one optimizer step, that is gradient accumulation."""
        return self.global_batch // (self.micro_batch * self.world_size)

    def __iter__(self) -> Iterator[list[int]]:
        """Lists of micro_batch sample numbers, forever."""
        step = self.start_step
        while True:
            for m in range(self.micro_batches):
                first = step * self.global_batch + (m * self.world_size + self.rank) * self.micro_batch
                yield list(range(first, first + self.micro_batch))
            step += 1


def make_loader(dataset, batches: StepBatches, workers: int = 0) -> DataLoader:
    """A loader of the batches. workers: decoding processes, 0 decodes in this one; the samples are the same.

    No worker needs a seed: every draw of a sample comes from its number.
    """
    import torch
    from torch.utils.data import DataLoader

    if workers < 0:
        raise ValueError(f"workers={workers}: 0 or more processes")
    return DataLoader(
        dataset, batch_sampler=batches, num_workers=workers, pin_memory=torch.cuda.is_available()
    )
