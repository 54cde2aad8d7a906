"""The demo: its check, resuming, its stages as the shipped configurations, and its table."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from babydoctor.config import load_config
from babydoctor.demo import demo, robustness
from babydoctor.demo.certainty import measure_localization
from babydoctor.demo.table import (
    IN_TERMS,
    ROBUSTNESS_ROWS,
    certainty_lines,
    certainty_shortfalls,
    robustness_shortfalls,
    shortfalls,
    to_markdown,
)
from babydoctor.demo.tiny_language import LanguageSettings, TinySettings, make_tiny_base
from babydoctor.demo.tiny_tower import TowerSettings
from babydoctor.phantom.text import KINDS
from babydoctor.phantom.write import write_phantoms
from babydoctor.schema import UserError

CHANCE = {"modality": 0.25, "finding": 0.2, "side": 0.5, "level": 1 / 3}
OVERALL_CHANCE = 536 / 1728


def made_up(right: float, in_terms: float, shuffled: dict[str, float] | None = None) -> dict[str, Any]:
    """The parts of ``metrics.json`` that the demo reads."""
    shuffled = CHANCE | {"all": OVERALL_CHANCE} | (shuffled or {})

    def condition(accuracies: dict[str, float], in_terms: float) -> dict[str, Any]:
        by_kind = {kind: {"closed_accuracy": {"value": accuracies[kind]}} for kind in KINDS}
        figures = {"closed_accuracy": {"value": accuracies["all"]}, IN_TERMS: {"value": in_terms}}
        return {"figures": figures, "by_group": {"question_type": by_kind}}

    return {
        "num_questions": 1728,
        "num_images": 480,
        "chance": {"closed_accuracy": OVERALL_CHANCE, "by_question_type": CHANCE},
        "conditions": {
            "right": condition(dict.fromkeys((*KINDS, "all"), right), in_terms),
            "shuffled": condition(shuffled, 0.0),
            "blank": condition(shuffled, 0.0),
        },
    }


def test_each_threshold_of_the_check() -> None:
    lay = made_up(0.94, 0.0)
    assert shortfalls(made_up(0.94, 0.94), lay) == []
    (weak,) = shortfalls(made_up(0.94, 0.8), lay)
    assert weak == "accuracy in radiology terms is 80.0%, below 93%"
    assert len(shortfalls(made_up(0.7, 0.7), lay)) == 1 + len(KINDS)
    (leak,) = shortfalls(made_up(0.94, 0.94, {"side": 0.6}), lay)
    assert leak == "side: 60.0% with shuffled images is more than 8% from chance (50.0%)"
    (overall,) = shortfalls(made_up(0.94, 0.94, {"all": 0.4}), lay)
    assert overall.startswith("all: 40.0% with shuffled images")
    (words,) = shortfalls(made_up(0.94, 0.5), lay)
    assert words.startswith("accuracy in radiology terms is 50.0%")
    (early,) = shortfalls(made_up(0.94, 0.94), made_up(0.94, 0.2))
    assert early.startswith("20.0% are in radiology terms before")


def made_up_robustness(changed: dict[str, float] | None = None) -> dict[str, Any]:
    """The parts of ``robustness.json`` that the demo reads; ``changed`` by "GROUP/KIND"."""
    groups = [f"{group}/{kind}" for group in ROBUSTNESS_ROWS for kind in (*KINDS, "outside")]
    values = dict.fromkeys(groups, 0.96) | (changed or {})
    return {"groups": {name: {"accuracy": value, "num_questions": 50} for name, value in values.items()}}


def test_each_threshold_of_wording_size_and_temperature() -> None:
    assert robustness_shortfalls(made_up_robustness()) == []
    (words,) = robustness_shortfalls(made_up_robustness({"held-out/side": 0.0, "held-out/level": 0.2}))
    assert words == "accuracy with held-out wordings is 53.0%, below 70% of the 96.0% with trained ones"
    (declined,) = robustness_shortfalls(made_up_robustness({"held-out/outside": 0.6}))
    assert declined == "60.0% of the outside questions in held-out wordings are declined, below 65%"
    (size,) = robustness_shortfalls(made_up_robustness({"512 px/finding": 0.8}))
    assert size == "accuracy at 512 px is 92.0%, more than 3% from the 96.0% at 84 px"
    (sampled,) = robustness_shortfalls(made_up_robustness({"temperature 1/level": 0.2}))
    assert sampled == "77.0% of the answers at temperature 1 are right, below 85%"


def made_up_certainty(near: float = 0.95, noticed: float = 1.0, alarms: float = 0.05, error: float = 0.01) -> Any:
    """The parts of the three files that the demo reads."""
    return {
        "localization": {"num_near": round(40 * near), "num_cases": 40, "near_finding": {"value": near}},
        "familiarity": {
            "false_alarms": alarms,
            "unfamiliar": {"upside_down": {"noticed": noticed}, "noise": {"noticed": 1.0}},
        },
        "confidence": {"calibration_error_after": error},
    }


def test_each_threshold_of_certainty() -> None:
    assert certainty_shortfalls(made_up_certainty()) == []
    (missed,) = certainty_shortfalls(made_up_certainty(near=0.5))
    assert missed == "50.0% of the maps peak near the finding, below 80%"
    (unnoticed,) = certainty_shortfalls(made_up_certainty(noticed=0.8))
    assert unnoticed == "80.0% of the unfamiliar images (upside down) are noticed, below 90%"
    assert len(certainty_shortfalls(made_up_certainty(alarms=0.2, error=0.3))) == 2
    assert certainty_lines(made_up_certainty())[0].endswith("in 38 of 40 phantoms")


def test_finished_steps_are_skipped_and_the_others_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def step(name: str) -> demo.Step:
        def run() -> None:
            ran.append(name)
            (tmp_path / name).write_text("")

        return demo.Step(name, tmp_path / name, run)

    (tmp_path / "first").write_text("")
    monkeypatch.setattr(demo, "build_steps", lambda work, check: [step("first"), step("second"), step("third")])
    monkeypatch.setattr(demo, "print_scores", lambda work, update: ["accuracy is low"])

    def try_out(work: Path, ask_all: bool) -> list[str]:
        ran.append(f"chat, all: {ask_all}")
        return wrong

    wrong: list[str] = []
    monkeypatch.setattr(demo, "try_out", try_out)
    assert demo.run_demo(tmp_path, check=True) == 1
    assert ran == ["second", "third", "chat, all: True"]
    assert demo.run_demo(tmp_path, check=False) == 0
    assert ran[3:] == ["chat, all: False"]
    monkeypatch.setattr(demo, "print_scores", lambda work, update: [])
    assert demo.run_demo(tmp_path, check=True) == 0
    wrong = ["Phantom CT, nodule, 'Describe the image.' (web UI): 'Left'"]
    assert demo.run_demo(tmp_path, check=True) == 1


def test_the_tiny_configurations_are_the_three_stages(tmp_path: Path) -> None:
    align, instruct, radiology = (
        load_config(demo.CONFIGS / f"{stage}.yaml", demo.stage_overrides(tmp_path, stage)) for stage in demo.STAGES
    )
    assert align.lora is None and align.data.template == "plain"
    assert instruct.lora is not None and instruct.model.quantization == "none"
    assert radiology.lora is not None and radiology.model.quantization == "nf4" and radiology.model.double_quantization
    assert (instruct.init_from, radiology.init_from) == (align.output_dir, instruct.output_dir)
    for config in (align, instruct, radiology):
        assert "train" in config.data.rows[0] and "held_out" in config.data.eval_rows[0]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small demo with two steps of stage 1."""
    folder = tmp_path_factory.mktemp("demo")
    write_phantoms(folder / "phantoms", num_train=24, num_held_out=12, seed=0, size=84)
    language = LanguageSettings(
        hidden_size=64, intermediate_size=96, num_layers=2, num_heads=2, num_texts=64, num_steps=2
    )
    tower = TowerSettings(hidden_size=32, num_layers=2, num_heads=2, num_steps=2, batch_size=8)
    make_tiny_base(folder / "phantoms", folder / "base", TinySettings(language=language, tower=tower))
    from babydoctor.train.loop import train

    train(load_config(demo.CONFIGS / "align.yaml", [*demo.stage_overrides(folder, "align"), *SHORT]))
    yield folder


SHORT = ["train.max_steps=2", "train.batch_size=4", "data.eval_limit=2", "train.num_sample_answers=1"]


def test_the_tables_come_from_the_phantom_task_and_the_other_ways_to_ask(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("phantoms", *demo.STAGES):
        (tmp_path / folder).symlink_to(work / ("align" if folder in demo.STAGES else folder))
    for stage in demo.STAGES:
        demo.score_stage(tmp_path, stage)
    monkeypatch.setattr(robustness, "NUM_WORDINGS", 2)
    monkeypatch.setattr(robustness, "NUM_SIZED_CASES", 1)
    monkeypatch.setattr(robustness, "NUM_SAMPLED", 8)
    demo.score_robustness(tmp_path)
    monkeypatch.setattr("babydoctor.demo.certainty.NUM_MAPS", 2)
    measure_localization(tmp_path / "phantoms", work / "align", tmp_path / "scores" / "certainty")
    for name in ("familiarity", "confidence"):  # they need more images
        path = tmp_path / "scores" / "certainty" / f"{name}.json"
        path.write_text(json.dumps(made_up_certainty()[name]))
    questions = (work / "phantoms" / "questions.jsonl").read_text().splitlines()
    metrics = demo.read_scores(tmp_path)["align"]
    assert metrics["num_questions"] == len(questions)
    assert list(metrics["conditions"]) == ["right", "shuffled", "blank"]
    assert (tmp_path / "scores" / "align" / "report.html").is_file()

    groups = demo.read_robustness(tmp_path)["groups"]
    assert {name.split("/")[0] for name in groups} == set(ROBUSTNESS_ROWS)
    assert groups["held-out/outside"]["num_questions"] == 2 and groups["512 px/modality"]["num_questions"] == 1

    # An answer that looks like markup is printed unchanged, and the table goes between its markers.
    for stage in demo.STAGES:
        path = tmp_path / "scores" / stage / "predictions-right.jsonl"
        rows = [json.loads(line) | {"answer": "[/INST] [bold]a mass"} for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    guide = tmp_path / "GUIDE.md"
    guide.write_text("before\n<!-- demo scores: begin -->\nold\n<!-- demo scores: end -->\nafter\n")
    demo.print_scores(tmp_path, guide)
    shown = capsys.readouterr().out
    assert shown.count("[/INST] [bold]a mass") == len(demo.STAGES)
    measured = json.loads((work / "align" / "manifest.json").read_text())["localization"]
    assert f"in {measured['num_near']} of 2 phantoms" in " ".join(shown.split())
    table = to_markdown(demo.read_scores(tmp_path), demo.read_robustness(tmp_path))
    assert guide.read_text() == (f"before\n<!-- demo scores: begin -->\n{table}\n<!-- demo scores: end -->\nafter\n")
    chance = metrics["chance"]
    assert f"| chance |  | {100 * chance['by_question_type']['modality']:.1f} |" in table
    assert f"| {100 * chance['closed_accuracy']:.1f} |  |" in table


def test_a_file_without_markers_is_refused(tmp_path: Path) -> None:
    from babydoctor.markers import write_section

    (tmp_path / "README.md").write_text("no markers")
    with pytest.raises(UserError, match=r"demo scores: begin.*add them"):
        write_section(tmp_path / "README.md", "demo scores", "table")


def test_demo_and_train_give_bitwise_equal_stages(work: Path, tmp_path: Path) -> None:
    """Both run as commands. The learning rate is so small that the LoRA's first values are denormal numbers.

    They are kept or flushed to zero, depending on the floating-point mode.
    """
    settings = [*SHORT, "train.learning_rate=1.0e-39", "train.projector_learning_rate=1.0e-3"]
    for folder in ("demo", "train"):
        (tmp_path / folder).mkdir()
        for name in ("phantoms", "base", "align"):
            (tmp_path / folder / name).symlink_to(work / name)
    # The demo command with its remaining steps cut down to the one stage.
    script = f"""
import sys
from babydoctor.cli.main import main
from babydoctor.demo import demo
all_steps, overrides = demo.build_steps, demo.stage_overrides
demo.build_steps = lambda work, check: [step for step in all_steps(work) if step.name.startswith("Stage 2")]
demo.stage_overrides = lambda work, stage: [*overrides(work, stage), *{settings!r}]
demo.print_scores = lambda work, update: []
demo.try_out = lambda work, ask_all: []
sys.argv = ["babydoctor", "demo", "--check", "--dir", {str(tmp_path / "demo")!r}]
main()
"""
    config = demo.CONFIGS / "instruct.yaml"
    overrides = [*demo.stage_overrides(tmp_path / "train", "instruct"), *settings]
    command = [sys.executable, "-m", "babydoctor.train", str(config), *overrides]
    for arguments in ([sys.executable, "-c", script], command):
        done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
    by_demo, by_train = (
        load_file(tmp_path / folder / "instruct" / "adapter" / "adapter_model.safetensors")
        for folder in ("demo", "train")
    )
    assert by_demo.keys() == by_train.keys()
    assert all(by_demo[name].tobytes() == by_train[name].tobytes() for name in by_demo)
    projectors = [(tmp_path / folder / "instruct" / "projector.safetensors") for folder in ("demo", "train")]
    assert projectors[0].read_bytes() == projectors[1].read_bytes()
