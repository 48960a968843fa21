"""Rows of the latent cache: the dtype of the file through the loader, the same values, and no row that has changed."""

import pytest
import torch

from data.latent_writer import LatentCacheWriter
from data.latents import LatentCache, LatentStream
from data.loader import make_loader


@pytest.fixture(params=[torch.bfloat16, torch.float32])
def written(request, tmp_path):
    """(cache, its tensors); three frames of 3 x 3 make rows that are no whole number of words in bfloat16."""
    torch.manual_seed(0)
    rows = {name: torch.randn(5, 1, 3, 3, 3).to(request.param) for name in ("mean", "logvar")}
    rows |= {
        "label": torch.arange(5) * 7,
        "video": torch.arange(5),
        "draw": torch.zeros(5, dtype=torch.int64),
    }
    writer = LatentCacheWriter(tmp_path / "cache", {"draws": {"crops": 1, "flips": False}}, 5, shard_size=3)
    for shard in range(2):
        entries = writer.entries(shard)
        writer.write(shard, {name: v[entries.start : entries.stop] for name, v in rows.items()}, [])
    writer.finish({})
    return LatentCache(tmp_path / "cache"), rows


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_hold_the_written_bits_in_the_dtype_of_the_file(written, workers):
    cache, rows = written
    stream = LatentStream(cache, seed=1)
    (batch,) = make_loader(stream, [[0, 1, 2, 3, 4]], workers)
    order = batch["video"]
    assert sorted(order.tolist()) == [0, 1, 2, 3, 4]
    for name in ("mean", "logvar", "label"):
        assert batch[name].dtype == rows[name].dtype
        assert torch.equal(batch[name], rows[name][order])
    assert batch["number"].tolist() == [0, 1, 2, 3, 4]
    assert all(torch.equal(cache[k]["mean"], rows["mean"][k].float()) for k in range(5))


@pytest.mark.parametrize("column", ["mean", "logvar"])
def test_a_row_that_changes_after_the_check_is_named(written, column):
    cache, _ = written
    assert list(cache.verify()) == []
    _, _, start, size, _ = cache._open[0].columns[column]
    path = cache._open[0].path
    for place in (start + size, start + 2 * size - 1):  # the first and the last byte of row 1
        content = bytearray(path.read_bytes())
        content[place] ^= 1
        path.write_bytes(content)
        cache.stored(0)
        with pytest.raises(ValueError, match="row 1 has changed since the shard was checked; delete"):
            cache.stored(1)
        content[place] ^= 1
        path.write_bytes(content)
    path.write_bytes(content[: start + size])
    with pytest.raises(ValueError, match="row 1 has changed"):
        cache.stored(1)


def test_every_pass_and_every_seed_has_an_order_of_its_own(written):
    cache, _ = written

    def orders(seed):
        stream = LatentStream(cache, seed=seed)
        videos = [int(stream[n]["video"]) for n in range(20)]
        return [tuple(videos[5 * e : 5 * e + 5]) for e in range(4)]

    first = orders(1)
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in first)
    assert len(set(first)) >= 3
    assert first == orders(1) != orders(2)
    stream = LatentStream(cache, seed=1)
    jumps = [17, 3, 12, 4, 19, 0]
    assert [int(stream[n]["video"]) for n in jumps] == [first[n // 5][n % 5] for n in jumps]
