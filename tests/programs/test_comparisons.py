"""python -m pipelines.benchmark KIND: ways to do the same thing in turns, peers from a checkout, and the model of a card."""

import json
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch

from denoiser.latte import Latte
from eval.i3d import I3D, to_i3d_input
from pipelines.bench import cases, pairs
from pipelines.bench.peers import load_peers
from pipelines.benchmark import KINDS, main
from pipelines.plan.pretend import LOWEST_TORCH, too_old
from vae import ODVAE
from vae.release import config_from_upstream

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_measured_against_another_way_that_gives_the_same(kind, tmp_path, capsys):
    out = tmp_path / "speed.jsonl"
    words = ["--peer", ""] if kind == "vae" else []
    assert main([kind, *words, "size=tiny", "rounds=1", "warmup=0", f"out={out}"]) == 0
    first, *rows = (json.loads(line) for line in out.read_text().splitlines())
    assert first["machine"]["peaks"].keys() == {"conv", "matmul", "copy"}
    assert {row["kind"] for row in rows} == {kind}
    printed = capsys.readouterr().out
    for row in rows:
        assert row["case"] in printed
        assert row["versions"]["python"]
        for run in row["runs"].values():
            assert run["seconds"]["median"] > 0
            assert run["ratio"]["p10"] <= run["ratio"]["median"] <= run["ratio"]["p90"]
            assert run.get("difference", 0) < 1e-4
    assert all(len(row["runs"]) > 1 for row in rows if kind not in ("train", "sample"))
    assert any("difference" in run for row in rows for run in row["runs"].values()) == (kind != "cache")


def test_ways_take_turns_and_the_ratio_is_that_of_each_round(monkeypatch):
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in ("theirs", "ours")}
    monkeypatch.setattr(
        pairs.Clock, "time", lambda self, run: run() or {"theirs": 3.0, "ours": 2.0}[calls[-1]]
    )
    best = {"conv": 10.0, "matmul": 1.0, "copy": 1.0}
    row = pairs.record(pairs.Case("work", runs, flops=10.0), 3, 1, pairs.Clock(CPU), best)
    assert calls == ["theirs", "ours", *["theirs", "ours"], *["ours", "theirs"], *["theirs", "ours"]]
    assert row["runs"]["ours"]["ratio"]["median"] == 1.5
    assert row["runs"]["ours"]["of_floor"] == 0.5
    assert "1.50 times" in "\n".join(pairs.lines(row))


def test_a_peers_model_is_imported_from_its_checkout_without_what_it_does_not_need(tmp_path, monkeypatch):
    package = tmp_path / "opensora/models/causalvideovae"
    model = package / "model/causal_vae/modeling_causalvae.py"
    model.parent.mkdir(parents=True)
    for folder in (package.parents[1], package.parent, package, model.parents[1], model.parent):
        (folder / "__init__.py").write_text("raise RuntimeError('imports everything')")
    (model.parents[1] / "layers.py").write_text("WIDTH = 7")
    model.write_text(
        textwrap.dedent(
            """
            import pytorch_lightning as pl
            from torchvision.io import read_video
            from ...utils.utils import custom_to_video
            from ..layers import WIDTH

            class CausalVAEModel(pl.LightningModule):
                width = WIDTH
            """
        )
    )
    import torchvision

    before, finders = set(sys.modules), list(sys.meta_path)
    module = load_peers(str(tmp_path))["Open-Sora-Plan"]
    assert module.CausalVAEModel.width == 7
    assert sys.modules["torchvision"] is torchvision
    assert sys.meta_path == finders
    new = set(sys.modules) - before
    assert new
    assert all(name.startswith("opensora") and "utils" not in name for name in new)
    for name in new:
        del sys.modules[name]


def test_cd_fvd_is_imported_from_its_checkout_without_its_downloads(tmp_path):
    package = tmp_path / "cdfvd/third_party/i3d"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parents[1]):
        (folder / "__init__.py").write_text("raise RuntimeError('imports everything')")
    (package / "pytorch_i3d.py").write_text("class InceptionI3d: pass")
    (package / "utils.py").write_text("from . import pytorch_i3d\nimport requests\n\nget = requests.get")
    before = set(sys.modules)
    module = load_peers(str(tmp_path))["cd-fvd"]
    assert module.pytorch_i3d.InceptionI3d
    assert not hasattr(module.get, "status_code")
    for name in set(sys.modules) - before:
        assert name.startswith("cdfvd")
        del sys.modules[name]


def test_a_folder_that_is_no_checkout_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"not a checkout of Open-Sora-Plan \(opensora/.*Latte"):
        main(["data", "size=tiny", f"peer={tmp_path}"])
    with pytest.raises(ValueError, match="size=huge: one of tiny"):
        main(["data", "size=huge"])
    for kind in ("data", "eval"):
        with pytest.raises(
            ValueError, match=f"{kind} --model: no model .*; those with one are vae, train, cache"
        ):
            main([kind, "--model"])
    assert main(["all", "--model", "--dry-run"]) == 0
    with pytest.raises(ValueError, match="only=nowhere: no case of data has this in its name"):
        main(["data", "size=tiny", "only=nowhere"])


class TheirLatte(Latte):
    """Ours with their order of axes, their position tables among the weights, and their guidance."""

    def __init__(self, **config):
        super().__init__(**config)
        self._non_persistent_buffers_set.clear()
        self.bf16 = []

    def forward(self, x, t, y):
        self.bf16.append(torch.is_autocast_enabled("cpu"))
        return super().forward(x.transpose(1, 2), t, y).sample.transpose(1, 2)

    def forward_with_cfg(self, x, t, y, cfg_scale):
        with_label, without = self(x, t, y)[:, :, :4].chunk(2)
        return torch.cat([without + cfg_scale * (with_label - without)] * 2)


class LatteModule:
    """Stands for their module: makes the model from their names of the arguments."""

    made: list

    def __init__(self):
        self.made = []

    def Latte(self, *, input_size, hidden_size, depth, extras, **same):
        assert extras == 2  # labels
        model = TheirLatte(sample_size=input_size, hidden_size=hidden_size, depth=depth, **same)
        self.made.append(model)
        return model


class CausalVAEModule:
    def CausalVAEModel(self, **config):
        return ODVAE(**config_from_upstream(config))


@pytest.mark.parametrize("kind", ["train", "sample"])
def test_a_peers_latte_has_our_weights_and_is_compared_with_ours(kind):
    case = list(cases.KINDS[kind](cases.Setup("tiny", CPU, {"Latte": LatteModule()})))[-1]
    assert list(case.runs) == ["Latte", "ours"]
    assert case.same() == {"ours": pytest.approx(0, abs=1e-4)}


def test_a_peers_vae_has_our_weights_and_takes_the_place_of_the_plain_network():
    setup = cases.Setup("tiny", CPU, {"Open-Sora-Plan": CausalVAEModule()})
    encode, decode = cases.vae(setup)
    step, _ = cases.train(setup)
    for case in (encode, decode, step):
        assert list(case.runs) == ["Open-Sora-Plan", "odvae", "osp_v1_2"]
        assert case.same() == {"osp_v1_2": pytest.approx(0, abs=1e-4)}
    step.runs["Open-Sora-Plan"]()  # a step changes the weights of one side alone
    assert step.same()["osp_v1_2"] > 1e-5


def test_a_peers_i3d_has_our_weights_and_is_compared_from_pixels_on():
    def preprocess(pixels):
        return to_i3d_input(torch.from_numpy(pixels[0]))[None]

    inception = SimpleNamespace(InceptionI3d=lambda classes, in_channels: I3D())
    module = SimpleNamespace(preprocess_i3d=preprocess, pytorch_i3d=inception)
    _, case, _ = cases.judge(cases.Setup("tiny", CPU, {"cd-fvd": module}))
    assert list(case.runs) == ["cd-fvd", "ours"]
    assert 0 < case.same()["ours"] < 1e-5
    module.preprocess_i3d = lambda pixels: -preprocess(pixels)
    assert case.same()["ours"] > 1e-2


def test_a_peers_latte_with_other_weights_than_ours_is_refused():
    class Other(LatteModule):
        def Latte(self, **config):
            model = super().Latte(**config)
            model.second_head, model.blocks[0].attn = torch.nn.Linear(1, 1, bias=False), torch.nn.Identity()
            return model

    with pytest.raises(
        ValueError, match=r"Latte's .* other weights than ours: blocks\.0\.attn.*, second_head\.weight;"
    ):
        list(cases.train(cases.Setup("tiny", CPU, {"Latte": Other()})))


@pytest.mark.parametrize("kind", ["train", "sample"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_lattes_run_in_the_precision_of_the_machines_own_speed(kind, dtype, monkeypatch):
    monkeypatch.setattr(cases.Setup, "dtype", dtype)
    ours, forward = [], Latte.forward

    def watched(model, *args, **kwargs):
        ours.append(torch.is_autocast_enabled("cpu"))
        return forward(model, *args, **kwargs)

    monkeypatch.setattr(Latte, "forward", watched)
    module = LatteModule()
    case = list(cases.KINDS[kind](cases.Setup("tiny", CPU, {"Latte": module})))[-1]
    for name, seen in (("Latte", module.made[0].bf16), ("ours", ours)):
        seen.clear()
        case.runs[name]()
        assert seen == [dtype is torch.bfloat16]


@pytest.mark.skipif(too_old(), reason=f"not run: the pretended GPU needs torch >= {LOWEST_TORCH}")
def test_the_model_tells_what_a_card_would_need_and_inference_copies_no_layout(tmp_path, monkeypatch, capsys):
    from pipelines.plan.programs import encode_and_decode

    def small(build, frames, size, **kwargs):
        widths = {"block_out_channels": (32, 32, 32, 32)}
        return encode_and_decode(lambda: ODVAE.preset("odvae", **widths).eval(), 9, 32, **kwargs)

    monkeypatch.setattr("pipelines.bench.model.encode_and_decode", small)
    out = tmp_path / "model.jsonl"
    main(["vae", "--model", "card=h100", "only=odvae", f"out={out}"])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["case"] for row in rows] == [f"odvae, 81 x 256 x 256: {way}" for way in ("encode", "decode")]
    assert all(row["kernels"] > 50 and row["bytes"] > 0 and row["layout_copies"] == 0 for row in rows)
    assert "layout copies" in capsys.readouterr().out
    with pytest.raises(ValueError, match="card=k80: known are h100"):
        main(["vae", "--model", "card=k80"])
