"""The engine's compiled CPU operator against PyTorch's operations, in bfloat16 and int8."""

# Fixtures are imported by name.
# ruff: noqa: F401, F811
from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers.engine_models import CONTEXT, build_model, build_request, settings, tokenizer, tokens_of, train_in_4_bit
from helpers.golden_answers import IMAGES, QUESTION, regret
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from babydoctor.bench.measure import tensor_bytes
from babydoctor.config import LoraConfig
from babydoctor.conversation import get_template, render_prompt
from babydoctor.data.tokens import encode
from babydoctor.engine.cpu import check, library
from babydoctor.engine.cpu.check import LARGEST_DIFFERENCE, Weights, difference_from_pytorch, operator_works
from babydoctor.engine.cpu.decoder import CpuDecoder, fits
from babydoctor.engine.cpu.library import Operator, load_operator
from babydoctor.engine.cpu.product import build_product
from babydoctor.engine.decoder import Decoder
from babydoctor.engine.engine import Engine
from babydoctor.engine.kv_cache import KVCache
from babydoctor.engine.layout import CHUNK_STEP, Chunk, DecodeRows
from babydoctor.engine.linear import PACKING_ROWS
from babydoctor.engine.request import GenerationRequest, ImageInput
from babydoctor.engine.settings import EngineSettings
from babydoctor.imaging.load import load_image
from babydoctor.imaging.preprocess import to_pixels
from babydoctor.interop.llava_import import import_llava
from babydoctor.model.babydoctor import BabyDoctor
from babydoctor.model.lora import add_lora
from babydoctor.model.nf4 import Quantization, quantize_linear
from babydoctor.model.packed.lora_linear import ADAPTER, effective_weight
from babydoctor.model.run_dir import load_run
from babydoctor.schema import Turn, UserError

needs_operator = pytest.mark.skipif(load_operator() is None, reason="there is no C++ compiler for the CPU operator")


@pytest.fixture(scope="module")
def model() -> BabyDoctor:
    return build_model(num_heads=4).to(torch.bfloat16)


@needs_operator
@pytest.mark.parametrize("kind", LARGEST_DIFFERENCE)
def test_steps_give_pytorchs_logits(kind: Weights) -> None:
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
    assert difference_from_pytorch(kind) < LARGEST_DIFFERENCE[kind]
    assert operator_works(with_nf4=kind == "nf4")


@needs_operator
@pytest.mark.skipif("avx2" not in library._processor().split(), reason="this processor has no AVX2")
def test_avx2_gives_the_same_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = Operator(library.build_library("haswell"))
    for kind in LARGEST_DIFFERENCE:
        if kind != "nf4" or find_spec("bitsandbytes"):
            with monkeypatch.context() as patch:
                expected = difference_from_pytorch(kind)
                patch.setattr("babydoctor.engine.cpu.decoder.load_operator", lambda: operator)
                assert difference_from_pytorch(kind) == pytest.approx(expected, rel=0.01)


@needs_operator
@pytest.mark.parametrize("num_rows", [1, 6, 7, 16])
@pytest.mark.parametrize("outputs", [64, 100, 131])
def test_products_of_any_number_of_rows_and_outputs(num_rows: int, outputs: int) -> None:
    torch.manual_seed(outputs)
    linears = [nn.Linear(96, size, bias=False, dtype=torch.bfloat16) for size in (outputs - 40, 40)]
    rows = torch.randn(num_rows, 96).bfloat16()
    operator = load_operator()
    assert operator is not None
    expected = rows.float() @ torch.cat([linear.weight for linear in linears]).float().T
    for is_int8, tolerance in ((False, 0.005), (True, 0.02)):
        actual = build_product(operator, linears, is_int8=is_int8)(rows)
        assert actual.shape == (num_rows, outputs) and actual.dtype == torch.bfloat16
        assert (actual.float() - expected).norm() / expected.norm() < tolerance


@needs_operator
@pytest.mark.parametrize("inputs", [96, 192])  # with 96, blocks of 64 weights cross outputs
@pytest.mark.parametrize("double", [False, True])
@torch.no_grad()
def test_4_bit_products_with_loras(inputs: int, double: bool) -> None:
    """Modules without a LoRA, and with LoRAs of different scales and ranks, in all no multiple of 16.

    Each row's result is the same alone and among others.
    """
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(inputs)
    sizes, quantization = {"q": 100, "k": 32, "v": 60}, Quantization(double=double)
    layers = {
        name: quantize_linear(torch.randn(size, inputs).bfloat16() / 8, quantization) for name, size in sizes.items()
    }
    lora = peft.LoraConfig(target_modules=["q", "v"], rank_pattern={"q": 5, "v": 8}, alpha_pattern={"q": 15, "v": 8})
    injected: Any = peft.inject_adapter_in_model(lora, nn.ModuleDict(layers)).eval()
    for name in ("q", "v"):
        torch.nn.init.normal_(injected[name].lora_B[ADAPTER].weight, std=0.3)
    modules = list(injected.values())
    operator = load_operator()
    assert operator is not None
    product, rows = build_product(operator, modules), torch.randn(7, inputs).bfloat16()
    expected = rows.float() @ torch.cat([effective_weight(module, torch.float32) for module in modules]).T
    actual = product(rows)
    assert actual.shape == expected.shape and (actual.float() - expected).norm() / expected.norm() < 0.005
    assert torch.equal(actual, torch.cat([product(row[None]) for row in rows]))


@needs_operator
@pytest.mark.parametrize("weights", [None, "int8", "nf4"])
def test_the_engine_gives_the_same_answers_alone_and_in_a_batch(
    model: BabyDoctor, tokenizer: Any, weights: str | None
) -> None:
    """Requests of different lengths, with images, start and end at different times. Each gets its tokens as alone."""
    if weights == "nf4":
        model, weights = trained_in_4_bit(), None
    requests = [build_request(seed, num_images=seed % 3, length=5 + 9 * (seed % 7)) for seed in range(9)]
    options = settings(weights=weights, step_tokens=200)
    with Engine(model, tokenizer, options) as engine:
        assert isinstance(engine.decoder, CpuDecoder) and engine.kv_cache.dtype == torch.bfloat16
        together = [engine.submit(request) for request in requests]
        answers = [tokens_of(handle) for handle in together]
    with Engine(model, tokenizer, replace(options, max_running=1)) as alone:
        assert [tokens_of(alone.submit(request)) for request in requests] == answers


@needs_operator
@pytest.mark.parametrize("weights", [None, "int8"])
def test_an_imported_model_chooses_tokens_that_are_as_likely(golden: Path, tmp_path: Path, weights: str | None) -> None:
    """The golden model is undecided: its best tokens differ by less than rounding. Float32 must find none worse."""
    import_llava(golden / "llava-golden-merged", tmp_path / "run", image_mode="pad")
    exact, rounded = load_run(tmp_path / "run"), load_run(tmp_path / "run")
    prompt = render_prompt([Turn("user", QUESTION)], get_template(exact.manifest.template))
    encoded = encode(prompt, exact.tokenizer, exact.model.num_patches)
    with Engine(
        rounded.model.to(torch.bfloat16), exact.tokenizer, settings(weights=weights, max_context=256)
    ) as engine:
        assert isinstance(engine.decoder, CpuDecoder)
        for name in IMAGES:
            pixels = to_pixels(load_image(golden / "images" / f"{name}.jpg"), exact.manifest.image)
            image = ImageInput(name, pixels)
            request = GenerationRequest(encoded.input_ids, encoded.image_mask, (image,), max_new_tokens=24)
            behind = regret(exact, torch.from_numpy(pixels), tokens_of(engine.submit(request)))
            assert len(behind) >= 12 and max(behind) < (0.1 if weights else 0.03)  # logits spread by 0.8


class ProductShapes(TorchDispatchMode):
    """Records the shapes of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[Any, ...]] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(function) for name in ("mm", "linear")):
            self.shapes.add((str(function), *(tuple(arg.shape) for arg in args if isinstance(arg, torch.Tensor))))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("on_operator", [False, pytest.param(True, marks=needs_operator)])
def test_prompts_of_many_lengths_have_few_product_shapes(model: BabyDoctor, on_operator: bool) -> None:
    """oneDNN builds a kernel for each shape and keeps it, which made a worker grow with every new prompt length."""
    config = model.language_model.config
    head_dim = config.hidden_size // config.num_attention_heads
    shape = (config.num_hidden_layers, config.num_key_value_heads, head_dim, CONTEXT, 2, 1)
    cache = KVCache(*shape, torch.bfloat16, torch.device("cpu"))
    decoder = (CpuDecoder if on_operator else Decoder)(model.language_model, cache)
    with ProductShapes() as recorded:
        for length in range(30, CONTEXT, 3):
            for start in range(0, length, 50):
                embeds = decoder.embed_tokens(torch.arange(start, min(start + 50, length)) % config.vocab_size)
                decoder.forward(DecodeRows([], [], []), [Chunk(0, start, embeds, start + 50 >= length)])
    attention = {shape for shape in recorded.shapes if "bmm" in shape[0]}
    lengths = -(-CONTEXT // CHUNK_STEP)
    assert len(attention) <= 4 * lengths  # two products, of one row or of CHUNK_STEP rows
    linear = recorded.shapes - attention
    assert len({shape[1] for shape in linear}) <= (0 if on_operator else 3 * (PACKING_ROWS + 2))


@needs_operator
@pytest.mark.parametrize("kind", ["bfloat16", "nf4"])
def test_other_thread_counts_give_the_same_logits(monkeypatch: pytest.MonkeyPatch, kind: Weights) -> None:
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
    difference = difference_from_pytorch(kind)
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert difference_from_pytorch(kind) == difference


def trained_in_4_bit() -> BabyDoctor:
    return train_in_4_bit(build_model(num_heads=4).to(torch.bfloat16))


@needs_operator
def test_int8_takes_4_bit_weights_and_merges_loras(tokenizer: Any) -> None:
    model, merged = trained_in_4_bit(), build_model(num_heads=4).to(torch.bfloat16)
    for name, module in merged.language_model.named_modules():
        if name.endswith("_proj"):
            module.weight.data = effective_weight(model.language_model.get_submodule(name), torch.bfloat16)
    requests = [build_request(seed, num_images=seed % 2) for seed in range(3)]
    with Engine(merged, tokenizer, settings(weights="int8")) as engine:
        expected = [tokens_of(engine.submit(request)) for request in requests]
    with Engine(model, tokenizer, settings(weights="int8", own_weights=True)) as engine:
        assert isinstance(engine.decoder, CpuDecoder)
        assert [tokens_of(engine.submit(request)) for request in requests] == expected


@needs_operator
@pytest.mark.parametrize("in_4_bit", [False, True])
def test_loras_are_computed_beside_the_weights(tokenizer: Any, in_4_bit: bool) -> None:
    """The operator's logits are as close to those of merged float32 weights as PyTorch's."""
    model = build_model(num_heads=4).to(torch.bfloat16)
    model = train_in_4_bit(model, prefix="model.layers." if in_4_bit else "none.")
    exact = build_model(num_heads=4)
    for name, module in exact.language_model.named_modules():
        if name.endswith("_proj"):
            module.weight.data = effective_weight(model.language_model.get_submodule(name), torch.float32)
    prompt = torch.arange(1, 40)

    def logits(kind: type[Decoder], language_model: Any, dtype: torch.dtype, **options: bool) -> torch.Tensor:
        decoder = kind(language_model, KVCache(3, 2, 16, CONTEXT, 2, 1, dtype, torch.device("cpu")), **options)
        decoder.forward(DecodeRows([], [], []), [Chunk(0, 0, decoder.embed_tokens(prompt), True)])
        return decoder.forward(DecodeRows([7], [0], [len(prompt)]), []).float()

    expected = logits(Decoder, exact.language_model, torch.float32, pack=False)
    by_pytorch = logits(Decoder, model.language_model, torch.float32, pack=False) - expected
    by_operator = logits(CpuDecoder, model.language_model, torch.bfloat16, own=True) - expected
    assert by_operator.norm() < 1.5 * by_pytorch.norm() < 0.2 * expected.norm()
    kept = [name for name, part in model.language_model.named_parameters() if part.numel()]
    assert all("norm" in name or "embed_tokens" in name for name in kept)
    with Engine(train_in_4_bit(build_model(num_heads=4), prefix="none."), tokenizer, settings()) as engine:
        assert not isinstance(engine.decoder, CpuDecoder)  # float32


@needs_operator
@pytest.mark.parametrize("is_tied", [False, True])
def test_copied_weights_of_an_owned_model_are_freed(tokenizer: Any, is_tied: bool) -> None:
    model, request = build_model(num_heads=4).to(torch.bfloat16), build_request(1)
    language_model = model.language_model
    if is_tied:
        language_model.lm_head.weight = language_model.model.embed_tokens.weight
    with Engine(model, tokenizer, settings()) as engine:
        expected = tokens_of(engine.submit(request))
    with Engine(model, tokenizer, settings(own_weights=True)) as engine:
        assert tokens_of(engine.submit(request)) == expected
    kept = [name for name, parameter in language_model.named_parameters() if parameter.numel()]
    assert all("norm" in name or "embed_tokens" in name for name in kept) and "model.embed_tokens.weight" in kept


@needs_operator
@pytest.mark.parametrize("weights", [None, "int8"])
def test_the_kv_cache_is_sized_by_the_memory_left_after_copying(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, weights: str | None
) -> None:
    """Free memory is 12 KiB plus what the model's own weights have given back."""
    model = build_model(num_heads=4).to(torch.bfloat16)
    total = tensor_bytes(model.language_model)
    free_bytes: list[int] = []

    def available() -> int:
        free_bytes.append(12 * 2**10 + total - tensor_bytes(model.language_model))
        return free_bytes[-1]

    monkeypatch.setattr("babydoctor.engine.settings.available_memory_bytes", available)
    options = settings(weights=weights, own_weights=True, max_context=32, kv_budget_bytes=None)
    with pytest.raises(UserError, match=r"kv_budget_bytes=99 is too small"):
        Engine(model, tokenizer, replace(options, kv_budget_bytes=99))
    with pytest.raises(UserError, match=r"max_context=9999 exceeds"):
        Engine(model, tokenizer, replace(options, max_context=9999))
    assert tensor_bytes(model.language_model) == total  # both errors came before weights were freed
    with Engine(model, tokenizer, options) as engine:
        assert free_bytes[-1] > total // 2 and engine.kv_cache.num_bytes <= free_bytes[-1] // 4
        assert len(tokens_of(engine.submit(build_request(0, num_images=0, length=4)))) == 23


def test_a_weight_in_float32_is_not_read_as_bfloat16() -> None:
    model = build_model(num_heads=4).to(torch.bfloat16).language_model
    assert fits(model)
    model.model.layers[1].input_layernorm.float()
    assert not fits(model)


def test_models_that_the_operator_cannot_run_are_refused_by_name(model: BabyDoctor, tokenizer: Any) -> None:
    with pytest.raises(UserError, match="weights=int4 must be int8"):
        EngineSettings(weights="int4")
    with pytest.raises(UserError, match="int8 is not possible: it takes a LLaMA on a CPU in bfloat16 or 4 bits"):
        Engine(build_model(), tokenizer, settings(weights="int8"))
    with pytest.raises(UserError, match=r"engine\.kv_dtype=float32, and it needs bfloat16"):
        Engine(model, tokenizer, settings(weights="int8", kv_dtype="float32"))


def test_without_a_compiler_pytorch_computes(
    model: BabyDoctor, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for function in (library.load_operator, check.operator_works):
        function.cache_clear()
    try:
        with caplog.at_level("INFO"), Engine(model, tokenizer, settings()) as engine:
            assert not isinstance(engine.decoder, CpuDecoder)
            assert len(tokens_of(engine.submit(build_request(0)))) == 24
        assert "could not be built" in caplog.text
    finally:
        for function in (library.load_operator, check.operator_works):
            function.cache_clear()
