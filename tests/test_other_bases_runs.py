"""Runs on Mistral, Qwen2 and Qwen3 with CLIP and SigLIP: loaded, merged and exported with equal logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.golden_answers import logits_and_greedy
from helpers.other_bases import WINDOW, write_run
from helpers.training import losses
from PIL import Image

from babydoctor.config import build_config
from babydoctor.engine.kv_cache import KVCache
from babydoctor.imaging.preprocess import to_pixels
from babydoctor.interop.export import export_run
from babydoctor.model.merge import merge_run
from babydoctor.model.run_dir import Run, load_run
from babydoctor.schema import UserError
from babydoctor.train.loop import train

RUNS = {"mistral": "clip", "qwen2": "clip", "qwen3": "siglip", "qwen3-clip": "clip"}
"""Name of the run -> its tower. The name starts with that of the family."""


@pytest.fixture(scope="session")
def runs(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, tower in RUNS.items():
        folder = tmp_path_factory.mktemp(name)
        made[name] = write_run(folder, name.split("-")[0], tiny_base / "llama", tower=tower)
    return made


def prompt(run: Run, length: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids that are longer than the window, without an image, and their logits in the run."""
    ids = torch.randint(3, 200, (1, length), generator=torch.Generator().manual_seed(5))
    model = run.model.language_model
    with torch.no_grad():
        hidden = run.model.decode(model.model.embed_tokens(ids), torch.arange(length)[None], [length])
        return ids, model.lm_head(hidden)[0]


def assert_close(ours: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert float((ours - expected).abs().max()) < tolerance * float(expected.abs().max())


@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3"])
def test_loaded_and_merged_runs_are_the_model_that_transformers_and_peft_load(
    runs: dict[str, Path], tmp_path: Path, name: str
) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    path = runs[name]
    ids, logits = prompt(load_run(path))
    base = AutoModelForCausalLM.from_pretrained(str(path.parent / "base"), dtype=torch.float32)
    with torch.no_grad():
        expected = peft.PeftModel.from_pretrained(base, str(path / "adapter")).eval()(ids).logits[0]
    assert_close(logits, expected)
    merge_run(path, tmp_path / "merged")
    assert_close(prompt(load_run(tmp_path / "merged"))[1], logits)
    stored = json.loads((tmp_path / "merged" / "language_model" / "config.json").read_text())
    assert stored["architectures"] == [type(base).__name__]
    assert not (tmp_path / "merged" / "adapter").exists()


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_4_bit_run_keeps_its_biases_and_norms(tiny_base: Path, tmp_path: Path, family: str) -> None:
    import bitsandbytes

    path = write_run(tmp_path, family, tiny_base / "llama", quantized=True)
    run = load_run(path)
    layer = run.model.language_model.model.layers[0].self_attn.q_proj.base_layer
    assert isinstance(layer, bitsandbytes.nn.Linear4bit)
    assert (layer.bias is not None) == (family == "qwen2")
    merge_run(path, tmp_path / "merged")
    merged = load_run(tmp_path / "merged")
    assert_close(prompt(merged)[1], prompt(run)[1], 1e-4)


@pytest.mark.parametrize("name", RUNS)
def test_hf_export_gives_the_logits_of_the_run(runs: dict[str, Path], tmp_path: Path, name: str) -> None:
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    export_run(runs[name], tmp_path / "hf", format="hf")
    model, info = LlavaForConditionalGeneration.from_pretrained(
        str(tmp_path / "hf"), dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    run = load_run(runs[name])
    pixels = torch.randn(3, 28, 28, generator=torch.Generator().manual_seed(2))
    expected, greedy = logits_and_greedy(run, pixels, 20)
    image_id = model.config.image_token_index
    ids = torch.tensor([[run.tokenizer.bos_token_id, *[image_id] * 4]])
    assert len(expected) == ids.shape[1]
    with torch.no_grad():
        generated = model.eval().generate(input_ids=ids, pixel_values=pixels[None], max_new_tokens=20, do_sample=False)
        logits = model(input_ids=ids, pixel_values=pixels[None]).logits[0, :, : expected.shape[1]]
    assert_close(logits, expected)
    assert generated[0, 5:].tolist() == greedy
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 28, 3), np.uint8))
    inputs = AutoProcessor.from_pretrained(str(tmp_path / "hf"))(images=picture, text="<image>", return_tensors="pt")
    assert int((inputs["input_ids"] == image_id).sum()) == run.model.num_patches == 4
    ours = to_pixels(picture, run.manifest.image)
    np.testing.assert_allclose(inputs["pixel_values"][0].numpy(), ours, atol=1e-5)


@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3-clip"])
def test_gguf_is_read_back_with_the_logits_of_the_run(runs: dict[str, Path], tmp_path: Path, name: str) -> None:
    """By transformers' own reader, which undoes llama.cpp's order of rotary weights where llama.cpp has one."""
    gguf = pytest.importorskip("gguf", reason="the gguf package is not installed (pip install 'babydoctor[interop]')")
    from transformers import AutoConfig, AutoModelForCausalLM

    notes = export_run(runs[name], tmp_path / "gguf", format="gguf", dtype="float32")
    fields = gguf.GGUFReader(tmp_path / "gguf" / "model.gguf").fields
    architecture = {"mistral": "llama", "qwen2": "qwen2", "qwen3-clip": "qwen3"}[name]
    assert fields["general.architecture"].contents() == architecture
    context = fields[f"{architecture}.context_length"].contents()
    assert context == (WINDOW if name == "mistral" else 160)
    assert any("sliding window of 12 tokens" in note for note in notes) == (name == "mistral")
    assert fields[f"{architecture}.attention.key_length"].contents() == (16 if name == "qwen3-clip" else 8)
    # transformers' reader ignores Qwen's key_length; it reads a Mistral as the LLaMA that the file says.
    config = None if name == "mistral" else AutoConfig.from_pretrained(str(runs[name].parent / "base"))
    model = AutoModelForCausalLM.from_pretrained(
        str(tmp_path / "gguf"), gguf_file="model.gguf", config=config, dtype=torch.float32
    )
    ids, expected = prompt(load_run(runs[name]), length=WINDOW)
    with torch.no_grad():
        assert_close(model.eval()(ids).logits[0], expected)


@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3-clip"])
def test_llama_cpp_gives_the_logits_of_the_run(runs: dict[str, Path], tmp_path: Path, name: str) -> None:
    llama_cpp = pytest.importorskip(
        "llama_cpp", reason="llama-cpp-python is not installed (pip install 'babydoctor[interop]' builds it)"
    )
    export_run(runs[name], tmp_path / "gguf", format="gguf", dtype="float32")
    exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    path = str(tmp_path / "gguf" / "model.gguf")
    model = llama_cpp.Llama(path, n_ctx=512, n_threads=1, verbose=False, logits_all=True, **exact)
    ids, expected = prompt(load_run(runs[name]), length=WINDOW)
    model.eval(ids[0].tolist())
    assert_close(torch.from_numpy(model.scores[:WINDOW].copy()), expected, 1e-3)
    model.close()


def test_what_a_format_cannot_hold_is_refused_by_name(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no Qwen3 with a SigLIP tower; it has LLaMA, Mistral and"):
        export_run(runs["qwen3"], tmp_path / "out", format="llava")
    with pytest.raises(UserError, match="a SigLIP tower is not written to GGUF"):
        export_run(runs["qwen3"], tmp_path / "out", format="gguf")
    assert not (tmp_path / "out").exists()


def test_llava_export_of_mistral_names_the_original_class(runs: dict[str, Path], tmp_path: Path) -> None:
    notes = export_run(runs["mistral"], tmp_path / "llava", format="llava")
    config = json.loads((tmp_path / "llava" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llava_mistral", ["LlavaMistralForCausalLM"])
    assert config["sliding_window"] == WINDOW
    assert any("'llava-mistral'" in note and "--conv-mode plain" in note for note in notes)


def test_stage_trains_on_another_base(runs: dict[str, Path], tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    """The whole stage on Qwen3 and SigLIP in 4 bits: plan, loader, steps, run directory; then an answer."""
    bases = {"language_model": str(runs["qwen3"].parent / "base"), "vision_tower": str(runs["qwen3"].parent / "tower")}
    changes = {
        "output_dir": str(tmp_path / "run"),
        "model": {**tiny_settings["model"], **bases, "quantization": "nf4"},
        "lora": {"r": 2, "alpha": 4, "dropout": 0.1},
        "train": {**tiny_settings["train"], "max_steps": 3, "batch_size": 12},  # each step takes all samples
    }
    path = train(build_config(tiny_settings | changes))
    values = [loss for _, loss in losses(path)]
    assert len(values) == 3 and values[2] < values[0]
    run = load_run(path)
    assert run.manifest.image_mean == (0.5, 0.5, 0.5)
    ids, expected = prompt(run)
    hidden = run.model.language_model(ids).logits[0]
    assert_close(hidden.detach(), expected, 1e-4)


def test_gpu_kernels_refuse_what_they_cannot_compute(runs: dict[str, Path]) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from babydoctor.engine.gpu.decoder import check_kernels

    cache = KVCache(1, 2, 16, capacity=160, num_slots=1, max_running=1, dtype=torch.float32, device=torch.device("cpu"))
    models = {name: load_run(runs[name]).model.language_model for name in ("mistral", "qwen2", "qwen3")}
    check_kernels(models["qwen2"], cache)
    with pytest.raises(RuntimeError, match="Qwen3's norms"):
        check_kernels(models["qwen3"], cache)
    with pytest.raises(RuntimeError, match=r"window of 12 tokens; engine\.max_context=12"):
        check_kernels(models["mistral"], cache)
    cache.capacity = WINDOW
    check_kernels(models["mistral"], cache)
