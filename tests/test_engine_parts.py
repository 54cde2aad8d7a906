"""The engine's parts that need no model: stop strings, detokenizing, KV slots, runs of rows, sampling."""

from __future__ import annotations

import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from babydoctor.engine.kv_cache import Content, FeatureCache, KVCache
from babydoctor.engine.layout import Chunk, DecodeRows, LayoutBuilder, group_rows
from babydoctor.engine.request import GenerationRequest
from babydoctor.engine.sequence import build_content
from babydoctor.engine.tokens.sampling import build_random, sample
from babydoctor.engine.tokens.stops import Detokenizer, StopFilter
from babydoctor.runtime import use_huge_pages


def feed(filter: StopFilter, pieces: list[str]) -> list[str]:
    shown = []
    for piece in pieces:
        shown.append(filter.add(piece))
        if filter.found is not None:
            break
    return shown


def test_an_ending_that_may_start_a_stop_string_is_held_back():
    filter = StopFilter(["</s>", "\nUSER"])
    assert feed(filter, ["fine", "\n", "US", "A is", " <", "/", "s"]) == ["fine", "", "", "\nUSA is", " ", "", ""]
    assert filter.found is None
    assert filter.flush() == "</s"


def test_the_first_stop_string_ends_the_text_and_the_longer_one_wins():
    filter = StopFilter(["END", "ENDING", "x"])
    assert feed(filter, ["the E", "ND", "x"]) == ["the ", ""] and filter.found == "END"
    filter = StopFilter(["b", "abc"])
    assert feed(filter, ["zabc"]) == ["z"] and filter.found == "abc"
    filter = StopFilter([])
    assert feed(filter, ["a", "b"]) == ["a", "b"] and filter.flush() == ""


@pytest.fixture(scope="module")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_no_delta_ever_splits_a_character(byte_tokenizer):
    text = "Erguß, 5 µm → 肺炎 🫁 done"
    detokenizer = Detokenizer(byte_tokenizer)
    deltas = [detokenizer.add(token) for token in byte_tokenizer.encode(text)]
    assert all("\ufffd" not in delta for delta in deltas)
    assert "".join(deltas) == text
    assert detokenizer.flush() == ""


def test_bytes_that_form_no_character_are_written_as_the_tokenizer_does(byte_tokenizer):
    tokens = byte_tokenizer.encode("a肺")[:-1]
    detokenizer = Detokenizer(byte_tokenizer)
    assert [detokenizer.add(token) for token in tokens] == ["a", "", ""]
    assert detokenizer.flush() == "\ufffd"


def test_any_bytes_in_pieces_are_the_text_of_all_of_them(byte_tokenizer):
    """Characters between bytes of no character, too: the tokens of a model are not always valid UTF-8."""
    draw, letters = random.Random(0), bytes_to_unicode()
    for _ in range(400):
        pieces = [draw.choice(["a", "é", "肺", "🫁", None]) for _ in range(draw.randint(1, 10))]
        data = b"".join(draw.randbytes(draw.randint(1, 4)) if piece is None else piece.encode() for piece in pieces)
        tokens = [byte_tokenizer.convert_tokens_to_ids(letters[byte]) for byte in data]
        detokenizer = Detokenizer(byte_tokenizer)
        shown = [detokenizer.add(token) for token in tokens]
        assert "".join(shown) + detokenizer.flush() == data.decode(errors="replace"), data


def test_sentencepiece_text_is_the_same_in_pieces(golden):
    tokenizer = AutoTokenizer.from_pretrained(golden / "base")
    for text in ("The lungs are clear.  No effusion,\nno pneumothorax.", "5 µm → 肺炎 🫁", " leading"):
        tokens = tokenizer.encode(text, add_special_tokens=False)
        detokenizer = Detokenizer(tokenizer)
        pieces = [detokenizer.add(token) for token in tokens]
        assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(tokens, skip_special_tokens=True)


def content(tokens: list[int], *images: tuple[int, str]) -> Content:
    return Content(np.asarray(tokens, np.int64), images)


def test_a_common_prefix_ends_at_another_image():
    mask = np.asarray([0, 0, 1, 1, 1, 1, 0], bool)
    ids = np.asarray([5, 6, 0, 0, 0, 0, 7])
    both = build_content(ids, mask, ("a", "b"))
    assert both.images == ((2, "a"), (4, "b"))
    assert both.common_prefix(build_content(ids, mask, ("a", "b"))) == 7
    assert both.common_prefix(build_content(ids, mask, ("a", "c"))) == 4
    assert both.common_prefix(build_content(ids, mask, ("x", "b"))) == 2
    assert both.common_prefix(both.head(3)) == 3
    # A text token never equals an image position, no matter which id input_ids has there.
    assert both.common_prefix(content([5, 6, 0, 0])) == 2


def build_slots(num_slots: int, max_running: int) -> KVCache:
    return KVCache(1, 1, 2, 16, num_slots, max_running, torch.float32, torch.device("cpu"))


def fill(kv_cache: KVCache, slot, tokens: list[int]) -> None:
    slot.content = content(tokens)
    for plane in (*kv_cache.keys, *kv_cache.values):
        plane[slot.index, 0, : len(tokens)] = torch.tensor(tokens, dtype=torch.float32)[:, None]


def held(kv_cache: KVCache, slot) -> list[int]:
    assert torch.equal(kv_cache.keys[0][slot.index], kv_cache.values[0][slot.index])
    return kv_cache.keys[0][slot.index, 0, : len(slot.content), 0].int().tolist()


def test_prefixes_are_reused_in_place_or_copied():
    kv_cache = build_slots(3, 2)
    first = kv_cache.allocate(content([1, 2, 3, 4]))
    assert first.num_reused == 0
    fill(kv_cache, first.slot, [1, 2, 3, 4])
    # A running request's prefix is copied.
    second = kv_cache.allocate(content([1, 2, 9]))
    assert (second.num_reused, second.slot is first.slot) == (2, False)
    assert held(kv_cache, second.slot) == [1, 2]
    assert kv_cache.allocate(content([1])) is None
    kv_cache.free(first.slot)
    # A finished request's slot is reused, and the last position of a prompt is always computed.
    third = kv_cache.allocate(content([1, 2, 3, 4]))
    assert (third.num_reused, third.slot) == (3, first.slot)
    with pytest.raises(AssertionError, match="twice"):
        kv_cache.free(third.slot)
        kv_cache.free(third.slot)


def test_contents_of_finished_requests_are_archived_and_the_oldest_is_dropped():
    kv_cache = build_slots(2, 1)
    for tokens in ([1, 1, 1, 1], [2, 2, 2, 2]):
        allocation = kv_cache.allocate(content(tokens))
        assert allocation.num_reused == 0
        fill(kv_cache, allocation.slot, tokens)
        kv_cache.free(allocation.slot)
    allocation = kv_cache.allocate(content([1, 1, 1, 1, 5]))
    assert allocation.num_reused == 4 and held(kv_cache, allocation.slot) == [1, 1, 1, 1]
    kv_cache.free(allocation.slot, scrub=True)
    assert kv_cache.keys[0][allocation.slot.index].abs().sum() == 0


@pytest.mark.parametrize(
    ("slots", "lengths", "runs"),
    [
        ([], [], []),
        ([0, 1, 2], [100, 90, 110], [[0, 1, 2]]),
        ([0, 2], [100, 100], [[0, 1]]),
        ([0, 9], [300, 300], [[0], [1]]),
        ([0, 1, 2], [100, 4000, 100], [[0], [1], [2]]),
    ],
)
def test_neighboring_slots_attend_together_if_that_is_cheaper(slots, lengths, runs):
    assert group_rows(slots, lengths, call_positions=512) == runs


def test_features_are_kept_within_the_budget_and_the_least_recently_used_dropped():
    cache = FeatureCache(budget_bytes=2 * 4 * 10)
    for key in ("a", "b"):
        cache.put(key, torch.zeros(10))
    assert cache.get("a") is not None
    cache.put("c", torch.zeros(10))
    assert cache.get("b") is None and cache.get("a") is not None and cache.get("c") is not None
    cache.put("too large", torch.zeros(100))
    assert cache.num_bytes == 80 and (cache.hits, cache.misses) == (3, 1)


def test_draws_follow_the_nucleus():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    random = build_random(GenerationRequest(np.zeros(1, np.int32), seed=1))
    draws = np.bincount([sample(logits, 1.0, 1.0, random) for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(draws, [0.5, 0.3, 0.15, 0.05], atol=0.03)
    draws = np.bincount([sample(logits, 1.0, 0.7, random) for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(draws, [0.625, 0.375, 0, 0], atol=0.03)
    assert {sample(logits, 1.0, 0.4, random) for _ in range(50)} == {0}
    assert {sample(logits, 0.02, 1.0, random) for _ in range(50)} == {0}


def test_a_flat_nucleus_wider_than_the_first_candidates_is_exact():
    logits = torch.zeros(1000)
    random = np.random.default_rng(0)
    draws = {sample(logits, 1.0, 0.9, random) for _ in range(6000)}
    assert len(draws) > 850 and max(draws) <= 900


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(("start", "length"), [(0, 1), (0, 300), (70, 128), (130, 310), (399, 41)])
def test_rows_of_a_chunk_see_themselves_and_what_is_before(window: int | None, start: int, length: int):
    cache = KVCache(1, 1, 2, 440, 1, 1, torch.float32, torch.device("cpu"))
    chunk = Chunk(0, start, torch.zeros(length, 1), True)
    (blocks,) = LayoutBuilder(cache, window).group(DecodeRows([], [], []), [chunk]).chunk_blocks
    seen = torch.zeros(length, cache.capacity, dtype=torch.bool)
    for block in blocks:
        rows = slice(block.first_row, block.first_row + block.num_rows)
        seen[rows, : block.masked_from] = True
        seen[rows, block.masked_from : block.length] = block.mask[: block.num_rows] == 0
    row, position = start + torch.arange(length)[:, None], torch.arange(cache.capacity)
    assert torch.equal(seen, (position <= row) & (position > row - (window or cache.capacity)))
    last = blocks[-1].last_row()
    assert last.first_row == length - 1 and torch.equal(last.mask, blocks[-1].mask[blocks[-1].num_rows - 1, None])


def test_memory_in_use_moves_into_huge_pages_and_keeps_its_content():
    numbers = torch.arange(24 * 2**20, dtype=torch.int32)  # 96 MB, so it gets a separate mapping
    moved = use_huge_pages()
    if moved < numbers.nbytes // 2:
        pytest.skip(f"this system gave {moved} bytes of huge pages (Linux 6.1 and transparent_hugepage are needed)")
    rollup = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
    found = re.search(r"AnonHugePages:\s+(\d+) kB", rollup)
    assert found is not None and int(found[1]) * 1024 >= numbers.nbytes // 2
    assert torch.equal(numbers, torch.arange(len(numbers), dtype=torch.int32))


def test_moving_memory_into_huge_pages_respects_the_limit():
    kept = torch.ones(16 * 2**20)
    assert use_huge_pages(max_bytes=4 * 2**20) <= 4 * 2**20 and kept.min() == 1
