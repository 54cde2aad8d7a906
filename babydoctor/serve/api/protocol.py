"""Requests and replies of the LLaVA wire protocol, with FastChat's and our own additions. No torch, no HTTP.

The protocol itself is unchanged (``llava/serve/{controller,model_worker}.py``, release 1.2). Our additions are optional
fields and further endpoints, which LLaVA's own programs ignore.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from babydoctor.eval.certainty.agreement import MAX_SAMPLES
from babydoctor.schema import Role

GREEDY_TEMPERATURE = 0.001
"""At or below this temperature decoding is greedy."""

MAX_NEW_TOKENS = 1024
"""The protocol's limit for ``max_new_tokens``. Larger values are reduced to it, as in LLaVA."""


def check_text(text: str) -> str:
    """Refuse NUL and half surrogate pairs: ``"\\ud800"`` is valid JSON, but not valid Unicode."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("must be valid Unicode, without half surrogate pairs") from None
    if "\0" in text:
        raise ValueError("must not contain the NUL character")
    return text


Text = Annotated[str, AfterValidator(check_text)]

MAX_STOPS = 32
"""Most stop strings of a request. Every token is checked against each of them."""

CERTAINTY_NAMES = ("familiarity", "confidence", "agreement")
"""Measures that a request may ask for with its answer: fields of requests and of last messages."""

StopText = Annotated[Text, Field(max_length=1024)]


class Body(BaseModel):
    """The base of all bodies. Unknown fields are ignored, as in LLaVA."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class Sampling(Body):
    """How the next token is chosen. Names and meaning are those of vLLM. Penalties apply before ``temperature``."""

    temperature: float = Field(1.0, allow_inf_nan=False, description="0.001 or less: greedy decoding.")
    top_p: float = Field(1.0, ge=0, le=1)
    top_k: int = Field(-1, ge=-1, description="Choose from this many likeliest tokens; -1 or 0: from all.")
    min_p: float = Field(0.0, ge=0, le=1, description="Drop tokens below this share of the likeliest token.")
    presence_penalty: float = Field(0.0, ge=-2, le=2, description="Subtracted from the scores of tokens in the answer.")
    frequency_penalty: float = Field(0.0, ge=-2, le=2, description="Subtracted once per occurrence of a token.")
    repetition_penalty: float = Field(
        1.0, gt=0, le=10, description="Divides the scores of tokens in prompt or answer; 1: off."
    )
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, max_length=1024, description="Added to the scores of these token ids."
    )
    seed: int | None = Field(None, ge=0, lt=2**63)
    ignore_eos: bool = Field(False, description="Generate past the end-of-text token, for benchmarks.")

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, values: Any) -> Any:
        """Treat null as the default, because some clients send every field they know."""
        return (
            {key: value for key, value in values.items() if value is not None} if isinstance(values, dict) else values
        )


class PromptTurn(Body):
    """One turn of the conversation that a prompt renders. ``<image>`` in ``text`` marks an image."""

    role: Role
    text: Text


class GenerateRequest(Sampling):
    """Body of ``/worker_generate_stream`` and ``/worker_generate``."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "radiology",
                    "prompt": "[INST] Which modality is this? [/INST]",
                    "temperature": 0,
                    "max_new_tokens": 64,
                    "stop": "</s>",
                }
            ]
        }
    )

    model: Text = Field("", max_length=512, description="A name from `/list_models`; a worker also accepts none.")
    prompt: Text = Field(description="The whole prompt in the model's template, with `<image>` for each image.")
    max_new_tokens: int = Field(256, ge=1, description="At most 1024; larger values are reduced.")
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = Field(
        None, description="The answer ends before any of these."
    )
    images: list[str] | None = Field(
        None, max_length=64, description="Base64 or data URLs, one for each `<image>` in the prompt."
    )
    echo: bool = Field(True, description="Whether `text` begins with the prompt.")
    logprobs: bool | int | None = Field(None, description="True or 1: log probabilities of the chosen tokens.")
    token_ids: bool = Field(False, description="Whether messages carry the ids of the new tokens.")
    json_schema: dict[str, Any] | None = Field(None, description="Restrict the answer to JSON that this schema allows.")
    continues: bool = Field(
        False, description="The prompt ends inside the answer, so the answer keeps its leading space."
    )
    resume_ids: list[Annotated[int, Field(ge=0, lt=2**31)]] | None = Field(
        None,
        max_length=MAX_NEW_TOKENS,
        description="Tokens that another worker has already generated; the answer continues after them.",
    )
    familiarity: bool = Field(
        False, description="The last message says whether the image is like those that the model was trained on."
    )
    confidence: bool = Field(
        False, description="The last message has the calibrated probability that a short answer is right."
    )
    agreement: int | None = Field(
        None,
        ge=2,
        le=MAX_SAMPLES,
        description="This many more answers are sampled; the last message says how many are the same.",
    )
    system: Text | None = Field(None, description="System prompt of `turns`; null: the template's own.")
    turns: list[PromptTurn] | None = Field(
        None, max_length=256, description="The conversation that `prompt` renders, for workers that forward messages."
    )

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings that are not empty."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(dict.fromkeys(text for text in given if text))

    @property
    def greedy(self) -> bool:
        return self.temperature <= GREEDY_TEMPERATURE


class AttentionRequest(Body):
    """Body of ``/worker_attention``: how much each word of an answer depends on each part of the image."""

    model: Text = Field("", max_length=512)
    prompt: Text = Field(description="The prompt that was answered, with `<image>` for the image.")
    answer: Text = Field(min_length=1, max_length=16_384, description="The answer, exactly as received.")
    images: list[str] = Field(max_length=64, description="Base64 or data URLs, one for each `<image>`.")
    method: Literal["occlusion"] = Field(
        "occlusion", description="occlusion: hide parts of the image and score the answer again."
    )
    stream: bool = Field(
        False, description="Send progress messages before the reply: JSON objects, a NUL byte after each."
    )


class AttentionProgress(BaseModel):
    """A message of ``/worker_attention`` with ``stream`` while the map is computed."""

    share: float = Field(ge=0, le=1, description="Share of the work that is done.")
    left_s: float | None = Field(None, description="Seconds left at the speed so far; null before there is a speed.")


class TokenAttention(BaseModel):
    text: str = Field(description="A piece of the answer; the pieces join to the whole answer.")
    weights: list[float] = Field(
        description="By how much the piece's log probability drops when each cell of the image is hidden, row by row. "
        "Negative: it rises."
    )


class AttentionReply(BaseModel):
    grid: list[int] = Field(description="Rows and columns of cells. A cell is half a patch of the vision tower.")
    tokens: list[TokenAttention]
    method: str = Field("occlusion", description="How the weights were computed.")
    localization: dict[str, Any] | None = Field(
        None, description="How often the peak of such a map is on the finding, measured by `eval --localization`."
    )


class CountTokenRequest(Body):
    """Body of ``/count_token``."""

    model: Text = Field("", max_length=512)
    prompt: Text


class ModelRequest(Body):
    """Body of ``/get_worker_address`` and of FastChat's endpoints that need only a model's name."""

    model: Text = Field("", max_length=512)


class WorkerStatus(Body):
    """A worker's report about itself. LLaVA's own workers send no ``template``."""

    model_names: list[Annotated[Text, Field(min_length=1, max_length=512)]] = Field(min_length=1, max_length=64)
    speed: float = Field(1, gt=0, le=1e6, description="Relative speed, the worker's weight in the lottery.")
    queue_length: int = Field(0, ge=0, le=10**9, description="Requests running and waiting.")
    template: str | None = Field(None, max_length=64, description="Name of the conversation template.")
    draining: bool = Field(False, description="True once the worker accepts no new requests.")


class FleetStatus(BaseModel):
    """A controller's answer to ``/worker_get_status``: the sum of its workers."""

    model_names: list[str]
    speed: float
    queue_length: int


class RegisterRequest(Body):
    """Body of ``/register_worker``."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "worker_name": "http://127.0.0.1:21002",
                    "check_heart_beat": True,
                    "worker_status": {"model_names": ["radiology"], "speed": 1, "queue_length": 0},
                }
            ]
        }
    )

    worker_name: str = Field(max_length=2048, description="The URL at which the controller reaches the worker.")
    check_heart_beat: bool = True
    worker_status: WorkerStatus | None = None


class HeartBeat(Body):
    """Body of ``/receive_heart_beat``."""

    worker_name: str = Field(max_length=2048)
    queue_length: int = Field(ge=0, le=10**9)
    draining: bool | None = Field(None, description="True while the worker accepts no new requests.")
