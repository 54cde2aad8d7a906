"""LoRAs are exchanged with peft in both directions."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from helpers.probe import probe_logits

from babydoctor.config import LoraConfig
from babydoctor.interop.export import export_run
from babydoctor.interop.llava_import import import_llava
from babydoctor.model.language_model import load_language_model
from babydoctor.model.lora import add_lora, lora_layers, save_lora
from babydoctor.model.run_dir import load_run

IDS = torch.arange(3, 60)[None]


def stock_base(golden: Path):  # type: ignore[no-untyped-def]
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(golden / "base"), dtype=torch.float32)


@torch.no_grad()
def run_logits(run: Path) -> torch.Tensor:
    model = load_run(run).model
    length = IDS.shape[1]
    hidden = model.decode(model.language_model.model.embed_tokens(IDS), torch.arange(length)[None], (length,))
    return model.language_model.lm_head(hidden)


def test_our_lora_loads_in_plain_peft(golden: Path, tmp_path: Path) -> None:
    import peft

    import_llava(golden / "llava-pretrain", tmp_path / "run")
    model = load_language_model(golden / "base", dtype=torch.float32)
    add_lora(model, LoraConfig(r=4, alpha=8))
    torch.manual_seed(0)
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    save_lora(model, tmp_path / "run" / "adapter", str(golden / "base"))
    theirs = peft.PeftModel.from_pretrained(stock_base(golden), str(tmp_path / "run" / "adapter"))
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, run_logits(tmp_path / "run"), atol=1e-4, rtol=0)


@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_a_lora_of_another_program_is_served_and_exported(golden: Path, tmp_path: Path, rank_stabilised: bool) -> None:
    """Another rank, fewer layers, per-layer alpha, rank-stabilised or not: the same logits, merged or not."""
    import peft

    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "v_proj", "down_proj"],
        alpha_pattern={"v_proj": 10},
        use_rslora=rank_stabilised,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(0)
    theirs = peft.get_peft_model(stock_base(golden), config)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    import_llava(golden / "llava-pretrain", tmp_path / "run")
    theirs.save_pretrained(str(tmp_path / "adapter"))
    shutil.copytree(tmp_path / "adapter", tmp_path / "run" / "adapter")
    theirs.eval()
    with torch.no_grad():
        expected = theirs(IDS).logits
        plain = stock_base(golden)(IDS).logits
    assert (expected - plain).abs().max() > 0.1
    torch.testing.assert_close(run_logits(tmp_path / "run"), expected, atol=1e-4, rtol=0)
    export_run(tmp_path / "run", tmp_path / "llava", format="llava")
    import_llava(tmp_path / "llava", tmp_path / "merged")
    models = [load_run(tmp_path / name).model for name in ("run", "merged")]
    torch.testing.assert_close(probe_logits(models[0]), probe_logits(models[1]), atol=1e-4, rtol=0)
