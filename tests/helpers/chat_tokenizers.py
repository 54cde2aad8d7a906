"""Small tokenizers of the kinds that LLaMA-3, Qwen2 and Mistral use, with their special tokens and chat templates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TEXT = "What does the scan show? The scan shows 12 nodules in the left lung.\n\nuser assistant system [INST] [/INST] CT"

LLAMA_3_JINJA = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
"""meta-llama/Meta-Llama-3-8B-Instruct, ``tokenizer_config.json``."""

QWEN_2_JINJA = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Qwen/Qwen2-7B-Instruct, ``tokenizer_config.json``."""

MISTRAL_JINJA = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}

{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('After the optional system message, conversation roles must alternate user/assistant') }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.first and system_message is defined %}
            {{- " [INST] " + system_message + "\\n\\n" + message["content"] + " [/INST]" }}
        {%- else %}
            {{- " [INST] " + message["content"] + " [/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] + eos_token}}
    {%- else %}
        {{- raise_exception('Only user and assistant roles are supported!') }}
    {%- endif %}
{%- endfor %}
"""
"""mistralai/Mistral-7B-Instruct-v0.2, ``tokenizer_config.json``; the texts of the exceptions are shortened."""

_LLAMA_3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def llama_3_tokenizer(vocab_size: int = 400) -> Any:
    """Byte-level BPE with LLaMA-3's pattern; ``<|eot_id|>`` ends an answer, but the ``eos_token`` is another, as in
    the base model."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_LLAMA_3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _train(tokenizer, vocab_size, [])
    tokenizer.add_special_tokens(
        ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        chat_template=LLAMA_3_JINJA,
    )


def qwen_2_tokenizer(vocab_size: int = 400) -> Any:
    """Qwen2's tokenizer class: byte-level BPE without a begin-of-sequence token."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import Qwen2Tokenizer

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    _train(trained, vocab_size, [])
    vocabulary, merges = _parts(trained)
    specials = [AddedToken(text, special=True, normalized=False) for text in ("<|im_start|>", "<|im_end|>")]
    return Qwen2Tokenizer(
        vocab=vocabulary,
        merges=merges,
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        additional_special_tokens=specials,
        chat_template=QWEN_2_JINJA,
    )


def mistral_tokenizer(*, legacy: bool, vocab_size: int = 600) -> Any:
    """LLaMA's tokenizer class, as Mistral's first tokenizers use it: SentencePiece's BPE with byte fallback."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaTokenizer

    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    _train(trained, vocab_size, ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))])
    vocabulary, merges = _parts(trained)
    return LlamaTokenizer(vocab=vocabulary, merges=merges, legacy=legacy, chat_template=MISTRAL_JINJA)


def with_tokenizer(base: Path, tokenizer: Any, folder: Path) -> Path:
    """A folder with the weights of ``base`` and another tokenizer."""
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).symlink_to(base / name)
    tokenizer.save_pretrained(folder)
    return folder


def _train(tokenizer: Any, vocab_size: int, first_tokens: list[str]) -> None:
    from tokenizers import pre_tokenizers, trainers

    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=first_tokens,
        initial_alphabet=[] if first_tokens else pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)


def _parts(tokenizer: Any) -> tuple[dict[str, int], list[tuple[str, str]]]:
    import json

    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]
