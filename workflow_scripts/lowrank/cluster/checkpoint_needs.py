"""What post-training and evaluating a checkpoint need, from its sizes and a preset. See `resources`."""

from __future__ import annotations

from dataclasses import replace

from lowrank.cluster.needs import GIB, PROGRAM, Need, plus
from lowrank.cluster.sizes import (
    HEAD_TOKENS,
    LOSS_TOKENS,
    SINGLE,
    STATISTICS_TOKENS,
    Sizes,
    batch_tokens,
    either,
    in_dtype,
)
from lowrank.config.presets import Calibration
from lowrank.config.suites import CostSuite, GenerationSuite, PerplexitySuite, Suite, ZeroShotSuite
from lowrank.config.tuning import FeatureDistillation, Tuning
from lowrank.config.zero import Zero

HARNESS_LIBRARIES = 0.1 * GIB
TEXTS = 0.05 * GIB
TRAINING_HEAD_TOKENS = 512

# What a config does not tell, and is taken for granted.
CORPUS_TOKENS = 1.0e6
"""Of a corpus that is scored to its end."""
TASK_TOKENS = {
    "hellaswag": 1.7e6,
    "boolq": 0.5e6,
    "piqa": 0.12e6,
    "arc_easy": 0.1e6,
    "arc_challenge": 0.07e6,
    "winogrande": 0.05e6,
    "openbookqa": 0.02e6,
}
"""Of a zero-shot task without a limit, as the log of its evaluation tells by SmolLM2's tokenizer, and some padding."""
DOCUMENT_TOKENS = 100
"""Of a document of a zero-shot task with a limit: of these tasks BoolQ's have the most, 150, and the mean is 66."""
INSTRUCTION_ROWS = 52_000
PROMPT_TOKENS = 256
DECODING_SECONDS = 0.1
"""A token at a time costs so much whatever the model, from launching its kernels."""


def tuning_need(opened: Sizes, stored: Sizes, tuning: Tuning, zero: Zero) -> Need:
    """Post-training.

    Args:
        opened: the checkpoint in the dtype that it is trained in.
        stored: in its own.
        tuning: the preset.
        zero: where it has the weights.
    """
    tokens = tuning.micro_batch_size * tuning.max_length
    steps = tuning.steps or (tuning.epochs or 0) * INSTRUCTION_ROWS / tuning.batch_size
    stages = len(getattr(tuning, "stages", ("all",)))
    evaluations = steps / tuning.evaluate_every + 2
    rows = stages * (2 * steps * tuning.batch_size + evaluations * tuning.validation_examples)  # backward: as forward
    trained = _trained(opened, tuning)
    weights, away = (0.0, opened.weights) if zero.offloads else (opened.weights, 0.0)
    return Need(
        gpu=True,
        shared=True,
        device={
            "weights": weights,
            "gathered layers": opened.number * _gathered(opened, zero) if zero.divided else 0,
            "trained numbers": trained,
            "activations": opened.training_activations(tokens) + _trained_activations(opened, tuning, tokens),
            "logits": opened.logits(min(tokens, TRAINING_HEAD_TOKENS), 2),
        },
        blocks=opened.shape.layers,
        split={"weights": weights} if zero.divided else {},
        evenly=zero.divided,
        divides=tuning.batch_size // tuning.micro_batch_size,
        remedy=_remedy(zero),
        host={"program": 2 * PROGRAM},
        together={"merged weights": stored.weights, "offloaded weights": away},
        loading=opened.weights,
        disk=stored.weights,
        scratch=trained,
        work=in_dtype(
            opened,
            opened.forward(rows * tuning.max_length, tuning.max_length),
            disk=opened.weights + 3 * stored.weights,
            seconds=180,
        ),
    )


def distillation_need(dense: Sizes, stored: Sizes, tuning: FeatureDistillation, calibration: Calibration) -> Need:
    """Distilling the features of a checkpoint, block by block.

    Args:
        dense: the dense model.
        stored: the checkpoint.
        tuning: the preset.
        calibration: whose windows it reads.
    """
    length, windows, layers = calibration.length, calibration.windows, dense.shape.layers
    single = replace(stored, dtype="float32")  # as a block is trained
    batch, tokens = tuning.batch_size * length, windows * length
    looks = (windows - tuning.validation_windows) * tuning.epochs / tuning.batch_size / tuning.evaluate_every + 2
    trained = 3 * tuning.epochs * (windows - tuning.validation_windows)  # backward: twice a pass forward
    read = len(tuning.inputs) * (trained + looks * tuning.validation_windows) * length
    factors = stored.linears / layers
    return Need(
        gpu=True,
        device={
            "weights": dense.weights + stored.weights,
            # A block's factors as they are trained, with gradients, both moments of AdamW and the best so far.
            "a block's factors": 5 * SINGLE * factors,
            "activations": max(
                _kept_for_factors(single, batch) + 2 * single.hidden(batch),
                dense.activations(batch_tokens(length, STATISTICS_TOKENS)),
            ),
        },
        blocks=layers,
        split={"weights": dense.block_weights + stored.block_weights},
        remedy="Take larger GPUs or nodes, or another tuning.",
        host={"program": PROGRAM, "hidden states": 3 * dense.hidden(tokens)},
        loading=dense.weights + stored.weights,
        disk=stored.weights,
        scratch=stored.linears * stored.number,
        work=plus(
            in_dtype(
                dense,
                dense.forward(tokens, length, head=False) + stored.forward(tokens, length, head=False),
                disk=dense.weights + 3 * stored.weights,
            ),
            single=single.forward(read, length, head=False),
        ),
    )


def _kept_for_factors(sizes: Sizes, tokens: float) -> float:
    """What one block keeps for training its factors: besides what a frozen one keeps, all that its factors read."""
    ranks = [m.out_features * m.in_features / (m.out_features + m.in_features) for m in sizes.block]
    read = tokens * sizes.number * (sum(sizes.inputs) + sizes.kept * sum(ranks))
    return sizes.training_activations(tokens) / sizes.shape.layers + read


def _gathered(sizes: Sizes, zero: Zero) -> float:
    """How many weights are whole on a device at once where they are divided; the experts of a block come as one."""
    together = sizes.linears / sizes.shape.layers if sizes.shape.experts else 0
    return max(min(zero.live, sizes.linears), together, sizes.head)


def _remedy(zero: Zero) -> str:
    """What helps training that does not fit."""
    if zero.offloads:
        return "A smaller `micro_batch_size` in its `tuning` takes less, or larger GPUs."
    away = "`deepspeed: zero3-offload` in its `tuning`, which keeps the weights in main memory"
    if zero.divided:
        return f"A smaller `micro_batch_size` takes less, and so does {away}."
    return f"Write `deepspeed: zero3` in its `tuning`, which divides the weights among the GPUs of a job, or {away}."


def _trained(sizes: Sizes, tuning: Tuning) -> float:
    """Parameters, gradients and both moments of Adam, in float32; for a scaled subspace also its copies of factors."""
    rank: int = getattr(tuning, "rank", 0)
    layers, outputs = sizes.shape.layers, sum(module.out_features for module in sizes.block)
    if getattr(tuning, "kind", "") == "lora":
        both = sum(2 * rank * (module.out_features + module.in_features) for module in sizes.block)
        return 4 * SINGLE * layers * both
    return layers * (4 * SINGLE * (outputs + rank * len(sizes.block)) + sizes.number * rank * outputs)


def _trained_activations(sizes: Sizes, tuning: Tuning, tokens: float) -> float:
    """What the trained vectors or matrices keep besides: their inputs, in the model's dtype and in float32."""
    lora = getattr(tuning, "kind", "") == "lora"
    widths = sum(sizes.share_of(m) * (m.in_features if lora else m.out_features) for m in sizes.block)
    return tokens * sizes.shape.layers * widths * (sizes.number + SINGLE)


def suite_need(sizes: Sizes, suite: Suite, longest: int) -> Need:
    """An evaluation.

    Args:
        sizes: of the checkpoint.
        suite: the preset.
        longest: the model's longest context, tokens.
    """
    if isinstance(suite, PerplexitySuite):
        return _perplexity(sizes, suite)
    if isinstance(suite, ZeroShotSuite):
        return _zero_shot(sizes, suite, min(suite.max_length, longest))
    return _cost(sizes, suite) if isinstance(suite, CostSuite) else _generation(sizes, suite)


def _perplexity(sizes: Sizes, suite: PerplexitySuite) -> Need:
    overlap = suite.length / (suite.stride or suite.length)
    tokens = suite.windows * suite.length if suite.windows else CORPUS_TOKENS * overlap
    activations = sizes.activations(batch_tokens(suite.length, LOSS_TOKENS))
    device = either(activations=activations, logits=sizes.logits(HEAD_TOKENS, 1))
    need = _evaluation(sizes, tokens * len(suite.corpora), suite.length, device)
    return replace(need, shared=True, host={**need.host, "texts": TEXTS})


def _zero_shot(sizes: Sizes, suite: ZeroShotSuite, length: int) -> Need:
    whole = sum(TASK_TOKENS[task] for task in suite.tasks)
    tokens = suite.limit * DOCUMENT_TOKENS * len(suite.tasks) if suite.limit else whole
    device = either(activations=sizes.activations(max(length, suite.batch_tokens)), logits=sizes.logits(HEAD_TOKENS, 1))
    need = _evaluation(sizes, tokens, length, device, seconds=60 + 15 * len(suite.tasks))
    requests = 0 if suite.limit else 2 * GIB
    return replace(need, shared=True, host={**need.host, "harness": HARNESS_LIBRARIES, "requests": requests})


def _cost(sizes: Sizes, suite: CostSuite) -> Need:
    prompt, new = suite.batch_size * suite.prompt_tokens, suite.batch_size * suite.new_tokens
    runs = suite.repeats + 1
    device = {"activations": sizes.activations(prompt), "keys and values": 2 * sizes.cache(prompt + new)}
    seconds = 60 + DECODING_SECONDS * runs * suite.new_tokens
    return _evaluation(sizes, runs * (prompt + new), suite.prompt_tokens, device, seconds)


def _generation(sizes: Sizes, suite: GenerationSuite) -> Need:
    tokens = len(suite.prompts) * suite.new_tokens
    device = {
        "activations": sizes.activations(PROMPT_TOKENS),
        "keys and values": 2 * sizes.cache(suite.new_tokens + PROMPT_TOKENS),
    }
    return _evaluation(sizes, tokens, suite.new_tokens, device, 60 + DECODING_SECONDS * tokens)


def _evaluation(sizes: Sizes, tokens: float, length: int, device: dict[str, float], seconds: float = 60) -> Need:
    """A checkpoint that reads `tokens` tokens, with what else lies on its device."""
    return Need(
        gpu=True,
        device={"weights": sizes.weights, **device},
        blocks=sizes.shape.layers,
        split={"weights": sizes.block_weights},
        loading=sizes.weights,
        work=in_dtype(sizes, sizes.forward(tokens, length), disk=sizes.weights, seconds=seconds),
    )
