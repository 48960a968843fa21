"""What compiled blocks save, as the planner models it (pipelines/plan/compiled.py)."""

from pipelines.plan import programs
from pipelines.train_latte import LatteTrainer, TrainLatteConfig
from pipelines.train_vae import TrainVAEConfig, VAETrainer
from pipelines.training.config import load
from tests.gpu_rules.test_steps import STAGE1, STAGE2

WIDE = [
    "precision=bf16",
    "denoiser.hidden_size=192",
    "denoiser.depth=6",
    "vae.name=sd2_1",
    "source.name=ucf101",
]
LARGE = [
    "precision=bf16",
    "clip.size=64",
    "model.block_out_channels=[32,32,64,64]",
    "loss.perceptual_weight=0",
]
COMPILED = ["compile=true"]


def test_compiled_blocks_take_fewer_kernels_less_traffic_and_less_memory():
    """Modelled: torch's own graphs of the blocks, elementwise work fused (pipelines/plan/compiled.py)."""

    def of(function, trainer, config, settings):
        plain, compiled = (
            function(trainer, load(config, None, [*settings, *more])) for more in ([], COMPILED)
        )
        assert compiled.syncs == []
        return plain.tasks[0].cost, compiled.tasks[0].cost

    plain, compiled = of(programs.stage_two, LatteTrainer, TrainLatteConfig, [*STAGE2, *WIDE])
    assert compiled.kernels < 0.75 * plain.kernels
    assert compiled.operations < 0.55 * plain.operations
    assert compiled.bytes < plain.bytes
    assert compiled.flops == plain.flops

    plain, compiled = of(programs.stage_one, VAETrainer, TrainVAEConfig, [*STAGE1, *LARGE])
    assert compiled.bytes < 0.6 * plain.bytes
    assert compiled.peak < 0.75 * plain.peak
    assert compiled.layout_copies < 0.3 * plain.layout_copies
    assert compiled.flops == plain.flops
