"""Which block of a model lies on which of several devices: arithmetic of sizes alone, without torch.

Blocks stay in their order, neighbours together, so that hidden states move on once a device. All that is no block
(embeddings, the last norm, the head) lies on the first device, and hidden states come back to it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

MODEL_GPUS = "RANKWISE_MODEL_GPUS"
"""The variable that tells a process over how many GPUs it may spread a model."""


def placed_blocks(blocks: Sequence[float], around: float, devices: int) -> list[int]:
    """The device of each block, so that the fullest device holds as little as it can.

    Args:
        blocks: bytes of each block, in the order of the forward pass.
        around: bytes of all that is no block, on device 0.
        devices: how many there are; the last ones stay empty if there are more than anything can be done with.

    Returns:
        A number from 0 to `devices` - 1 for each block; it never falls.
    """
    sums = [0.0]
    for size in blocks:
        sums.append(sums[-1] + size)
    runs = {end - start for i, start in enumerate(sums) for end in sums[i:]}
    caps = sorted(runs | {around + size for size in sums})
    least = bisect_left(caps, True, key=lambda cap: _under(blocks, around, devices, cap) is not None)
    places = _under(blocks, around, devices, caps[least])
    assert places is not None  # the largest cap holds everything on the first device
    return places


def fullest(blocks: Sequence[float], around: float, devices: int) -> float:
    """Bytes on the fullest device, blocks being placed as `placed_blocks` does."""
    held = [around] + [0.0] * (devices - 1)
    for size, device in zip(blocks, placed_blocks(blocks, around, devices), strict=True):
        held[device] += size
    return max(held)


def _under(blocks: Sequence[float], around: float, devices: int, cap: float) -> list[int] | None:
    """One device filled after the other up to a cap, or None if they do not hold all."""
    places, device, held = [], 0, around
    if around > cap:
        return None
    for size in blocks:
        while held + size > cap * (1 + 1e-12):  # sums in another order differ by rounding
            device, held = device + 1, 0.0
            if device == devices or size > cap * (1 + 1e-12):
                return None
        held += size
        places.append(device)
    return places
