"""The tokenizer as GGUF keys for llama.cpp.

SentencePiece BPE (``tokenizer.model``, or an equivalent ``tokenizer.json``) is llama.cpp's ``llama`` tokenizer.
Byte-level BPE is its ``gpt2`` tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from babydoctor.schema import UserError

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerBase


_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA_3_SPLIT = _WORDS + r"\p{N}{1,3}" + _REST
"""The pattern by which LLaMA-3's tokenizer splits text before merging."""

_SPLIT_NAMES = {LLAMA_3_SPLIT: "llama-bpe", _WORDS + r"\p{N}" + _REST: "qwen2"}
"""The patterns of LLaMA-3 and Qwen2 and llama.cpp's names for them."""


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id with SentencePiece's score and llama.cpp's token type."""

    model: str
    tokens: list[bytes]
    scores: list[float]
    types: Sequence[int]
    merges: list[str]
    pre: str = "default"
    """llama.cpp's name of the pattern that splits text before merging."""


def read_vocabulary(tokenizer: PreTrainedTokenizerBase, directory: Path, size: int) -> Vocabulary:
    """Read the vocabulary of ``size`` ids. Ids without a token become unused tokens.

    Raises:
        UserError: llama.cpp has no tokenizer of this kind.
    """
    model_file = directory / "tokenizer.model"
    base = _sentencepiece(model_file) if model_file.is_file() else _from_json(tokenizer, directory)
    return _with_added(base, tokenizer, size)


def write_vocabulary(
    writer: GGUFWriter, vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase, *, end_id: int
) -> None:
    """Write the vocabulary and the special ids.

    Args:
        end_id: the token that ends an answer. llama.cpp finds further ones, such as the end of text, by their names.
    """
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    for value, add in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (end_id, writer.add_eos_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id),
    ):
        if value is not None:
            add(value)
    writer.add_add_bos_token(tokenizer.bos_token_id is not None)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(vocabulary.model == "llama")


def _sentencepiece(path: Path) -> Vocabulary:
    from gguf import TokenType
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor()
    pieces.LoadFromFile(str(path))
    tokens, scores, types = [], [], []
    for index in range(pieces.GetPieceSize()):
        tokens.append(pieces.IdToPiece(index).encode())
        scores.append(pieces.GetScore(index))
        kinds = (
            (pieces.IsUnknown, TokenType.UNKNOWN),
            (pieces.IsControl, TokenType.CONTROL),
            (pieces.IsUnused, TokenType.UNUSED),
            (pieces.IsByte, TokenType.BYTE),
        )
        types.append(next((kind for test, kind in kinds if test(index)), TokenType.NORMAL))
    return Vocabulary("llama", tokens, scores, types, [])


def _from_json(tokenizer: PreTrainedTokenizerBase, directory: Path) -> Vocabulary:
    from gguf import TokenType

    backend: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    model = backend["model"]
    parts = {key: backend.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")}
    text = json.dumps(parts, ensure_ascii=False)
    if model["type"] != "BPE":
        raise UserError(
            f"{directory}: llama.cpp does not support this {model['type']!r} tokenizer; it supports SentencePiece "
            "BPE (tokenizer.model) and byte-level BPE"
        )
    ids = model["vocab"]
    ordered = sorted(ids, key=lambda token: ids[token])
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    tokens = [token.encode() for token in ordered]
    if '"ByteLevel"' in text:
        pre = _split_name(backend.get("pre_tokenizer"), directory)
        return Vocabulary("gpt2", tokens, [0.0] * len(tokens), [TokenType.NORMAL] * len(tokens), merges, pre)
    if "▁" not in text:
        raise UserError(
            f"{directory}: this BPE tokenizer is neither SentencePiece's nor byte-level; llama.cpp supports no others"
        )
    # llama.cpp merges the pair whose result has the best score; its score is minus the rank of its first merge.
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", "", 1), rank)
    scores = [-float(ranks.get(token, len(merges))) for token in ordered]
    types = [
        TokenType.BYTE if len(token) == 6 and token.startswith("<0x") and token.endswith(">") else TokenType.NORMAL
        for token in ordered
    ]
    if model.get("unk_token") in ids:
        types[ordered.index(model["unk_token"])] = TokenType.UNKNOWN
    return Vocabulary("llama", tokens, scores, types, [])


def _split_name(pre_tokenizer: Any, directory: Path) -> str:
    """llama.cpp's name of a byte-level tokenizer's pattern.

    Raises:
        UserError: it is none of the known ones, so llama.cpp would split text differently.
    """
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer]) if pre_tokenizer else []
    patterns = [step["pattern"].get("Regex", step["pattern"]) for step in steps if step["type"] == "Split"]
    others = [step["type"] for step in steps if step["type"] not in ("Split", "ByteLevel")]
    if not patterns and not others:
        return "gpt-2"
    if not others and len(patterns) == 1 and patterns[0] in _SPLIT_NAMES:
        return _SPLIT_NAMES[patterns[0]]
    raise UserError(
        f"{directory}: the pre_tokenizer in tokenizer.json splits text by {(patterns + others)[0]!r}, which has no "
        f"name in llama.cpp; known are the patterns of GPT-2, {' and '.join(_SPLIT_NAMES.values())}"
    )


def _with_added(base: Vocabulary, tokenizer: PreTrainedTokenizerBase, size: int) -> Vocabulary:
    from gguf import TokenType

    tokens, scores, types = list(base.tokens), list(base.scores), list(base.types)
    for index in range(len(tokens), size):
        tokens.append(f"[PAD{index}]".encode())
        scores.append(-10000.0)
        types.append(TokenType.UNUSED)
    for index, added in tokenizer.added_tokens_decoder.items():
        if index < size and types[index] not in (TokenType.UNKNOWN, TokenType.BYTE):
            tokens[index] = added.content.encode()
            types[index] = TokenType.CONTROL if added.special else TokenType.USER_DEFINED
    return Vocabulary(base.model, tokens[:size], scores[:size], types[:size], base.merges, base.pre)
