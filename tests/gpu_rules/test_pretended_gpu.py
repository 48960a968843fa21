"""The pretended GPU is strict where a real one is, and leaves nothing behind."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from pipelines.plan.backward import python_backward
from pipelines.plan.pretend import pretended_gpu
from tests.unit.vae.tiny import clip, tiny


def test_autocast_follows_cuda_s_lists(gpu):
    x = torch.zeros(2, 8, 4, device="cuda")
    weight = torch.zeros(8, 8, 3, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        y = F.conv1d(x, weight)
        assert y.dtype is torch.bfloat16
        assert F.group_norm(y, 2).dtype is torch.float32  # on a CPU it stays bf16
        assert F.layer_norm(y, y.shape[-1:]).dtype is torch.float32


def test_silu_into_a_window_of_another_dtype_is_refused(gpu):
    window = torch.zeros(2, 3, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="BFloat16"):
        torch.ops.aten.silu.out(torch.zeros(2, 3, device="cuda"), out=window)


def test_tensors_of_two_devices_do_not_mix(gpu):
    layer = nn.Linear(3, 3).to("cuda")
    with pytest.raises(RuntimeError, match="same device"):
        layer(torch.zeros(2, 3))


def test_moving_a_module_keeps_its_parameters(gpu):
    layer = nn.Linear(3, 3)
    before = list(layer.parameters())
    optimizer = torch.optim.Adam(before)
    layer.to("cuda")
    assert all(a is b for a, b in zip(before, layer.parameters(), strict=True))
    layer(torch.zeros(2, 3, device="cuda")).sum().backward()
    optimizer.step()
    assert {s["exp_avg"].device.type for s in optimizer.state.values()} == {"cuda"}


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool(x.isfinite().all()),
        lambda x: x.cpu(),
        lambda x: x + torch.ones(3).to("cuda"),
        lambda x: x.copy_(torch.ones(3)),
        lambda x: torch.ones(2**20).to("cuda", non_blocking=True),  # from memory that is not pinned
    ],
)
@pytest.mark.parametrize("inference", [False, True])
def test_a_wait_for_the_device_is_noted(gpu, wait, inference):
    with torch.inference_mode(inference):
        x = torch.zeros(3, device="cuda")
        gpu.syncs.found.clear()
        wait(x)
    assert len(gpu.syncs.found) == 1


def test_a_copy_from_pinned_memory_does_not_wait(gpu):
    torch.ones(2**20).pin_memory().to("cuda", non_blocking=True)
    torch.zeros(3, device="cuda").to("cpu", non_blocking=True)
    assert gpu.syncs.found == []


def test_afterwards_torch_is_as_it_was():
    import torch.cuda.amp.common as amp

    def state():
        return (
            F.scaled_dot_product_attention,
            nn.Module._apply,
            torch.autograd.backward,
            amp.amp_definitely_not_available,
        )

    before, real = state(), torch.ones(3, requires_grad=True)
    with pretended_gpu():
        nn.Linear(2, 2).to("cuda")
    assert state() == before
    real.square().sum().backward()
    assert torch.equal(real.grad, torch.full((3,), 2.0))


def test_python_s_backward_gives_torch_s_gradients_to_the_bit():
    """With a gradient taken on the way, a graph used twice, checkpointed blocks and gradients that add up."""
    vae, x = tiny(dtype=torch.float32), clip(9, dtype=torch.float32)

    def gradients():
        vae.zero_grad()
        for _ in range(2):
            z = vae.encode(x).latent_dist.mode()
            y = checkpoint(lambda z: vae.decode(z).sample, z, use_reentrant=False)
            loss = (y - x).abs().mean() + z.square().mean()
            (on_the_way,) = torch.autograd.grad(loss, vae.last_decoder_layer, retain_graph=True)
            (loss * on_the_way.norm()).backward()
        return [on_the_way, *(p.grad for p in vae.parameters())]

    expected = gradients()
    with python_backward():
        found = gradients()
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
