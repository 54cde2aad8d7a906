"""``babydoctor export --format gguf``: ``model.gguf`` and ``mmproj.gguf`` for llama.cpp.

Source: llama.cpp, ``convert_hf_to_gguf.py`` (names, order of rotary weights) and ``tools/mtmd/clip.cpp`` and
``models/llava.cpp`` (how it computes a projector of type ``mlp``), as vendored in llama-cpp-python 0.3.36, and
``examples/llava/clip.cpp`` in 0.3.8 (additional keys and names).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from babydoctor.conversation import get_template
from babydoctor.interop.chat_template import build_chat_template
from babydoctor.interop.gguf_names import LANGUAGE_NAMES, language_name, tower_name
from babydoctor.interop.gguf_vocabulary import read_vocabulary, write_vocabulary
from babydoctor.interop.plain import PlainRun
from babydoctor.model.families import TOWERS, has_class_token, sliding_window
from babydoctor.schema import UserError

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

TYPES = {
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
    "q8_0": "Q8_0",
    "q5_1": "Q5_1",
    "q5_0": "Q5_0",
    "q4_1": "Q4_1",
    "q4_0": "Q4_0",
}
"""``--dtype`` -> llama.cpp's name; the block formats that the gguf package can write."""

_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""``model_type`` -> llama.cpp's architecture. Its Qwen architectures rotate a head's halves, as transformers does."""

Tensor = tuple[str, tuple[int, ...], "GGMLQuantizationType"]


def export_gguf(run: PlainRun, out: Path, dtype: str) -> list[str]:
    """Write both files with one weight in memory at a time.

    Returns:
        Lines for the user about differences in llama.cpp.

    Raises:
        UserError: this run has no exact counterpart in llama.cpp.
    """
    if dtype not in TYPES:
        raise UserError(f"--dtype {dtype!r} is not one of {', '.join(TYPES)}")
    if not has_class_token(run.vision_config):
        name = TOWERS[run.vision_config.model_type]
        raise UserError(
            f"{run.tower_directory}: a {name} tower is not written to GGUF, only CLIP is. Export with --format hf"
        )
    projector = run.mlp_projector()
    write_language_model(run, out / "model.gguf", TYPES[dtype])
    matrix_type = "F32" if dtype == "float32" else "F16"
    write_mmproj(run, projector, out / "mmproj.gguf", matrix_type)
    write_mmproj(run, projector, out / "mmproj-cls-last.gguf", matrix_type, class_token_last=True)
    return list(_notes(run))


def _context_length(config: Any) -> int:
    """llama.cpp computes these architectures without a sliding window, which is exact up to the window's length."""
    window = sliding_window(config)
    return config.max_position_embeddings if window is None else min(window, config.max_position_embeddings)


def _notes(run: PlainRun) -> Iterator[str]:
    config: Any = run.language_config
    if _context_length(config) < config.max_position_embeddings:
        yield (
            f"llama.cpp computes this language model without its sliding window of {sliding_window(config)} tokens, so "
            f"the file's context is {_context_length(config)} tokens. Do not raise it with -c."
        )
    yield (
        "Which mmproj: llama.cpp puts the tower's class token after the patches and then drops the first patch "
        "instead of the class token (issue 25814, open pull request 25844; so does llama-cpp-python from 0.3.9 to "
        "0.3.36). Use mmproj-cls-last.gguf there: its position embeddings are shifted, so that every patch but the "
        "first is computed as in training. Use mmproj.gguf with llama-cpp-python 0.3.8, the last release before that, "
        "or with a llama.cpp in which it is fixed: the answers are those of this run."
    )
    yield "In llama.cpp the second question of a conversation begins with a space token that training did not have."
    size = run.manifest.image_size
    yield (
        "llama.cpp resizes an image before it letterboxes it; this run letterboxes first. Margins and pixels differ "
        f"slightly, except for square images of {size} x {size}, which are not changed."
    )
    if run.manifest.image_mode == "square":
        yield "llama.cpp letterboxes; this run crops to a square. Crop images yourself to get the same pixels."
    yield "llama.cpp rounds GELU to 16 bits, so f32 files differ from this run by about 0.1% of a feature."


def write_language_model(run: PlainRun, path: Path, type_name: str) -> None:
    """Write ``model.gguf``: language model, tokenizer and chat template."""
    gguf = import_gguf()
    config: Any = run.language_config
    architecture = _ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, architecture)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(run.manifest.name)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(_context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    _add_rope(writer, run)
    _add_file_type(writer, type_name)
    vocabulary = read_vocabulary(run.tokenizer, run.language_directory, config.vocab_size)
    write_vocabulary(writer, vocabulary, run.tokenizer, end_id=run.end_token_ids[0])
    # llama.cpp adds the begin-of-sequence token and SentencePiece's spaces itself.
    template = get_template(run.manifest.template)
    has_begin = run.tokenizer.bos_token is not None
    writer.add_chat_template(build_chat_template(template, spaces=False, has_begin=has_begin, llama_cpp=True))
    tensors = [(name, shape, language_type(name, shape, type_name)) for name, shape in run.language_shapes()]

    def convert(name: str, weight: torch.Tensor) -> torch.Tensor:
        if architecture != "llama":
            return weight
        if ".q_proj." in name:
            return interleave_rotary(weight, config.num_attention_heads)
        return interleave_rotary(weight, config.num_key_value_heads) if ".k_proj." in name else weight

    _write(writer, tensors, run.language_weights("Writing model.gguf"), language_name, convert)


def write_mmproj(
    run: PlainRun,
    projector: dict[str, torch.Tensor],
    path: Path,
    type_name: str,
    *,
    class_token_last: bool = False,
) -> None:
    """Write the tower and the projector.

    Args:
        class_token_last: for a llama.cpp that puts the class token after the patches, see ``_notes``.
    """
    gguf = import_gguf()
    vision: Any = run.vision_config
    if vision.hidden_act not in ("quick_gelu", "gelu"):
        raise UserError(f"{run.tower_directory}: hidden_act={vision.hidden_act!r}; llama.cpp takes quick_gelu and gelu")
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_name(run.manifest.name)
    writer.add_description("CLIP tower and projector of a LLaVA")
    writer.add_clip_has_vision_encoder(True)
    # Read by llama.cpp until March 2025 (llama-cpp-python 0.3.8), which has the class token in the right place.
    writer.add_bool("clip.has_text_encoder", False)
    writer.add_bool("clip.has_llava_projector", True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_projection_dim(run.language_config.hidden_size)
    writer.add_vision_image_size(run.manifest.image_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    # Without feature_layer it computes all layers but the last, and changing that has been discussed
    # (llama.cpp issue 25817). Layers above the one that is used are not written.
    num_layers = vision.num_hidden_layers + 1 + run.manifest.vision_layer
    writer.add_vision_block_count(num_layers)
    writer.add_array("clip.vision.feature_layer", [num_layers])
    writer.add_vision_head_count(vision.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    writer.add_vision_image_mean(run.manifest.image_mean)
    writer.add_vision_image_std(run.manifest.image_std)
    writer.add_vision_use_gelu(vision.hidden_act == "gelu")
    _add_file_type(writer, type_name)

    def wanted() -> Iterable[tuple[str, torch.Tensor]]:
        for name, weight in run.tower_weights():
            layer = re.match(r"encoder\.layers\.(\d+)\.", name)
            # llama.cpp would apply a post-layernorm here. LLaVA uses the features before it.
            if not name.startswith("post_layernorm") and not (layer and int(layer[1]) >= num_layers):
                yield name, weight
        yield from ((f"projector.{name}", weight) for name, weight in projector.items())

    def storage(name: str, shape: tuple[int, ...]) -> GGMLQuantizationType:
        is_matrix = len(shape) > 1 and "position_embedding" not in name
        return gguf.GGMLQuantizationType[type_name if is_matrix else "F32"]

    tensors = [(name, tuple(weight.shape), storage(name, tuple(weight.shape))) for name, weight in wanted()]

    def convert(name: str, weight: torch.Tensor) -> torch.Tensor:
        # Row 0 is the class token's position.
        return weight.roll(-1, 0) if class_token_last and "position_embedding" in name else weight

    _write(writer, tensors, wanted(), tower_name, convert)


def language_type(name: str, shape: tuple[int, ...], type_name: str) -> GGMLQuantizationType:
    """Storage type of a weight: norms in F32; embeddings and head in 8 bits or more; F16 if blocks do not fit."""
    gguf = import_gguf()
    if len(shape) == 1:
        return gguf.GGMLQuantizationType.F32
    if type_name.startswith(("Q4", "Q5")) and name in LANGUAGE_NAMES:
        type_name = "Q8_0"
    kind = gguf.GGMLQuantizationType[type_name]
    block = gguf.GGML_QUANT_SIZES[kind][0]
    return kind if shape[-1] % block == 0 else gguf.GGMLQuantizationType.F16


def interleave_rotary(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Reorder rows ``[heads * dim, ...]``: transformers rotates a head's halves, llama.cpp's LLaMA adjacent pairs."""
    return weight.view(num_heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _add_rope(writer: GGUFWriter, run: PlainRun) -> None:
    gguf = import_gguf()
    rope: dict[str, Any] = dict(getattr(run.language_config, "rope_parameters", None) or {})
    kind = rope.get("rope_type", "default")
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif kind != "default":
        raise UserError(f"{run.language_directory}: rope_type={kind!r} is not written to GGUF; only default and linear")


def _add_file_type(writer: GGUFWriter, type_name: str) -> None:
    gguf = import_gguf()
    name = "ALL_F32" if type_name == "F32" else f"MOSTLY_{type_name}"
    writer.add_file_type(gguf.LlamaFileType[name])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _write(
    writer: GGUFWriter,
    tensors: list[Tensor],
    weights: Iterable[tuple[str, torch.Tensor]],
    rename: Callable[[str], str],
    convert: Callable[[str, torch.Tensor], torch.Tensor],
) -> None:
    """Write the description of all tensors, then their bytes, one tensor at a time."""
    gguf = import_gguf()
    for name, shape, kind in tensors:
        block, num_bytes = gguf.GGML_QUANT_SIZES[kind]
        size = int(np.prod(shape)) // block * num_bytes
        writer.add_tensor_info(rename(name), shape, np.dtype(np.float32), size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for (expected, _, kind), (name, weight) in zip(tensors, weights, strict=True):
        assert name == expected, (name, expected)
        writer.write_tensor_data(gguf.quants.quantize(convert(name, weight.float()).numpy(), kind))
    writer.close()


def import_gguf() -> Any:
    """Import the gguf package, or raise an error that says how to install it."""
    try:
        import gguf
    except ImportError as error:
        raise UserError("--format gguf needs the gguf package: pip install 'babydoctor[interop]'") from error
    return gguf
