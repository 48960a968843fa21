"""Weight files: found by name, known by digest, refused when wrong, never run."""

import hashlib

import numpy as np
import pytest
import torch

from data.core import environment
from eval import weights
from eval.check_weights import main as check_main
from eval.features import extract_features, i3d_extractor
from eval.i3d import I3D
from eval.weight_files import WeightFile, crc32c, masked, tf_table, to_tf_layout
from eval.weights import Provenance, find_weights, identify, load_i3d, random_seed, read_state


@pytest.mark.parametrize("kind", ["i3d", "c3d", "c3d_mean", "alexnet", "vgg16"])
def test_missing_weights_name_the_file_its_source_its_digest_and_the_way_out(kind, tmp_path, monkeypatch):
    official = weights.WEIGHT_FILES[kind]
    for setting in (None, tmp_path, tmp_path / "nowhere"):
        if setting is not None:
            monkeypatch.setenv("OMNILATTE_WEIGHTS", str(setting))
        with pytest.raises(ValueError, match="are missing") as caught:
            find_weights(kind)
        for part in (official.file, official.source, official.digest):
            assert part in str(caught.value)
        assert "--no-lpips" in str(caught.value) or "random:0" in str(caught.value)


def test_the_git_blob_digest_is_git_s(tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(b"hello\n")
    stat = path.stat()
    sha256, blob = weights._digests(str(path), stat.st_size, stat.st_mtime_ns)
    assert blob == "ce013625030ba8dba906f756967f9e9ca394464a"  # git hash-object of "hello\n"
    assert sha256 == hashlib.sha256(b"hello\n").hexdigest()


def test_a_file_known_to_be_wrong_is_refused_and_the_right_one_is_known(tmp_path, monkeypatch, caplog):
    path = tmp_path / "any.pt"
    path.write_bytes(b"hello\n")
    assert not identify(path, "i3d").known
    assert "not the published one" in caplog.text
    monkeypatch.setitem(weights.WRONG_FILES, "ce013625030ba8dba906f756967f9e9ca394464a", "the wrong file")
    with pytest.raises(ValueError, match=r"the wrong file; use i3d_pretrained_400\.pt"):
        identify(path, "i3d")
    monkeypatch.undo()
    right = WeightFile("a", "I3D", "b", git_blob="ce013625030ba8dba906f756967f9e9ca394464a")
    monkeypatch.setitem(weights.WEIGHT_FILES, "i3d", right)
    assert identify(path, "i3d").known


def test_a_number_of_random_weights_has_another_name():
    random = Provenance("I3D", "random:7", "", known=False, seed=7)
    assert random.metric_name("FVD") == "random-feature FVD (I3D, seed 7)"
    assert Provenance("I3D", "i3d.pt", "ab", known=False).metric_name("FVD") == "FVD"
    assert random_seed("random:7") == 7
    assert random_seed("folder") is None
    with pytest.raises(ValueError, match="random:SEED"):
        random_seed("random")


def test_a_saved_i3d_loads_without_the_batch_counters_and_in_both_formats(tmp_path):
    from safetensors.torch import save_file

    source, _ = load_i3d("random:3")
    state = {k: v for k, v in source.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert len(state) == 287
    torch.save(state, tmp_path / "i3d_pretrained_400.pt")
    (tmp_path / "converted").mkdir()
    save_file(state, tmp_path / "converted" / "i3d_pretrained_400.safetensors")
    for folder in (tmp_path, tmp_path / "converted"):
        loaded, provenance = load_i3d(folder)
        assert provenance.seed is None
        assert len(provenance.sha256) == 64
        assert all(torch.equal(v, source.state_dict()[k]) for k, v in loaded.state_dict().items())


def test_keys_that_do_not_fit_are_listed(tmp_path):
    state = I3D().state_dict()
    del state["Mixed_3b.b0.conv3d.weight"]
    state["logits.conv3d.bias"] = torch.zeros(7)
    state["stranger"] = torch.zeros(1)
    torch.save(dict(state), tmp_path / "a.pt")
    with pytest.raises(
        ValueError, match=r"1 missing: Mixed_3b\.b0.*1 extra: stranger.*1 wrong shapes: logits"
    ):
        load_i3d(tmp_path / "a.pt")


class Bomb:
    def __reduce__(self):
        return (eval, ("1/0",))


def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path):
    torch.save({"a": Bomb()}, tmp_path / "bomb.pt")
    np.savez(tmp_path / "bomb.npz", a=np.array([Bomb()], dtype=object))
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_bytes(b"<html>moved</html>")
    (tmp_path / "text.safetensors").write_bytes(b"<html>moved</html>")
    (tmp_path / "text.npz").write_bytes(b"<html>moved</html>")
    for path in tmp_path.iterdir():
        with pytest.raises(ValueError, match=path.name):
            read_state(path)


def test_rgb_imagenet_is_named_as_the_wrong_file_whatever_its_bytes(tmp_path):
    path = tmp_path / "rgb_imagenet.pt"
    path.write_bytes(b"anything")
    with pytest.raises(ValueError, match=r"trained on ImageNet and Kinetics.*use i3d_pretrained_400\.pt"):
        load_i3d(path)


@pytest.mark.parametrize(
    ("data", "expected"),
    [(b"123456789", 0xE3069283), (bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43), (b"", 0)],
)
def test_crc32c_equals_the_published_check_values(data, expected):
    assert crc32c(data) == expected  # RFC 3720, B.4, and the catalogue's check value


@pytest.mark.parametrize("size", [255, 256, 257, 511, 512, 5000, 100_003])
def test_crc32c_of_many_lanes_equals_the_byte_loop(size):
    data, value = np.random.default_rng(size).bytes(size), 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ 0x82F63B78 * (value & 1)
    assert crc32c(data) == value ^ 0xFFFFFFFF


@pytest.fixture(scope="module")
def checkpoint():
    """An I3D, and the table its checkpoint would have."""
    state = {k: v.numpy() for k, v in load_i3d("random:3")[0].state_dict().items() if "num_batches" not in k}
    table = {
        key: {**entry, "crc32c_masked": masked(crc32c(to_tf_layout(state[key])))}
        for key, entry in tf_table().items()
    }
    return state, table


def save(state: dict, path) -> None:
    torch.save({key: torch.from_numpy(np.array(value)) for key, value in state.items()}, path)


def test_converted_weights_with_the_checkpoints_checksums_are_known(checkpoint, tmp_path, monkeypatch):
    state, table = checkpoint
    monkeypatch.setattr("eval.weight_files.tf_table", lambda: table)
    save(state, tmp_path / "converted.pt")
    provenance = load_i3d(tmp_path / "converted.pt")[1]
    assert provenance.known
    assert provenance.tensors.startswith("all equal")
    changed = {
        **state,
        "Mixed_4c.b1b.conv3d.weight": state["Mixed_4c.b1b.conv3d.weight"] * np.float32(1.0001),
    }
    save(changed, tmp_path / "tuned.pt")
    provenance = load_i3d(tmp_path / "tuned.pt")[1]
    assert not provenance.known
    assert provenance.tensors.startswith("1 of 230 differ")


def test_weights_of_other_values_are_not_known_by_the_real_table(checkpoint, tmp_path, caplog):
    save(checkpoint[0], tmp_path / "any.pt")
    assert (
        load_i3d(tmp_path / "any.pt")[1].tensors
        == "230 of 230 differ from TF-Hub deepmind/i3d-kinetics-400/1"
    )
    assert "compare with no published one" in caplog.text


def test_a_dump_of_the_tf_hub_checkpoint_by_its_own_names_loads(checkpoint, tmp_path):
    state, _ = checkpoint
    dump = {e["tf_name"]: to_tf_layout(state[k]).reshape(e["tf_shape"]) for k, e in tf_table().items()}
    np.savez(tmp_path / "tfhub_i3d.npz", **dump)
    loaded = load_i3d(tmp_path / "tfhub_i3d.npz")[0].state_dict()
    assert all(np.array_equal(loaded[key].numpy(), value) for key, value in state.items())


class Scripted(torch.nn.Module):
    def forward(self, x, rescale: bool = False, resize: bool = False, return_features: bool = False):
        assert return_features
        if rescale:
            x = x / 255.0 * 2.0 - 1.0
        mean = x.mean(dim=[2, 3, 4])
        return torch.cat([mean, torch.full_like(mean[:, :1], float(resize))], dim=1)


def test_a_torchscript_runs_after_its_digest_only_and_gets_the_flags_of_its_authors(tmp_path, monkeypatch):
    path = tmp_path / "i3d_torchscript.pt"
    torch.jit.save(torch.jit.script(Scripted()), path)
    with pytest.raises(ValueError, match="TorchScript file runs code"):
        i3d_extractor(tmp_path, "cpu", eps=1e-3)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    official = WeightFile(path.name, "I3D", "somewhere", sha256=digest)
    monkeypatch.setitem(weights.WEIGHT_FILES, "i3d_torchscript", official)
    with pytest.raises(ValueError, match="--protocol stylegan-v"):
        i3d_extractor(tmp_path, "cpu", eps=1e-5)
    clips = np.full((2, 9, 32, 48, 3), 255, np.uint8)
    for resize, flag in (("squash", 1.0), ("short", 0.0)):
        extractor = i3d_extractor(path, "cpu", eps=1e-3, resize=resize)
        assert extractor.provenance.known
        np.testing.assert_allclose(extract_features(clips, extractor), [[1, 1, 1, flag]] * 2, atol=1e-6)


def test_the_listing_names_every_file_and_verification_has_three_outcomes(
    tmp_path, capsys, checkpoint, monkeypatch
):
    assert check_main([]) == 0
    printed = capsys.readouterr().out
    for official in weights.WEIGHT_FILES.values():
        assert official.file in printed
        assert official.source in printed
    save(checkpoint[0], tmp_path / "i3d_pretrained_400.pt")
    assert check_main([str(tmp_path / "i3d_pretrained_400.pt")]) == 1
    assert "not verified: 230 of 230 differ" in capsys.readouterr().out
    monkeypatch.setattr("eval.weight_files.tf_table", lambda: checkpoint[1])
    assert check_main([str(tmp_path / "i3d_pretrained_400.pt")]) == 0
    (tmp_path / "rgb_imagenet.pt").write_bytes(b"x")
    for name, message in (
        ("rgb_imagenet.pt", "ImageNet"),
        ("gone.pt", "no such file"),
        (".", "no such file"),
    ):
        with pytest.raises(ValueError, match=message):
            check_main([str(tmp_path / name)])


def test_lpips_trunks_are_known_by_their_tensors_in_any_file_and_never_read_by_another_network(
    tmp_path, monkeypatch, caplog
):
    from dataclasses import replace

    from eval.fidelity import load_lpips
    from eval.weight_files import tensor_digest

    trunk = {
        f"features.{k.split('.', 1)[1]}": v for k, v in load_lpips("random:1")[0].net.state_dict().items()
    }
    digest = tensor_digest({k: v.numpy() for k, v in trunk.items()})
    monkeypatch.setitem(
        weights.WEIGHT_FILES, "alexnet", replace(weights.WEIGHT_FILES["alexnet"], tensors=digest)
    )
    torch.save({**trunk, "classifier.1.weight": torch.zeros(3)}, tmp_path / "alexnet-owt-7be5be79.pth")
    network, provenance = load_lpips(tmp_path)
    assert provenance.known
    assert provenance.tensors.startswith("all equal to the trunk of alexnet")
    assert caplog.text == ""  # known: no word about the file's digest
    own = network.net.state_dict()
    assert all(torch.equal(own[k], trunk[f"features.{k.split('.', 1)[1]}"]) for k in own)
    tuned = {**trunk, "features.3.bias": trunk["features.3.bias"] + 1e-3}
    torch.save(tuned, tmp_path / "tuned.pth")
    assert not load_lpips(tmp_path / "tuned.pth")[1].known
    assert "tuned.pth: tensors differ from the trunk of alexnet" in caplog.text
    with pytest.raises(ValueError, match=r"keys do not fit vgg16"):
        load_lpips(tmp_path / "tuned.pth", net="vgg")
    with pytest.raises(ValueError, match="LPIPS has alex, vgg"):
        load_lpips(net="squeeze")


def test_the_finder_looks_in_the_folder_then_for_trunks_in_torchs_cache_and_one_folder_serves_vaes_too(
    tmp_path, monkeypatch
):
    from vae.registry import vae_folder

    cache = tmp_path / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    for name in ("vgg16-397923af.pth", "i3d_pretrained_400.pt"):
        (cache / name).touch()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    root = environment.ROOT
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.delenv("OMNILATTE_WEIGHTS")
    assert find_weights("vgg16") == cache / "vgg16-397923af.pth"
    with pytest.raises(ValueError, match=r"weights does not exist.*bash scripts/fetch_weights.sh"):
        find_weights("i3d")  # judges are not looked for in torch's cache
    for folder in (tmp_path / "weights", tmp_path / "set"):
        folder.mkdir()
        (folder / "lpips_vgg16.safetensors").touch()
        assert find_weights("vgg16") == folder / "lpips_vgg16.safetensors"
        monkeypatch.setenv("OMNILATTE_WEIGHTS", str(tmp_path / "set"))
    with pytest.raises(ValueError, match=rf"{tmp_path}/set/odvae is not a folder"):
        vae_folder("odvae")
    monkeypatch.setattr(environment, "ROOT", root)
    monkeypatch.delenv("OMNILATTE_WEIGHTS")
    with pytest.raises(ValueError, match=rf"{weights.Path(weights.__file__).parents[1]}/weights/odvae"):
        vae_folder("odvae")


@pytest.mark.parametrize("name", ["alexnet-owt-7be5be79.pth", "lpips_vgg16.safetensors", "mean2.npz"])
def test_verification_opens_every_kind_of_file(name, tmp_path):
    (tmp_path / name).write_text("hello\n")
    with pytest.raises(ValueError, match="not a plain weight file") as caught:
        check_main([str(tmp_path / name)])
    assert "weights_only=False" not in str(caught.value)


def test_a_refused_pickle_is_told_in_our_words(tmp_path):
    from vae.reading import read_checkpoint

    torch.save({"a": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(ValueError, match=r"bomb\.pt: .*holds Python objects beside tensors.*never run"):
        read_state(tmp_path / "bomb.pt")
    (tmp_path / "old.ckpt").write_bytes(b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00cos\nsystem\n.")
    for read in (read_state, read_checkpoint):
        with pytest.raises(ValueError, match="damaged, or holds Python objects") as caught:
            read(tmp_path / "old.ckpt")
        assert "weights_only" not in str(caught.value)


def test_c3d_is_read_from_its_release_with_the_mean_clip_beside_it(tmp_path, monkeypatch):
    class Small(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1a, self.fc8 = torch.nn.Conv3d(3, 2, 3), torch.nn.Linear(4, 5)
            self.register_buffer("mean", torch.zeros(3, 16, 112, 112))

    monkeypatch.setattr("eval.c3d.C3D", Small)
    rng = np.random.default_rng(0)
    state = {k: rng.random(tuple(v.shape), np.float32) for k, v in Small().named_parameters()}
    names = {k: k.replace(".weight", "/W").replace(".bias", "/b") for k in state}
    np.savez(tmp_path / "conv3d_deepnetA_ucf.npz", **{names[k]: v for k, v in state.items()})
    with pytest.raises(ValueError, match=r"C3D weights are missing.*mean2\.npz"):
        weights.load_c3d(tmp_path)
    mean = rng.random((3, 16, 128, 171), np.float32)
    np.savez(tmp_path / "mean2.npz", mean=mean)
    loaded = weights.load_c3d(tmp_path)[0].state_dict()
    for name, value in (state | {"mean": mean[:, :, 8:120, 8:120]}).items():
        assert np.array_equal(loaded[name].numpy(), value), name
