"""Checkpoints: 8-bit optimizer states, checksums, leftovers of killed processes and full disks."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.training import small_disk
from safetensors import safe_open

from babydoctor.files import write_text
from babydoctor.schema import UserError
from babydoctor.train.checkpoint import (
    TrainState,
    find_damage,
    find_newest_intact,
    list_checkpoints,
    load_parameters,
    read_checkpoint,
    read_state,
    save_checkpoint,
)

WIDE_ENOUGH = 128
"""128 x 128 elements: bitsandbytes keeps the state of tensors below 4,096 elements in float32."""


def build(optimizer: str) -> tuple[Any, torch.optim.Optimizer]:
    """Three layers with trainable parameters, and their optimizer."""
    torch.manual_seed(0)
    layers = torch.nn.ModuleList(torch.nn.Linear(WIDE_ENOUGH, WIDE_ENOUGH) for _ in range(3))
    model = SimpleNamespace(layers=layers, trainable_parameters=lambda: dict(layers.named_parameters()))
    if optimizer == "adamw":
        return model, torch.optim.AdamW(layers.parameters(), lr=1e-3)
    bitsandbytes = pytest.importorskip("bitsandbytes")
    return model, bitsandbytes.optim.PagedAdamW8bit(layers.parameters(), lr=1e-3)


def steps(model: Any, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        x = torch.randn(4, WIDE_ENOUGH, generator=torch.Generator().manual_seed(step))
        for layer in model.layers:
            x = layer(x).tanh()
        x.sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def load(path: Path, model: Any, optimizer: torch.optim.Optimizer) -> None:
    checkpoint = read_checkpoint(path)
    load_parameters(checkpoint, model)
    optimizer.load_state_dict(checkpoint.optimizer_state())


def save(run: Path, model: Any, optimizer: torch.optim.Optimizer, step: int, keep: int = 3) -> Path:
    return save_checkpoint(
        run, model.trainable_parameters(), optimizer.state_dict(), TrainState(step, 4 * step, "f" * 64), keep=keep
    )


@pytest.mark.parametrize("kind", ["adamw", "paged_adamw_8bit"])
def test_training_continues_bit_equal(tmp_path: Path, kind: str) -> None:
    model, optimizer = build(kind)
    steps(model, optimizer, 0, 3)
    path = save(tmp_path, model, optimizer, 3)
    steps(model, optimizer, 3, 6)
    whole = save(tmp_path, model, optimizer, 6)

    resumed, other = build(kind)
    load(path, resumed, other)
    assert read_state(path) == TrainState(3, 12, "f" * 64)
    steps(resumed, other, 3, 6)
    again = save(tmp_path / "resumed", resumed, other, 6)
    for name in ("trainable.safetensors", "optimizer.safetensors", "state.json"):
        assert (again / name).read_bytes() == (whole / name).read_bytes(), name


def test_shared_quantization_maps_are_stored_once(tmp_path: Path) -> None:
    model, optimizer = build("paged_adamw_8bit")
    steps(model, optimizer, 0, 1)
    path = save(tmp_path, model, optimizer, 1)
    with safe_open(path / "optimizer.safetensors", "pt") as file:
        maps = [name for name in file.keys() if "qmap" in name]  # noqa: SIM118 (no mapping)
        assert any(file.get_slice(name).get_dtype() == "U8" for name in file.keys())  # noqa: SIM118
    assert len(maps) == 2
    assert len(json.loads((path / "state.json").read_text())["optimizer"]["shared"]) == 2 * (3 - 1)
    resumed, other = build("paged_adamw_8bit")
    load(path, resumed, other)
    loaded = [state["qmap1"].data_ptr() for state in other.state.values() if "qmap1" in state]
    assert len(loaded) == 3 and len(set(loaded)) == 1


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [flip_bit, cut, Path.unlink], ids=["bit flipped", "cut", "missing"])
@pytest.mark.parametrize("name", ["trainable.safetensors", "optimizer.safetensors", "state.json", "checksums.sha256"])
def test_a_damaged_checkpoint_is_replaced_by_the_previous_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Any, name: str
) -> None:
    model, optimizer = build("adamw")
    steps(model, optimizer, 0, 1)
    first, second = (save(tmp_path, model, optimizer, step) for step in (1, 2))
    assert find_damage(second) is None and find_newest_intact(tmp_path) == second
    damage(second / name)
    assert find_newest_intact(tmp_path) == first
    assert "step-2 is damaged" in caplog.text and name in caplog.text and "continues from step-1" in caplog.text
    assert list_checkpoints(tmp_path) == [first]
    assert (tmp_path / "checkpoints" / "step-2.damaged").is_dir()
    assert find_damage(save(tmp_path, model, optimizer, 2)) is None

    for path in list_checkpoints(tmp_path):
        damage(path / name)
    with pytest.raises(UserError, match=r"every checkpoint .* is damaged.*step-1"):
        find_newest_intact(tmp_path)


def test_checksums_are_those_of_sha256sum(tmp_path: Path) -> None:
    model, optimizer = build("adamw")
    path = save(tmp_path, model, optimizer, 0)
    assert subprocess.run(["sha256sum", "-c", "checksums.sha256"], cwd=path, capture_output=True).returncode == 0


def test_leftovers_are_deleted_and_old_checkpoints_pruned(tmp_path: Path) -> None:
    model, optimizer = build("adamw")
    steps(model, optimizer, 0, 1)
    for step in range(1, 5):
        save(tmp_path, model, optimizer, step, keep=2)
    checkpoints = tmp_path / "checkpoints"
    for leftover in (".step-5.tmp-1", ".step-4.old-1"):
        (checkpoints / leftover).mkdir()
        (checkpoints / leftover / "state.json").write_text('{"step": 5')
    assert find_newest_intact(tmp_path) == checkpoints / "step-4"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-3", "step-4"]


def test_a_full_disk_keeps_earlier_checkpoints(tmp_path: Path) -> None:
    model, optimizer = build("adamw")
    steps(model, optimizer, 0, 1)
    with small_disk(tmp_path / "disk", "1m") as run:
        first = save(run, model, optimizer, 1, keep=1)
        with pytest.raises(UserError, match=r"step 2 .*no space left.*continue from .*step-1 with --resume") as caught:
            save(run, model, optimizer, 2, keep=1)
        assert "\n" not in str(caught.value)
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-1"]
        assert find_newest_intact(run) == first


def test_a_full_disk_keeps_the_old_text_file(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as folder:
        write_text(folder / "config.yaml", "old")
        with pytest.raises(OSError, match="No space left"):
            write_text(folder / "config.yaml", "new" * 100_000)
        assert [path.name for path in folder.iterdir()] == ["config.yaml"]
        assert (folder / "config.yaml").read_text() == "old"
