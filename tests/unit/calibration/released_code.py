"""The pooled covariance as the paper's released code computes it, in our own words; the library does not use it.

The code walks over the sequences and keeps, for those of the current group, the number of tokens, their mean and their
scatter. Two sets of tokens with means a and b, n and t tokens, have the scatter

    S = S_a + S_b + (n t / (n + t)) (b - a) (b - a)'

together. The released code takes b minus the mean of *both* sets for b - a, which is n / (n + t) of it. A group's
covariance joins the average when its last sequence was seen; a group that is not full never does.
"""

from __future__ import annotations

import numpy as np

SEQUENCES_PER_GROUP = 32


def group_scatter(sequences: np.ndarray, faulty: bool = True) -> np.ndarray:
    """Scatter of the tokens of s sequences (s x t x n) by the running update; without the error if not `faulty`."""
    count, mean = 0, np.zeros(sequences.shape[2])
    scatter = np.zeros((sequences.shape[2],) * 2)
    for sequence in sequences:
        tokens, own = len(sequence), sequence.mean(axis=0)
        together = (count * mean + tokens * own) / (count + tokens)
        step = own - (together if faulty else mean)
        inside = sequence - own
        scatter += inside.T @ inside + count * tokens / (count + tokens) * np.outer(step, step)
        count, mean = count + tokens, together
    return scatter


def pooled_covariance(sequences: np.ndarray, per_group: int = SEQUENCES_PER_GROUP, faulty: bool = True) -> np.ndarray:
    """The average of the covariances of all full groups; zero if there is none."""
    average = np.zeros((sequences.shape[2],) * 2)
    full = len(sequences) // per_group
    for group in range(full):
        part = sequences[group * per_group : (group + 1) * per_group]
        average += group_scatter(part, faulty) / (per_group * sequences.shape[1] - 1) / full
    return average
