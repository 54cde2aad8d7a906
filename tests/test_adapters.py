"""Loading, merging, 4-bit and LoRA change only what they should, and the model computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.probe import probe_logits
from torch import nn
from transformers import LlamaForCausalLM

from babydoctor.config import LoraConfig, build_config
from babydoctor.model import language_model
from babydoctor.model.babydoctor import BabyDoctor
from babydoctor.model.language_model import load_language_model
from babydoctor.model.lora import LoraUpdate, add_lora, lora_layers
from babydoctor.model.merge import merge_run
from babydoctor.model.nf4 import Quantization, dequantized_weight
from babydoctor.model.run_dir import load_run, read_manifest
from babydoctor.schema import UserError
from babydoctor.train.loop import train

LINEARS = {f"self_attn.{n}_proj" for n in "qkvo"} | {f"mlp.{n}_proj" for n in ("gate", "up", "down")}
IDS = torch.arange(3, 40)[None]


def decoder_linears(model: nn.Module, num_layers: int = 2) -> set[str]:
    return {f"model.layers.{layer}.{name}" for layer in range(num_layers) for name in LINEARS}


def test_streamed_loading_equals_transformers(tiny_base: Path) -> None:
    ours = load_language_model(tiny_base / "llama", dtype=torch.float32)
    theirs = LlamaForCausalLM.from_pretrained(tiny_base / "llama", dtype=torch.float32)
    for (name, ours_p), (_, theirs_p) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(ours_p, theirs_p), name
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, atol=1e-5, rtol=0)


def test_lora_and_4bit_reach_decoder_linears_only(tiny_base: Path, tiny_run: Path) -> None:
    import bitsandbytes as bnb

    language_model = load_language_model(tiny_base / "llama", dtype=torch.float32, quantization=Quantization())
    add_lora(language_model, LoraConfig(r=4, alpha=8, dropout=0.0))
    whole = load_run(tiny_run).model
    model = BabyDoctor(whole.vision, whole.projector, language_model)
    in_4bit = {name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    with_lora = {name for name, _ in lora_layers(model)}
    expected = {f"language_model.{name}" for name in decoder_linears(language_model)}
    assert {name.removesuffix(".base_layer") for name in in_4bit} == expected
    assert with_lora == expected
    assert all(p.dtype == torch.float32 for p in (*model.projector.parameters(), *model.vision.parameters()))
    assert type(language_model.lm_head) is nn.Linear
    trained = {name.split(".lora_")[0] for name in model.trainable_parameters()}
    assert trained == expected


def test_unknown_lora_target_is_named(tiny_base: Path) -> None:
    model = load_language_model(tiny_base / "llama", dtype=torch.float32)
    with pytest.raises(UserError, match=r"lora\.target_modules.*w1.*q_proj"):
        add_lora(model, LoraConfig(target_modules=("w1",)))


def test_quantizing_keeps_one_float_weight_at_a_time(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a weight is quantized, all earlier ones are 4-bit already, so there is never a float copy of the base."""
    floats: list[int] = []
    real = language_model.place_weight

    def watch(model: Any, name: str, weight: torch.Tensor, quantization: Any) -> None:
        real(model, name, weight, quantization)
        floats.append(
            sum(
                module.weight.numel()
                for module_name, module in model.named_modules()
                if module_name.startswith("model.layers.")
                and isinstance(module, nn.Linear)
                and module.weight.dtype == torch.float32
                and module.weight.device.type != "meta"
            )
        )

    monkeypatch.setattr(language_model, "place_weight", watch)
    load_language_model(tiny_base / "llama", dtype=torch.float32, quantization=Quantization())
    assert max(floats) == 0


@pytest.fixture(scope="module")
def stages(tiny_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Stage 2 with a LoRA, and a 4-bit stage 3 with a new LoRA on top of it."""
    folder = tmp_path_factory.mktemp("stages")
    lora = {"lora": {"r": 4, "alpha": 8, "dropout": 0.0}}
    more = {"train": tiny_settings["train"] | {"learning_rate": 1e-2}}
    second = tiny_settings | lora | more | {"name": "instruct", "output_dir": str(folder / "instruct")}
    third = second | {
        "name": "radiology",
        "output_dir": str(folder / "radiology"),
        "init_from": str(folder / "instruct"),
        "model": {"dtype": "float32", "quantization": "nf4"},
    }
    for settings in (second, third):
        train(build_config(settings))
    return {name: folder / name for name in ("instruct", "radiology")}


def test_stage_3_is_based_on_the_merged_stage_2(stages: dict[str, Path]) -> None:
    manifest = read_manifest(stages["radiology"])
    assert manifest.base_adapters == ("./base_adapters/0-instruct",)
    assert [stage.name for stage in manifest.lineage] == ["instruct", "radiology"]
    before = load_run(stages["instruct"]).model.language_model
    after = load_run(stages["radiology"]).model.language_model
    update = LoraUpdate(stages["instruct"] / "adapter")
    plain = load_language_model(read_manifest(stages["instruct"]).language_model, dtype=torch.float32)
    for name in decoder_linears(plain):
        merged = update.apply(name, plain.get_submodule(name).weight)
        folded = before.get_submodule(name)
        torch.testing.assert_close(merged, folded.base_layer.weight + folded.get_delta_weight("default"))
        stored = dequantized_weight(after.get_submodule(name).base_layer)
        assert (stored - merged).abs().max() < 0.15 * merged.abs().max(), name  # NF4's widest step


@pytest.mark.parametrize("stage", ["instruct", "radiology"])
def test_merged_logits_equal_unmerged(stages: dict[str, Path], tmp_path: Path, stage: str) -> None:
    report = merge_run(stages[stage], tmp_path / "merged")
    assert report.difference < 1e-4
    merged = load_run(tmp_path / "merged")
    assert merged.manifest.quantization == "none" and merged.manifest.base_adapters == ()
    difference = probe_logits(merged.model) - probe_logits(load_run(stages[stage]).model)
    assert difference.abs().max() < 1e-4
    with pytest.raises(UserError, match="exists already"):
        merge_run(stages[stage], tmp_path / "merged")


def test_a_qlora_is_merged_before_another_stage(stages: dict[str, Path], tiny_settings: dict[str, Any]) -> None:
    settings = tiny_settings | {
        "output_dir": str(stages["radiology"].parent / "fourth"),
        "init_from": str(stages["radiology"]),
        "model": {"dtype": "float32"},
    }
    with pytest.raises(UserError, match="babydoctor merge"):
        train(build_config(settings))


def test_adapter_loads_in_plain_peft(stages: dict[str, Path], tiny_base: Path) -> None:
    import peft

    base = LlamaForCausalLM.from_pretrained(tiny_base / "llama", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, str(stages["instruct"] / "adapter")).eval()
    ours = load_run(stages["instruct"]).model.language_model
    torch.testing.assert_close(ours(IDS).logits, theirs(input_ids=IDS).logits, atol=1e-4, rtol=0)
