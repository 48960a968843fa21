"""Which samples make up which optimizer step, on any number of processes; and the loader that decodes them."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from data.core.lazy import lazy
from data.processes import Pool

torch = lazy("torch")
torch_data = lazy("torch.utils.data")


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
        """Count the micro-batches of one rank in one optimizer step, that is gradient accumulation."""
        return self.global_batch // (self.micro_batch * self.world_size)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield lists of micro_batch sample numbers, forever."""
        step = self.start_step
        while True:
            for m in range(self.micro_batches):
                first = step * self.global_batch + (m * self.world_size + self.rank) * self.micro_batch
                yield list(range(first, first + self.micro_batch))
            step += 1


def make_loader(dataset: Any, batches: Iterable[list[int]], workers: int = 0) -> Iterator[dict]:
    """Yield the batches, read ahead. workers: processes that decode clips (of a latent cache: threads), 0 reads here.

    dataset: has `batch(numbers)`, as a LatentStream, or `dataset[n]` and, for workers, `attempts(n)`, as a ClipDataset.

    The samples are the same for any number: every draw of a sample comes from its number. Clips come through pipes as
    uint8 (data/processes.py), so /dev/shm may be small; a decoder that dies or hangs costs one process.
    """
    if workers < 0:
        raise ValueError(f"workers={workers}: 0 or more processes")
    if hasattr(dataset, "batch"):
        made = _of_rows(dataset, batches, workers)
    elif workers:
        made = _by_processes(dataset, iter(batches), workers)
    else:
        made = (_collate(list(map(dataset.__getitem__, numbers))) for numbers in batches)
    return _in_background(made) if workers else made


def _collate(samples: list[dict]) -> dict:
    return _pinned(torch_data.default_collate(samples))


def _pinned(batch: dict) -> dict:
    if not torch.cuda.is_available():
        return batch
    return {k: v.pin_memory() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def _of_rows(dataset: Any, batches: Iterable[list[int]], workers: int) -> Iterator[dict]:
    with ThreadPoolExecutor(workers) if workers else contextlib.nullcontext() as pool:
        for numbers in batches:
            yield _pinned(dataset.batch(numbers, pool.map if pool else map))


def _by_processes(dataset: Any, batches: Iterator[list[int]], workers: int) -> Iterator[dict]:
    """Yield the batches; at most 2 * workers samples, and a batch, are on their way or wait to be taken."""
    # Batches in their order, samples that are made, and the sample that each job is for.
    waiting: deque[list[int]] = deque()
    done: dict[int, dict] = {}
    jobs: dict[int, tuple[int, Generator]] = {}
    with Pool(workers) as pool:

        def go_on(n: int, attempts: Generator, answer: Any) -> None:
            # A sample needs another job where its video could not be read.
            try:
                jobs[pool.submit(*attempts.send(answer))] = n, attempts
            except StopIteration as end:
                done[n] = end.value

        while True:
            # Keep the processes busy with the samples of the next batches.
            while not waiting or len(jobs) + len(done) < 2 * workers:
                if (numbers := next(batches, None)) is None:
                    break
                waiting.append(numbers)
                for n in numbers:
                    go_on(n, dataset.attempts(n), None)
            if not waiting:
                return
            # Take answers as they come until the first batch is whole.
            while not done.keys() >= set(waiting[0]):
                job, answer = pool.wait()
                go_on(*jobs.pop(job), answer)
            yield _collate(list(map(done.pop, waiting.popleft())))


def _in_background(batches: Iterator[dict]) -> Iterator[dict]:
    """Make the batches in a thread that is one ahead: results are taken from the processes while the model trains."""
    ready: queue.Queue = queue.Queue(1)
    over = threading.Event()

    # (batch, None), (None, error), or (None, None) at the end; given up when nobody takes them any more.
    def put(item: tuple[dict | None, BaseException | None]) -> None:
        while not over.is_set():
            with contextlib.suppress(queue.Full):
                return ready.put(item, timeout=0.2)

    def make() -> None:
        try:
            for batch in batches:
                put((batch, None))
                if over.is_set():
                    break
            else:
                put((None, None))
        except BaseException as error:
            put((None, error))
        finally:
            batches.close()

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    try:
        while True:
            batch, error = ready.get()
            if error is not None:
                raise error
            if batch is None:
                return
            yield batch
    finally:
        over.set()
        thread.join(10)
