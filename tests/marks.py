"""Marks of tests that are about a machine with a GPU, or about one without."""

from __future__ import annotations

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
NO_GPU = pytest.mark.skipif(HAS_GPU, reason="is about what happens where torch sees no GPU, and here it sees one")
ON_CPU = pytest.mark.skipif(
    HAS_GPU, reason="starts workers on processors; where there is a GPU each worker takes one, and two find no second"
)
NEEDS_GPU = pytest.mark.skipif(not HAS_GPU, reason="asks the GPU itself what it can do, and torch sees none here")
