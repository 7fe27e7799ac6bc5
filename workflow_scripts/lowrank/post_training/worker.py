"""What one process of a post-training does."""

from __future__ import annotations

from typing import Any

from lowrank.jobs.share import Share
from lowrank.post_training.job import TrainingJob
from lowrank.post_training.train import train


def train_share(arguments: dict[str, Any], share: Share) -> None:
    """Train together with the other processes; what is learnt and the progress lie in the job's folder.

    Args:
        arguments: a `TrainingJob`.
        share: which process this is; the loop asks torch.distributed itself.
    """
    train(TrainingJob(**arguments))
