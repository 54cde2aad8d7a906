"""The tiny base models: seeded, ordinary transformers directories, and a language model not trained on any answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from babydoctor.conversation import get_template, render
from babydoctor.data.tokens import encode, load_tokenizer
from babydoctor.demo.tiny_corpus import build_corpus
from babydoctor.demo.tiny_language import LanguageSettings, TinySettings, hidden_states, make_tiny_base
from babydoctor.demo.tiny_tower import TowerSettings, caption_pieces
from babydoctor.imaging.preprocess import ImageSettings
from babydoctor.model.vision import load_vision_tower, num_patches, patch_features
from babydoctor.phantom import text
from babydoctor.phantom.case import build_cases, load_cases
from babydoctor.phantom.write import write_phantoms
from babydoctor.schema import IGNORE_INDEX, Turn, UserError

SMALL = TinySettings(
    seed=1,
    language=LanguageSettings(
        hidden_size=64, intermediate_size=96, num_layers=2, num_heads=2, num_texts=64, num_steps=3
    ),
    tower=TowerSettings(hidden_size=32, num_layers=2, num_heads=2, num_steps=3, batch_size=8),
)


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("phantoms")
    write_phantoms(out, num_train=48, num_held_out=8, seed=3, size=84)
    return out


@pytest.fixture(scope="module")
def base(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("base")
    make_tiny_base(phantoms, out, SMALL)
    return out


def test_the_same_seed_gives_the_same_weights_and_existing_files_are_kept(
    phantoms: Path, base: Path, tmp_path: Path
) -> None:
    make_tiny_base(phantoms, tmp_path, SMALL)
    for part in ("clip", "llama"):
        first, second = (load_file(folder / part / "model.safetensors") for folder in (base, tmp_path))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first), part
    assert (tmp_path / "llama/tokenizer.json").read_bytes() == (base / "llama/tokenizer.json").read_bytes()
    written = (tmp_path / "clip/model.safetensors").stat().st_mtime_ns
    make_tiny_base(phantoms, tmp_path, SMALL)
    assert (tmp_path / "clip/model.safetensors").stat().st_mtime_ns == written


def test_the_language_model_is_trained_on_what_transformers_computes(base: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(base / "llama").eval()
    input_ids = torch.arange(3, 27).reshape(2, 12)
    wanted = torch.rand(2, 12, generator=torch.Generator().manual_seed(0)) < 0.4
    with torch.no_grad():
        whole = model.model(input_ids=input_ids, use_cache=False).last_hidden_state
        torch.testing.assert_close(hidden_states(model, input_ids, wanted), whole[wanted])


def test_the_tower_loads_like_any_clip(base: Path) -> None:
    tower = load_vision_tower(base / "clip", dtype=torch.float32)
    settings = ImageSettings.from_processor_dir(base / "clip", "pad")
    assert (settings.size, num_patches(tower.config)) == (84, 36)
    assert 0.1 < settings.mean[0] < 0.6 and 0.1 < settings.std[0] < 0.6
    saved = load_file(base / "clip/model.safetensors")
    kept = {name.removeprefix("vision_model."): value for name, value in tower.state_dict().items()}
    assert kept.keys() == {name.removeprefix("vision_model.") for name in saved}
    assert all(torch.equal(kept[name.removeprefix("vision_model.")], value) for name, value in saved.items())
    assert patch_features(tower, torch.zeros(1, 3, 84, 84)).shape == (1, 36, 32)


def test_the_tokenizer_has_the_layout_of_llamas(base: Path) -> None:
    tokenizer = load_tokenizer(base / "llama")
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>", "<0x00>", "<0xFF>"]) == [0, 1, 2, 3, 258]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    assert len(tokenizer) <= SMALL.language.vocab_size
    for words in ("This is an X-ray picture.", "größer als 3\nµm", "Loculated effusion, left lower zone."):
        ids = tokenizer(words)["input_ids"]
        assert ids[0] == 1
        assert tokenizer.decode(ids, skip_special_tokens=True) == words
    assert len(tokenizer("Nodule", add_special_tokens=False)["input_ids"]) == 1


def test_every_answer_of_a_conversation_is_supervised_to_its_end(base: Path) -> None:
    tokenizer = load_tokenizer(base / "llama")
    turns = [Turn("user", "<image>\nWhat kind of scan is this?"), Turn("assistant", "CT")]
    turns += [Turn("user", "What is the main finding?"), Turn("assistant", "Nodule")]
    example = encode(render(turns, get_template("llava_llama_2")), tokenizer, 36)
    learnt = [int(label) for label in example.labels if label != IGNORE_INDEX]
    assert tokenizer.convert_ids_to_tokens(learnt) == ["▁CT", "▁", "</s>", "▁Nodule", "▁", "</s>"]


def test_the_corpus_contains_no_image_and_no_radiology_answer() -> None:
    corpus = build_corpus(build_cases("train", 240, 0), 400, seed=0)
    terse = {f"[/INST] {term} </s>" for terms in text.TERMS.values() for term in terms.values()}
    assert all("<image>" not in piece for piece in corpus)
    assert not any(answer in piece for piece in corpus for answer in terse)
    assert corpus == build_corpus(build_cases("train", 240, 0), 400, seed=0)


def test_the_base_reads_every_term_as_the_stages_write_it(base: Path) -> None:
    tokenizer = load_tokenizer(base / "llama")
    read = {
        i
        for document in build_corpus(build_cases("train", 240, 0), 1000, seed=0)
        for i in tokenizer(document)["input_ids"]
    }
    for terms in text.TERMS.values():
        for term in terms.values():
            assert set(tokenizer(term)["input_ids"]) <= read, term


def test_caption_pieces_join_to_the_caption(phantoms: Path) -> None:
    for case in load_cases(phantoms, "train"):
        whole, scan, what, side, level = caption_pieces(case)
        if case.finding == "none":
            assert whole == f"{scan} with {what}" and side is level is None
        else:
            assert whole == f"{scan} with {what} {side} {level}"


def test_a_folder_without_phantoms_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"truth\.jsonl is missing"):
        make_tiny_base(tmp_path, tmp_path / "base")
