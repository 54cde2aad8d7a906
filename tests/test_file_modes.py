"""Files on disk: written files obey the umask, and unreadable files are named in errors."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.serving import build_tiny_run
from safetensors.torch import load_file

from babydoctor.model.tensor_files import load_tensors, save_tensors
from babydoctor.serve.page.feedback import save_row
from babydoctor.serve.worker.retention import Retention

_WRITE_EVERYTHING = """
import json, os, sys
from pathlib import Path
out, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
os.umask(int(sys.argv[3], 8))
from babydoctor.config import build_config
from babydoctor.interop.export import export_run
from babydoctor.model.merge import merge_run
from babydoctor.phantom.write import write_phantoms
from babydoctor.train.loop import train
run = train(build_config(settings | {"output_dir": str(out / "run"), "lora": {"r": 4, "alpha": 8}}))
merge_run(run, out / "merged")
for kind in ("hf", "llava", "gguf"):
    export_run(out / "merged", out / kind, format=kind)
write_phantoms(out / "phantoms", num_train=4, num_held_out=2, seed=0, size=56)
"""


def _modes(folder: Path) -> dict[str, int]:
    paths = [path for path in folder.rglob("*") if not path.is_symlink()]
    return {f"{path.relative_to(folder)}{'/' * path.is_dir()}": stat.S_IMODE(path.stat().st_mode) for path in paths}


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_all_written_files_obey_the_umask(umask: int, tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    arguments = [str(tmp_path / "out"), json.dumps(tiny_settings), oct(umask)]
    (tmp_path / "out").mkdir()
    done = subprocess.run([sys.executable, "-c", _WRITE_EVERYTHING, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    modes = _modes(tmp_path / "out")
    names = "\n".join(modes)
    for name in ("projector.safetensors", "adapter_model.safetensors", "optimizer.safetensors", "model.gguf", ".png"):
        assert name in names
    wrong = {
        name: oct(mode) for name, mode in modes.items() if mode != (0o777 if name.endswith("/") else 0o666) & ~umask
    }
    assert not wrong


def test_private_files_stay_private(tmp_path: Path) -> None:
    """Patients' data: under any umask, only the operator's account can read retained requests and feedback."""
    before = os.umask(0o000)
    try:
        Retention(tmp_path / "kept").keep("id", "prompt", [b"image"], "answer")
        save_row(tmp_path / "feedback.jsonl", {"comment": "a"})
    finally:
        os.umask(before)
    modes = _modes(tmp_path)
    assert modes["kept/"] == 0o700
    files = {name: mode for name, mode in modes.items() if not name.endswith("/")}
    assert len(files) == 3 and set(files.values()) == {0o600}


def test_tensors_are_read_back_by_the_library(tmp_path: Path) -> None:
    tensors = {
        "flags": torch.tensor([True, False, True]),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "half": torch.randn(3, 5).to(torch.bfloat16),
        "wide": torch.randn(7, 3).t(),
        "number": torch.tensor(3.5, dtype=torch.float64),
        "none": torch.zeros(0, 4),
    }
    save_tensors(tensors, tmp_path / "a.safetensors")
    read = load_file(tmp_path / "a.safetensors")
    assert read.keys() == tensors.keys()
    assert all(read[name].dtype == value.dtype and torch.equal(read[name], value) for name, value in tensors.items())


# Root can read everything, so the child drops the capabilities that allow it.
_READ = """
import ctypes, json, os, sys
from pathlib import Path
from babydoctor.config_file import read_yaml
from babydoctor.data.sources import iter_rows
from babydoctor.imaging.isolation import load_image
from babydoctor.model.run_dir import load_run

def give_up_root():
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    assert libc.capset(header, data) == 0, ctypes.get_errno()

readers = {
    "run": lambda path: load_run(path, device="cpu"),
    "image": load_image,
    "rows": lambda path: list(iter_rows(path)),
    "config": read_yaml,
}
if os.getuid() == 0:
    give_up_root()
result = []
for kind, start, file in json.loads(sys.argv[1]):
    mode = os.stat(file).st_mode
    os.chmod(file, 0)
    try:
        readers[kind](Path(start))
        result.append([file, "read", ""])
    except Exception as error:
        result.append([file, type(error).__name__, str(error)])
    finally:
        os.chmod(file, mode)
print(json.dumps(result))
"""


def test_unreadable_files_are_named(tiny_rows: Path, tmp_path: Path) -> None:
    run = build_tiny_run(tmp_path)
    own = [run / "manifest.json", run / "projector.safetensors"]
    models = [tmp_path / "base" / name for name in ("config.json", "model.safetensors", "tokenizer.json")]
    models += [tmp_path / "clip" / name for name in ("config.json", "model.safetensors")]
    cases = [("run", str(run), str(file)) for file in (*own, *models)]
    image, rows = tiny_rows / "images" / "0.png", tiny_rows / "rows.json"
    config = tmp_path / "config.yaml"
    config.write_text("name: a\n")
    cases += [(kind, str(file), str(file)) for kind, file in (("image", image), ("rows", rows), ("config", config))]
    done = subprocess.run([sys.executable, "-c", _READ, json.dumps(cases)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    wrong = [line for line in result if line[1] not in ("UserError", "ImageError") or line[0] not in line[2]]
    assert not wrong, "\n".join(map(str, wrong))


def test_the_command_line_names_a_file_that_it_cannot_open(tmp_path: Path) -> None:
    """For any kind of file. A directory instead of a file is unreadable for every account."""
    (tmp_path / "config.yaml").mkdir()
    (tmp_path / "file").touch()
    code = "import sys; from babydoctor.cli.main import main; sys.argv[1:] = {}; main()"
    for arguments in (
        ["config", str(tmp_path / "config.yaml")],
        ["data", "phantom", "--out", str(tmp_path / "file/a")],
    ):
        done = subprocess.run([sys.executable, "-c", code.format(arguments)], capture_output=True, text=True)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert str(tmp_path) in done.stderr


def test_a_file_may_replace_itself(tmp_path: Path) -> None:
    """Its tensors are mapped from the file that is replaced."""
    file = tmp_path / "adapter.safetensors"
    save_tensors({"a": torch.arange(100_000.0), "b": torch.ones(3, dtype=torch.bfloat16)}, file)
    mapped = load_file(file)
    save_tensors(mapped, file)
    again = load_tensors(file)
    assert torch.equal(again["a"], torch.arange(100_000.0)) and [path.name for path in tmp_path.iterdir()] == [
        file.name
    ]
