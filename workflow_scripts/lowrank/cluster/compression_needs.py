"""What compressing a model needs, from its sizes and a method's preset. See `resources`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from lowrank.cluster.needs import PROGRAM, Need, Work, plus
from lowrank.cluster.sizes import (
    DOUBLE,
    LOSS_TOKENS,
    SINGLE,
    STATISTICS_TOKENS,
    Sizes,
    batch_tokens,
    decomposition,
    in_dtype,
)
from lowrank.compression.branches import Structure
from lowrank.config.low_rank import StackedSettings
from lowrank.config.presets import ANY_MULTIPLE, Calibration, MethodSettings
from lowrank.model.families import LinearModule
from lowrank.ranks.budget import Budget

ON_PROCESSORS = ("dense", "flap")
"""Kinds of methods that have nothing to compute that a GPU would help with."""

TAKE_GRADIENTS = ("fwsvd", "llm-pruner", "obd-llm", "zs-svd")
"""Kinds of methods that take loss gradients of weights, if they read calibration windows."""

ALL_AT_ONCE = ("llrc", "slicegpt", "zs-svd")
"""Kinds of methods that have all new layers before one takes its place; others make a layer or a block each time."""

STORE_AS_WRITTEN = ("slicegpt",)
"""Those whose new layers wait in the model's dtype; factors of the others do in float64, not yet cut."""

TRAIN_MASKS = ("llrc",)
"""Kinds of methods that train masks over all directions of all matrices."""

BLOCK_BY_BLOCK = ("slicegpt",)
"""Kinds of methods that run the model with one block at a time on the device."""

INVERT_NEURONS = ("modegpt",)
"""Kinds of methods that invert the second moment of all neurons of a block."""


def compression_need(
    method: MethodSettings,
    dense: Sizes,
    compressed: Sizes,
    calibration: Calibration | None,
    bases: float,
    projections: float,
) -> Need:
    """Compressing a model.

    Args:
        method: the preset.
        dense, compressed: the model before and after.
        calibration: what the preset names.
        bases: bytes of the bases of a block, if the preset reads some.
        projections: operations of those that are not in the files of bases.
    """
    if method.kind == "dense":  # its files are linked
        return Need(host={"program": PROGRAM, "weights": dense.weights}, work=Work(disk=2 * dense.weights))
    if method.covariance is None:
        need = _decomposed(method, dense, compressed, calibration)
    else:
        need = _sliced(method, dense, compressed, bases, projections)
    if getattr(method, "identity_block", False):
        need = _with_identity_blocks(need, dense, compressed)
    if method.covariance is not None and "tokens" in method.needs and calibration:
        need = _with_influence(need, method, dense, calibration)
    return need


def _sliced(method: MethodSettings, dense: Sizes, compressed: Sizes, bases: float, projections: float) -> Need:
    """A method that takes its pairs from bases that are there."""
    all_bases = dense.shape.layers * bases
    need = Need(
        host={"program": PROGRAM, "weights": dense.weights, "a block's bases": bases},
        disk=compressed.weights,
        work=Work(single=projections, disk=dense.weights + all_bases + 2 * compressed.weights),
    )
    return _with_neurons(need, method, dense) if method.eliminates else need


def _with_identity_blocks(need: Need, dense: Sizes, compressed: Sizes) -> Need:
    """What it takes besides to put an identity block into each pair: an elimination of its second factor, in float64.

    A decomposition takes more of a GPU, and is over by then.
    """
    pairs = [(m.out_features, m.in_features, _rank_with_identity_block(m, compressed.kept)) for m in dense.block]
    work = sum(r**2 * (m - r / 3) + (m - r) * r**2 + 2 * r**2 * n for m, n, r in pairs)
    largest = DOUBLE * max(4 * m * r + 2 * r * n for m, n, r in pairs)
    return replace(
        need,
        gpu=True,
        device=need.device or {"an identity block": largest},
        work=plus(need.work, double=dense.shape.layers * work),
    )


def _rank_with_identity_block(module: LinearModule, kept: float) -> float:
    """The rank of which r (m + n) - r (r - 1) is that share of a matrix."""
    both = module.out_features + module.in_features + 1
    return (both - math.sqrt(both**2 - 4 * min(1.0, kept) * module.parameters)) / 2


def elimination_need(dense: Sizes, multiple: int | None, windows: int) -> Need:
    """Predicting what removing neurons costs.

    Args:
        dense: the model.
        multiple: of which the numbers of neurons are that pairs are tried of; None: the elimination alone.
        windows: of the calibration.
    """
    shape, layers = dense.shape, dense.shape.layers
    cube, read = shape.intermediate**3, dense.statistics(windows) + dense.output_moments(SINGLE)
    device, widths = {"elimination": _squares_of_neurons(dense)}, []
    if multiple:
        device |= {"a decomposition": decomposition(dense.block)}
        widths = Structure.of(Budget.of(shape)).mlp.tried(multiple)
    double = sum((dense.narrow_decompositions(width) for width in widths), 0.0) if multiple else 4.0 * layers * cube
    stored = DOUBLE * (2 * shape.intermediate + (3 if dense.gated else 2) * sum(widths))
    return Need(
        gpu=True,
        device=device,
        host={
            "program": PROGRAM,
            "a block's weights": dense.block_weights / layers,
            "a block's statistics": read + 2 * dense.moments(DOUBLE),
        },
        disk=layers * stored,
        work=Work(
            double=double + len(widths) * layers * cube,  # a refit each
            disk=dense.weights + layers * (dense.statistics_file(windows) + dense.gradients_file),
        ),
    )


def _squares_of_neurons(dense: Sizes) -> float:
    """The correlation of a block's neurons, its inverse and what an update adds, while the covariances of both inputs
    are there; G at the output of one of the first matrices, whole and in part; weights, and what is left of them."""
    shape = dense.shape
    return DOUBLE * (7 * shape.intermediate**2 + 2 * shape.hidden**2 + 8 * shape.intermediate * shape.hidden)


def _with_neurons(sliced: Need, method: MethodSettings, dense: Sizes) -> Need:
    """What it takes besides to remove neurons: a block's covariance, the refit, and the bases that were picked."""
    shape = dense.shape
    pairs = dense.narrow_decompositions(shape.intermediate) if method.eliminates != ANY_MULTIPLE else 0
    read = dense.statistics(0) + dense.output_moments(SINGLE)
    narrower = SINGLE * dense.linears / shape.layers
    host = {"a block's statistics": read + 2 * dense.moments(DOUBLE), "a block's narrower weights": narrower}
    return replace(
        sliced,
        gpu=True,
        device={"refit": _squares_of_neurons(dense), "a decomposition": decomposition(dense.block)},
        host={**sliced.host, **host},
        work=plus(sliced.work, double=shape.layers * shape.intermediate**3 + pairs, disk=2 * shape.layers * read),
    )


def _with_influence(need: Need, method: MethodSettings, dense: Sizes, calibration: Calibration) -> Need:
    """What it takes besides to run the model on some windows, when nothing else is on the device."""
    length = calibration.length
    running = {"weights": dense.weights, "activations": dense.activations(batch_tokens(length, STATISTICS_TOKENS))}
    tokens = min(getattr(method, "windows", calibration.windows), calibration.windows) * length
    work = plus(need.work, in_dtype(dense, dense.forward(tokens, length, head=False)))
    if sum(running.values()) <= need.device_bytes:
        return replace(need, work=work)
    # Afterwards the weights are in main memory again, and one GPU does the rest.
    return replace(
        need,
        gpu=True,
        device=running,
        blocks=dense.shape.layers,
        split={"weights": dense.block_weights},
        alone=need.device_bytes,
        work=work,
    )


def _decomposed(method: MethodSettings, dense: Sizes, sizes: Sizes, calibration: Calibration | None) -> Need:
    """A method that decomposes or prunes by itself, with gradients or hidden states if it reads the calibration
    windows. An upper estimate for all of them."""
    on_device, split, returning = computes_on_device(method), dict[str, float](), 0.0
    matrices = _stacked(method, dense)
    device = {"a decomposition": float(decomposition(matrices))} if on_device else {}
    if method.kind in INVERT_NEURONS:  # the moment, what damps it, its root and its inverse, with room for each
        device["a decomposition"] = max(device["a decomposition"], 7 * DOUBLE * dense.shape.intermediate**2)
    host = {"program": PROGRAM, "weights": dense.weights}
    in_place, as_written = method.kind not in ALL_AT_ONCE, method.kind in STORE_AS_WRITTEN
    blocks_together = getattr(method, "blocks_together", 1)
    if in_place:
        host |= {"a block's new layers": DOUBLE * dense.linears / dense.shape.layers * blocks_together}
    else:
        host |= {"new weights": sizes.weights} if as_written else {"factors": DOUBLE * dense.linears}
    work = Work(disk=dense.weights + 2 * sizes.weights, seconds=120)
    work = plus(work, double=method.decompositions * dense.decompositions() if on_device else 0)
    if "statistics" in method.needs:
        host["a block's statistics"] = 2 * dense.moments(DOUBLE) * blocks_together
        work = plus(work, disk=dense.shape.layers * dense.statistics_file(0))
    if "gradients" in method.needs:
        host["a block's gradients"] = dense.output_moments(SINGLE)
        work = plus(work, disk=dense.shape.layers * dense.gradients_file)
    if "tokens" in method.needs and calibration:
        rounds = 1 + getattr(method, "corrections", 0)
        windows = getattr(method, "windows", None) or getattr(method, "sequences", None) or calibration.windows
        length = getattr(method, "length", None) or calibration.length
        tokens = min(windows, calibration.windows) * length
        if method.kind in TAKE_GRADIENTS:  # before it decomposes anything
            device = {"sums": SINGLE * dense.linears, "activations": dense.training_activations(length)}
        else:
            device["activations"] = dense.activations(batch_tokens(length, LOSS_TOKENS))
        block_by_block = method.kind in BLOCK_BY_BLOCK
        device["weights"] = dense.block_weights / dense.shape.layers if block_by_block else dense.weights
        if method.kind in TRAIN_MASKS:
            device |= _masks(method, dense, length)
        if not block_by_block:
            split = _split(method, dense, device)
        if rounds > 1:  # the dense weights, their gradients and factors wait for the next truncation
            host |= {"gradients": SINGLE * dense.linears, "next factors": DOUBLE * dense.linears}
        elif not block_by_block:
            del host["weights"]
            if in_place or as_written:  # factors in float64 leave room for what comes back
                returning = device["weights"] + device.get("sums", 0.0)
        if method.kind not in (*TRAIN_MASKS, *TAKE_GRADIENTS):  # which make them anew in each pass
            host["hidden states"] = 2 * dense.hidden(tokens)
        # A search by single layers (ASVD) runs the blocks from a layer's own on: half of them on average.
        trials = len(getattr(method, "kept", ())) * dense.shape.layers * len(dense.block)
        refined = getattr(method, "refine", 0)  # passes forward and backward through each block
        if refined:  # the pairs of a block, their gradients and both moments of AdamW
            device["training a block"] = 4 * SINGLE * dense.linears / dense.shape.layers
        passes = 4 * rounds + 3 * refined + (trials / 2 if getattr(method, "allocation", None) == "strs" else 0)
        if method.kind in TRAIN_MASKS:  # forward in both models, backward in one of about twice the size
            tokens, passes = getattr(method, "steps", 0) * getattr(method, "batch_size", 1) * length, 7
        work = plus(work, in_dtype(dense, passes * dense.forward(tokens, length)))
    return Need(
        gpu=on_device,
        device=device,
        host=host,
        blocks=dense.shape.layers,
        split=split,
        remedy="Nothing of it can be divided among GPUs: take larger ones, or another method.",
        loading=dense.weights,
        returning=returning,
        disk=sizes.weights,
        work=work,
    )


def _split(method: MethodSettings, dense: Sizes, device: Mapping[str, float]) -> dict[str, float]:
    """What lies with the blocks where they lie on several GPUs; who takes gradients keeps their sums there."""
    with_blocks: tuple[str, ...] = ("sums", "activations") if method.kind in TAKE_GRADIENTS else ()
    if method.kind in TRAIN_MASKS:
        with_blocks = ("all directions", "activations")
    return {"weights": dense.block_weights} | {part: device[part] for part in with_blocks}


def _stacked(method: MethodSettings, dense: Sizes) -> list[LinearModule]:
    """The matrices that a method decomposes in a block: those of the block, or stacks of them."""
    if not isinstance(method, StackedSettings):
        return dense.block
    blocks = Budget.of(dense.shape.model_copy(update={"layers": min(method.blocks_together, dense.shape.layers)}))
    return [stack.module for stack in method.stacks(blocks)]


def _masks(method: MethodSettings, dense: Sizes, length: int) -> dict[str, float]:
    """What training masks over all directions takes on a device, besides the dense model."""
    directions = [(min(m.out_features, m.in_features), m.out_features + m.in_features) for m in dense.block]
    return {
        "all directions": dense.number * dense.shape.layers * sum(k * both for k, both in directions),
        "masks": 8 * SINGLE * dense.shape.layers * sum(k for k, _ in directions),
        "activations": dense.training_activations(getattr(method, "batch_size", 1) * length),
    }


def computes_on_device(method: MethodSettings) -> bool:
    """Whether compressing by this preset runs on a GPU: not if it only slices bases that are there, as they are."""
    reads = bool({"gradients", "tokens"} & set(method.needs))
    changes = reads or getattr(method, "identity_block", False)
    return method.kind not in ON_PROCESSORS and (method.covariance is None or changes)
