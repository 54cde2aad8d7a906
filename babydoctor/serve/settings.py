"""Settings of controller, workers and web UI: ``configs/serve.yaml`` plus ``key=value`` overrides.

API keys and the registration secret are never in this file or on a command line. They come from the environment or from
a file that only the operator can read.
"""

from __future__ import annotations

import ipaddress
import os
import re
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
    """Limits of a request. Each is checked before the work that it limits."""

    max_body_bytes: int = Field(32 * 2**20, gt=0, description="size of a request; base64 makes images a third larger")
    max_held_bytes: int = Field(2**30, gt=0, description="size of all open requests together; further ones get 429")
    body_timeout_s: float = Field(30, gt=0, description="time for a client to send the whole body")
    max_connections: int = Field(2048, gt=0, description="connections of one process; beyond it the idlest is closed")
    head_timeout_s: float = Field(10, gt=0, description="time for a client to send a request's head")
    stall_timeout_s: float = Field(60, gt=0, description="a client that reads nothing for this long is disconnected")
    max_pixels: int = Field(50_000_000, gt=0, description="pixels of an image, read from its header before decoding")
    decode_seconds: float = Field(
        2, gt=0, description="CPU time to decode an image of 4 megapixels; larger ones get more"
    )
    decode_memory_bytes: int = Field(
        512 * 2**20, gt=0, description="memory to decode an image of 4 megapixels; larger ones get more"
    )
    max_images: int = Field(1, ge=1, description="images in a request; the stages train on one")
    max_prompt_chars: int = Field(65_536, gt=0, description="characters in a prompt")
    max_queue: int = Field(64, ge=0, description="requests that wait for a slot of a worker; further ones get 429")
    max_open: int = Field(1024, gt=0, description="open requests of a controller; further ones get 429")
    request_timeout_s: float = Field(300, gt=0, description="time from arrival to the last token")
    stuck_s: float = Field(
        120, gt=0, description="if the engine or decoding makes no progress for this long, /readyz is 503"
    )
    keep_alive_s: float = Field(
        3, gt=0, description="longest time without data in a stream; LLaVA's clients give up after 10 s"
    )


class RemoteImages(Section):
    """Images by URL in OpenAI requests. Off while ``hosts`` is empty."""

    hosts: tuple[str, ...] = Field((), description="host names that images may be read from, exactly as in the URL")
    max_bytes: int = Field(16 * 2**20, gt=0, description="size of an image file")
    timeout_s: float = Field(10, gt=0, description="time for the whole download, including redirects")


class ControllerSettings(Section):
    """The controller: routes requests to workers."""

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(21001, ge=0, le=65535, description="0: any free port")
    dispatch: Literal["lottery", "shortest_queue"] = Field(
        "shortest_queue", description="how a worker is chosen for a request; lottery weights workers by their speed"
    )
    heart_beat_expiry_s: float = Field(
        30, gt=0, description="a worker without a heartbeat for this time gets no requests"
    )
    connect_timeout_s: float = Field(3, gt=0, description="time to connect to a worker")
    worker_silence_s: float = Field(
        60, gt=0, description="an answer without data for this time is continued on another worker"
    )
    trusted_workers: tuple[str, ...] = Field(
        (), description="URLs that may register without the secret, for LLaVA's own workers"
    )
    foreign_template: str = Field("v1", description="template of messages for workers that do not report one")


class WorkerSettings(Section):
    """A worker: one copy of the model behind HTTP."""

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(21002, ge=0, le=65535, description="port of the first worker; 0: any free port")
    controller: str | None = Field("http://127.0.0.1:21001", description="URL of the controller; null: none")
    address: str | None = Field(None, description="URL at which the controller reaches this worker; null: detected")
    model_name: str | None = Field(
        None, description="name of the model for clients; null: the name of the run directory"
    )
    aliases: tuple[str, ...] = Field(
        (), description="more names of the model; LLaVA's clients choose a template by names such as llava-llama-2-x"
    )
    speed: float = Field(1, gt=0, description="weight in the lottery")
    heart_beat_s: float = Field(15, gt=0, description="seconds between heartbeats to the controller")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    drain_s: float = Field(60, ge=0, description="time that running answers get to finish after SIGTERM")
    retention_dir: str | None = Field(
        None, description="folder to write requests and answers to; null: they are not stored"
    )


class DicomWebServer(Section):
    """A PACS that the web UI reads from. Its credentials come from the environment."""

    name: str = Field(min_length=1, max_length=40, description="as users see it")
    url: str = Field(pattern=r"^https?://\S+$", description="root of its DICOMweb services")
    write_back: bool = Field(False, description="users may store an answer there as a structured report")
    ca_file: str | None = Field(None, description="certificates that its HTTPS is checked with; null: the public ones")
    timeout_s: float = Field(20, gt=0, description="for each answer of the server")

    @property
    def credentials_variable(self) -> str:
        """Environment variable with ``user:password``, or with a bearer token, which has no colon."""
        return "BABYDOCTOR_DICOMWEB_" + re.sub(r"\W", "_", self.name.upper(), flags=re.ASCII)


class PageSettings(Section):
    """The web UI."""

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(7860, ge=0, le=65535, description="0: any free port")
    feedback_file: str | None = Field(
        "feedback/feedback.jsonl", description="file for the feedback of users who consent; null: no feedback"
    )
    dicomweb: tuple[DicomWebServer, ...] = Field((), description="PACS that users may load images from")


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
        description="web sites that may call the APIs from a browser, e.g. https://app.example.org; *: all",
    )
    allowed_hosts: tuple[str, ...] = Field(
        (), description="further host names of servers on 127.0.0.1, through a proxy on this machine"
    )
    public_without_keys: bool = Field(False, description="true allows other machines to connect without API keys")


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
    key per line (``#`` begins a comment). Controller and workers share ``BABYDOCTOR_REGISTRATION_SECRET``.

    Raises:
        UserError: the file cannot be read, or a key is too short.
    """
    environment = os.environ if environment is None else environment
    keys = [key.strip() for key in environment.get(KEYS_VARIABLE, "").split(",")]
    if file := environment.get(KEYS_FILE_VARIABLE):
        try:
            lines = Path(file).read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise UserError(f"{KEYS_FILE_VARIABLE}={file}: cannot be read ({error.strerror}); check it") from None
        keys += [line.partition("#")[0].strip() for line in lines]
    secret = environment.get(SECRET_VARIABLE) or None
    keys = [key for key in keys if key]
    for name, value in [*((KEYS_VARIABLE, key) for key in keys), *([(SECRET_VARIABLE, secret)] if secret else [])]:
        if len(value) < MIN_SECRET_LENGTH or not value.isascii() or not value.isprintable():
            raise UserError(
                f"{name} holds a key of {len(value)} characters; a key has at least {MIN_SECRET_LENGTH} printable "
                "ASCII characters. Generate one with: python -c 'import secrets; print(secrets.token_urlsafe(32))'"
            )
    return Secrets(tuple(dict.fromkeys(keys)), secret)


def is_loopback(host: str) -> bool:
    """True if a server that listens on ``host`` can be reached only from this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_exposure(part: str, host: str, settings: ServeSettings, secrets: Secrets) -> None:
    """Refuse to accept connections from other machines without keys.

    Raises:
        UserError: ``host`` is reachable from outside and there are no API keys, or no registration secret.
    """
    if is_loopback(host):
        return
    if not secrets.api_keys and not settings.public_without_keys:
        raise UserError(
            f"{part}.host={host} can be reached from other machines, and no API keys are set: anyone could use the "
            f"model. Set {KEYS_VARIABLE} or {KEYS_FILE_VARIABLE}, listen on 127.0.0.1, or set "
            "public_without_keys=true if a proxy in front of it authenticates users"
        )
    if part == "controller" and not secrets.registration:
        raise UserError(
            f"controller.host={host} can be reached from other machines, and {SECRET_VARIABLE} is not set: anybody "
            "could register a worker and receive patients' images. Set it for the controller and for every worker"
        )
