"""The three sizes of the rehearsal: hidden sizes, layers, rows, steps and tokens."""

from __future__ import annotations

from dataclasses import dataclass

from babydoctor.model.known_sizes import CLIP_L, LLAMA_2_7B
from babydoctor.schema import UserError

GIB = 2**30

CLIP_L_TEXT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 49408,
}


@dataclass(frozen=True)
class Size:
    """The size of one rehearsal.

    Attributes:
        language: sizes of the LLaMA, by the keys of its ``config.json``.
        vision: sizes of CLIP's vision tower. Its images have 224 px and its patches 14 px in every size.
        text: sizes of CLIP's text tower, which is not used.
        shard_bytes: largest shard of the published LLaMA; the published 7B has two shards.
        steps, batch_size: for each training stage.
        micro_batch_tokens: for each stage; empty: as shipped. Small values make a small step accumulate gradients.
        num_threads: for each process; None: as many as there are cores. Tiny models are slower on several threads.
        num_sample_answers: sample answers of the last stage; each takes a long time in wide models.
        num_rows: rows of each training set.
        answer_tokens: longest answer of chat, evaluation and the APIs.
        eval_batch_size: ``--batch-size`` of the evaluation. In bfloat16 a batch rounds differently from one row. The
            best tokens of random weights are so close that its answers can then differ from those of ``chat``.
        greedy_tokens: tokens that are compared between a run and its merged and exported forms.
        dtype: precision of the comparison. float32 reveals small errors, but 7B does not fit into memory.
        tolerance: largest difference of logits, relative to the largest logit, that counts as rounding.
        gguf_dtype: ``--dtype`` of the exported GGUF.
        checks_plan: whether peaks must agree with the plan. Tiny models are smaller than the noise.
        deletes_products: whether merged and exported weights are deleted after their comparison.
        limit_s: a command that takes longer is stopped and counts as failed.
    """

    name: str
    language: dict[str, int]
    vision: dict[str, int]
    text: dict[str, int]
    shard_bytes: int
    steps: int
    batch_size: int
    micro_batch_tokens: dict[str, int]
    num_threads: int | None
    num_sample_answers: int
    num_rows: int
    answer_tokens: int
    eval_batch_size: int
    greedy_tokens: int
    dtype: str
    tolerance: float
    gguf_dtype: str
    checks_plan: bool
    deletes_products: bool
    limit_s: float


SIZES = {
    "golden": Size(
        name="golden",
        language={
            "hidden_size": 128,
            "intermediate_size": 352,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "vocab_size": 2000,
        },
        vision={"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2},
        text={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "vocab_size": 49408,
        },
        shard_bytes=400_000,
        steps=3,
        batch_size=4,
        micro_batch_tokens={"align": 1024, "instruct": 2048, "radiology": 1024},
        num_threads=1,
        num_sample_answers=1,
        num_rows=20,
        answer_tokens=12,
        eval_batch_size=4,
        greedy_tokens=8,
        dtype="float32",
        tolerance=0.02,
        gguf_dtype="bfloat16",
        checks_plan=False,
        deletes_products=False,
        limit_s=600,
    ),
    "wide": Size(
        name="wide",
        language={**LLAMA_2_7B, "num_hidden_layers": 2},
        vision={**CLIP_L, "num_hidden_layers": 4},
        text={**CLIP_L_TEXT, "num_hidden_layers": 2},
        shard_bytes=300_000_000,
        steps=2,
        batch_size=2,
        micro_batch_tokens={},
        num_threads=None,
        num_sample_answers=0,
        num_rows=12,
        answer_tokens=4,
        eval_batch_size=4,
        greedy_tokens=3,
        dtype="float32",
        tolerance=0.02,
        gguf_dtype="q8_0",
        checks_plan=True,
        deletes_products=True,
        limit_s=1200,
    ),
    "7b": Size(
        name="7b",
        language=LLAMA_2_7B,
        vision=CLIP_L,
        text=CLIP_L_TEXT,
        shard_bytes=10_000_000_000,
        steps=2,
        batch_size=2,
        micro_batch_tokens={},
        num_threads=None,
        num_sample_answers=1,
        num_rows=12,
        answer_tokens=4,
        eval_batch_size=1,
        greedy_tokens=3,
        dtype="bfloat16",
        # bfloat16 rounds a lot over 32 layers of random weights: with the same merged weights, our forward pass and
        # that of transformers differ by 4.9% of the largest logit. Without the LoRA it would be 111%.
        tolerance=0.1,
        gguf_dtype="q4_0",
        checks_plan=True,
        deletes_products=True,
        limit_s=4 * 3600,
    ),
}


def find_size(name: str) -> Size:
    """A size by its name.

    Raises:
        UserError: there is no such size.
    """
    if name not in SIZES:
        raise UserError(f"--size {name!r} is not one of {', '.join(SIZES)}")
    return SIZES[name]
