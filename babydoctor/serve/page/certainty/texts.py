"""What the web UI says about how sure an answer is, and about images unlike the training images. Pure functions.

The figures come from the API's ``familiarity``, ``confidence`` and ``agreement``. What a run was not measured for is
not mentioned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from babydoctor.eval.metrics import normalize

UNFAMILIAR = (
    "This image is unlike the images that the model was trained on. Its answer may mean nothing, however sure it "
    "sounds."
)
NO_CONFIDENCE = "Its confidence is not shown, because it was not measured on such images."

RIGHT_OFTEN = "{where}, answers with this confidence were right in {hits} of 100 cases"
TOO_FEW = "{where}, too few answers had this confidence to say how often they were right"
NOT_REAL = "not measured on real images"
NOT_HERE = "not measured on your images"

FEWEST_SIMILAR = 20
"""Similar held-out answers without which no share is stated."""

PANEL_NOTE = (
    "Both buttons ask the last question again. Answers that agree can all be wrong, and an answer that depends on the "
    "image can still be wrong."
)

AGREE = "{agreeing} of {samples} more answers, sampled at random, say the same."
ALL_AGREE = "All {samples} more answers, sampled at random, say the same. They can all be wrong."
NONE_AGREE = "None of {samples} more answers, sampled at random, says the same. Do not rely on this answer."
SHARED_WORDS = "On average they share {share:.0%} of their words with the answer."

SAME_WITHOUT = "The answer is the same without the image, so it may not depend on the image at all."
OTHER_WITHOUT = "Without the image the answer is different, so it depends on the image. That does not make it right."


def lines_under_answer(certainty: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(kind, sentence) to show under an answer; kind is ``warning`` or ``note``."""
    familiarity, confidence = certainty.get("familiarity") or {}, certainty.get("confidence") or {}
    is_unfamiliar = familiarity.get("is_familiar") is False
    lines = [("warning", UNFAMILIAR)] if is_unfamiliar else []
    if "value" in confidence:
        sentence = NO_CONFIDENCE if is_unfamiliar else confidence_sentence(confidence)
        lines.append(("note", sentence))
    return lines


def confidence_sentence(confidence: Mapping[str, Any]) -> str:
    """The confidence of an answer, and how often held-out answers like it were right."""
    similar, hits = int(confidence["num_similar"]), int(confidence["num_similar_right"])
    is_phantom = confidence["measured_on"] == "phantom"
    where = "On held-out phantoms" if is_phantom else f"On held-out questions ({confidence['measured_on']})"
    template = RIGHT_OFTEN if similar >= FEWEST_SIMILAR else TOO_FEW
    # The rule of succession: 40 right of 40 do not promise 100 of 100.
    measured = template.format(where=where, hits=round(100 * (hits + 1) / (similar + 2)))
    return f"Confidence {percent(confidence['value'])}. {measured}; {NOT_REAL if is_phantom else NOT_HERE}."


def percent(share: float) -> str:
    """A share as whole percent that never claims 0 or 100."""
    if share >= 0.995:
        return "over 99%"
    return "under 1%" if share < 0.005 else f"{share:.0%}"


def agreement_sentence(agreement: Mapping[str, Any]) -> str:
    """How many sampled answers say the same as the answer."""
    samples, agreeing = int(agreement["num_samples"]), int(agreement["num_agreeing"])
    template = ALL_AGREE if agreeing == samples else AGREE if agreeing else NONE_AGREE
    sentence = template.format(agreeing=agreeing, samples=samples)
    share = float(agreement["word_overlap"])
    return sentence if agreeing == samples else f"{sentence} {SHARED_WORDS.format(share=share)}"


def without_image_sentence(answer: str, hidden: str) -> str:
    """What it means that the answer is, or is not, the same without the image."""
    return SAME_WITHOUT if normalize(answer) == normalize(hidden) else OTHER_WITHOUT
