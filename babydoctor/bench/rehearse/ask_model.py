"""Load a model in one of several ways and compute its answer for a comparison: greedy tokens and logits.

Run as a program, with one process per model:
``python -m babydoctor.bench.rehearse.ask_model KIND MODEL --out FILE ...``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from babydoctor.bench.rehearse.answers import AnswerTensors, read_answer
from babydoctor.schema import IMAGE_TOKEN, Turn


@torch.no_grad()
def answer_run(
    path: Path, image: Path, question: str, num_tokens: int, dtype: torch.dtype, reference: Any
) -> AnswerTensors:
    """Ask a run directory. ``reference`` holds the token ids to compute logits at; None: the greedy tokens."""
    from babydoctor.conversation import get_template, render_prompt
    from babydoctor.data.tokens import encode
    from babydoctor.imaging.load import load_image
    from babydoctor.imaging.preprocess import to_pixels
    from babydoctor.model.lora import lora_layers
    from babydoctor.model.run_dir import load_run

    run = load_run(path, dtype=dtype)
    turns = [Turn("user", f"{IMAGE_TOKEN}\n{question}")]
    prompt = encode(render_prompt(turns, get_template(run.manifest.template)), run.tokenizer, run.model.num_patches)
    ids, mask = torch.tensor(prompt.input_ids).long(), torch.tensor(prompt.image_mask)
    pixels = torch.as_tensor(np.array(to_pixels(load_image(image), run.manifest.image)))[None]
    features = run.model.encode_images(pixels)

    def logits_after(tokens: list[int], count: int) -> torch.Tensor:
        """Logits ``[count, V]`` at the last ``count`` positions of the prompt followed by ``tokens``."""
        all_ids = torch.cat([ids, torch.tensor(tokens, dtype=torch.long)])
        all_mask = torch.cat([mask, torch.zeros(len(tokens), dtype=torch.bool)])
        embeds = run.model.embed(all_ids[None], all_mask[None], features)
        hidden = run.model.decode(embeds, torch.arange(len(all_ids))[None], (len(all_ids),))
        return run.model.language_model.lm_head(hidden[0, -count:]).float()

    tokens: list[int] = []
    rows: list[torch.Tensor] = []
    for _ in range(num_tokens):
        rows.append(logits_after(tokens, 1))
        tokens.append(int(rows[-1].argmax()))
    given = tokens if reference is None else [int(token) for token in reference]
    logits = torch.cat(rows) if given == tokens else logits_after(given[:-1], num_tokens)
    layers = [layer for _, layer in lora_layers(run.model.language_model)]
    without = None
    if layers:
        for layer in layers:
            for name in layer.scaling:
                layer.scaling[name] = 0.0
        without = logits_after(given[:-1], num_tokens).numpy()
    return AnswerTensors(np.array(tokens), logits.numpy(), prompt.input_ids[~prompt.image_mask], without)


@torch.no_grad()
def answer_hf(
    path: Path, image: Path, question: str, num_tokens: int, dtype: torch.dtype, reference: Any
) -> AnswerTensors:
    """Ask an export for transformers as its README describes: processor, chat template, ``generate``."""
    from PIL import Image
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    processor: Any = AutoProcessor.from_pretrained(str(path))
    model: Any = LlavaForConditionalGeneration.from_pretrained(str(path), dtype=dtype).eval()
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    with Image.open(image) as picture:
        inputs = processor(text=text, images=picture.convert("RGB"), return_tensors="pt", add_special_tokens=False)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    ids = inputs["input_ids"]
    # A random model may write an end-of-text token; the comparison continues after it.
    generated = model.generate(
        **inputs, max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    tokens = generated[0, ids.shape[1] :]
    given = tokens if reference is None else torch.tensor(reference)
    extended = torch.cat([ids, given[None, :-1]], dim=1)
    output = model(input_ids=extended, attention_mask=torch.ones_like(extended), pixel_values=inputs["pixel_values"])
    logits = output.logits[0, -num_tokens:].float().numpy()
    prompt = ids[0][ids[0] != model.config.image_token_id].numpy()
    return AnswerTensors(tokens.numpy(), logits, prompt)


def main() -> None:
    """Ask one model and write its answer to a file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=("run", "hf"))
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--question", required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--reference", type=Path)
    given = parser.parse_args()
    reference = None if given.reference is None else read_answer(given.reference).tokens
    ask = answer_run if given.kind == "run" else answer_hf
    answer = ask(given.model, given.image, given.question, given.tokens, getattr(torch, given.dtype), reference)
    arrays = {key: value for key, value in vars(answer).items() if value is not None}
    np.savez(given.out, **arrays)
    print(json.dumps({"tokens": answer.tokens.tolist()}))


if __name__ == "__main__":
    main()
