"""The processes of one run: who does what, and how results meet. Alone, everything is a plain call.

    torchrun --nproc-per-node 4 eval/fvd.py --real DIR --fake DIR

Python objects are exchanged over gloo, on the CPU, whatever the devices are; features of 2,048 clips are 3 MB.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

PATIENCE = timedelta(hours=12)  # one process may scan a large set while the others wait


@dataclass(frozen=True)
class Ranks:
    """This process's number and how many there are. group: the gloo group, None when alone."""

    rank: int = 0
    world: int = 1
    group: Any = None

    @property
    def main(self) -> bool:
        return self.rank == 0

    def all_gather(self, value: Any) -> list:
        """The values of all processes, in the order of their ranks."""
        if self.world == 1:
            return [value]
        import torch.distributed as dist

        values = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values

    def everywhere(self, fn: Callable[[], Any]) -> list:
        """Results of fn() of all processes. If it raises ValueError or OSError in one, it is raised in all."""
        result, error = None, None
        try:
            result = fn()
        except (ValueError, OSError) as raised:
            error = raised
        if self.world == 1:
            if error:
                raise error
            return [result]
        gathered = self.all_gather((result, None if error is None else f"{error}"))
        for rank, (_, message) in enumerate(gathered):
            if message is not None:
                raise error if error is not None and rank == self.rank else ValueError(message)
        return [value for value, _ in gathered]

    def from_main(self, fn: Callable[[], Any]) -> Any:
        """fn() as computed by rank 0, in all processes; its ValueError or OSError too."""
        return self.everywhere(lambda: fn() if self.main else None)[0]


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """The processes of a torchrun or accelerate launch, or of a group that exists already; else one alone."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        group = dist.new_group(backend="gloo", timeout=PATIENCE)
        try:
            yield Ranks(dist.get_rank(), dist.get_world_size(), group)
        finally:
            dist.destroy_process_group(group)
        return
    if world == 1:
        yield Ranks()
        return
    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
