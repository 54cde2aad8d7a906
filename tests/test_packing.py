"""Packing loses nothing, keeps documents apart, and gives the same loss and gradients."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.packed_examples import loss, make_example, with_prefix
from hypothesis import given
from hypothesis import strategies as st

from babydoctor.config import LoraConfig
from babydoctor.data.packing import MIN_PREFIX, build_batch, common_prefix, pack, plan_bins
from babydoctor.model.babydoctor import BabyDoctor
from babydoctor.model.lora import add_lora
from babydoctor.model.run_dir import load_run
from babydoctor.schema import IGNORE_INDEX, Example, UserError


@given(
    lengths=st.lists(st.integers(1, 50), max_size=40),
    max_tokens=st.integers(50, 120),
    num_ranks=st.integers(1, 4),
)
def test_no_document_is_lost_and_no_bin_overflows(lengths: list[int], max_tokens: int, num_ranks: int) -> None:
    bins = plan_bins(lengths, max_tokens, num_ranks)
    assert sorted(index for members in bins for index in members) == list(range(len(lengths)))
    assert len(bins) % num_ranks == 0
    assert all(sum(lengths[index] for index in members) <= max_tokens for members in bins)


def test_bins_are_few_and_evenly_filled() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(262, 330, 128).tolist()
    filled = [sum(lengths[i] for i in members) for members in plan_bins(lengths, 4096)]
    assert sum(filled) / (len(filled) * max(filled)) > 0.97


def test_a_document_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match=r"train\.micro_batch_tokens=10"):
        pack([make_example(11)], 10)


def test_labels_shift_inside_each_document() -> None:
    batch = build_batch([make_example(6, seed=1), make_example(5, seed=2)])
    first, second = make_example(6, seed=1).labels, make_example(5, seed=2).labels
    assert batch.targets.tolist() == [*first[1:], IGNORE_INDEX, *second[1:], IGNORE_INDEX]
    assert batch.position_ids.tolist() == [*range(6), *range(5)]
    assert batch.document_lengths == (6, 5)


def test_a_shared_prefix_is_stored_once() -> None:
    words = list(range(50, 50 + MIN_PREFIX + 4))
    examples = [with_prefix(make_example(6 + i, seed=i), words) for i in range(3)]
    assert common_prefix(examples) == len(words)
    batch, other = pack(examples, 34)
    for part in (batch, other):
        assert len(part) <= 34
        assert part.prefix_length == (len(words) if len(part.ids) > 1 else 0)
    assert sorted(batch.ids + other.ids) == ["0", "1", "2"]
    both = build_batch(examples, len(words))
    assert both.input_ids.tolist() == [*words, *np.concatenate([e.input_ids[len(words) :] for e in examples])]
    assert both.position_ids.tolist() == [*range(26), *range(20, 27), *range(20, 28)]
    assert both.document_lengths == (6, 7, 8) and both.num_supervised == sum(e.num_supervised for e in examples)


@pytest.mark.parametrize("kept", [MIN_PREFIX - 1, MIN_PREFIX, MIN_PREFIX + 3])
def test_images_targets_and_different_tokens_end_a_prefix(kept: int) -> None:
    words = list(range(50, 90))
    a, b = (with_prefix(make_example(9, seed=i), words) for i in range(2))
    expected = kept if kept >= MIN_PREFIX else 0
    a.input_ids[kept] = 1
    assert common_prefix([a, b]) == expected
    a.input_ids[kept] = words[kept]
    a.image_mask[kept] = True
    assert common_prefix([a, b]) == expected
    a.image_mask[kept] = False
    a.labels[kept + 1] = 5  # predicted by position ``kept``
    assert common_prefix([a, b]) == expected
    assert common_prefix([a]) == 0


def test_an_example_is_never_prefix_alone() -> None:
    words = list(range(50, 90))
    short = Example("short", np.array(words, np.int32), np.full(40, IGNORE_INDEX, np.int32), np.zeros(40, bool))
    assert common_prefix([short, with_prefix(make_example(9), words)]) == 39


@pytest.fixture
def model(tiny_run: Path) -> BabyDoctor:
    model = load_run(tiny_run, dtype=torch.float32).model
    model.projector.requires_grad_(True)
    return model


def test_packed_loss_and_gradients_equal_unpacked(model: BabyDoctor) -> None:
    words = list(range(50, 70))
    examples = [with_prefix(make_example(20 + 3 * i, num_images=i % 2, seed=i), words) for i in range(7)]
    results = []
    packings = [pack(examples, size, share_prefix=shares) for size in (10_000, 80) for shares in (True, False)]
    assert [max(batch.prefix_length for batch in batches) for batches in packings] == [20, 0, 20, 0]
    for batches in (*packings, [build_batch([example]) for example in examples]):
        count = sum(batch.num_supervised for batch in batches)
        total = sum(loss(model, batch) / count for batch in batches)
        assert isinstance(total, torch.Tensor)
        total.backward()
        results.append((total.item(), model.projector.weight.grad.clone()))
        model.zero_grad()
    for value, gradient in results[1:]:
        assert value == pytest.approx(results[0][0], abs=1e-5)
        torch.testing.assert_close(gradient, results[0][1], atol=1e-5, rtol=1e-4)


def test_loss_equals_transformers(model: BabyDoctor) -> None:
    example = make_example(24, seed=3)
    ids, labels = (torch.from_numpy(x).long()[None] for x in (example.input_ids, example.labels))
    reference = model.language_model(input_ids=ids, labels=labels).loss
    batch = build_batch([example])
    assert (loss(model, batch) / batch.num_supervised).item() == pytest.approx(reference.item(), abs=1e-5)


def test_documents_do_not_see_each_other(model: BabyDoctor) -> None:
    """Changing tokens in one document does not change the hidden states of the others."""
    examples = [make_example(17 + i, seed=i) for i in range(3)]
    other = [examples[0], make_example(18, seed=99), examples[2]]

    def hidden(chosen: list[Example]) -> torch.Tensor:
        batch = build_batch(chosen)
        embeds = model.language_model.model.embed_tokens(torch.from_numpy(batch.input_ids).long())[None]
        positions = torch.from_numpy(batch.position_ids).long()[None]
        with torch.no_grad():
            return model.decode(embeds, positions, batch.document_lengths)[0]

    before, after = hidden(examples), hidden(other)
    torch.testing.assert_close(before[:17], after[:17], atol=1e-6, rtol=0)
    torch.testing.assert_close(before[35:], after[35:], atol=1e-6, rtol=0)
    assert (before[17:35] - after[17:35]).abs().max() > 1e-2


@pytest.mark.parametrize("every", [1, 2])
def test_recomputing_activations_does_not_change_the_result(model: BabyDoctor, every: int) -> None:
    add_lora_if_absent(model)
    batch = build_batch([make_example(30, num_images=1, seed=5)])
    gradients = []
    for recompute in (0, every):
        model.recompute_every = recompute
        loss(model, batch).backward()
        gradients.append({n: p.grad.clone() for n, p in model.trainable_parameters().items() if p.grad is not None})
        model.zero_grad()
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 2
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-6, rtol=1e-5)


def add_lora_if_absent(model: BabyDoctor) -> None:
    if not getattr(model.language_model, "peft_config", None):
        add_lora(model.language_model, LoraConfig(r=4, alpha=8, dropout=0.0))
    for name, parameter in model.language_model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
