"""Process-wide switches: library calls do not change them, the command line sets them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from babydoctor.engine.settings import EngineSettings
from babydoctor.runtime import share_cores, use_own_gpu
from babydoctor.schema import UserError

LIBRARY_CALLS = """
import json, os, sys

import numpy as np, torch

def state():
    tiny = torch.tensor([1e-40])
    return {
        "environment": dict(os.environ),
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "denormals": bool((tiny * 0.5 != 0).item()),
        "float32": torch.get_float32_matmul_precision(),
        "dtype": str(torch.get_default_dtype()),
        "grad": torch.is_grad_enabled(),
    }

import accelerate, transformers  # they set environment variables of their own when they are imported
before = state()
from pathlib import Path
from babydoctor.config import load_config
from babydoctor.engine.engine import Engine
from babydoctor.engine.request import GenerationRequest
from babydoctor.engine.settings import EngineSettings
from babydoctor.model.run_dir import load_run
from babydoctor.train.loop import train

run = load_run(train(load_config(Path(sys.argv[1]), [])))
with Engine(run.model, run.tokenizer, EngineSettings(max_running=1)) as engine:
    finished = engine.submit(GenerationRequest(np.array([1, 5, 6]), max_new_tokens=4, ignore_eos=True)).result(120)
assert finished.usage.completion_tokens == 4
print(json.dumps([before, state()]))
"""


def test_library_calls_change_nothing_process_wide(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    """Training a step, loading the run and answering with an engine, in a process without the command line."""
    settings = tiny_settings | {"output_dir": str(tmp_path / "run")}
    settings["train"] = settings["train"] | {"max_steps": 1}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", LIBRARY_CALLS, str(config)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    before, after = json.loads(done.stdout.splitlines()[-1])
    assert before["denormals"], "torch starts with denormals"
    assert after == before


def run_python(program: str, **environment: str) -> Any:
    """The JSON that a program prints, in its own process."""
    kept = {name: value for name, value in os.environ.items() if not name.endswith("ALLOC_CONF")}
    done = subprocess.run(
        [sys.executable, "-c", program], env=kept | environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


COMMANDS = """
import json, sys
from babydoctor.cli.main import main
commands, tower = json.loads(sys.argv[1]), sys.argv[2]
for arguments in commands:
    sys.argv = ["babydoctor", *arguments]
    try:
        main()
    except SystemExit as stopped:
        assert not stopped.code, arguments
from transformers import CLIPVisionConfig, CLIPVisionModel
from babydoctor.runtime import hide_saving_progress
hide_saving_progress()
CLIPVisionModel(CLIPVisionConfig(hidden_size=24, intermediate_size=24, num_hidden_layers=1)).save_pretrained(tower)
"""


def test_commands_print_no_messages_of_libraries(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    """A stage with everything from bitsandbytes, then the commands that use the run. stderr stays empty."""
    pytest.importorskip("bitsandbytes")
    run, rows = tmp_path / "run", tiny_settings["data"]["rows"][0]
    settings = tiny_settings | {"output_dir": str(run), "lora": {"r": 4, "alpha": 8}}
    settings["model"] = settings["model"] | {"quantization": "nf4", "dtype": "bfloat16"}
    settings["train"] = settings["train"] | {"max_steps": 1, "optimizer": "paged_adamw_8bit", "num_sample_answers": 1}
    settings["data"] = settings["data"] | {"eval_rows": [rows]}
    config, images = tmp_path / "config.yaml", tiny_settings["data"]["images"]
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    commands = [
        ["doctor"],
        ["train", str(config)],
        ["chat", str(run), "Which side?", "--image", f"{images}/0.png", "--max-new-tokens", "2"],
        ["merge", str(run), "--out", str(tmp_path / "merged")],
        ["export", str(run), "--format", "hf", "--out", str(tmp_path / "hf")],
        ["data", "check", rows, "--images", images, "--bad", str(tmp_path / "bad.jsonl")],
    ]
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(commands), str(tmp_path / "tower")],
        capture_output=True,
        text=True,
        timeout=600,
    )
    # On a busy machine the commands show progress.
    messages = [line for line in done.stderr.splitlines() if not line.endswith("s left")]
    assert (done.returncode, messages) == (0, []), done.stdout[-3000:]


def test_training_commands_flush_denormals_and_grow_cuda_segments() -> None:
    program = """
import json, os, sys
from babydoctor.runtime import prepare_training
prepare_training()
import torch
flushed = bool((torch.tensor([1e-40]) * 0.5 == 0).item())
print(json.dumps([flushed, os.environ.get("PYTORCH_CUDA_ALLOC_CONF"), os.environ.get("PYTORCH_ALLOC_CONF")]))
"""
    assert run_python(program) == [True, "expandable_segments:True", None]
    assert run_python(program, PYTORCH_CUDA_ALLOC_CONF="backend:native") == [True, "backend:native", None]
    assert run_python(program, PYTORCH_ALLOC_CONF="backend:native") == [True, None, "backend:native"]


WAITING = """
import json, os, sys
from babydoctor.cli.main import main
sys.argv = ["babydoctor", "plan", "configs/radiology.yaml"]
try:
    main()
except SystemExit as stopped:
    assert not stopped.code
print(json.dumps({name: os.environ.get(name) for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}))
"""


def test_openmp_reads_the_way_of_waiting_that_a_command_sets() -> None:
    """libgomp prints its settings when it is loaded, so a variable that is set too late would show the default."""
    kept = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run(
        [sys.executable, "-c", WAITING],
        cwd=Path(__file__).parents[1],
        env=kept | {"OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("torch computes with another OpenMP here")
    assert re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr) == ["1000"] * done.stderr.count("GOMP_SPINCOUNT")
    # Workers and ranks are child processes, which inherit the variable.
    assert json.loads(done.stdout.splitlines()[-1]) == {"OMP_WAIT_POLICY": None, "GOMP_SPINCOUNT": "1000"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, [None, "1000"]),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, ["PASSIVE", None]),
        ({"GOMP_SPINCOUNT": "50"}, [None, "50"]),
    ],
)
def test_the_users_way_of_waiting_is_kept(
    given: dict[str, str], expected: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, given.get(name, ""))  # restored after the test, whatever it does
        if name not in given:
            monkeypatch.delenv(name)
    share_cores()
    assert [os.environ.get(name) for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")] == expected


def test_the_engine_uses_the_configured_number_of_threads() -> None:
    program = """
import json, threading, torch
from babydoctor.runtime import prepare_engine
torch.ones(1 << 20).exp()
prepare_engine("cpu", 3)
counts = []
def compute():
    torch.ones(1 << 20).exp()
    counts.append(torch.get_num_threads())
thread = threading.Thread(target=compute)
thread.start()
thread.join()
print(json.dumps(counts))
"""
    assert run_python(program, OMP_NUM_THREADS="1") == [3]


WEIGHTS = """
import json, re, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from babydoctor.memory_maps import clean_weight_files
from babydoctor.model.tensor_files import load_tensors
from babydoctor.runtime import return_freed_memory

def resident():
    text = Path("/proc/self/smaps").read_text()
    found = re.findall(r"(read|changed)\\.safetensors\\n(?:.*\\n)*?Rss: +(\\d+) kB", text)
    return {name: int(kilobytes) for name, kilobytes in found}

folder = Path(sys.argv[1])
tensors = {}
for name in ("read", "changed"):
    save_file({"weight": torch.arange(1 << 20)}, folder / f"{name}.safetensors")
    tensors[name] = load_tensors(folder / f"{name}.safetensors")["weight"]
tensors["changed"][5] = -1
before = [int(tensor.sum()) for tensor in tensors.values()]
mapped = resident()
return_freed_memory()
left = resident()
print(json.dumps([mapped, left, before == [int(tensor.sum()) for tensor in tensors.values()]]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_pages_of_weight_files_are_returned_unless_they_were_changed(tmp_path: Path) -> None:
    mapped, left, is_equal = run_python(WEIGHTS.replace("sys.argv[1]", repr(str(tmp_path))))
    assert min(mapped.values()) >= 8192 and is_equal
    assert left["read"] < 100 and left["changed"] >= 8192


def test_a_thread_count_without_a_hook_is_refused() -> None:
    assert EngineSettings(num_threads=2, on_start=lambda device, num_threads: None).num_threads == 2
    with pytest.raises(UserError, match=r"engine\.num_threads=2 needs on_start.*torch\.set_num_threads"):
        EngineSettings(num_threads=2)


@pytest.mark.parametrize(("visible", "expected"), [(None, "1"), ("4,6", "6"), ("4", "")])
def test_a_rank_sees_its_own_gpu(monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    use_own_gpu()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == expected
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
