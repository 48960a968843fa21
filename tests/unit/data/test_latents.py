"""Rows of the latent cache: the dtype of the file through the loader, the same values, and no row that has changed."""

import json

import pytest
import torch

from data.core.files import sha256_of
from data.latent_writer import LatentCacheWriter
from data.latents import LatentCache, LatentStream, shard_file, sidecar_file
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


def test_a_sealed_cache_that_lacks_less_than_before_is_sealed_again_whatever_the_limit(tmp_path):
    def rows(count):
        moments = {name: torch.zeros(count, 1, 1, 2, 2) for name in ("mean", "logvar")}
        return moments | {name: torch.arange(count) for name in ("label", "video", "draw")}

    def lacking(*entries):
        return [{"entry": n, "video": str(n), "reason": "gone"} for n in entries]

    writer = LatentCacheWriter(tmp_path, {}, 4, shard_size=4)
    writer.write(0, rows(2), lacking(2, 3))
    with pytest.raises(ValueError, match=r"2 of 4 clips \(50.0%\) could not be read"):
        writer.finish({}, max_failed_share=0.05)
    writer.finish({}, max_failed_share=0.5)
    writer.write(0, rows(3), lacking(3))
    assert writer.finish({}, max_failed_share=0.05)["rows"] == [3]
    writer.write(0, rows(2), lacking(2, 3))
    with pytest.raises(ValueError, match="2 of 4 clips"):
        writer.finish({}, max_failed_share=0.05)


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
    shard = cache._open[0]
    path, start, size = shard.path, shard.starts[column == "logvar"], shard.size
    for place in (start + size, start + 2 * size - 1):  # the first and the last byte of row 1
        content = bytearray(path.read_bytes())
        content[place] ^= 1
        path.write_bytes(content)
        cache.batch([0])
        with pytest.raises(ValueError, match="row 1 has changed since the shard was checked; delete"):
            cache.batch([0, 1])
        content[place] ^= 1
        path.write_bytes(content)
    path.write_bytes(content[: start + size])
    with pytest.raises(ValueError, match="row 1 has changed"):
        cache.batch([1])


def test_every_pass_and_every_seed_has_an_order_of_its_own(written):
    cache, _ = written

    def orders(seed):
        stream = LatentStream(cache, seed=seed)
        videos = stream.batch(range(20))["video"].tolist()
        return [tuple(videos[5 * e : 5 * e + 5]) for e in range(4)]

    first = orders(1)
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in first)
    assert len(set(first)) >= 3
    assert first == orders(1) != orders(2)
    stream = LatentStream(cache, seed=1)
    jumps = [17, 3, 12, 4, 19, 0]
    assert stream.batch(jumps)["video"].tolist() == [first[n // 5][n % 5] for n in jumps]


@pytest.mark.parametrize("change", ["more_rows", "long_ids", "float_ids", "other_dtype", "other_shape"])
def test_a_shard_whose_columns_do_not_fit_its_record_is_named(written, change):
    cache, rows = written
    shard = {name: column[:3] for name, column in rows.items()}
    other = torch.float16
    shard |= {
        "more_rows": {"logvar": rows["logvar"][:4]},
        "long_ids": {"video": rows["video"]},
        "float_ids": {"draw": torch.zeros(3)},
        "other_dtype": {"logvar": shard["logvar"].to(other)},
        "other_shape": {"logvar": shard["logvar"].flatten(1)},
    }[change]
    LatentCacheWriter(cache.folder, cache.fingerprint, 5, shard_size=3).write(0, shard, [])
    with pytest.raises(ValueError, match="latents-00000.safetensors: no shard of latents"):
        cache.batch([0])
    assert "no shard of latents" in next(cache.verify())


@pytest.mark.parametrize("cut", ["in_the_ids", "in_the_rows", "no_width"])
def test_a_shard_that_is_shorter_than_it_says_is_named_although_its_sum_fits(written, cut):
    cache, _ = written
    path = shard_file(cache.folder, 0)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    first, last = sorted(header[name]["data_offsets"][1] for name in ("mean", "draw"))
    if cut == "no_width":
        for name in ("mean", "logvar"):
            header[name] |= {"shape": [3, 0], "data_offsets": [0, 0]}
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    else:
        path.write_bytes(content[: 8 + length + {"in_the_ids": last, "in_the_rows": first}[cut] - 1])
    record = json.loads(sidecar_file(cache.folder, 0).read_text())
    record["sha256"] = sha256_of(path)
    sidecar_file(cache.folder, 0).write_text(json.dumps(record))
    with pytest.raises(ValueError, match="latents-00000.safetensors: no shard of latents"):
        cache.batch([0])
    assert "no shard of latents" in next(cache.verify())


def test_rows_of_two_sizes_do_not_make_a_batch(written):
    cache, rows = written
    shard = {name: column[3:] for name, column in rows.items()}
    shard |= {name: shard[name].flatten(1) for name in ("mean", "logvar")}
    LatentCacheWriter(cache.folder, cache.fingerprint, 5, shard_size=3).write(1, shard, [])
    assert cache.batch([3, 4])["mean"].shape == (2, 27)
    with pytest.raises(ValueError, match=r"latents-00001.*row 0 is \(.*, another one"):
        cache.batch([0, 3])
    with pytest.raises(IndexError, match="row 5: the cache has 5"):
        cache.batch([0, 5])


def test_threads_fill_the_rows_of_a_batch(written):
    cache, rows = written
    taken = []

    def each(read, numbers):
        taken.extend(numbers)
        return map(read, reversed(numbers))

    batch = LatentStream(cache, seed=2).batch([7, 5, 9], each)
    assert taken == [0, 1, 2]
    assert batch["number"].tolist() == [7, 5, 9]
    assert torch.equal(batch["logvar"], rows["logvar"][batch["video"]])
