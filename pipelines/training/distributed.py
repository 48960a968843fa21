"""The distributed engine is accelerate (with DeepSpeed by launch configuration); here is the little it needs from us."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import DistributedType, broadcast_object_list
from torch import Tensor, nn

from data.core.lazy import lazy
from data.dataset import list_digest
from pipelines.training.folder import ROOT
from pipelines.training.settings import Precision
from pipelines.training.trackers import tracker_names

deepspeed = lazy("deepspeed")
deepspeed_utils = lazy("deepspeed.utils")

PATIENCE = timedelta(hours=2)  # of processes that wait while the main one draws samples or saves
ALWAYS = timedelta(days=30)  # of those that wait for a scan, or for another's share of a long job

log = logging.getLogger(__name__)


def make_accelerator(config: Any = None) -> Accelerator:
    """An Accelerator for 1 process, DDP or DeepSpeed, on GPUs or CPUs, as the launcher set it up.

    config: a trainer's settings; global_batch and micro_batch decide the accumulation. Weights, optimizer and EMA stay
    fp32; precision=bf16 is autocast, see `autocast`; precision=tf32 see `matrix_products`.
    """
    # How many micro-batches make an update of this launch
    world = int(os.environ.get("WORLD_SIZE", 1))
    accumulation = accumulation_steps(config.global_batch, config.micro_batch, world) if config else 1
    if torch.cuda.is_available() and (trouble := cudnn_trouble(torch.backends.cudnn.version())):
        log.warning("%s", trouble)
    # How the processes talk: DDP's rules, the backend, DeepSpeed's file
    handlers: list[Any] = [
        DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    ]
    deepspeed_launch = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"
    cpus = "LOCAL_RANK" in os.environ and not torch.cuda.is_available()
    if "LOCAL_RANK" in os.environ:
        # Without an explicit backend accelerate believes in one process when DeepSpeed runs on CPUs.
        handlers.append(InitProcessGroupKwargs(backend="gloo" if cpus else "nccl", timeout=PATIENCE))
    if deepspeed_launch:
        _find_deepspeed_config()
    if cpus and deepspeed_launch:
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # its build takes minutes and may hang
    # The engine itself; TF32 and bf16 are ours to switch, so it does no mixed precision.
    accelerator = Accelerator(
        mixed_precision="no",
        gradient_accumulation_steps=accumulation,
        kwargs_handlers=handlers,
        cpu=cpus and not deepspeed_launch,  # True would turn DeepSpeed off
        log_with=tracker_names(getattr(config, "log_with", "")) or None,
        project_dir=getattr(config, "run_dir", None),
    )
    # What accelerate understood must be what the launcher and the settings say.
    if accelerator.num_processes != world or (
        world > 1 and accelerator.distributed_type == DistributedType.NO
    ):
        raise RuntimeError(
            f"accelerate sees {accelerator.num_processes} processes ({accelerator.distributed_type}), "
            f"the launcher started {world}: each process would train independently"
        )
    if config and accelerator.gradient_accumulation_steps != accumulation:
        raise ValueError(
            f"global_batch={config.global_batch}, micro_batch={config.micro_batch} on {world} processes make {accumulation} "
            f"micro-batches an update, accelerate was told {accelerator.gradient_accumulation_steps} (its own settings, or "
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS): take gradient_accumulation_steps out of them, or say auto in a "
            "DeepSpeed file"
        )
    if uses_deepspeed(accelerator) and config:
        # What DeepSpeed would take from a prepared loader or do by itself inside its step.
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        settings["train_micro_batch_size_per_gpu"] = config.micro_batch
        settings["gradient_clipping"] = config.grad_clip
        if config.precision is Precision.bf16:
            # No module by name: their weights and gradients would travel, and be averaged, in bf16.
            bf16 = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
            settings["torch_autocast"] = bf16
    return accelerator


def cudnn_trouble(version: int | None) -> str:
    """ "" or what is wrong with a cuDNN, as torch numbers it: 3D convolutions of half precision in 9.8 to 9.14.

    Source: pytorch/pytorch#166643, #166122, #166790, #163539.
    """
    if version is None or not 90800 <= version < 91500:
        return ""
    return (
        f"cuDNN {version // 10000}.{version // 100 % 100}: its bf16 and fp16 3D convolutions are wrong, or left out by torch and "
        "then several times slower and larger; install cuDNN 9.15 or newer, or the versions of requirements.txt"
    )


@contextlib.contextmanager
def main_process_first(accelerator: Accelerator) -> Iterator[None]:
    """The main process runs the block, then the others do. They wait however long it takes.

    A first scan of some 100,000 videos takes hours; a barrier of NCCL would give up after PATIENCE. When the main process
    dies, so do they.
    """
    if accelerator.num_processes == 1:
        yield
        return
    with _patient_group() as group:
        if not accelerator.is_main_process:
            torch.distributed.barrier(group)
        yield
        if accelerator.is_main_process:
            torch.distributed.barrier(group)


@contextlib.contextmanager
def _patient_group() -> Iterator[Any]:
    """All processes, as a group of its own in which they wait as long as it takes."""
    group = torch.distributed.new_group(backend="gloo", timeout=ALWAYS)
    yield group
    torch.distributed.destroy_process_group(group)


def open_everywhere(accelerator: Accelerator, open_videos: Callable[[], Any]) -> Any:
    """Clips, opened on every process: first on the main one, which scans them for the others.

    Raises ValueError on every process when one cannot open them, and unless all see the same videos: sample n must be the
    same one everywhere.
    """
    if accelerator.num_processes == 1:
        return open_videos()
    # No process may wait for one that has failed.
    clips, own = None, None
    with main_process_first(accelerator):
        try:
            clips = open_videos()
        except (ValueError, OSError) as error:
            own = error
    found = (len(clips), list_digest(clips), "") if own is None else (0, "", str(own))
    seen = gathered(accelerator, [found])
    if own is not None:
        raise own
    for process, (count, digest, failure) in enumerate(seen):
        if failure:
            raise ValueError(f"process {process}: {failure}")
        if digest != seen[0][1]:
            raise ValueError(
                f"process {process} sees {count} videos, the main one {seen[0][0]}, or others: they are still being copied, "
                "or some could not be read on one machine; start again when they are all there"
            )
    return clips


def wait_for_all(accelerator: Accelerator) -> None:
    """Wait for every process, however long its share of a job takes; `accelerator.wait_for_everyone` gives up after PATIENCE."""
    gathered(accelerator, [])


def gathered(accelerator: Accelerator, items: list[Any]) -> list[Any]:
    """The items of all processes, on each of them. They wait for the slowest however long it takes."""
    if accelerator.num_processes == 1:
        return items
    tables: list[Any] = [None] * accelerator.num_processes
    with _patient_group() as group:
        torch.distributed.all_gather_object(tables, items, group=group)
    return [item for table in tables for item in table]


def _find_deepspeed_config() -> None:
    """A relative deepspeed_config_file counts from the repository, so that a launch works from any folder."""
    name = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
    file = os.environ.get(name, "")
    if file and not Path(file).exists() and (ROOT / file).is_file():
        os.environ[name] = str(ROOT / file)


def uses_deepspeed(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def deepspeed_grad_norm(accelerator: Accelerator) -> float | None:
    """Norm of the whole gradient of the step that DeepSpeed's last backward made (an older accelerate does not tell it)."""
    return accelerator.deepspeed_engine_wrapped.engine.get_global_grad_norm()


def autocast(accelerator: Accelerator, config: Any) -> torch.autocast:
    """bf16 arithmetic where the config asks for it; weights and results that matter stay fp32."""
    return torch.autocast(accelerator.device.type, torch.bfloat16, enabled=config.precision is Precision.bf16)


@contextlib.contextmanager
def matrix_products(config: Any) -> Iterator[None]:
    """Inside, float32 matrix products take TF32 for precision=tf32 and are exact else; afterwards as they were."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if config.precision is Precision.tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


GRAPHS = 64  # of one kind of block: its widths, sizes and modes; torch would give up after 8


def compile_blocks(model: nn.Module, accelerator: Accelerator) -> None:
    """torch.compile each repeated block of a model in place, so that names in checkpoints and exports stay.

    Call it after the copies that shall not be compiled. Raises ValueError for a model that names no such blocks, and under
    ZeRO-3, which gathers the weights of single layers.
    """
    if not getattr(model, "_repeated_blocks", None):
        raise ValueError(f"compile=true: a {type(model).__name__} names no repeated blocks; compile=false")
    if uses_deepspeed(accelerator) and accelerator.state.deepspeed_plugin.zero_stage == 3:
        raise ValueError(
            "compile=true: not with ZeRO-3; use DDP or ZeRO-2 (configs/accelerate), or compile=false"
        )
    # Each block is compiled once for each size of its input, up to GRAPHS.
    settings = torch._dynamo.config
    limit = "recompile_limit" if hasattr(settings, "recompile_limit") else "cache_size_limit"  # torch 2.6
    setattr(settings, limit, max(GRAPHS, getattr(settings, limit)))
    model.compile_repeated_blocks(dynamic=False)


def finite_or_nan(loss: torch.Tensor) -> torch.Tensor:
    """The loss itself; one that is not finite gets a NaN gradient, whatever its own would be.

    So the guard on the gradient norm, which all processes share, sees it before the update and no process waits for
    another's verdict.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


def accumulation_steps(global_batch: int, micro_batch: int, world_size: int) -> int:
    """Micro-batches per update so that micro_batch x world_size x accumulation = global_batch, or ValueError."""
    per_pass = micro_batch * world_size
    if micro_batch < 1 or global_batch % per_pass:
        raise ValueError(
            f"global_batch={global_batch} is not a multiple of micro_batch={micro_batch} x {world_size} processes; "
            f"choose e.g. global_batch={max(1, round(global_batch / max(1, per_pass))) * max(1, per_pass)}"
        )
    return global_batch // per_pass


def same_everywhere(accelerator: Accelerator, value: Any) -> Any:
    """The main process's value, on every process."""
    box = [value]
    if accelerator.num_processes > 1:
        broadcast_object_list(box, from_process=0)
    return box[0]


def send(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on the device, without waiting for what is queued there: that takes page-locked memory on this side."""
    if device.type == "cuda" and value.device.type == "cpu":
        value = value.pin_memory()
    return value.to(device, non_blocking=True)


class Later:
    """A number on its way from the device. `read` waits for it alone, not for what was queued since."""

    def __init__(self, value: torch.Tensor):
        self.value, self.event = value, None
        if value.device.type == "cuda":
            self.value = value.to("cpu", non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record(torch.cuda.current_stream(value.device))

    def read(self) -> float:
        if self.event is not None:
            self.event.synchronize()
        return float(self.value)


def any_process(accelerator: Accelerator, flag: bool) -> Later:
    """Reads above 0 on every process when the flag is true on one."""
    return Later(accelerator.reduce(send(torch.tensor(float(flag)), accelerator.device), "sum"))


def largest_of(accelerator: Accelerator, number: int) -> int:
    """The largest of the processes' numbers, on every process."""
    if accelerator.num_processes == 1:
        return number
    return int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max())


def draw_seed(seed: int, number: int) -> int:
    """Seed of sample `number` of the endless stream: what is random in a step depends on nothing else.

    Not on the batch size, the number of processes, or whether the run was interrupted. splitmix64 of (seed, number).
    """
    mask = (1 << 64) - 1
    z = (seed * 0x9E3779B97F4A7C15 + number * 0xD1342543DE82EF95 + 0x2545F4914F6CDD1D) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) >> 1  # torch.Generator takes 63 bits


def generators(seed: int, numbers: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per sample, seeded by draw_seed."""
    return [torch.Generator().manual_seed(draw_seed(seed, int(n))) for n in numbers]


def normal(draws: list[torch.Generator], shape: Sequence[int], device: torch.device) -> torch.Tensor:
    """(B, *shape) standard normal, row i from its own generator."""
    return send(torch.stack([torch.randn(tuple(shape), generator=g) for g in draws]), device)


# ---- checkpoints under every launch ----------------------------------------------------------------------
#
# DeepSpeed shards weights and optimizer states; they are gathered and scattered here. So a checkpoint has one form:
# written under ZeRO 1, 2 or 3, DDP or one process, it is read by each of them, on any number of processes. DeepSpeed's
# own files are pickles and fit one number of processes only; they are neither written nor read.
# Source: deepspeed.utils.tensor_fragment, the access to full states that DeepSpeed documents.

MOMENTS = ("exp_avg", "exp_avg_sq")


def as_fused(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state_dict as the fused one takes it; older checkpoints of stage one come from another."""
    return state | {"param_groups": [group | {"fused": True} for group in state["param_groups"]]}


def whole_weights(module: nn.Module, change: bool = False) -> contextlib.AbstractContextManager:
    """Inside, the module's parameters are whole on every process; outside ZeRO-3 they always are.

    Every process enters it together. It takes 4 bytes a parameter for a time when no activations are held.
    change: what the first process writes into them holds for all.
    """
    parameters = list(module.parameters())
    if not any(hasattr(p, "ds_id") for p in parameters):
        return contextlib.nullcontext()

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

    # DeepSpeed has its optimizer inside its own, and the moments in shards.
    inner, parameters = model.optimizer.optimizer, list(accelerator.unwrap_model(model).parameters())
    states: dict[int, dict[str, Tensor]] = {}
    if inner.state:  # empty until an update was made
        step = next(iter(inner.state.values()))["step"].cpu()
        for number, parameter in enumerate(parameters):
            # Every process gathers, the main one keeps. Each has a counter of its own: torch counts up every one.
            state = {"step": step.clone()}
            for key in MOMENTS:
                state[key] = deepspeed_utils.safe_get_full_optimizer_state(parameter, key)
            if accelerator.is_main_process:
                states[number] = {key: value.cpu().clone() for key, value in state.items()}
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
    # Empty moments for each shard that this process owns, with the common step.
    zero, inner = model.optimizer, model.optimizer.optimizer
    partitioned = hasattr(zero, "fp32_partitioned_groups_flat")  # ZeRO-3
    flats = zero.fp32_partitioned_groups_flat if partitioned else zero.single_partition_of_fp32_groups
    for flat in flats:
        step = states[0]["step"].to(flat.device if inner.defaults.get("fused") else "cpu").clone()
        inner.state[flat] = {"step": step} | {key: torch.zeros_like(flat) for key in MOMENTS}
    if not partitioned:
        zero._lazy_init_hp_params_optimizer_state()  # what it does itself after its first update
    # Then each parameter's moments; DeepSpeed cuts out what belongs to this process.
    for number, parameter in enumerate(accelerator.unwrap_model(model).parameters()):
        for key in MOMENTS:
            _give(parameter, states[number][key].to(accelerator.device), key)


def _give(parameter: nn.Parameter, value: Tensor, key: str) -> None:
    """Hand a whole moment to DeepSpeed's optimizer, which keeps this process's part of it."""
    if not hasattr(parameter, "ds_id"):
        deepspeed_utils.safe_set_full_optimizer_state(parameter, value, key)
        return
    # DeepSpeed's own cut fails where a tensor does not divide evenly; its last piece is padded with zeros.
    size, group = parameter.ds_tensor.numel(), parameter.ds_process_group
    missing = size * torch.distributed.get_world_size(group) - value.numel()
    padded = nn.functional.pad(value.flatten(), (0, missing))
    own = padded.narrow(0, size * torch.distributed.get_rank(group), size)
    deepspeed_utils.safe_set_local_optimizer_state(parameter, own, key)
