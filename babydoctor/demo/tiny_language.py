"""The tiny base models: a CLIP tower, a tokenizer and a chat LLaMA, trained from scratch on the training phantoms.

They replace openai/clip-vit-large-patch14 and meta-llama/Llama-2-7b-chat on machines without downloads. They are saved
as ordinary transformers directories (``clip/`` and ``llama/``), so no other code treats them specially.

The LLaMA trains on text only: questions and their topics, conversations with a description in place of the image, plain
sentences, and radiology reports and records. It learns the vocabulary, radiology's terms included, what people ask for
in which words, and the form of the conversations. It never sees a question that is answered in radiology's terms. It
learns to use images in the three stages only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from babydoctor.demo.tiny_corpus import build_corpus
from babydoctor.phantom import text
from babydoctor.phantom.asking import expand, load_wordings
from babydoctor.phantom.case import Case, load_cases
from babydoctor.progress import loss_progress
from babydoctor.schema import IGNORE_INDEX, UserError

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from babydoctor.demo.tiny_tower import TowerSettings

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
WORD_START = "▁"
_USER_TURN = re.compile(r"\[INST\].*?\[/INST\]", re.DOTALL)


_Document = tuple[list[int], list[int]]
"""Token ids and labels."""


@dataclass(frozen=True)
class LanguageSettings:
    """Sizes and optimizer settings of the language model."""

    vocab_size: int = 2560
    hidden_size: int = 192
    intermediate_size: int = 512
    num_layers: int = 4
    num_heads: int = 6
    max_positions: int = 1024
    num_texts: int = 24000
    num_steps: int = 700
    initializer_range: float = 0.06
    """Larger than LLaMA's 0.02, which suits thousands of steps: attention is sharp enough to learn from the first."""
    batch_tokens: int = 1300
    learning_rate: float = 3e-3
    weight_decay: float = 0.01


def build_tokenizer(corpus: Sequence[str], cases: Sequence[Case], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a BPE tokenizer with LLaMA-2's layout: three special tokens, 256 bytes, then pieces with ``▁``."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    rng = np.random.default_rng(0)
    # Every word of the three training sets gets its own piece, including the terms that only stage 3 uses.
    words = [*corpus, text.REPORT_QUESTION]
    words += [expand(pattern, "none", rng) for lines in load_wordings().trained.values() for pattern in lines * 20]
    words += [text.report(case) for case in cases[:500]]
    words += [question for wordings in text.QUESTIONS.values() for question in wordings]
    words += [term for terms in text.TERMS.values() for term in terms.values()] * 20
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Sequence([normalizers.Prepend(WORD_START), normalizers.Replace(" ", WORD_START)])
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("\n|</?s>"), "removed"),
            pre_tokenizers.Split(WORD_START, "merged_with_next"),
            # Digits and punctuation are separate pieces, so "left." contains the piece "left".
            pre_tokenizers.Split(Regex(r"[0-9.,:?!]"), "isolated"),
        ]
    )
    learned = vocab_size - len(SPECIAL_TOKENS) - 256
    learner.train_from_iterator(words, trainers.BpeTrainer(vocab_size=learned, show_progress=False))
    model = json.loads(learner.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].get)
    ordered = [*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: number for number, piece in enumerate(ordered)},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = learner.normalizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(WORD_START, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def _encode(document: str, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """Token ids of a document, and its labels: in conversations, only what the assistant says is learned."""
    encoded = tokenizer(document, return_offsets_mapping=True)
    ids = encoded["input_ids"]
    spans = [match.span() for match in _USER_TURN.finditer(document)]
    labels = [
        IGNORE_INDEX if any(start <= place < end for start, end in spans) else token
        for token, (place, _) in zip(ids, encoded["offset_mapping"], strict=True)
    ]
    return ids, labels


def _group(documents: Sequence[_Document], num_tokens: int) -> list[list[_Document]]:
    """Divide documents, sorted by length, into groups of at most ``num_tokens`` tokens, padding included."""
    groups: list[list[_Document]] = [[]]
    for document in documents:
        if groups[-1] and (len(groups[-1]) + 1) * len(document[0]) > num_tokens:
            groups.append([])
        groups[-1].append(document)
    return groups


def hidden_states(model: LlamaForCausalLM, input_ids: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The last hidden states of the wanted tokens, ``[M, D]``, as transformers computes them.

    The feed-forward of the last layer runs on these tokens only, 40% of all, which saves about 7% of a step.

    Args:
        input_ids: ``[B, L]``.
        wanted: bool ``[B, L]``, true for ``M`` tokens.
    """
    import torch

    body = model.model
    *layers, last = body.layers
    hidden = body.embed_tokens(input_ids)  # [B, L, D]
    rotary = body.rotary_emb(hidden, torch.arange(input_ids.shape[1])[None])
    for layer in layers:
        hidden = layer(hidden, position_embeddings=rotary)
    mixed, _ = last.self_attn(last.input_layernorm(hidden), position_embeddings=rotary, attention_mask=None)
    hidden = (hidden + mixed)[wanted]
    hidden = hidden + last.mlp(last.post_attention_layernorm(hidden))
    return body.norm(hidden)


def train_language_model(
    corpus: Sequence[str], tokenizer: PreTrainedTokenizerFast, settings: LanguageSettings, seed: int
) -> LlamaForCausalLM:
    """Train a LLaMA from scratch by language modeling on the corpus."""
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed + 1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_heads,
        max_position_embeddings=settings.max_positions,
        rms_norm_eps=1e-5,
        initializer_range=settings.initializer_range,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    documents = sorted((_encode(piece, tokenizer) for piece in corpus), key=lambda document: len(document[0]))
    # Documents of similar length share a batch to limit padding. The order of the batches is random.
    groups = _group(documents, settings.batch_tokens)
    rng = np.random.default_rng([seed, 3])
    order = [int(i) for _ in range(1 + settings.num_steps // len(groups)) for i in rng.permutation(len(groups))]
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        betas=(0.9, 0.98),
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.num_steps, pct_start=0.1
    )
    for number, report in enumerate(loss_progress("language model", settings.num_steps)):
        group = groups[order[number]]
        longest = max(len(ids) for ids, _ in group)
        input_ids = torch.zeros((len(group), longest), dtype=torch.long)
        labels = torch.full((len(group), longest), IGNORE_INDEX)
        for row, (ids, targets) in enumerate(group):  # right padding: causal attention never reaches it
            input_ids[row, : len(ids)], labels[row, : len(ids)] = torch.tensor(ids), torch.tensor(targets)
        learned = labels[:, 1:] != IGNORE_INDEX
        hidden = hidden_states(model, input_ids[:, :-1], learned)
        loss = cross_entropy(model.lm_head(hidden), labels[:, 1:][learned])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        report(loss.item())
    return model.eval()


def make_language_model(
    cases: Sequence[Case], out: Path, settings: LanguageSettings | None = None, seed: int = 0
) -> None:
    """Train a tokenizer and a LLaMA on texts about the cases and save both in the folder ``out``."""
    from babydoctor.files import atomic_directory

    settings = settings or LanguageSettings()
    corpus = build_corpus(cases, settings.num_texts, seed)
    tokenizer = build_tokenizer(corpus, cases, settings.vocab_size)
    model = train_language_model(corpus, tokenizer, settings, seed)
    with atomic_directory(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@dataclass(frozen=True)
class TinySettings:
    """Settings of the tiny base models."""

    seed: int = 0
    language: LanguageSettings = field(default_factory=LanguageSettings)
    tower: TowerSettings | None = None
    """None: the defaults."""


def make_tiny_base(phantoms: Path, out: Path, settings: TinySettings | None = None) -> None:
    """Train ``out/clip`` and ``out/llama`` on a phantom folder. Existing ones are kept.

    Raises:
        UserError: ``phantoms`` has no training cases.
    """
    from babydoctor.demo.tiny_tower import make_tower

    settings = settings or TinySettings()
    cases = load_cases(phantoms, "train")
    if not cases:
        raise UserError(f"{phantoms / 'truth.jsonl'} has no training case; run `babydoctor data phantom` again")
    if not (out / "clip").is_dir():
        make_tower(cases, phantoms / "images", out / "clip", settings.tower, settings.seed)
    if not (out / "llama").is_dir():
        make_language_model(cases, out / "llama", settings.language, settings.seed)
