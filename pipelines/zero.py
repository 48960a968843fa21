"""DeepSpeed keeps weights and optimizer in pieces; here they are put together and taken apart again.

So a checkpoint has one form: written under ZeRO 1, 2 or 3, DDP or one process, it is read by each of them, on any number
of processes. DeepSpeed's own files, which are pickles and fit one number of processes only, are neither written nor read.
Source: deepspeed.utils.tensor_fragment, the access to full states that DeepSpeed documents.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.engine import uses_deepspeed
from pipelines.trainer import as_fused

MOMENTS = ("exp_avg", "exp_avg_sq")


def whole_weights(module: nn.Module, change: bool = False) -> contextlib.AbstractContextManager:
    """Inside, the module's parameters are whole on every process; outside ZeRO-3 they always are.

    Every process enters it together. It takes 4 bytes a parameter for a time when no activations are held.
    change: what the first process writes into them holds for all.
    """
    parameters = list(module.parameters())
    if not any(hasattr(p, "ds_id") for p in parameters):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if change else None)


def load_weights(accelerator: Any, model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Fill a prepared model, and DeepSpeed's own copy of its weights, strictly."""
    module = accelerator.unwrap_model(model)
    with whole_weights(module, change=True):
        module.load_state_dict(weights)
    if uses_deepspeed(accelerator):
        model.optimizer.refresh_fp32_params()


def optimizer_state(accelerator: Any, model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """torch's state_dict of AdamW with whole moments, on the main process; every process calls it."""
    if not uses_deepspeed(accelerator):
        return optimizer.state_dict()
    from deepspeed.utils import safe_get_full_optimizer_state

    inner, parameters = model.optimizer.optimizer, list(accelerator.unwrap_model(model).parameters())
    states: dict[int, dict[str, Tensor]] = {}
    if inner.state:  # empty until an update was made
        step = next(iter(inner.state.values()))["step"].cpu()
        for number, parameter in enumerate(parameters):
            full = {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
            if accelerator.is_main_process:
                # each with a counter of its own: torch counts up every one
                states[number] = {"step": step.clone()} | {k: v.cpu().clone() for k, v in full.items()}
    group = {key: inner.param_groups[0][key] for key in inner.defaults}
    return {"state": states, "param_groups": [group | {"params": list(range(len(parameters)))}]}


def load_optimizer_state(accelerator: Any, model: nn.Module, optimizer: Any, state: dict[str, Any]) -> None:
    """Take a whole `optimizer_state`, on every process; each keeps what it owns."""
    if not uses_deepspeed(accelerator):
        optimizer.load_state_dict(as_fused(state))
        return
    states = state["state"]
    if not states:
        return
    zero, inner = model.optimizer, model.optimizer.optimizer
    partitioned = hasattr(zero, "fp32_partitioned_groups_flat")  # ZeRO-3
    flats = zero.fp32_partitioned_groups_flat if partitioned else zero.single_partition_of_fp32_groups
    for flat in flats:
        step = states[0]["step"].to(flat.device if inner.defaults.get("fused") else "cpu").clone()
        inner.state[flat] = {"step": step} | {key: torch.zeros_like(flat) for key in MOMENTS}
    if not partitioned:
        zero._lazy_init_hp_params_optimizer_state()  # what it does itself after its first update
    for number, parameter in enumerate(accelerator.unwrap_model(model).parameters()):
        for key in MOMENTS:
            _give(parameter, states[number][key].to(accelerator.device), key)


def _give(parameter: nn.Parameter, value: Tensor, key: str) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    if not hasattr(parameter, "ds_id"):
        safe_set_full_optimizer_state(parameter, value, key)
        return
    # DeepSpeed's own cut fails where a tensor does not divide evenly; its last piece is padded with zeros.
    size, group = parameter.ds_tensor.numel(), parameter.ds_process_group
    padded = nn.functional.pad(
        value.flatten(), (0, size * torch.distributed.get_world_size(group) - value.numel())
    )
    safe_set_local_optimizer_state(
        parameter, padded.narrow(0, size * torch.distributed.get_rank(group), size), key
    )
