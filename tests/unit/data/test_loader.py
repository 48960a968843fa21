"""Which samples a step uses: the same set on any number of processes."""

import itertools

import pytest

from data.loader import StepBatches


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 12), (1, 4), (2, 3), (3, 2), (4, 1)])
def test_a_step_uses_the_same_samples_on_any_number_of_processes(world_size, micro_batch):
    seen = []
    for rank in range(world_size):
        batches = StepBatches(5, 12, micro_batch, rank, world_size)
        part = list(itertools.islice(batches, batches.micro_batches))
        assert {len(batch) for batch in part} == {micro_batch}
        seen += itertools.chain.from_iterable(part)
    assert sorted(seen) == list(range(60, 72))


def test_micro_batches_run_over_ranks_before_they_advance():
    ranks = [list(itertools.islice(StepBatches(1, 8, 2, rank, 2), 3)) for rank in (0, 1)]
    assert ranks == [[[8, 9], [12, 13], [16, 17]], [[10, 11], [14, 15], [18, 19]]]


def test_starting_at_a_step_continues_the_stream():
    whole = list(itertools.islice(StepBatches(0, 6, 3), 10))
    assert list(itertools.islice(StepBatches(3, 6, 3), 4)) == whole[6:]


def test_sizes_that_do_not_fit_are_refused_with_one_that_does():
    with pytest.raises(ValueError, match=r"global_batch=10: must be a multiple of .* 4 \* 2, e\.g\. 8"):
        StepBatches(0, 10, 4, 0, 2)
    with pytest.raises(ValueError, match="rank=2"):
        StepBatches(0, 8, 4, 2, 2)
