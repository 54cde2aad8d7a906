"""Models of known sizes with random weights for ``bench serve``. Nothing is downloaded.

Speed does not depend on the values of weights. In the tokenizer each word of the template and the questions is one
token, which is close to LLaMA's. Unused tokens fill its vocabulary up to the real size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from babydoctor.bench.models import PRESETS, build_random_model
from babydoctor.conversation import get_template, prompt_text, render_prompt
from babydoctor.interop.gguf_vocabulary import LLAMA_3_SPLIT
from babydoctor.model.babydoctor import BabyDoctor
from babydoctor.model.nf4 import Quantization
from babydoctor.schema import IMAGE_TOKEN, Turn

TEMPLATE = "v1"

IMAGE_SIZE = PRESETS["mini"]["vision"]["image_size"]
VOCABULARY = PRESETS["mini"]["language"]["vocab_size"]


def build_model(preset: str, device: str = "cpu", quantization: Quantization | None = None) -> BabyDoctor:
    """Build a bfloat16 or NF4 model with random weights that never ends an answer by itself."""
    model = build_random_model(preset, device, quantization=quantization)
    with torch.no_grad():
        model.language_model.lm_head.weight[:3] = 0  # the largest of 32,000 random logits is never 0
    return model


def build_tokenizer(questions: Sequence[str]) -> Any:
    """Build a byte-level tokenizer in which every word of the prompts is one token.

    It splits text as LLaMA-3's does, which llama.cpp knows: there, too, a word of the vocabulary is one token.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = pre_tokenizers.Split(Regex(LLAMA_3_SPLIT), "isolated")
    splitter = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    texts = [*questions, *(build_prompt(question).replace(IMAGE_TOKEN, "") for question in questions)]
    pieces = {piece for text in texts for piece, _ in splitter.pre_tokenize_str(text)}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merge = ("Ġ", "t")  # llama.cpp refuses a vocabulary without merges
    tokens = ["<unk>", "<s>", "</s>", *alphabet, *sorted({*pieces, "".join(merge)} - set(alphabet))]
    tokens += [f"Ġtoken{index}" for index in range(VOCABULARY - len(tokens))]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[merge], unk_token="<unk>", ignore_merges=True))
    backend.pre_tokenizer = splitter
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def build_prompt(question: str) -> str:
    """The prompt that a LLaVA client sends for a question about one image."""
    return prompt_text(render_prompt([Turn("user", f"{IMAGE_TOKEN}\n{question}")], get_template(TEMPLATE)))


def write_run(
    model: BabyDoctor, tokenizer: Any, directory: Path, name: str, dtype: Literal["bfloat16", "float32"] = "bfloat16"
) -> Path:
    """Save the model as a run directory that ``babydoctor worker`` serves."""
    from babydoctor.model.run_dir import Manifest, save_trained, write_manifest

    base, clip, run = directory / "base", directory / "clip", directory / name
    model.language_model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    model.vision.save_pretrained(clip)
    run.mkdir()
    save_trained(model, run, str(base))
    manifest = Manifest(
        name=name,
        language_model=str(base),
        vision_tower=str(clip),
        template=TEMPLATE,
        image_size=IMAGE_SIZE,
        image_mode="pad",
        image_mean=(0.4815, 0.4578, 0.4082),
        image_std=(0.2686, 0.2613, 0.2758),
        dtype=dtype,
    )
    write_manifest(run, manifest)
    return run
