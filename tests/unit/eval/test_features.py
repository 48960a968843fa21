"""A judging network runs in exact float32 whatever surrounds it."""

import numpy as np
import pytest
import torch

from eval.features import Extractor, device_of, extract_features


def test_a_judge_runs_in_exact_float32_whatever_surrounds_it():
    seen = []

    class Spy(torch.nn.Module):
        def forward(self, x):
            tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
            seen.append((torch.is_autocast_enabled("cpu"), *tf32, torch.is_inference_mode_enabled()))
            return x.flatten(1)[:, :4].float()

    before = torch.get_float32_matmul_precision()
    clips = [np.zeros((2, 4, 4, 3), np.uint8)] * 3
    extractor = Extractor(Spy(), lambda clip: clip.movedim(-1, 0).float(), None, torch.device("cpu"))
    try:
        torch.set_float32_matmul_precision("high")
        surrounded = torch.backends.cudnn.flags(enabled=True, allow_tf32=True)
        with torch.autocast("cpu", torch.bfloat16), surrounded:
            extract_features(clips, extractor, batch_size=2)
            assert torch.is_autocast_enabled("cpu")
            assert torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == [(False, "highest", False, True)] * 2


@pytest.mark.parametrize("name", ["gpu", "cuda:97", "cpu:x"])
def test_a_device_that_is_not_here_is_one_line(name):
    with pytest.raises(ValueError, match=f"--device {name}: .*cpu, cuda, or cuda:N"):
        device_of(name)
    assert device_of("cpu") == torch.device("cpu")
