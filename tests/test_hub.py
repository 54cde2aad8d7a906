"""Downloads from a local hub with the real clients: what is fetched and resumed, and the error messages."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.hub_server import Hub, run_hub

ROWS = [
    {
        "id": str(index),
        "image": f"{index}.jpg",
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}],
    }
    for index in range(2)
]
BABYDOCTOR = (sys.executable, "-c", "from babydoctor.cli.main import main; main()")
LCS = "liuhaotian/LLaVA-Pretrain"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with run_hub() as running:
        yield running


def environment(hub: Hub, home: Path) -> dict[str, str]:
    return os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(home),
        "NO_PROXY": "127.0.0.1,localhost",
    }


def run(hub: Hub, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*BABYDOCTOR, *arguments]
    return subprocess.run(command, env=environment(hub, home), capture_output=True, text=True, timeout=300)


def run_python(hub: Hub, home: Path, code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment(hub, home) | variables, capture_output=True, text=True, timeout=300)


def zip_of_images(folder: Path) -> bytes:
    import zipfile

    from PIL import Image

    path = folder / "made.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for index in range(2):
            Image.effect_noise((128, 128), 80).save(folder / "made.jpg", quality=95)
            archive.write(folder / "made.jpg", f"{index}.jpg")
    return path.read_bytes()


def add_lcs(hub: Hub, folder: Path) -> bytes:
    archive = zip_of_images(folder)
    files = {"blip_laion_cc_sbu_558k.json": json.dumps(ROWS).encode(), "images.zip": archive}
    hub.add("datasets", LCS, files)
    return archive


def one_sentence(done: subprocess.CompletedProcess[str]) -> str:
    """The message of a failed command: no traceback, a few lines at most."""
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr, done.stderr
    return " ".join(done.stderr.split())


def test_a_killed_download_continues_where_it_stopped(hub: Hub, tmp_path: Path) -> None:
    archive = add_lcs(hub, tmp_path)
    half = len(archive) // 2
    hub.hold_after["images.zip"] = half
    out = tmp_path / "out"
    command = [*BABYDOCTOR, "data", "lcs", "--download", "--out", str(out)]
    process = subprocess.Popen(command, env=environment(hub, tmp_path / "home"), stderr=subprocess.PIPE)
    partial = out / "download" / "images.zip.partial"
    deadline = time.monotonic() + 300
    while not (partial.is_file() and partial.stat().st_size == half):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    hub.release.set()
    hub.hold_after.clear()
    done = run(hub, tmp_path / "home", "data", "lcs", "--download", "--out", str(out))
    # The set is not the published one, which is reported after the rows are written.
    assert "2 rows were in the source, and 558,128 are published" in one_sentence(done)
    assert hub.downloads("images.zip") == [None, f"bytes={half}-"]
    assert (out / "download" / "images.zip").read_bytes() == archive
    assert sorted(path.name for path in (out / "download").iterdir()) == sorted(
        ["blip_laion_cc_sbu_558k.json", "images", "images.zip", "sources.json"]
    )
    assert len(json.loads((out / "train.json").read_text())) == 2
    assert json.loads((out / "sources.json").read_text()) == {f"datasets/{LCS}": hub.repos[0].commit}


def test_a_download_continues_after_a_broken_connection(hub: Hub, tmp_path: Path) -> None:
    archive = add_lcs(hub, tmp_path)
    hub.cut_after["images.zip"] = len(archive) // 3
    done = run(hub, tmp_path / "home", "data", "lcs", "--download", "--out", str(tmp_path / "out"))
    assert "558,128 are published" in one_sentence(done)
    third = len(archive) // 3
    assert hub.downloads("images.zip")[:3] == [None, f"bytes={third}-", f"bytes={2 * third}-"]
    assert (tmp_path / "out" / "download" / "images.zip").read_bytes() == archive


def test_a_file_that_changed_on_the_hub_is_fetched_again(hub: Hub, tmp_path: Path) -> None:
    archive = add_lcs(hub, tmp_path)
    folder = tmp_path / "out" / "download"
    folder.mkdir(parents=True)
    (folder / "images.zip.partial").write_bytes(b"of an older version")
    (folder / "images.zip.partial.version").write_text("0" * 64)
    run(hub, tmp_path / "home", "data", "lcs", "--download", "--out", str(tmp_path / "out"))
    assert hub.downloads("images.zip") == [None]
    assert (folder / "images.zip").read_bytes() == archive


def test_failures_are_one_sentence_with_a_fix(hub: Hub, tmp_path: Path) -> None:
    home = tmp_path / "home"

    def fetch(out: str) -> str:
        return one_sentence(run(hub, home, "data", "lcs", "--download", "--out", str(tmp_path / out)))

    message = fetch("absent")
    assert f"{LCS}/blip_laion_cc_sbu_558k.json: the hub has no data set of this name, or it is private" in message
    assert "By hand: download " in message and "check the spelling" in message

    archive = add_lcs(hub, tmp_path)
    hub.cut_after["images.zip"] = 0
    message = fetch("cut")
    assert "images.zip" in message or "/blobs/" in message
    assert "the download failed" in message and "run this again" in message
    hub.cut_after.clear()

    hub.announced_size["images.zip"] = 10**17
    message = fetch("full")
    assert "images.zip" in message and "100000000.0 GB more are needed" in message and "GB free" in message
    hub.announced_size.clear()

    folder = tmp_path / "really-full" / "download"
    folder.mkdir(parents=True)
    (folder / "images.zip.partial").symlink_to("/dev/full")
    message = fetch("really-full")
    assert "images.zip" in message and "free some space and run this again to resume" in message

    hub.spoiled.add("images.zip")
    message = fetch("spoiled")
    assert "the download is damaged" in message and "run this again" in message
    assert not (tmp_path / "spoiled" / "download" / "images.zip").exists()
    hub.spoiled.clear()

    folder = tmp_path / "cut-zip" / "download"
    folder.mkdir(parents=True)
    (folder / "images.zip").write_bytes(archive[: len(archive) // 2])
    message = fetch("cut-zip")
    assert f"{folder / 'images.zip'}: is damaged or cut off" in message and "download it again" in message

    del hub.repos[0].files["images.zip"]
    message = fetch("no-file")
    assert f"{LCS}/images.zip: this data set has no file 'images.zip'" in message

    hub.repos[0].gated = True
    message = fetch("gated")
    assert "is gated; ask for access at" in message and "`hf auth login`" in message


MODEL_CODE = """
import sys
from babydoctor.hub import model_commit, model_directory
from babydoctor.schema import UserError
try:
    directory = model_directory(sys.argv[1] if len(sys.argv) > 1 else "owner/model", weights=%s)
    print(model_commit("owner/model"), *sorted(path.name for path in directory.iterdir()))
except UserError as error:
    print(error)
"""


def test_models_come_as_safetensors_without_their_duplicates(hub: Hub, tmp_path: Path) -> None:
    weights = bytes(range(256)) * 8
    files = {
        "config.json": b"{}",
        "tokenizer.model": b"t",
        "README.md": b"r",
        "model-00001-of-00001.safetensors": weights,
        "model.safetensors.index.json": b"{}",
        "pytorch_model-00001-of-00001.bin": weights[::-1],
        "pytorch_model.bin.index.json": b"{}",
        "mm_projector.bin": b"p",
        "onnx/model.bin": weights,
    }
    repo = hub.add("models", "owner/model", files)
    home = tmp_path / "home"
    listed = (
        "config.json mm_projector.bin model-00001-of-00001.safetensors model.safetensors.index.json tokenizer.model"
    )
    assert run_python(hub, home, MODEL_CODE % "True").stdout.strip() == f"{repo.commit} {listed}"
    assert not hub.downloads("pytorch_model-00001-of-00001.bin") and not hub.downloads("README.md")
    offline = run_python(hub, home, MODEL_CODE % "True", HF_HUB_OFFLINE="1")
    assert offline.stdout.strip() == f"{repo.commit} {listed}"

    tokenizer_only = run_python(hub, tmp_path / "other", MODEL_CODE % "False")
    assert tokenizer_only.stdout.split()[1:] == ["config.json", "model.safetensors.index.json", "tokenizer.model"]

    for name in [name for name in files if "safetensors" in name]:
        del files[name]
    bin_only = run_python(hub, tmp_path / "third", MODEL_CODE % "True").stdout
    assert "pytorch_model-00001-of-00001.bin" in bin_only


def test_unavailable_models_are_named(hub: Hub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    message = run_python(hub, home, MODEL_CODE % "True").stdout.strip()
    assert (
        message.startswith("owner/model: the hub has no model of this name, or it is private") and "401" not in message
    )
    message = run_python(hub, home, MODEL_CODE % "True", HF_HUB_OFFLINE="1").stdout.strip()
    assert message.startswith("owner/model: not in the local cache, and HF_HUB_OFFLINE=1")
    message = run_python(hub, home, MODEL_CODE.replace('"owner/model",', '"a/b/c",') % "True").stdout.strip()
    assert message.startswith("a/b/c: neither a directory here nor the id of a model")
    hub.add("models", "owner/model", {"config.json": b"{}"}, gated=True)
    message = run_python(hub, home, MODEL_CODE % "True").stdout.strip()
    assert message == (
        f"owner/model: this model is gated; ask for access at {hub.url}/owner/model, then log in with `hf auth login`"
    )


PARTS_CODE = """
from babydoctor.config import build_config
from babydoctor.data.tokens import load_tokenizer
from babydoctor.imaging.preprocess import ImageSettings
from babydoctor.interop.llava_source import open_source
from babydoctor.model.families import load_language_config, load_vision_config
from babydoctor.plan.model import describe_model
from babydoctor.schema import UserError
models = {"language_model": "owner/model", "vision_tower": "owner/model"}
config = build_config({"name": "a", "output_dir": "b", "model": models, "data": {"rows": ["c"]}})
for part in (
    lambda: load_language_config("owner/model"),
    lambda: load_tokenizer("owner/model"),
    lambda: load_vision_config("owner/model"),
    lambda: ImageSettings.from_processor_dir("owner/model", "pad"),
    lambda: describe_model(config),
    lambda: open_source("owner/model", None, None),
):
    try:
        part()
    except UserError as error:
        print(error)
"""


def test_every_reader_of_a_model_gives_the_reason(hub: Hub, tmp_path: Path) -> None:
    hub.add("models", "owner/model", {"config.json": b"{}"}, gated=True)
    done = run_python(hub, tmp_path / "home", PARTS_CODE)
    reason = f"owner/model: this model is gated; ask for access at {hub.url}/owner/model, then log in with "
    assert done.stdout.splitlines() == [f"{reason}`hf auth login`"] * 6, done.stdout + done.stderr


def test_a_model_whose_download_breaks_is_named(hub: Hub, tmp_path: Path) -> None:
    hub.add("models", "owner/model", {"config.json": b"{}", "model.safetensors": bytes(5000)})
    hub.cut_after["model.safetensors"] = 0
    message = run_python(hub, tmp_path / "home", MODEL_CODE % "True").stdout.strip()
    assert message.startswith("owner/model: the download failed (") and message.endswith("run this again")


def test_unavailable_data_sets_are_named(hub: Hub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    arguments = ("data", "check", "owner/set", "--bad", str(tmp_path / "bad.jsonl"))
    assert "owner/set: the hub has no data set of this name" in one_sentence(run(hub, home, *arguments))
    hub.add("datasets", "owner/set", {"train.json": b"[]"}, gated=True)
    assert "owner/set: this data set is gated; ask for access at" in one_sentence(run(hub, home, *arguments))
    environment_offline = environment(hub, home) | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*BABYDOCTOR, *arguments], env=environment_offline, capture_output=True, text=True)
    assert "owner/set: not in the local cache, and HF_HUB_OFFLINE=1" in one_sentence(done)


def test_a_run_records_the_commits_of_its_models(hub: Hub, tiny_base: Path, tiny_rows: Path, tmp_path: Path) -> None:
    for name in ("llama", "clip"):
        hub.add("models", f"owner/{name}", {path.name: path.read_bytes() for path in (tiny_base / name).iterdir()})
    rows = tmp_path / "rows"
    shutil.copytree(tiny_rows, rows)
    (rows / "sources.json").write_text(json.dumps({"datasets/owner/set": "f" * 40}))
    config = tmp_path / "stage.yaml"
    config.write_text(
        f"""
name: tiny
output_dir: {tmp_path / "run"}
model: {{language_model: owner/llama, vision_tower: owner/clip, dtype: float32}}
data: {{rows: {rows / "rows.json"}, images: {rows / "images"}, max_length: 256, num_workers: 0}}
train: {{batch_size: 4, micro_batch_tokens: 512, max_steps: 1, num_sample_answers: 0}}
tracking: {{tensorboard: false}}
"""
    )
    done = run(hub, tmp_path / "home", "train", str(config))
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["hub_commits"] == {f"owner/{repo.name[6:]}": repo.commit for repo in hub.repos}
    assert manifest["data_versions"] == {"datasets/owner/set": "f" * 40}
