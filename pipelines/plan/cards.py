"""Graphics cards, and how long counted work takes on them.

Rates are the makers' figures for dense work (NVIDIA's data sheets of the A100, H100 SXM, H200, L40S, RTX 3090 and
RTX 4090 architecture papers); memory is what a program can allocate, a little less than the name says.
"""

from dataclasses import dataclass

from data.core.lazy import lazy
from pipelines.plan.cost import Cost, Work

torch = lazy("torch")

# Fitted to one H200 (docs/results/gpu): with them most steps are within 20 % of their measured time, all within 26 %
SHARE = 0.5  # of a card's arithmetic that convolutions and products reach
BANDWIDTH_SHARE = 0.7  # of the data sheet's bandwidth that a pass over a tensor reaches
OPERATION_S = 5e-6  # of the host for each operation
KERNEL_S = 2e-6  # of the device for the smallest kernel


@dataclass(frozen=True)
class Card:
    """half, tf32, fp32: operations a second of dense bf16, TF32 and float32; bandwidth: bytes a second."""

    name: str
    gib: float
    half: float
    tf32: float
    fp32: float
    bandwidth: float


_CARDS = (
    Card("h100", 79.1, 989e12, 495e12, 67e12, 3.35e12),
    Card("h200", 139.8, 989e12, 495e12, 67e12, 4.8e12),
    Card("a100", 79.2, 312e12, 156e12, 19.5e12, 2.04e12),
    Card("a100-40", 39.4, 312e12, 156e12, 19.5e12, 1.56e12),
    Card("l40s", 44.4, 362e12, 183e12, 91.6e12, 0.864e12),
    Card("rtx4090", 23.6, 165e12, 82.6e12, 82.6e12, 1.008e12),
    Card("rtx3090", 23.6, 71e12, 35.6e12, 35.6e12, 0.936e12),
)
CARDS = {card.name: card for card in _CARDS}


def find_card(name: str) -> Card:
    """The card of that name, or the one in this machine for "". ValueError for a name that is not in the table."""
    if not name:
        return card_here() or CARDS["h100"]
    if name.lower() not in CARDS:
        raise ValueError(f"card={name}: known are {', '.join(CARDS)}")
    return CARDS[name.lower()]


def card_here() -> Card | None:
    """The row of the GPU in this machine, None without one or for one that is not in the table."""

    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name().lower().replace(" ", "")
    found = [key for key in CARDS if key.split("-")[0] in name]
    return CARDS[found[0]] if found else None


def seconds(cost: Cost, card: Card, tf32: bool = False) -> float:
    """Time of the work on the card: each operation is bound by arithmetic, by memory or by its launch; and a step by its host.

    tf32: float32 products run as TF32 (convolutions do by torch's default).
    """
    device = sum(_device_seconds(work, card, tf32) * n for work, n in cost.works.items())
    return max(device, cost.operations * OPERATION_S)


def _device_seconds(work: Work, card: Card, tf32: bool) -> float:
    # cuDNN takes TF32 for float32 convolutions; for products only where the program allows it.
    rates = {"half": card.half, "conv32": card.tf32, "matmul32": card.tf32 if tf32 else card.fp32}
    arithmetic = work.flops / (SHARE * rates.get(work.unit, card.fp32))
    return max(arithmetic, work.bytes / (BANDWIDTH_SHARE * card.bandwidth), work.kernels * KERNEL_S)
