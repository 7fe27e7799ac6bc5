"""What compression asks for, method by method."""

from __future__ import annotations

import importlib
import inspect
import re

import pytest

from lowrank.cluster.compression_needs import TAKE_GRADIENTS, computes_on_device
from lowrank.cluster.needs import CUDA_HOST, PROGRAM
from lowrank.cluster.resources import Estimator
from lowrank.cluster.sizes import Sizes
from lowrank.config.load import load_study
from lowrank.config.sources import ModelShape
from tests.unit.cluster.published_shapes import LLAMA_7B
from tests.unit.cluster.resource_samples import BOLACO, ROOT, study_of


@pytest.mark.parametrize("config", ["paper", "quickstart", "mini-paper"])
def test_methods_that_pick_a_device_get_a_gpu_and_no_others(config: str) -> None:
    """Held against the modules' own code; add a kind that computes on processors to `ON_PROCESSORS`."""
    study = load_study(ROOT / f"config/{config}.yaml")
    for name in study.methods:
        method = study.method(name)
        module = importlib.import_module(f"lowrank.methods.{method.kind.replace('-', '_')}")
        code = inspect.getsource(module)
        # By code that methods share.
        shared = (
            method.eliminates is not None or "gradients" in method.needs or getattr(method, "identity_block", False)
        )
        assert computes_on_device(method) == ("pick_device" in code or shared), name
        assert (method.kind in TAKE_GRADIENTS) == bool(re.search("(sum|mean)_gradients", code)), name


def test_every_kind_of_method_is_estimated() -> None:
    from lowrank.methods import method_modules

    study = study_of(LLAMA_7B)
    for kind, module in method_modules().items():
        names = {"calibration": "c4", "covariance": "pooled", "validation": "top", "search": "bo"}
        fields = module.Settings.model_fields
        needed = {name: value for name, value in names.items() if name in fields and fields[name].is_required()}
        study.methods["one"] = module.Settings(kind=kind, **needed)
        need = Estimator(study).need("compress_model", BOLACO | {"method": "one"})
        assert need.host_bytes(0) > 13e9, kind
        assert need.gpu == computes_on_device(study.methods["one"]), kind


def test_a_search_by_single_layers_takes_long_and_gradients_take_memory() -> None:
    """ASVD tries 6 ratios of each of 224 layers of LLaMA-2-7B, with half a pass each on average."""
    from lowrank.methods import method_modules

    study, needs = study_of(LLAMA_7B), {}
    for kind, more in (("asvd", {"windows": 4, "length": 32}), ("fwsvd", {}), ("modegpt", {}), ("slicegpt", {})):
        study.methods["one"] = method_modules()[kind].Settings(kind=kind, calibration="c4", **more)
        needs[kind] = Estimator(study).need("compress_model", BOLACO | {"method": "one"})
    one_pass = Sizes(ModelShape(**LLAMA_7B), "float16").forward(4 * 32, 32)
    assert needs["asvd"].work.half / one_pass == pytest.approx(4 + 6 * 7 * 32 / 2)
    assert needs["fwsvd"].device["sums"] == 4 * 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert "sums" not in needs["slicegpt"].device
    assert needs["modegpt"].device["a decomposition"] == 7 * 8 * 11008**2


def test_weights_that_come_back_from_a_gpu_count_beside_what_is_made_of_them() -> None:
    """In 7B: most make a block at a time, SliceGPT all before it writes; LLM-Pruner's gradients come back too."""
    from lowrank.methods import method_modules

    study, needs = study_of(LLAMA_7B), {}
    windows = {"svd-llm": {}, "asvd": {"windows": 4, "length": 32}, "llm-pruner": {}, "modegpt": {}, "slicegpt": {}}
    for kind, more in windows.items():
        study.methods["one"] = method_modules()[kind].Settings(kind=kind, calibration="c4", **more)
        needs[kind] = Estimator(study).need("compress_model", BOLACO | {"method": "one"})
    linears = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    weights = 2 * (linears + 2 * 32000 * 4096 + 65 * 4096)
    made = weights - 0.2 * 2 * linears
    for kind, beside in {"llm-pruner": 4 * linears, "modegpt": 0, "slicegpt": made}.items():
        need = needs[kind]
        others = {"program", "weights", "new weights"}
        more = CUDA_HOST + PROGRAM + sum(size for part, size in need.host.items() if part not in others)
        assert need.host_bytes(1) == pytest.approx(weights + beside + more), kind
    assert needs["asvd"].host_bytes(1) == pytest.approx(needs["svd-llm"].host_bytes(1), rel=1e-3)
    for kind in ("asvd", "llm-pruner", "modegpt"):  # where nothing moves, nothing is there twice
        need = needs[kind]
        assert "weights" not in need.host
        assert need.host_bytes(0) == need.device_bytes + sum(need.host.values())


def test_rounds_of_correction_take_passes_and_second_moments_of_gradients_are_read() -> None:
    from lowrank.methods import method_modules

    study, needs = study_of(LLAMA_7B), {}
    for name, kind, more in (
        ("zs", "zs-svd", {"sequences": 1}),
        ("corrected", "zs-svd", {"sequences": 1, "corrections": 5}),
        ("obd", "obd-llm", {}),
        ("io", "obd-llm", {"allocation": "first-order"}),
    ):
        study.methods["one"] = method_modules()[kind].Settings(kind=kind, calibration="c4", **more)
        needs[name] = Estimator(study).need("compress_model", BOLACO | {"method": "one"})
    assert needs["corrected"].work.half == pytest.approx(6 * needs["zs"].work.half)
    assert needs["zs"].device["sums"] == needs["io"].device["sums"] == 4 * 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert "sums" not in needs["obd"].device
    assert needs["obd"].host["a block's gradients"] == 4 * (5 * 4096**2 + 2 * 11008**2)


def test_masks_over_all_directions_take_more_than_the_model() -> None:
    from lowrank.methods import method_modules

    study, needs = study_of(LLAMA_7B), {}
    for steps in (100, 200):
        study.methods["one"] = method_modules()["llrc"].Settings(kind="llrc", calibration="c4", steps=steps)
        needs[steps] = Estimator(study).need("compress_model", BOLACO | {"method": "one"})
    directions = 32 * 4096 * (4 * (4096 + 4096) + 3 * (11008 + 4096))
    assert needs[100].device["all directions"] == 2 * directions
    assert needs[100].device["masks"] == 8 * 4 * 32 * 7 * 4096
    assert needs[200].work.half == pytest.approx(2 * needs[100].work.half)


def test_stacks_of_matrices_are_decomposed_as_one() -> None:
    from lowrank.methods import method_modules

    study, device, host = study_of(LLAMA_7B), {}, {}
    for kind in ("svd-llm", "skipcat", "basis-sharing"):
        study.methods["one"] = method_modules()[kind].Settings(kind=kind, calibration="c4")
        need = Estimator(study).need("compress_model", BOLACO | {"method": "one"})
        device[kind], host[kind] = need.device["a decomposition"], need.host["a block's statistics"]
    stack = 22016 * 4096  # gate on top of up, or up in two blocks
    assert device["svd-llm"] + 8 * stack < device["skipcat"] == device["basis-sharing"]
    assert host["basis-sharing"] == 2 * host["skipcat"] == 2 * host["svd-llm"]


def test_removing_neurons_takes_a_gpu_that_holds_the_covariance_of_a_block() -> None:
    from lowrank.methods.rankwise import Settings

    study, needs = study_of(LLAMA_7B), {}
    for mlp in ("pairs", "neurons", "both"):
        named = {"kind": "rankwise", "calibration": "c4", "covariance": "pooled", "influence": False}
        study.methods["one"] = Settings(**named, mlp=mlp, identity_block=False)
        needs[mlp] = Estimator(study).need("compress_model", BOLACO | {"method": "one"})
    assert not needs["pairs"].gpu
    for mlp in ("neurons", "both"):
        assert needs[mlp].gpu
        assert 7 * 8 * 11008**2 < needs[mlp].device["refit"] < 11 * 8 * 11008**2
        assert needs[mlp].host_bytes(0) > needs["pairs"].host_bytes(0)
    assert needs["both"].work.double > 2 * needs["neurons"].work.double >= 2 * 32 * 11008**3


def test_identity_blocks_are_made_on_a_gpu_and_their_eliminations_take_time() -> None:
    from lowrank.methods.bolaco import Settings

    study, needs = study_of(LLAMA_7B), {}
    preset = study.methods["bolaco"].model_dump()
    for identity in (True, False):
        study.methods["one"] = Settings(**preset | {"identity_block": identity})
        needs[identity] = Estimator(study).need("compress_model", BOLACO | {"method": "one"})
    assert (needs[True].gpu, needs[False].gpu) == (True, False)
    operations = 0.0
    for m, n in 4 * [(4096, 4096)] + 2 * [(11008, 4096)] + [(4096, 11008)]:
        rank = max(r for r in range(min(m, n)) if r * (m + n) - r * (r - 1) <= 0.8 * m * n)
        operations += 32 * (rank**2 * (m - rank / 3) + rank**2 * (m - rank) + 2 * rank**2 * n)
    assert needs[True].work.double - needs[False].work.double == pytest.approx(operations, rel=0.01)
    assert 0 < needs[True].device_bytes < 2e9


def test_the_influence_of_blocks_takes_a_gpu_that_holds_the_model() -> None:
    from lowrank.methods.rankwise import INFLUENCE_WINDOWS, Settings

    study, needs = study_of(LLAMA_7B), {}
    for influence in (True, False):
        named = {"kind": "rankwise", "calibration": "c4", "covariance": "pooled"}
        study.methods["one"] = Settings(**named, influence=influence, identity_block=False)
        needs[influence] = Estimator(study).need("compress_model", BOLACO | {"method": "one"})
    assert needs[True].gpu
    assert not needs[False].gpu
    weights = 2 * 6.7e9
    assert weights < needs[True].device_bytes < 1.2 * weights
    assert needs[True].host == needs[False].host  # the weights come back before the bases are read
    windows = min(INFLUENCE_WINDOWS, study.calibration["c4"].windows)
    operations = 2 * 6.5e9 * windows * study.calibration["c4"].length
    assert operations < needs[True].work.half < 1.2 * operations
