"""The golden question and images, and a run's answers to them computed without the engine."""

from __future__ import annotations

import torch

from babydoctor.conversation import get_template, render_prompt
from babydoctor.data.tokens import encode
from babydoctor.model.run_dir import Run
from babydoctor.schema import Turn

QUESTION = "<image>\nThe following image is a radiology scan. Deeply analyze and diagnose this image."
IMAGES = ("ROCO_00278", "ROCO_01747")


def logits_and_greedy(run: Run, pixels: torch.Tensor, num_new: int) -> tuple[torch.Tensor, list[int]]:
    """Logits ``[T, V]`` of the golden prompt and the ids that greedy decoding adds."""
    prompt = encode(
        render_prompt([Turn("user", QUESTION)], get_template(run.manifest.template)),
        run.tokenizer,
        run.model.num_patches,
    )
    ids, mask = torch.from_numpy(prompt.input_ids).long(), torch.from_numpy(prompt.image_mask)
    with torch.no_grad():
        embeds = run.model.embed(ids[None], mask[None], run.model.encode_images(pixels[None]))
        logits = first = None
        greedy: list[int] = []
        for _ in range(num_new):
            length = embeds.shape[1]
            hidden = run.model.decode(embeds, torch.arange(length)[None], (length,))
            logits = run.model.language_model.lm_head(hidden)[0]
            first = logits if first is None else first
            greedy.append(int(logits[-1].argmax()))
            if greedy[-1] == run.tokenizer.eos_token_id:
                break
            added = run.model.language_model.model.embed_tokens(torch.tensor([[greedy[-1]]]))
            embeds = torch.cat([embeds, added], dim=1)
    assert first is not None
    return first, greedy


@torch.no_grad()
def regret(run: Run, pixels: torch.Tensor, added: list[int], question: str = QUESTION) -> list[float]:
    """How far the logit of each added id is below the largest one, given the ids before it."""
    template = get_template("llava_llama_2")
    prompt = encode(render_prompt([Turn("user", question)], template), run.tokenizer, run.model.num_patches)
    ids = torch.tensor([[*prompt.input_ids.tolist(), *added]])
    mask = torch.tensor([[*prompt.image_mask.tolist(), *[False] * len(added)]])
    embeds = run.model.embed(ids, mask, run.model.encode_images(pixels[None]))
    hidden = run.model.decode(embeds, torch.arange(ids.shape[1])[None], (ids.shape[1],))
    logits = run.model.language_model.lm_head(hidden)[0, len(prompt) - 1 : -1]
    return (logits.max(-1).values - logits.gather(1, torch.tensor(added)[:, None])[:, 0]).tolist()
