"""``babydoctor eval RUN --task phantom --localization``: does "Where it looked" point at the finding?

For held-out phantoms with a finding, the run is asked what the finding is, and the occlusion map of its own answer is
compared with where the finding was drawn: the pointing game (Zhang et al. 2018) and the area under the ROC curve of the
map as a classifier of pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from babydoctor.eval.intervals import NUM_RESAMPLES, draw_weights
from babydoctor.eval.metrics import auroc
from babydoctor.files import write_json
from babydoctor.imaging.load import load_image
from babydoctor.imaging.preprocess import to_pixels
from babydoctor.inference import Inference, Query, user_turn
from babydoctor.model.occlusion import FILL, Fill, OcclusionMap, build_task
from babydoctor.phantom.case import Case, load_cases
from babydoctor.phantom.drawing import finding_mask
from babydoctor.schema import UserError

if TYPE_CHECKING:
    from babydoctor.model.run_dir import Run

QUESTION = "What is the main finding?"
MAX_NEW_TOKENS = 12
DEFAULT_CASES = 100


@dataclass(frozen=True, slots=True)
class CaseResult:
    """One phantom. Distances are from the map's peak to the finding's nearest pixel, in patches."""

    id: str
    finding: str
    answer: str
    distance: float
    auc: float
    finding_share: float
    """Share of the image that the finding covers."""


def cases_with_finding(phantoms: Path, num_cases: int = DEFAULT_CASES) -> list[Case]:
    """The first held-out cases with a finding, at most ``num_cases``.

    Raises:
        UserError: the folder holds no phantoms, or none with a finding.
    """
    cases = [case for case in load_cases(phantoms, "held_out") if case.finding != "none"][:num_cases]
    if not cases:
        raise UserError(
            f"{phantoms} holds no held-out phantoms with a finding; write some with `babydoctor data phantom`"
        )
    return cases


def localize(run: Run, phantoms: Path, cases: Sequence[Case], fill: Fill = FILL) -> Iterator[CaseResult]:
    """Compare the run's maps with the truth, case by case. The images are in ``phantoms``."""
    query = Query([user_turn(QUESTION, has_image=True)], max_new_tokens=MAX_NEW_TOKENS, logprobs=0)
    options = {"pack_weights": False}  # the maps use the model's own weights
    with Inference.for_queries(run.model, run.tokenizer, run.manifest, [query], engine=options) as inference:
        for case in cases:
            pixels = to_pixels(load_image(phantoms / "images" / case.image), run.manifest.image)
            yield _localize_case(inference, replace(query, pixels=pixels), case, fill)


def _localize_case(inference: Inference, query: Query, case: Case, fill: Fill) -> CaseResult:
    model, prompt = inference.model, inference.encode(query.turns)
    answer = inference.answer(query)
    answer_ids = [token.token_id for token in answer.logprobs]
    # Without the token that ends it, unless nothing else was answered.
    answer_ids = [token for token in answer_ids if token not in inference.engine.eos] or answer_ids
    assert query.pixels is not None
    task = build_task(model, prompt.input_ids, prompt.image_mask, query.pixels, answer_ids, fill)
    occlusion = OcclusionMap(model, task)
    for _ in occlusion.run():
        pass
    drops = occlusion.result().sum(0)  # [cells, cells]
    mask = finding_mask(case, inference.image_settings.size)
    distance, auc = peak_distance(drops, mask, model.patch_size), pixel_auc(drops, mask)
    return CaseResult(case.id, case.finding, answer.text.strip(), distance, auc, float(mask.mean()))


def peak_distance(drops: np.ndarray, mask: np.ndarray, patch_size: int) -> float:
    """Distance from the peak's cell to the nearest pixel of ``mask`` ``[S, S]``, in patches; 0: the cell touches it.

    Args:
        drops: ``[cells, cells]``; a cell is half a patch.
    """
    cell = patch_size / 2
    row, column = np.unravel_index(int(drops.argmax()), drops.shape)
    rows, columns = np.nonzero(mask)
    down = np.maximum(0, np.maximum(row * cell - rows - 1, rows - (row + 1) * cell))
    right = np.maximum(0, np.maximum(column * cell - columns - 1, columns - (column + 1) * cell))
    return float(np.hypot(down, right).min() / patch_size)


def pixel_auc(drops: np.ndarray, mask: np.ndarray) -> float:
    """Probability that a pixel of the finding has a larger drop than one outside it, ties counted as half."""
    size = mask.shape[0]
    index = np.arange(size) * drops.shape[0] // size
    values = drops[np.ix_(index, index)]
    return auroc(values[~mask], values[mask])


def summarize(results: Sequence[CaseResult], fill: Fill) -> dict[str, Any]:
    """The figures, with 95% bootstrap intervals over cases."""
    values = {
        "on_finding": [float(result.distance == 0) for result in results],
        "near_finding": [float(result.distance <= 0.5) for result in results],
        "auc": [result.auc for result in results],
    }
    return {
        "method": "occlusion",
        "fill": fill,
        "num_cases": len(results),
        "num_on": int(sum(values["on_finding"])),
        "num_near": int(sum(values["near_finding"])),
        "finding_share": float(np.mean([result.finding_share for result in results])),
        **{name: _with_interval(given) for name, given in values.items()},
    }


def _with_interval(values: Sequence[float]) -> dict[str, float]:
    means = draw_weights(len(values), NUM_RESAMPLES, seed=0) @ np.asarray(values) / len(values)
    low, high = np.percentile(means, (2.5, 97.5)).tolist()
    return {"value": float(np.mean(values)), "low": low, "high": high}


def evaluate_localization(
    run_directory: Path,
    phantoms: Path,
    out: Path,
    *,
    num_cases: int,
    fill: Fill = FILL,
    device: str = "cpu",
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Measure, write ``localization.json`` to ``out``, and record figures of the usual fill in the run's manifest."""
    from babydoctor.model.run_dir import load_run, read_manifest, write_manifest

    cases = cases_with_finding(phantoms, num_cases)
    results = []
    for number, result in enumerate(localize(load_run(run_directory, device=device), phantoms, cases, fill), start=1):
        results.append(result)
        progress(number, len(cases))
    summary = summarize(results, fill)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "localization.json", {**summary, "cases": [asdict(result) for result in results]})
    if fill == FILL:
        write_manifest(run_directory, read_manifest(run_directory).model_copy(update={"localization": summary}))
    return summary
