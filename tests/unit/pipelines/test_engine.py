"""What a launch brings along: accelerate's own accumulation, a cuDNN that is wrong, a main process that takes long."""

import datetime
import functools
import math
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp
from accelerate.state import AcceleratorState

from pipelines.training import distributed as engine
from pipelines.training.settings import Precision
from pipelines.training.trainer import Trainer

CONFIG = SimpleNamespace(
    global_batch=8,
    micro_batch=2,
    precision=Precision.fp32,
    grad_clip=0.0,
    log_with="tensorboard",
    run_dir="x",
)


def test_accelerate_s_own_accumulation_is_refused_when_it_is_another(monkeypatch):
    assert engine.make_accelerator(CONFIG).gradient_accumulation_steps == 4
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert engine.make_accelerator(CONFIG).gradient_accumulation_steps == 4
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    with pytest.raises(ValueError, match=r"make 4 micro-batches an update, accelerate was told 1 .*say auto"):
        engine.make_accelerator(CONFIG)
    engine.make_accelerator()  # without an update there is nothing to accumulate


@pytest.mark.parametrize(
    ("version", "bad"), [(90701, 0), (90800, 1), (91002, 1), (91400, 1), (91500, 0), (92400, 0), (None, 0)]
)
def test_a_cudnn_with_broken_3d_convolutions_is_named_at_the_start(version, bad, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    try:
        engine.make_accelerator()
    except (RuntimeError, AssertionError):  # there is no card behind it
        pass
    finally:  # accelerate would remember a GPU for the tests to come
        AcceleratorState._reset_state(reset_partial_state=True)
    assert ("install cuDNN 9.15" in caplog.text) == bool(bad)


def _rank(rank: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    engine.PATIENCE = datetime.timedelta(seconds=2)
    accelerator = engine.make_accelerator()
    with engine.main_process_first(accelerator):
        with open(f"{folder}/order", "a") as file:
            file.write(f"{rank} begins\n")
        if rank == 0:
            time.sleep(6)  # a first scan
        with open(f"{folder}/order", "a") as file:
            file.write(f"{rank} ends\n")
    accelerator.wait_for_everyone()
    if rank == 1:
        time.sleep(6)  # a share that takes longer
    assert engine.gathered(accelerator, [rank]) == [0, 1]


class Clips(list):
    name = list.__getitem__

    def label(self, number: int) -> int:
        return 0


def _rank_that_lists_videos(rank: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    accelerator = engine.make_accelerator()
    assert engine.open_everywhere(accelerator, lambda: Clips("ab")) == ["a", "b"]

    def another_arrives() -> Clips:
        return Clips(("ab", "abc")[rank])

    with pytest.raises(ValueError, match="process 1 sees 3 videos, the main one 2, .*start again"):
        engine.open_everywhere(accelerator, another_arrives)
    with pytest.raises(ValueError, match="process 1 sees 2 videos, the main one 2, or others"):
        engine.open_everywhere(accelerator, lambda: Clips(("ab", "ba")[rank]))

    def unreadable(where: int) -> Clips:
        if rank == where:
            raise OSError("disk gone")
        return Clips("ab")

    for where in (0, 1):
        kind, said = (
            (OSError, "^disk gone") if rank == where else (ValueError, f"^process {where}: disk gone")
        )
        with pytest.raises(kind, match=said):
            engine.open_everywhere(accelerator, functools.partial(unreadable, where))
    Path(folder, str(rank)).touch()


@pytest.mark.distributed
def test_processes_that_see_different_videos_stop(tmp_path, monkeypatch):
    from tests.programs.test_distributed import free_port

    monkeypatch.setenv("MASTER_PORT", free_port())
    mp.start_processes(_rank_that_lists_videos, (str(tmp_path),), nprocs=2, start_method="spawn")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


@pytest.mark.distributed
def test_a_first_scan_may_take_longer_than_the_patience_of_the_process_group(tmp_path, monkeypatch):
    from tests.programs.test_distributed import free_port

    monkeypatch.setenv("MASTER_PORT", free_port())
    mp.start_processes(_rank, (str(tmp_path),), nprocs=2, start_method="spawn")
    lines = (tmp_path / "order").read_text().splitlines()
    assert lines == ["0 begins", "0 ends", "1 begins", "1 ends"]


@pytest.mark.parametrize("warmup", [False, True])
def test_the_average_follows_its_decay_and_a_warm_up_raises_it(warmup):
    settings = SimpleNamespace(ema_warmup=warmup)
    trainer, model = Trainer(settings, None), torch.nn.Linear(1, 1, bias=False)
    trainer.ema = SimpleNamespace(module=torch.nn.Linear(1, 1, bias=False), decay=0.5)
    torch.nn.init.ones_(model.weight)
    torch.nn.init.zeros_(trainer.ema.module.weight)
    seen = []
    for trainer.step in range(20):
        trainer.update_ema(model, torch.tensor(True))
        seen.append(trainer.ema.module.weight.item())
    decays = [min(0.5, (1 + n) / (10 + n)) if warmup else 0.5 for n in range(20)]
    assert seen == pytest.approx([1 - math.prod(decays[: n + 1]) for n in range(20)], abs=1e-6)
    assert seen[0] == pytest.approx(0.9 if warmup else 0.5)
