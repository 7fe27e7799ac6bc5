"""What one process of a post-training does."""

from __future__ import annotations

from typing import Any

from lowrank.post_training.job import TrainingJob
from lowrank.post_training.train import train
from lowrank.share import Share


def train_share(arguments: dict[str, Any], share: Share) -> None:
    """Train together with the other processes; what is learnt and the progress lie in the job's folder.

    Args:
        arguments: a `TrainingJob`.
        share: which process this is; the loop asks torch.distributed itself.
    """
    train(TrainingJob(**arguments))
