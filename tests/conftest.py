"""Fixtures that several test modules share. Tests run offline and on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from helpers.base_models import write_base_models


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with the golden references and the real data. Tests that need it are skipped if it is absent."""
    folder = Path(os.environ.get("BABYDOCTOR_SHARED", Path(__file__).parents[2] / "shared"))
    if not (folder / "golden").is_dir():
        pytest.skip(f"the golden references are not at {folder} (set BABYDOCTOR_SHARED)")
    return folder


@pytest.fixture(scope="session")
def golden(shared_dir: Path) -> Path:
    """References made with the original LLaVA code."""
    return shared_dir / "golden"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Use one thread: on a busy machine, tiny models are far slower on several threads."""
    import torch

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def default_floating_point_mode() -> Iterator[None]:
    """Restore the floating-point mode, which commands change when a test runs them in this process."""
    import torch

    yield
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``llama/`` (hidden size 64, 2 layers, with a tokenizer) and ``clip/`` (32, 28 px, 4 patches), random weights."""
    return write_base_models(
        tmp_path_factory.mktemp("tiny_base"),
        llama={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 1024,
            "initializer_range": 0.1,
        },
        clip={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2},
        text="What does the scan show? The scan shows a nodule in the left lung.",
        vocab_size=320,
    )


@pytest.fixture(scope="session")
def tiny_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``rows.json`` and ``images/``: ten drawn images with a question each, and two text-only rows."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("tiny_rows")
    (folder / "images").mkdir()
    rows: list[dict[str, Any]] = []
    for index in range(12):
        name, word = f"{index}.png", ("left", "right")[index % 2]
        picture = Image.new("RGB", (40, 30), (20 * index, 40, 90))
        picture.paste((255, 255, 255), (0, 0, 20, 30) if word == "left" else (20, 0, 40, 30))
        picture.save(folder / "images" / name)
        question = f"<image>\nWhich side, {index}?" if index < 10 else f"Say {word}."
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": f"The {word} lung" + "!" * index}]
        rows.append({"id": str(index), "conversations": turns} | ({"image": name} if index < 10 else {}))
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="session")
def tiny_settings(tiny_base: Path, tiny_rows: Path) -> dict[str, Any]:
    """Settings of a short float32 stage on ``tiny_base`` and ``tiny_rows``; tests add what they need."""
    return {
        "name": "tiny",
        "output_dir": "",
        "model": {
            "language_model": str(tiny_base / "llama"),
            "vision_tower": str(tiny_base / "clip"),
            "dtype": "float32",
        },
        "data": {
            "rows": [str(tiny_rows / "rows.json")],
            "images": str(tiny_rows / "images"),
            "max_length": 256,
            "num_workers": 0,
        },
        "train": {
            "batch_size": 4,
            "micro_batch_tokens": 512,
            "max_steps": 6,
            "learning_rate": 1e-3,
            "save_every": 2,
            "num_sample_answers": 0,
        },
        "tracking": {"tensorboard": False},
    }


@pytest.fixture(scope="session")
def tiny_run(tiny_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run directory: projector and LoRA trained for six steps on images and text."""
    from babydoctor.config import build_config
    from babydoctor.train.loop import train

    run = tmp_path_factory.mktemp("runs") / "tiny"
    lora = {"r": 4, "alpha": 8, "dropout": 0.1}
    return train(build_config(tiny_settings | {"output_dir": str(run), "lora": lora}))


@pytest.fixture
def ask_old_llama_cpp(
    tmp_path: Path,
) -> Callable[[Path, Sequence[tuple[Path, str, int]]], list[tuple[str, list[int], list[float]]]]:
    """(folder, (PNG, question, longest answer)...) -> (answer, its ids but the last, the prompt's last logits)...

    From llama-cpp-python 0.3.8, the last version with CLIP's class token in the right place. ``scripts/test.sh``
    installs it next to the environment, because two versions cannot be loaded into one process.
    """
    folder = Path(sys.prefix) / "llama-cpp-python-0.3.8"
    if not (folder / "llama_cpp").is_dir():
        pytest.skip("llama-cpp-python 0.3.8 is not built (BABYDOCTOR_LLAMA_CPP=1 bash scripts/test.sh)")

    def ask(model: Path, questions: Sequence[tuple[Path, str, int]]) -> list[tuple[str, list[int], list[float]]]:
        asked, answered = tmp_path / "questions.json", tmp_path / "answers.json"
        asked.write_text(json.dumps([(str(png), *rest) for png, *rest in questions]))
        script = Path(__file__).parent / "helpers" / "llama_cpp_before_mtmd.py"
        environment = os.environ | {"PYTHONPATH": str(folder)}
        command = [sys.executable, script, model, asked, answered]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(answered.read_text())

    return ask


@pytest.fixture(scope="session")
def gpu() -> str:
    """The device of the tests marked ``gpu``: CUDA, or the CPU in a rehearsal.

    TF32 is off: with it, cuDNN's convolution of the tower differs by 1e-3.
    """
    import torch

    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    return os.environ.get("BABYDOCTOR_GPU_TESTS_ON", "cuda")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked ``gpu`` if there is no CUDA device, except in a rehearsal on the CPU."""
    import torch

    if torch.cuda.is_available() or os.environ.get("BABYDOCTOR_GPU_TESTS_ON") == "cpu":
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
