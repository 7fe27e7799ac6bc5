"""Models: checkpoints and GGUF files become checked folders, and anything else one clear message."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from lowrank.config.sources import Model
from lowrank.errors import RankwiseError
from lowrank.files import sha256_file
from lowrank.model.checkpoint import load_checkpoint
from lowrank.model.shapes import model_config
from lowrank.sources import checks, hub
from lowrank.sources.models import fetch_model
from tests import tiny
from tests.unit.sources.model_samples import (
    PARAMETERS,
    SHAPE,
    VOCABULARY,
    add_head,
    change_json,
    change_weights,
    fetch,
    make_tokenizer,
    refused,
    save_llama,
    section,
)


def test_a_checkpoint_folder_is_taken_over_and_described(folder: Path, tmp_path: Path) -> None:
    (folder / "optimizer.pt").write_bytes(b"a pickle")
    (folder / "notes.py").write_text("raise SystemExit")
    manifest = fetch(folder, tmp_path, license="CC0")
    target = tmp_path / "models" / "tiny"
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in target.iterdir()} == names
    assert manifest["files"] == {name: sha256_file(folder / name) for name in names}
    assert manifest["parameters"] == PARAMETERS
    assert manifest["shape"] == SHAPE | {
        **{"attention_bias": False, "mlp_bias": False},
        **{"experts": 0, "experts_per_token": 0},
    }
    assert (manifest["model"], manifest["source"]["path"]) == ("tiny", str(folder))
    ids = torch.tensor([[1, 5, 9]])
    ours, theirs = (AutoModelForCausalLM.from_pretrained(path) for path in (target, folder))
    assert ours.dtype == torch.bfloat16  # the stored type is kept
    assert torch.equal(ours(ids).logits, theirs(ids).logits)
    assert AutoTokenizer.from_pretrained(target)("the texts").input_ids == make_tokenizer()("the texts").input_ids


def test_the_licence_comes_along_and_code_does_not(folder: Path, tmp_path: Path) -> None:
    for name in ("LICENSE", "NOTICE.md", "USE_POLICY.md", "README.md", "LICENSE.py"):
        (folder / name).write_text(name)
    manifest = fetch(folder, tmp_path)
    assert {"LICENSE", "NOTICE.md", "USE_POLICY.md"} <= set(manifest["files"])
    assert not {"README.md", "LICENSE.py"} & set(manifest["files"])


def test_shards_and_hub_snapshots(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    for file in folder.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "shards")
    # the hub's cache: symbolic links to blobs
    (tmp_path / "snapshot").mkdir()
    for file in (tmp_path / "shards").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    monkeypatch.setattr(hub, "fetch_snapshot", lambda source: sorted((tmp_path / "snapshot").iterdir()))
    model = section(folder).plain() | {"source": {"hub": "o/tiny", "revision": "0" * 40}}
    manifest = fetch_model("tiny", Model.model_validate(model), tmp_path / "cache", tmp_path / "models" / "tiny")
    shards = [file for file in (tmp_path / "models" / "tiny").glob("*.safetensors") if not file.is_symlink()]
    assert len(shards) > 1
    assert manifest["parameters"] == PARAMETERS
    shards_of_index = sorted((tmp_path / "shards").glob("*.safetensors"))
    shards_of_index[0].unlink()
    refused(tmp_path / "shards", tmp_path / "again", f"not there: {shards_of_index[0].name}")


def test_a_single_file_of_weights_goes_before_an_index_as_in_transformers(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, folder / "old.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "old.safetensors")}))
    caplog.set_level("INFO")
    manifest = fetch(folder, tmp_path)
    assert not {index.name, "old.safetensors"} & set(manifest["files"])
    assert manifest["files"]["model.safetensors"] == sha256_file(folder / "model.safetensors")
    assert f"{index.name} is left out" in caplog.text
    (folder / "old.safetensors").unlink()
    assert fetch(folder, tmp_path)["files"] == manifest["files"]


def test_opt_has_its_own_names(tmp_path: Path) -> None:
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    make_tokenizer().save_pretrained(tmp_path / "opt")
    shape = {"family": "opt", "layers": 1, "kv_heads": 4}
    assert fetch(tmp_path / "opt", tmp_path, shape=shape)["parameters"] > 0


def test_weights_stored_without_the_prefix_of_the_base_model(folder: Path, tmp_path: Path) -> None:
    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    change_weights(folder, strip)
    assert fetch(folder, tmp_path)["parameters"] == PARAMETERS


def test_every_wrong_number_is_listed(folder: Path, tmp_path: Path) -> None:
    wrong = {"layers": 3, "kv_heads": 4, "vocabulary": 299, "tied_embeddings": False, "family": "mistral"}
    message = refused(folder, tmp_path, "not the one that the config describes", shape=wrong)
    for line in (
        "models.tiny.shape.layers: the config says 3, the model has 2",
        "models.tiny.shape.kv_heads: the config says 4, the model has 2",
        "models.tiny.shape.vocabulary: the config says 299, the model has 300",
        "models.tiny.shape.tied_embeddings: the config says False, the model has True",
        "models.tiny.shape.family: the config says mistral, the model has llama",
    ):
        assert line in message
    assert "shape.hidden" not in message


def test_a_longest_context_that_the_model_cannot_read(folder: Path, gguf_file: Path, tmp_path: Path) -> None:
    for source in (folder, gguf_file):
        message = refused(source, tmp_path, "max_length", max_length=65)
        assert message == (
            "models.tiny: models.tiny.max_length: 65 tokens, but the model reads at most 64 (`max_position_embeddings` "
            "of its config.json); write `max_length: 64` or less. Left out, it is 2048."
        )


@pytest.mark.parametrize("kind", tiny.SHAPES)
def test_random_models_of_all_families_are_made_checked_and_opened(kind: str, folder: Path, tmp_path: Path) -> None:
    source = {"random": 0, "tokenizer": "other"}
    model = Model.model_validate({"source": source, "shape": tiny.shape(kind, VOCABULARY), "max_length": 64})
    manifest = fetch_model("random", model, tmp_path / "cache", tmp_path / "random", tokenizer=folder)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "random")
    assert manifest["parameters"] == stock.num_parameters()
    found = model.model_copy(update={"shape": None})
    assert checks.with_shape(found, tmp_path / "random").shape.plain() == model.shape.plain() == manifest["shape"]
    ids = torch.tensor([[1, 5, 9]])
    ours = load_checkpoint(tmp_path / "random", torch.float32)
    torch.testing.assert_close(ours(ids).logits, stock(ids).logits, rtol=0, atol=1e-6)


def test_a_random_model_reads_as_much_as_the_config_says(folder: Path, tmp_path: Path) -> None:
    source = {"random": 0, "tokenizer": "other"}
    model = Model.model_validate(section(folder, max_length=4096).plain() | {"source": source})
    fetch_model("random", model, tmp_path / "cache", tmp_path / "random", tokenizer=folder)
    assert json.loads((tmp_path / "random/config.json").read_text())["max_position_embeddings"] == 4096


def test_unknown_architectures_are_named(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").write_text(GPT2Config().to_json_string())
    refused(folder, tmp_path, "`model_type: gpt2`.*known families: gemma3_text, llama, mistral, ")


def test_quantised_models_are_refused(folder: Path, tmp_path: Path) -> None:
    change_json(folder / "config.json", quantization_config={"quant_method": "gptq"})
    refused(folder, tmp_path, "quantised")


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_the_model_is_never_run(folder: Path, tmp_path: Path, file: str) -> None:
    (folder / "own.py").write_text("raise SystemExit('the code ran')")
    change_json(folder / file, auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.M"})
    refused(folder, tmp_path, "Python code of its own .* never run here")


def test_biases_that_the_shape_does_not_have_are_refused_and_those_that_it_has_are_not(tmp_path: Path) -> None:
    save_llama(tmp_path / "source", attention_bias=True)
    refused(tmp_path / "source", tmp_path, r"shape\.attention_bias: the config says False, the model has True")
    manifest = fetch(tmp_path / "source", tmp_path, shape={"attention_bias": True})
    assert manifest["shape"]["attention_bias"]


def test_a_changed_source_does_not_reach_the_fetched_model(folder: Path, tmp_path: Path) -> None:
    fetch(folder, tmp_path)
    with (folder / "model.safetensors").open("r+b") as file:  # a writer that keeps the file's inode
        file.truncate(10)
    assert (tmp_path / "models/tiny/model.safetensors").stat().st_size > 10


def test_a_truncated_weight_file(folder: Path, tmp_path: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])
    refused(folder, tmp_path, r"model\.safetensors: truncated or damaged")


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite(folder: Path, tmp_path: Path, value: float) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value

    change_weights(folder, spoil)
    refused(folder, tmp_path, r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinite")


def test_weights_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.0.self_attn.q_proj.weight"]
        tensors["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(4, 32)
        tensors["model.layers.0.self_attn.v_proj.weight"] = torch.zeros(16, 32, dtype=torch.int8)

    change_weights(folder, spoil)
    message = refused(folder, tmp_path, "q_proj.weight is not stored")
    assert "k_proj.weight is (4, 32), not (16, 32)" in message
    assert "v_proj.weight holds torch.int8" in message


@pytest.mark.parametrize(
    "name", ["model.layers.2.mlp.up_proj.weight", "mtp.proj.weight", "model.layers.0.mlp.up_proj.bias"]
)
def test_weights_that_the_model_does_not_have(folder: Path, tmp_path: Path, name: str) -> None:
    """Of a block too many, of a head for more tokens, a bias: transformers would leave them out, and others not."""
    change_weights(folder, lambda tensors: tensors.update({name: torch.zeros(3)}))
    message = refused(folder, tmp_path, "the weights cannot be used")
    assert message.endswith(f":\n  model.safetensors: {name} is none of the model's weights; take it out of the file")


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_stored_buffers_of_old_checkpoints_are_passed_over(folder: Path, tmp_path: Path, prefix: str) -> None:
    """As transformers does. (Llama's first checkpoints have frequencies in each block.)"""

    def add(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[prefix + name.removeprefix("model.")] = tensors.pop(name)
        tensors[f"{prefix}layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    change_weights(folder, add)
    assert fetch(folder, tmp_path)["parameters"] == PARAMETERS
    load_checkpoint(tmp_path / "models/tiny", torch.float32)


def test_stored_tensors_that_transformers_leaves_out_without_a_word(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some classes name what checkpoints of theirs hold beside the model."""
    change_weights(folder, lambda tensors: tensors.update({"mtp.proj.weight": torch.zeros(3)}))
    refused(folder, tmp_path, "mtp.proj.weight is none of the model's weights")
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"^mtp\."])
    assert fetch(folder, tmp_path)["parameters"] == PARAMETERS


@pytest.mark.parametrize("change", [0.5, float("nan")])
def test_a_head_of_its_own_that_the_configuration_ties_away(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: float
) -> None:
    monkeypatch.setattr("lowrank.sources.checks.CHUNK", 1000)  # some chunks of rows
    change_weights(folder, lambda tensors: add_head(tensors, change))
    message = refused(folder, tmp_path, "tie_word_embeddings: true")
    assert message == (
        "models.tiny: model.safetensors: lm_head.weight is stored, and differs from model.embed_tokens.weight, "
        "although config.json says `tie_word_embeddings: true`. Which of them the model writes with depends on the "
        "program that opens it. If the head is its own, write `tie_word_embeddings: false` there, and "
        "`models.tiny.shape.tied_embeddings: false` in the config; else take lm_head.weight out of the file."
    )


@pytest.mark.parametrize("strip", [False, True])
def test_heads_in_other_shards_and_without_the_prefix(folder: Path, tmp_path: Path, strip: bool) -> None:
    tensors = load_file(folder / "model.safetensors")
    add_head(tensors, 0.5)
    named = {name.removeprefix("model.") if strip else name: tensor for name, tensor in tensors.items()}
    shards = {name: f"{'head' if name == 'lm_head.weight' else 'rest'}.safetensors" for name in named}
    for shard in set(shards.values()):
        save_file({name: tensor for name, tensor in named.items() if shards[name] == shard}, folder / shard)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    refused(folder, tmp_path, "head.safetensors: lm_head.weight is stored, and differs from")


def test_a_head_of_another_shape(folder: Path, tmp_path: Path) -> None:
    change_weights(folder, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(299, 32)}))
    refused(folder, tmp_path, "lm_head.weight is stored, and differs from")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_tied_head_may_be_stored_twice(folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    change_weights(folder, lambda tensors: add_head(tensors, dtype=dtype))
    assert fetch(folder, tmp_path)["parameters"] == PARAMETERS


def test_an_untied_head_is_kept(folder: Path, tmp_path: Path) -> None:
    change_weights(folder, lambda tensors: add_head(tensors, 0.5))
    change_json(folder / "config.json", tie_word_embeddings=False)
    assert fetch(folder, tmp_path, shape={"tied_embeddings": False})["parameters"] == PARAMETERS + VOCABULARY * 32


def test_a_model_without_the_linear_layers_of_its_family(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skeleton = checks.skeleton_of

    def odd(config: Any) -> Any:
        built: Any = skeleton(config)
        built.model.layers[1].mlp.gate_proj = torch.nn.Identity()
        built.model.layers[0].mlp.up_proj = torch.nn.Linear(32, 40, device="meta")
        return built

    monkeypatch.setattr(checks, "skeleton_of", odd)
    message = refused(folder, tmp_path, r"layers\.1\.mlp\.gate_proj: no Linear layer, but Identity")
    assert "layers.0.mlp.up_proj: (40, 32), and `shape` gives (48, 32)" in message


def test_pickled_weights_are_never_loaded(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, tmp_path, r"only pickles \(pytorch_model\.bin\).*never loaded")


def test_an_adapter_beside_the_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    """Transformers would load it on top of them, in every later job."""
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    refused(folder, tmp_path, r"an adapter \(LoRA\) lies beside its weights .*merge_and_unload.* no `adapter_\*` files")
    (folder / "adapter_config.json").unlink()
    fetch(folder, tmp_path)


def test_an_adapter_is_seen_before_anything_is_fetched(folder: Path) -> None:
    """Where a shape is read from the files of a source, a snapshot of the hub among them."""
    files = sorted(folder.iterdir())
    assert model_config(files)["model_type"] == "llama"
    adapter, elsewhere = folder / "adapter_config.json", folder / "adapters/adapter_config.json"
    assert model_config([*files, elsewhere])
    with pytest.raises(RankwiseError, match=r"an adapter \(LoRA\) lies beside its weights"):
        model_config([*files, adapter])


def test_folders_that_are_no_model(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").unlink()
    refused(folder, tmp_path, "one `config.json`, and here are 0")


def test_special_tokens_without_an_embedding(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The tokenizer of Gemma's text models has one for images; many fine-tunes have one for padding."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<filled{index}>" for index in range(VOCABULARY - len(tokenizer))])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert len(tokenizer) == VOCABULARY + 1
    tokenizer.save_pretrained(folder)
    fetch(folder, tmp_path)
    assert "no embedding of <image>" in caplog.text
    tokenizer.add_tokens(["another", "ordinary"])
    tokenizer.save_pretrained(folder)
    message = rf"token 'ordinary' has number {VOCABULARY + 2}, the model only {VOCABULARY} tokens, numbered from 0"
    refused(folder, tmp_path / "again", message)


def test_a_missing_tokenizer(folder: Path, tmp_path: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    refused(folder, tmp_path, "its tokenizer cannot be loaded")


def test_too_small_a_disk(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 3})())
    refused(folder, tmp_path, "the model needs .* larger disk")
