"""C3D against TGAN2's chainer network with rule weights (314 MB, made in memory)."""

import json
import zlib

import numpy as np
import torch

from eval.c3d import C3D, crop_mean, to_c3d_input


def rule_c3d(shapes: dict) -> C3D:
    network = C3D()
    with torch.no_grad():
        for key, shape in shapes.items():
            z = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32)
            if key.endswith("/b"):
                z *= np.float32(0.05)
            else:
                z *= np.float32(np.sqrt(2 / np.prod(shape[1:])))
            if key == "fc8/W":
                z *= np.float32(0.01)
            name = key.replace("/W", ".weight").replace("/b", ".bias")
            network.get_parameter(name).copy_(torch.from_numpy(z))
    mean = np.random.default_rng(zlib.crc32(b"mean")).uniform(80, 120, (3, 16, 128, 171)).astype(np.float32)
    network.mean.copy_(crop_mean(torch.from_numpy(mean)))
    return network.eval()


@torch.inference_mode()
def test_logits_and_probabilities_equal_tgan2(golden):
    with np.load(golden / "eval_c3d.npz") as arrays:
        frozen = {name: arrays[name] for name in arrays.files}
    shapes = json.loads(str(frozen["shapes"]))
    own = {
        k.replace(".weight", "/W").replace(".bias", "/b"): list(v.shape) for k, v in C3D().named_parameters()
    }
    assert own == shapes
    assert sum(np.prod(shape) for shape in shapes.values()) == 78_409_573
    network = rule_c3d(shapes)
    clips = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 16, 64, 64, 3), dtype=np.uint8))
    x = torch.stack([to_c3d_input(clip) for clip in clips])
    np.testing.assert_allclose((x - network.mean)[0, :, 0, :4, :4], frozen["rand16_pre_corner"], atol=1e-4)
    logits = network(x)
    np.testing.assert_allclose(logits, frozen["rand16_fc8"], atol=1e-4)
    np.testing.assert_allclose(logits.softmax(dim=1), frozen["rand16_prob"], atol=1e-5)
