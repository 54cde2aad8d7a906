"""Every command of the evaluation guide runs, on a demo that was trained for two steps."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from babydoctor.cli.main import build_app
from babydoctor.config import load_config
from babydoctor.demo import demo
from babydoctor.demo.tiny_language import LanguageSettings, TinySettings, make_tiny_base
from babydoctor.demo.tiny_tower import TowerSettings
from babydoctor.phantom.write import write_phantoms
from babydoctor.train.loop import train

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "babydoctor" / "eval" / "README.md"
SHORT_TRAINING = ("train.max_steps=2", "train.batch_size=4", "data.eval_limit=2", "train.num_sample_answers=0")
SHORTER = {
    "train": (*SHORT_TRAINING, "eval.max_questions=8", "eval.every_steps=0"),
    "eval": ("--resamples", "100"),
    "eval compare": ("--resamples", "100"),
    "eval stages": ("--seeds", "1", "--max-questions", "16", *(w for s in SHORT_TRAINING for w in ("--override", s))),
}
"""Options added to each command. They make it faster and leave the options of the guide in place."""


def commands(guide: Path) -> list[list[str]]:
    # A block under a marker is run by another test.
    blocks = re.findall(r"(?<!-->\n)```bash\n(.*?)```", guide.read_text(encoding="utf-8"), re.DOTALL)
    found = [shlex.split(line) for block in blocks for line in block.splitlines() if line.strip()]
    return [[word for word in words if not re.match(r"[A-Z_]+=", word)] for words in found]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a checkout after ``babydoctor demo --check``."""
    folder = tmp_path_factory.mktemp("checkout")
    work = folder / ".demo"
    write_phantoms(work / "phantoms", num_train=24, num_held_out=12, seed=0, size=84)
    language = LanguageSettings(
        hidden_size=64, intermediate_size=96, num_layers=2, num_heads=2, num_texts=64, num_steps=2
    )
    tower = TowerSettings(hidden_size=32, num_layers=2, num_heads=2, num_steps=2, batch_size=8)
    make_tiny_base(work / "phantoms", work / "base", TinySettings(language=language, tower=tower))
    for stage in demo.STAGES:
        train(load_config(demo.CONFIGS / f"{stage}.yaml", [*demo.stage_overrides(work, stage), *SHORT_TRAINING]))
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "images").mkdir()
    (folder / "babydoctor" / "eval").mkdir(parents=True)
    shutil.copy(GUIDE, folder / "babydoctor" / "eval" / "README.md")
    shutil.copy(ROOT / "MODEL_CARD.md", folder)
    return folder


@pytest.mark.slow
def test_commands_of_the_guide(checkout: Path, shared_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkout / "VQA-RAD").symlink_to(shared_dir / "data" / "vqa-rad")
    monkeypatch.chdir(checkout)
    found = commands(GUIDE)
    assert len(found) >= 10
    for program, *words in found:
        assert program == "babydoctor", words
        name = " ".join(words[:2]) if words[1] in ("compare", "stages") else words[0]
        result = CliRunner().invoke(build_app(), [*words, *SHORTER.get(name, ())])
        assert result.exit_code == 0, (words, result.output[-2000:], result.exception)
    assert "radiology | closed accuracy" in (checkout / "MODEL_CARD.md").read_text()
    updated = (checkout / "babydoctor" / "eval" / "README.md").read_text()
    assert "phantom, 16 questions, 1 seed(s)" in updated
    assert (checkout / "eval" / "radiology" / "report.html").is_file()


def test_links_of_the_guide() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", GUIDE.read_text(encoding="utf-8")):
        assert target.startswith("http") or (GUIDE.parent / target).exists(), target
