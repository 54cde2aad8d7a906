"""Settings of the serving parts: ``configs/serve.yaml`` plus ``key=value`` overrides. Secrets come from elsewhere.

API keys and the registration secret are never in this file or on a command line: they come from the environment
or from a file that only the operator can read.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from babydoctor.config_file import Section, load
from babydoctor.schema import UserError

KEYS_VARIABLE = "BABYDOCTOR_API_KEYS"
KEYS_FILE_VARIABLE = "BABYDOCTOR_API_KEYS_FILE"
SECRET_VARIABLE = "BABYDOCTOR_REGISTRATION_SECRET"

MIN_SECRET_LENGTH = 16


class Limits(Section):
    """What a request may cost. All are checked before the work that they limit."""

    max_body_bytes: int = Field(32 * 2**20, gt=0, description="of a request; an image grows by a third in base64")
    max_held_bytes: int = Field(2**30, gt=0, description="of all open requests together; more get 429")
    body_timeout_s: float = Field(30, gt=0, description="to send the whole body")
    max_connections: int = Field(2048, gt=0, description="of one part; one more ends the one that is idle longest")
    head_timeout_s: float = Field(10, gt=0, description="to send a request's head, or the next one's")
    stall_timeout_s: float = Field(60, gt=0, description="a client that reads nothing for so long is disconnected")
    max_pixels: int = Field(50_000_000, gt=0, description="of an image; checked in its header, before decoding")
    decode_seconds: float = Field(2, gt=0, description="of CPU to decode an image of 4 megapixels; larger get more")
    decode_memory_bytes: int = Field(512 * 2**20, gt=0, description="to decode an image of 4 megapixels, likewise")
    max_images: int = Field(1, ge=1, description="of a request; the stages train on one")
    max_prompt_chars: int = Field(65_536, gt=0, description="of a prompt, in characters")
    max_queue: int = Field(64, ge=0, description="requests of a worker that wait for a slot; more get 429")
    max_open: int = Field(1024, gt=0, description="requests that a controller holds open; more get 429")
    request_timeout_s: float = Field(300, gt=0, description="from arrival to the last token")
    stuck_s: float = Field(
        120, gt=0, description="a step of the engine, or decoding, without progress for so long: /readyz is 503"
    )
    keep_alive_s: float = Field(3, gt=0, description="longest silence of a stream; LLaVA's clients give up after 10")


class RemoteImages(Section):
    """Images by URL in OpenAI requests. Off while ``hosts`` is empty."""

    hosts: tuple[str, ...] = Field((), description="host names that may be read from, exactly as in the URL")
    max_bytes: int = Field(16 * 2**20, gt=0, description="of an image file")
    timeout_s: float = Field(10, gt=0, description="for the whole download, redirects included")


class ControllerSettings(Section):
    """The controller: routes requests to workers."""

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(21001, ge=0, le=65535, description="0: any free port")
    dispatch: Literal["lottery", "shortest_queue"] = Field(
        "shortest_queue", description="how a request finds its worker; lottery weighs workers by their speed"
    )
    heart_beat_expiry_s: float = Field(30, gt=0, description="a worker silent for so long is out of rotation")
    connect_timeout_s: float = Field(3, gt=0, description="to reach a worker")
    worker_silence_s: float = Field(60, gt=0, description="a stream silent for so long is continued elsewhere")
    trusted_workers: tuple[str, ...] = Field(
        (), description="URLs that may be registered without the secret: for the original LLaVA's workers"
    )
    foreign_template: str = Field("v1", description="template for messages to workers that name none")


class WorkerSettings(Section):
    """A worker: one copy of the model behind HTTP."""

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(21002, ge=0, le=65535, description="of the first worker; 0: any free port")
    controller: str | None = Field("http://127.0.0.1:21001", description="null: the worker stands alone")
    address: str | None = Field(None, description="URL under which the controller reaches this worker; null: found out")
    model_name: str | None = Field(None, description="null: the name of the run directory")
    aliases: tuple[str, ...] = Field(
        (), description="further names of the model; LLaVA's clients pick a template by a name like llava-llama-2-x"
    )
    speed: float = Field(1, gt=0, description="weight in the lottery")
    heart_beat_s: float = Field(15, gt=0, description="seconds between heartbeats to the controller")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    drain_s: float = Field(60, ge=0, description="after SIGTERM, running answers get so long to finish")
    retention_dir: str | None = Field(None, description="requests and answers are written there; null: never")


class PageSettings(Section):
    """The web UI."""

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(7860, ge=0, le=65535, description="0: any free port")
    feedback_file: str | None = Field(
        "feedback/feedback.jsonl", description="users' feedback is appended there, with their consent; null: none taken"
    )


class ServeSettings(Section):
    """Settings of controller, workers and web UI."""

    limits: Limits = Limits()
    remote_images: RemoteImages = RemoteImages()
    controller: ControllerSettings = ControllerSettings()
    worker: WorkerSettings = WorkerSettings()
    page: PageSettings = PageSettings()
    engine: dict[str, Any] = Field(default_factory=dict, description="settings of the engine, see EngineSettings")
    cors_origins: tuple[str, ...] = Field(
        (),
        description="web pages that may call the APIs from a browser, e.g. https://app.example.org; *: all",
    )
    allowed_hosts: tuple[str, ...] = Field(
        (), description="further host names under which parts on 127.0.0.1 are reached, through a proxy on this machine"
    )
    public_without_keys: bool = Field(False, description="true: may listen beyond this machine without API keys")


@dataclass(frozen=True)
class Secrets:
    """API keys of clients, and the secret that controller and workers share. Never printed."""

    api_keys: tuple[str, ...] = field(default=(), repr=False)
    registration: str | None = field(default=None, repr=False)


def load_settings(path: str | Path | None, overrides: Sequence[str] = ()) -> ServeSettings:
    """Read the YAML file, if one is given, and apply ``key=value`` overrides (values are YAML).

    Raises:
        UserError: the file, a key or a value is wrong; the message names it.
    """
    return load(ServeSettings, path, overrides)


def load_secrets(environment: Mapping[str, str] | None = None) -> Secrets:
    """Read the API keys and the registration secret from the environment.

    ``BABYDOCTOR_API_KEYS`` holds keys with commas between them; ``BABYDOCTOR_API_KEYS_FILE`` names a file with one
    key a line (``#`` begins a comment). ``BABYDOCTOR_REGISTRATION_SECRET`` is what controller and workers share.

    Raises:
        UserError: the file cannot be read, or a key is too short to be one.
    """
    environment = os.environ if environment is None else environment
    keys = [key.strip() for key in environment.get(KEYS_VARIABLE, "").split(",")]
    if file := environment.get(KEYS_FILE_VARIABLE):
        try:
            lines = Path(file).read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise UserError(f"{KEYS_FILE_VARIABLE}={file}: cannot be read ({error.strerror})") from None
        keys += [line.partition("#")[0].strip() for line in lines]
    secret = environment.get(SECRET_VARIABLE) or None
    keys = [key for key in keys if key]
    for name, value in [*((KEYS_VARIABLE, key) for key in keys), *([(SECRET_VARIABLE, secret)] if secret else [])]:
        if len(value) < MIN_SECRET_LENGTH or not value.isascii() or not value.isprintable():
            raise UserError(
                f"{name} holds a key of {len(value)} characters; a key has at least {MIN_SECRET_LENGTH} printable "
                "ASCII ones. Make one with: python -c 'import secrets; print(secrets.token_urlsafe(32))'"
            )
    return Secrets(tuple(dict.fromkeys(keys)), secret)


def is_loopback(host: str) -> bool:
    """Whether a server that listens on ``host`` can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_exposure(part: str, host: str, settings: ServeSettings, secrets: Secrets) -> None:
    """Refuse to listen beyond this machine without keys.

    Raises:
        UserError: ``host`` is reachable from outside and there are no API keys, or no registration secret.
    """
    if is_loopback(host):
        return
    if not secrets.api_keys and not settings.public_without_keys:
        raise UserError(
            f"{part}.host={host} can be reached from other machines, and no API keys are set: anybody could use the "
            f"model. Set {KEYS_VARIABLE} or {KEYS_FILE_VARIABLE}, listen on 127.0.0.1, or say "
            "public_without_keys=true if something in front of it checks who may come in"
        )
    if part == "controller" and not secrets.registration:
        raise UserError(
            f"controller.host={host} can be reached from other machines, and {SECRET_VARIABLE} is not set: anybody "
            "could register a worker and be sent patients' images. Set it for the controller and for every worker"
        )
