"""``bench train`` and ``bench paths``: figures are consistent, and slow paths compute the same as fast ones."""

from __future__ import annotations

import pytest
import torch
from helpers.packed_examples import loss, make_example, with_prefix
from typer.testing import CliRunner

from babydoctor.bench import paths as bench_paths
from babydoctor.bench.paths import loss_of_all_logits, pad_to_longest, square_attention
from babydoctor.bench.train import bench_train, prepare, run_steps
from babydoctor.cli.main import build_app
from babydoctor.data.layout import build_attention_layout
from babydoctor.data.packing import build_batch
from babydoctor.model.babydoctor import BabyDoctor
from babydoctor.model.packed.attention import attend
from babydoctor.model.run_dir import load_run
from babydoctor.plan.hardware import this_cpu


@pytest.mark.parametrize("tails", [None, (1, 9, 4)])
@pytest.mark.parametrize("prefix", [0, 5])
def test_one_full_mask_equals_attention_by_blocks(tails, prefix):
    torch.manual_seed(0)
    lengths = (6, 11, 4)
    num_rows = sum(lengths) + prefix if tails is None else sum(tails)
    q = torch.randn(num_rows, 4, 8, dtype=torch.float64)
    k, v = (torch.randn(sum(lengths) + prefix, 2, 8, dtype=torch.float64) for _ in range(2))
    layout = build_attention_layout(lengths, tails, prefix)
    torch.testing.assert_close(square_attention(q, k, v, layout), attend(q, k, v, layout))


def test_the_slow_loss_equals_the_fast_loss(tiny_run):
    model = load_run(tiny_run, dtype=torch.float32).model
    words = list(range(50, 70))
    examples = [with_prefix(make_example(20 + 3 * i, num_images=1, seed=i), words) for i in range(3)]
    batch = build_batch(examples, len(words))
    expected = loss(model, batch)
    (padded,) = pad_to_longest(examples, 1000)
    assert padded.document_lengths == (26, 26, 26)
    torch.testing.assert_close(loss(model, padded), expected, atol=1e-4, rtol=1e-6)
    model.forward = loss_of_all_logits.__get__(model, BabyDoctor)
    torch.testing.assert_close(loss(model, batch), expected, atol=1e-4, rtol=1e-6)


def test_a_stage_is_measured():
    settings = {"preset": "mini", "device": "cpu", "num_steps": 1, "batch_size": 2, "num_workers": 0}
    ((ceiling, result),) = bench_train(("radiology",), **settings)
    assert result.stage == "radiology" and 0 < result.mfu < 1 and ceiling > 0
    assert result.tokens_per_s == pytest.approx(result.samples_per_s * result.plan.statistics.num_tokens, rel=0.5)
    assert result.plan.statistics.num_prefix == 76


def test_each_path_is_measured_on_and_off(monkeypatch):
    """With two samples per step. Whether a path is faster is not tested."""
    names = ("bfloat16", "cross-entropy in chunks at the loss positions", "last layer from the first loss position on")
    chosen = tuple(path for path in bench_paths.PATHS if path.name in names)
    monkeypatch.setattr(bench_paths, "PATHS", chosen)
    results = list(bench_paths.bench_paths("instruct", num_steps=1, batch_size=2))
    assert [result.path for result in results] == list(chosen) and len(chosen) == 3
    assert all(result.samples_per_s > 0 and result.samples_per_s_without > 0 for result in results)
    peaks = {result.path.name: result.peak_bytes_without / result.peak_bytes for result in results}
    assert peaks["bfloat16"] > 1.3
    assert peaks["cross-entropy in chunks at the loss positions"] > 1.02


def test_token_counts_include_the_shared_prefix():
    job = prepare("instruct", "mini", "cpu", hardware=this_cpu(), batch_size=8, num_workers=0)
    ((_, _, data),) = run_steps(job, 1)
    (batch,) = data.batches
    assert batch.prefix_length == 76
    assert data.num_tokens == (sum(batch.document_lengths) + 76) + 7 * 76


def test_an_invalid_memory_size_is_refused():
    result = CliRunner().invoke(build_app(), ["bench", "train", "--memory-cap", "much"])
    assert result.exit_code == 2 and "22.5GiB" in result.output
