"""The meter: medians, waiting, warm-up, null memory on a CPU, the slowest of several ranks."""

import json
import time

import pytest
import torch
import torch.multiprocessing as mp

from pipelines.efficiency import Meter, encoder_speed, memory_peaks, quantile


def run_steps(meter: Meter, seconds: list[float], wait: float = 0.0) -> None:
    for second in seconds:
        with meter.data_wait():
            time.sleep(wait)
        time.sleep(second)
        meter.step()


def test_speed_is_that_of_the_median_step_after_the_warmup():
    meter = Meter("cpu", "cached", clips_per_step=4, warmup=2)
    run_steps(meter, [0.3, 0.0])
    assert meter.summary()["tspeed"] is None
    run_steps(meter, [0.02] * 5 + [0.3] + [0.02] * 5)
    result = meter.summary()
    assert result["timed_steps"] == 11
    assert 0.02 <= result["step_s"] < 0.05
    assert result["tspeed"] == pytest.approx(1 / result["step_s"])
    assert result["clips_per_s"] == pytest.approx(4 / result["step_s"])
    assert result["mean_s"] > result["step_s"]
    assert result["p10_s"] <= result["step_s"] <= result["p90_s"]
    assert result["mode"] == "cached"


def test_waiting_for_data_is_a_share_of_the_time():
    meter = Meter("cpu", "online", clips_per_step=1, warmup=1)
    run_steps(meter, [0.01] * 6, wait=0.03)
    assert 0.6 < meter.summary()["data_wait_share"] < 0.85
    assert Meter("cpu", "online", 1).summary()["data_wait_share"] is None


def test_a_paused_step_is_not_timed():
    meter = Meter("cpu", "cached", clips_per_step=1, warmup=1)
    run_steps(meter, [0.01, 0.01])
    meter.pause()
    run_steps(meter, [0.2])
    run_steps(meter, [0.01, 0.01])
    result = meter.summary()
    assert result["timed_steps"] == 3
    assert result["p90_s"] < 0.1


def test_memory_is_null_on_a_cpu_and_the_summary_is_json():
    meter = Meter("cpu", "cached", clips_per_step=1, warmup=1)
    run_steps(meter, [0.0, 0.0, 0.0])
    result = json.loads(json.dumps(meter.summary()))
    assert result["tmem"] == {"allocated_mib": None, "reserved_mib": None, "device_mib": None}
    assert result["tmem_run"] == result["tmem"]
    assert set(meter.scalars()) == {"eff/tspeed", "eff/data_wait_share"}


def test_the_window_bounds_what_is_kept():
    meter = Meter("cpu", "cached", clips_per_step=1, warmup=1, window=5)
    run_steps(meter, [0.0] * 50)
    assert meter.summary()["timed_steps"] == 5


def test_a_wrong_mode_is_refused():
    with pytest.raises(ValueError, match="online, cached"):
        Meter("cpu", "mixed", 1)
    with pytest.raises(ValueError, match="at least 1"):
        Meter("cpu", "cached", 0)


def test_quantiles_interpolate():
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([0.0, 10.0], 0.9) == pytest.approx(9.0)
    assert quantile([5.0], 0.1) == 5.0


def _rank(rank: int, path: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)
    meter = Meter("cpu", "cached", clips_per_step=2, warmup=1)
    run_steps(meter, [0.01 if rank == 0 else 0.08] * 4)
    with open(f"{path}/{rank}.json", "w") as file:
        json.dump(meter.summary(), file)
    torch.distributed.destroy_process_group()


def test_the_slowest_rank_gives_the_speed_and_all_ranks_agree(tmp_path):
    mp.start_processes(_rank, (str(tmp_path),), nprocs=2, start_method="fork")
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert results[0] == results[1]
    assert results[0]["step_s"] >= 0.08
    assert results[0]["ranks"][0]["step_s"] < 0.06


def test_encoder_speed_counts_clips_and_states_its_input():
    calls = []

    def encode(clip):
        calls.append(clip.shape)
        time.sleep(0.01)

    result = encoder_speed(encode, torch.zeros(2, 3, 5, 8, 8), warmup=2, repeats=6)
    assert len(calls) == 8
    assert result["cspeed"] == pytest.approx(2 / result["median_s"])
    assert 100 < result["cspeed"] <= 200
    assert (result["batch"], result["frames"], result["dtype"]) == (2, 5, "float32")
    assert result["allocated_mib"] is None


def test_out_of_memory_is_a_result_and_not_a_crash():
    def encode(clip):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    result = encoder_speed(encode, torch.zeros(4, 3, 5, 8, 8))
    assert result["cspeed"] is None
    assert result["out_of_memory"] == "OOM at b=4"
    with pytest.raises(ValueError, match="B, 3, T, H, W"):
        encoder_speed(encode, torch.zeros(3, 5, 8, 8))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="not run: needs a CUDA device")
def test_memory_is_counted_in_mib_on_a_gpu():
    device = torch.device("cuda")
    meter = Meter(device, "cached", clips_per_step=1, warmup=1)
    for _ in range(3):
        torch.zeros(64 * 2**20, dtype=torch.uint8, device=device)
        meter.step()
    result = meter.summary()["tmem"]
    assert 64 <= result["allocated_mib"] <= result["reserved_mib"] <= result["device_mib"]
    assert memory_peaks(device)["reserved_mib"] % 2 == 0
