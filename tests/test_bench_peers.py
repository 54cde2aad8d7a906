"""``bench peers``: llama.cpp computes the same prompts, and both are measured."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from helpers.serving import tiny_worker

from babydoctor.bench.peers.compare import WEIGHTS, Match, OwnWorker, compare
from babydoctor.bench.peers.llama_cpp import check_installed, is_optimized
from babydoctor.bench.serve_figures import Timing, build_questions, summarize
from babydoctor.schema import UserError


class Fixed:
    """A program that always takes the same time for an answer of 64 tokens."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.pid = seconds, 0


def test_a_row_has_medians_and_ratios_within_rounds():
    def figures(seconds: float):
        return summarize(1, [Timing(seconds / 4, seconds, 64)], wall_s=seconds)

    match = Match(1, WEIGHTS["int8"], Fixed(1), Fixed(1), [], [])  # type: ignore[arg-type]
    for ours, theirs in ((1.0, 2.0), (4.0, 4.0), (2.0, 3.0)):  # the machine was slow in the second round
        match.ours.append(figures(ours))
        match.theirs.append(figures(theirs))
    assert match.row() == ["1", "int8, q8_0", "32", "21", "1.50 (1.00-2.00)", "0.500", "0.750", "0", "0"]


@pytest.mark.slow
def test_both_programs_read_the_same_prompts_and_are_measured(tmp_path: Path):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (pip install 'babydoctor[interop]')")
    try:
        check_installed()
    except UserError as error:
        pytest.skip(str(error))
    updates: list[tuple[int, int]] = []
    table = compare(
        tmp_path,
        preset="tiny",
        users=(1, 2),
        weights=("bf16",),
        requests_per_user=1,
        max_new_tokens=3,
        rounds=1,
        on_progress=lambda text, done, total: updates.append((done, total)),
    )
    rows = [line.split(" | ") for line in table.splitlines()[2:4]]
    assert [row[0] for row in rows] == ["| 1", "| 2"] and all(float(row[2]) > 0 < float(row[3]) for row in rows)
    assert updates == [(1, 2), (2, 2)] and "llama-cpp-python" in table


@pytest.mark.parametrize(("flags", "optimized"), [("-march=native -O1 -fPIC", False), ("-O3 -DNDEBUG", True)])
def test_a_build_without_optimization_is_noticed(
    flags: str, optimized: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (pip install 'babydoctor[interop]')")
    (tmp_path / "libggml-cpu.so").write_bytes(b"\x7fELF" + flags.encode() + b"\0")
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path))
    assert is_optimized() == optimized


def test_our_worker_is_asked_over_http():
    url = tiny_worker().url
    figures = OwnWorker(url, 0, "tiny").measure(build_questions(2), 3, num_users=2)
    assert figures.num_users == 2 and figures.tokens_per_s > 0


def test_a_missing_llama_cpp_and_unknown_weights_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "llama_cpp", None)
        with pytest.raises(UserError, match=r"llama_cpp is missing: pip install .*llama-cpp-python\[server\]"):
            compare(tmp_path)
    monkeypatch.setattr("babydoctor.bench.peers.compare.check_installed", lambda: None)
    with pytest.raises(UserError, match="--weights 'q4' is not one of bf16, int8"):
        compare(tmp_path, weights=("q4",))
