"""Occlusion maps: the definition on a small model, the search on a larger grid, and computation in the engine."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.engine_models import build_model, build_request, settings, tokenizer, tokens_of  # noqa: F401
from helpers.serving import tiny_run

from babydoctor.cli.evaluation.measure import measure_localization
from babydoctor.engine.engine import Engine
from babydoctor.eval.localization import MAX_NEW_TOKENS, QUESTION, evaluate_localization, peak_distance, pixel_auc
from babydoctor.imaging.load import load_image
from babydoctor.imaging.preprocess import to_pixels
from babydoctor.inference import Inference, Query, user_turn
from babydoctor.model.occlusion import HiddenWindow, OcclusionMap, OcclusionTask, fill_image
from babydoctor.model.run_dir import load_run
from babydoctor.phantom.case import build_cases
from babydoctor.phantom.drawing import finding_mask
from babydoctor.phantom.write import write_phantoms
from babydoctor.schema import UserError

PREFIX, ANSWER = [5, 9, 11], [7, 200, 31]


def build_task(seed: int = 0, fill: Any = "mean") -> OcclusionTask:
    """An image of 2 x 2 patches behind three tokens, a question of two, an answer of three."""
    pixels = torch.randn(3, 28, 28, generator=torch.Generator().manual_seed(seed))
    return OcclusionTask(torch.tensor([*PREFIX, 0, 0, 0, 0, 40, 41]), 3, pixels, torch.tensor(ANSWER), 14, fill)


def test_drops_equal_those_by_transformers() -> None:
    """The log-probability of each answer token with and without the window, by the plain forward pass."""
    model, task = build_model(), build_task()
    occlusion = OcclusionMap(model, task)
    list(occlusion.run())
    assert occlusion.num_cells == 4 and len(occlusion.drops) == 4
    window = HiddenWindow(1, 0, 3)
    hidden = task.pixels.clone()
    hidden[:, 7:28, 0:21] = task.pixels.mean(dim=(1, 2), keepdim=True)
    scores = []
    with torch.no_grad():
        for pixels in (task.pixels, hidden):
            ids = torch.cat([task.input_ids, task.answer_ids])[None]
            mask = torch.zeros_like(ids, dtype=torch.bool)
            mask[:, 3:7] = True
            embeds = model.embed(ids, mask, model.encode_images(pixels[None]))
            logits = model.language_model(inputs_embeds=embeds).logits[0].log_softmax(-1)
            scores.append(logits[-4:-1].gather(1, task.answer_ids[:, None])[:, 0].numpy())
    np.testing.assert_allclose(occlusion.drops[window], scores[0] - scores[1], atol=1e-4)
    covering = [drop for place, drop in occlusion.drops.items() if place.row == 1 or place.row == 0]
    np.testing.assert_allclose(occlusion.result()[:, 1, 1], np.mean(covering, axis=0), atol=1e-5)


class OneSpot:
    """Simulated scores: the answer depends on the cells around one spot and slightly on all others."""

    def __init__(self, row: float, column: float, num_cells: int) -> None:
        rows, columns = np.mgrid[:num_cells, :num_cells] + 0.5
        self.weight = np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / 4) + 1e-3

    def __call__(self, windows: list[HiddenWindow | None]) -> np.ndarray:
        def hidden(w: HiddenWindow) -> float:
            return float(self.weight[w.row : w.row + w.edge, w.column : w.column + w.edge].sum())

        return np.array([[0.0 if w is None else -hidden(w)] for w in windows], np.float32)


@pytest.mark.parametrize("spot", [(3.2, 4.1), (20.5, 9.5), (31.0, 0.5), (16.0, 16.0), (7.0, 6.0), (12.5, 25.0)])
def test_the_coarse_search_finds_a_spot(spot: tuple[float, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """On CLIP-L's 16 x 16 patches, with 61 windows where a full search needs 900."""
    task = OcclusionTask(torch.zeros(260, dtype=torch.long), 1, torch.zeros(3, 224, 224), torch.tensor([1]), 14)
    occlusion = OcclusionMap(build_model(), task)
    monkeypatch.setattr(occlusion, "_score", OneSpot(*spot, occlusion.num_cells))
    shares = list(occlusion.run())
    assert shares == sorted(shares) and shares[-1] == 1.0
    assert len(occlusion.drops) == 61
    row, column = np.unravel_index(occlusion.result()[0].argmax(), (32, 32))
    assert np.hypot(row + 0.5 - spot[0], column + 0.5 - spot[1]) <= 1.5


def test_fills_hide_the_image() -> None:
    pixels = torch.full((3, 84, 84), 0.2)
    pixels[:, 40:44, 40:44] = 5.0
    blurred = fill_image(pixels, "blur", 14)
    assert blurred.shape == pixels.shape and float(blurred.max()) < 0.3
    assert float(fill_image(pixels, "mean", 14).std()) < 1e-6


def test_the_engine_computes_a_map_between_answers_and_can_cancel_it(tokenizer: Any) -> None:  # noqa: F811
    model = build_model()
    alone = OcclusionMap(model, build_task())
    list(alone.run())
    request = build_request(3)
    with Engine(model, tokenizer, settings()) as engine:
        expected = tokens_of(engine.submit(request))
        job = OcclusionMap(model, build_task())
        running = engine.start_job(job)
        assert tokens_of(engine.submit(request)) == expected
        running.ended.result(60)
        np.testing.assert_allclose(job.result(), alone.result(), atol=1e-5)

        begun = threading.Event()

        class Endless:
            def run(self) -> Iterator[float]:
                while True:
                    begun.set()
                    yield 0.1

        class Failing:
            def run(self) -> Iterator[float]:
                yield 0.5
                raise ValueError("no such thing")

        endless = engine.start_job(Endless())
        assert begun.wait(60) and endless.ended.cancel()
        with pytest.raises(ValueError, match="no such thing"):
            engine.start_job(Failing()).ended.result(60)
        with pytest.raises(CancelledError):
            endless.ended.result(0)
        assert tokens_of(engine.submit(request)) == expected


def test_localization_metrics_by_hand() -> None:
    mask = np.zeros((28, 28), bool)
    mask[0:7, 14:21] = True  # cell (0, 2)
    drops = np.zeros((4, 4))
    drops[0, 2] = 1
    assert peak_distance(drops, mask, 14) == 0 and pixel_auc(drops, mask) == 1.0
    assert pixel_auc(-drops, mask) == 0.0 and pixel_auc(np.zeros((4, 4)), mask) == 0.5
    assert peak_distance(np.roll(drops, 1, axis=1), mask, 14) == 0  # touches it
    assert peak_distance(np.roll(drops, 2, axis=0), mask, 14) == pytest.approx(0.5)


def test_the_true_location_is_where_the_finding_was_drawn() -> None:
    for case in build_cases("held_out", 40, 3):
        mask = finding_mask(case, 84)
        assert mask.any() == (case.finding != "none")
        if case.side is not None:
            # The viewer faces the patient: the patient's left is on the right.
            assert (np.nonzero(mask)[1].mean() > 42) == (case.side == "left")


def test_a_runs_localization_is_measured_and_recorded(tmp_path: Path) -> None:
    """With random weights: every case gets a map of the run's answer, and the manifest records the result."""
    shutil.copytree(tiny_run(), tmp_path / "run")
    write_phantoms(tmp_path / "phantoms", num_train=2, num_held_out=6, seed=0, size=84)
    reported: list[tuple[int, int]] = []
    summary = evaluate_localization(
        tmp_path / "run", tmp_path / "phantoms", tmp_path / "out", num_cases=3, progress=lambda *p: reported.append(p)
    )
    assert summary["num_cases"] == 3 and reported == [(1, 3), (2, 3), (3, 3)]
    assert json.loads((tmp_path / "run/manifest.json").read_text())["localization"] == summary
    cases = json.loads((tmp_path / "out/localization.json").read_text())["cases"]
    paths = (tmp_path / "run", tmp_path / "phantoms", tmp_path / "mean")
    other = evaluate_localization(*paths, num_cases=1, fill="mean", progress=lambda *p: None)
    assert other["fill"] == "mean"
    assert json.loads((tmp_path / "run/manifest.json").read_text())["localization"] == summary  # the web UI uses blur
    with pytest.raises(UserError, match="--fill gray: no such fill"):
        measure_localization(*paths, 1, "gray", "cpu")
    run = load_run(tmp_path / "run")
    query = Query([user_turn(QUESTION, has_image=True)], max_new_tokens=MAX_NEW_TOKENS)
    with Inference.for_queries(run.model, run.tokenizer, run.manifest, [query]) as inference:
        for case in cases:
            image = tmp_path / "phantoms/images" / f"held_out_{case['id'].rsplit('-', 1)[1]}.png"
            pixels = to_pixels(load_image(image), run.manifest.image)
            assert case["answer"] == inference.answer(replace(query, pixels=pixels)).text.strip()
            assert case["distance"] >= 0 and 0 <= case["auc"] <= 1 and case["finding"] != "none"
