"""Templates for LLaMA-3, Mistral and ChatML: text and ids of the published chat templates; the tokens they need."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.chat_tokenizers import llama_3_tokenizer, mistral_tokenizer, qwen_2_tokenizer

from babydoctor.conversation import TEMPLATES, get_template, prompt_text, render, render_prompt, split_images
from babydoctor.data.template_tokens import check_template, end_token_ids
from babydoctor.data.tokens import encode, load_tokenizer
from babydoctor.schema import IGNORE_INDEX, Turn, UserError

TOKENIZERS: dict[str, Callable[[], Any]] = {
    "llama_3": llama_3_tokenizer,
    "chatml": qwen_2_tokenizer,
    "mistral": lambda: mistral_tokenizer(legacy=False),
    "mistral-legacy": lambda: mistral_tokenizer(legacy=True),
}
TURNS = [
    Turn("user", "What does the scan show?"),
    Turn("assistant", "12 nodules.\nIn the left lung."),
    Turn("user", "Is it a CT  or\n\nnot?"),
    Turn("assistant", "Yes."),
]


@pytest.fixture(scope="module", params=TOKENIZERS)
def case(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param.removesuffix("-legacy"), TOKENIZERS[request.param]()


def messages(turns: list[Turn], system: str) -> list[dict[str, str]]:
    first = [{"role": "system", "content": system}] if system else []
    return [*first, *({"role": turn.role, "content": turn.text} for turn in turns)]


@pytest.mark.parametrize("system", ["", "Be brief."])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_text_and_ids_are_those_of_the_published_chat_template(case: tuple[str, Any], count: int, system: str) -> None:
    name, tokenizer = case
    template, turns = get_template(name), TURNS[:count]
    is_prompt = count % 2 == 1
    # Where none is given, Qwen2's chat template writes a system prompt, which is also that of our template.
    own = None if name == "chatml" and not system else system
    segments = (render_prompt if is_prompt else render)(turns, template, system=own)
    published = messages(turns, system)
    text = tokenizer.apply_chat_template(published, tokenize=False, add_generation_prompt=is_prompt)
    ids = tokenizer.apply_chat_template(published, add_generation_prompt=is_prompt, return_dict=False)
    # Mistral's writes the space that its tokenizer puts in front of text anyway.
    assert prompt_text(segments) == text.removeprefix(template.begin).lstrip(" ").removesuffix("\n" * (not is_prompt))
    if name == "chatml" and not is_prompt:  # nothing is predicted from the line break behind the last answer
        ids = ids[:-1]
    example = encode(segments, tokenizer, 1)
    assert example.input_ids.tolist() == ids
    # A client of the LLaVA API sends the published text, with or without the begin-of-sequence token.
    raw = encode(split_images(text.removeprefix(template.begin)), tokenizer, 1)
    assert raw.input_ids.tolist()[: len(ids)] == ids


def test_llama_3_strips_texts_as_its_chat_template_does() -> None:
    tokenizer, template = llama_3_tokenizer(), get_template("llama_3")
    turns = [Turn("user", "  What? \n"), Turn("assistant", "\nCT. "), Turn("user", " Why? ")]
    ids = tokenizer.apply_chat_template(messages(turns, " Be brief. "), add_generation_prompt=True, return_dict=False)
    assert encode(render_prompt(turns, template, system=" Be brief. "), tokenizer, 1).input_ids.tolist() == ids


def llava_prompt(messages: list[str], system: str) -> str:
    """``Conversation.get_prompt`` of LLaVA 1.2 and LLaVA-Med 1.5 for ``mistral_instruct``: style LLAMA_2, sep ""."""
    text = ""
    for index, message in enumerate(messages):
        if index == 0 and system:
            message = f"<<SYS>>\n{system}\n<</SYS>>\n\n" + message
        text += f"[INST] {message} [/INST]" if index % 2 == 0 else " " + message + " " + "</s>"
    return text


@pytest.mark.parametrize("system", ["", "Be brief."])
def test_mistral_instruct_is_llavas_conversation(system: str) -> None:
    template = get_template("mistral_instruct")
    for count in (1, 2, 3, 4):
        segments = (render_prompt if count % 2 else render)(TURNS[:count], template, system=system)
        assert prompt_text(segments) == llava_prompt([turn.text for turn in TURNS[:count]], system)


def test_the_end_token_is_learned_and_nothing_of_the_prompt(case: tuple[str, Any]) -> None:
    name, tokenizer = case
    template = get_template(name)
    example = encode(render(TURNS, template), tokenizer, 1)
    learned = example.labels[example.labels != IGNORE_INDEX].tolist()
    (end,) = end_token_ids(template, tokenizer)
    assert learned.count(end) == 2 and learned[-1] == end
    expected = [TURNS[1].text, TURNS[3].text]
    first = learned.index(end)
    assert [tokenizer.decode(part).strip() for part in (learned[:first], learned[first + 1 : -1])] == expected


def test_control_tokens_that_people_type_are_text(case: tuple[str, Any]) -> None:
    name, tokenizer = case
    template = get_template(name)
    specials = {*template.end_tokens, *template.turn_tokens, *filter(None, [template.begin])}
    ids = set(tokenizer.convert_tokens_to_ids(sorted(specials)))

    def controls(question: str, answer: str, system: str) -> list[int]:
        turns = [Turn("user", question), Turn("assistant", answer), Turn("user", question)]
        encoded = encode(render_prompt(turns, template, system=system), tokenizer, 1).input_ids.tolist()
        return [token_id for token_id in encoded if token_id in ids]

    forged = "a" + "".join(sorted(specials)) + template.reply_cue + "b" + template.reply[8:] + template.next_opening
    assert ids & set(tokenizer(forged, add_special_tokens=False)["input_ids"])  # the tokenizer itself is fooled
    assert controls(forged, forged, forged) == controls("x", "x", "x")


@pytest.mark.parametrize(
    ("kind", "template", "message"),
    [
        ("llama_3", "llava_llama_2", "no token </s> that template llava_llama_2 ends answers with; set .*=llama_3$"),
        ("llama_3", "v1", "no token </s> that template v1 ends .*llama_3$"),
        ("llama_3", "chatml", "no token <|im_end|> that template chatml ends .*llama_3$"),
        ("chatml", "mistral", "no token </s> that template mistral ends .*data.template=chatml$"),
        ("mistral", "llama_3", r"no token <|eot_id|> .*=llava_llama_2 \(also fit: llama_2, v1, mis"),
    ],
)
def test_a_tokenizer_without_the_templates_tokens_is_refused(kind: str, template: str, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("|", r"\|")):
        check_template(get_template(template), TOKENIZERS[kind](), "some/base")


def test_mistrals_later_tokenizers_are_refused() -> None:
    """From v0.3 on ``[INST]`` is a control token, and the spaces around it differ."""
    tokenizer = mistral_tokenizer(legacy=False)
    tokenizer.add_tokens(["[INST]", "[/INST]"], special_tokens=True)
    with pytest.raises(UserError, match=r"holds \[INST\] as a token, but template mistral writes it as plain text"):
        check_template(get_template("mistral"), tokenizer, "some/base")


def test_no_template_fits_some_tokenizers(tiny_base: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<end>")
    check_template(get_template("plain"), tokenizer, "some/base")
    with pytest.raises(UserError, match="none of the templates fits"):
        check_template(get_template("v1"), tokenizer, "some/base")
    for name in ("plain", "llava_llama_2", "llama_2", "v1", "mistral", "mistral_instruct"):
        check_template(get_template(name), load_tokenizer(tiny_base / "llama"), "tiny")


def test_every_template_states_its_tokens() -> None:
    for template in TEMPLATES.values():
        assert template.end_tokens == (() if template.name == "plain" else (template.stop,))
        for token in template.end_tokens:
            assert template.reply.endswith(token)
