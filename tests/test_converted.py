"""The converted form of rows: the same samples, order, fingerprint and losses as the rows it was made from."""

from __future__ import annotations

import base64
import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
from helpers.image_files import plain_png
from helpers.training import build_settings, losses, unfinish

from babydoctor.bench.data import bench_data
from babydoctor.config import build_config
from babydoctor.data.convert import convert_rows
from babydoctor.data.converted import DIGESTS_FILE, ConvertedRows
from babydoctor.data.dataset_rows import EMBEDDED
from babydoctor.data.images import read_image
from babydoctor.data.rows import fingerprint, load_dataset_rows
from babydoctor.data.sources import iter_rows, read_embedded
from babydoctor.schema import Sample, UserError
from babydoctor.train.loop import train


def row(number: int, **more: Any) -> dict[str, Any]:
    question = f"<image>\nWhat is image {number}?" if "image" in more else f"What is {number}?"
    answer = {"from": "gpt", "value": f"Answer {number} ü"}
    return {"id": f"r{number}", "conversations": [{"from": "human", "value": question}, answer], **more}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes(plain_png(90))
    return folder


def content(samples: Any) -> list[Sample]:
    """Samples without their location, which differs."""
    return [replace(sample, source="", id="" if sample.id == sample.source else sample.id) for sample in samples]


def test_the_same_samples_and_fingerprint_by_index(tmp_path: Path, images: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("babydoctor.data.convert._BATCH_ROWS", 3)  # several batches
    monkeypatch.setattr("babydoctor.data.convert._SHARD_BYTES", 200)  # and several files
    rows = [row(n, **({"image": "a.png"} if n % 2 else {"system": "Be brief."})) for n in range(20)]
    del rows[4]["id"]
    source = write_rows(tmp_path / "rows.json", rows)
    before = load_dataset_rows(source, images)
    convert_rows([source], tmp_path / "out", images=images)
    after = load_dataset_rows(str(tmp_path / "out"), images)
    assert isinstance(after, ConvertedRows) and len(list((tmp_path / "out").glob("*.arrow"))) > 2
    assert content(after) == content(before) and after[-1].id == "r19" and after[4].id == f"{tmp_path}/out#4"
    assert content(after[3:20:5]) == content(before[3:20:5])
    assert fingerprint(after) == fingerprint(before)
    assert content(load_dataset_rows(iter_source(tmp_path / "out"), images)) == content(before)


def iter_source(folder: Path) -> str:
    """The same folder as a plain set of the ``datasets`` library, without our own files."""
    (folder / "converted.json").unlink()
    return str(folder)


def test_embedded_images_are_read_from_the_converted_form(tmp_path: Path, images: Path) -> None:
    url = "data:image/png;base64," + base64.b64encode(plain_png(7)).decode()
    source = write_rows(tmp_path / "rows.json", [row(0, image="a.png"), row(1, images=[url], image=None)])
    convert_rows([source], tmp_path / "out", images=images, embed_images=True)
    samples = load_dataset_rows(str(tmp_path / "out"), None)  # without an image folder
    assert [read_image(str(s.image), None).getpixel((0, 0)) for s in samples] == [(90, 0, 0), (7, 0, 0)]
    assert fingerprint(samples) == fingerprint(load_dataset_rows(source, images))


def test_bad_rows_are_refused_or_listed(tmp_path: Path, images: Path) -> None:
    source = write_rows(tmp_path / "rows.json", [row(0), row(1, image="gone.png"), row(0), row(2)])
    with pytest.raises(UserError, match=r"2 of 4 rows are bad(.|\n)*Nothing was written"):
        convert_rows([source], tmp_path / "out", images=images)
    assert not (tmp_path / "out").exists()
    done = convert_rows([source], tmp_path / "out", images=images, on_bad="quarantine")
    listed = [json.loads(line)["reason"] for line in (tmp_path / "out" / "bad.jsonl").read_text().splitlines()]
    assert listed == ["image_missing", "duplicate"] and done.num_rows == 2
    assert fingerprint(load_dataset_rows(str(tmp_path / "out"), images)) == fingerprint(
        load_dataset_rows(source, images, "quarantine")
    )
    with pytest.raises(UserError, match="exists already"):
        convert_rows([source], tmp_path / "out", images=images)


def test_converted_sets_are_joined_and_repeated_rows_found(tmp_path: Path) -> None:
    first = write_rows(tmp_path / "1.json", [row(0), row(1)])
    second = write_rows(tmp_path / "2.json", [row(2), row(1), row(3)])
    for number, source in enumerate((first, second), start=1):
        convert_rows([source], tmp_path / f"out{number}")
    folders = [str(tmp_path / "out1"), str(tmp_path / "out2")]
    with pytest.raises(UserError, match="1 of 5 rows are bad"):
        load_dataset_rows(folders, None)
    samples = load_dataset_rows(folders, None, "quarantine", tmp_path / "bad.jsonl")
    assert [sample.id for sample in samples] == ["r0", "r1", "r2", "r3"]
    assert fingerprint(samples) == fingerprint(load_dataset_rows([first, second], None, "quarantine"))
    assert json.loads((tmp_path / "bad.jsonl").read_text())["source"] == f"{folders[1]}#1"


def test_a_damaged_set_and_moved_images_are_refused(tmp_path: Path, images: Path) -> None:
    convert_rows([write_rows(tmp_path / "rows.json", [row(0, image="a.png")])], tmp_path / "out", images=images)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"data\.images"):
        load_dataset_rows(str(tmp_path / "out"), tmp_path / "empty")
    (tmp_path / "out" / DIGESTS_FILE).write_bytes(bytes(16))
    with pytest.raises(UserError, match="do not agree; convert the rows again"):
        load_dataset_rows(str(tmp_path / "out"), images)


def write_shard(path: Path, members: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as shard:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            shard.addfile(member, io.BytesIO(data))
    return str(path)


def test_webdataset_shards_are_read_in_place_and_converted(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    for number in range(4):
        text = json.dumps(row(number, image=f"{number}.png")).encode()
        write_shard(shards / f"{number}.tar", {f"x/{number}.json": text, f"x/{number}.png": plain_png(10 * number)})
    samples = load_dataset_rows(str(shards), None)
    convert_rows([shards], tmp_path / "out")
    for rows in (samples, load_dataset_rows(str(tmp_path / "out"), None)):
        assert [sample.id for sample in rows] == ["r0", "r1", "r2", "r3"]
        assert [read_image(str(s.image), None).getpixel((0, 0)) for s in rows] == [(v, 0, 0) for v in (0, 10, 20, 30)]
    assert fingerprint(samples) == fingerprint(load_dataset_rows(str(tmp_path / "out"), None))
    (tmp_path / "bad.tar").write_bytes((shards / "1.tar").read_bytes()[:700])
    with pytest.raises(UserError, match=r"bad\.tar.*cut off"):
        list(iter_rows(tmp_path / "bad.tar"))
    with pytest.raises(UserError, match=r"member \.mp3"):
        list(iter_rows(write_shard(tmp_path / "audio.tar", {"1.json": b"{}", "1.mp3": b""})))


def test_rows_at_a_url(tmp_path: Path) -> None:
    rows = [row(0), row(1)]
    fsspec.filesystem("memory").pipe("/rows.json", json.dumps(rows).encode())
    shard = write_shard(tmp_path / "1.tar", {"1.json": json.dumps(row(1)).encode(), "1.png": plain_png(3)})
    fsspec.filesystem("memory").pipe("/1.tar", Path(shard).read_bytes())
    assert [r for _, r in iter_rows("memory://rows.json")] == rows
    [(_, found)] = iter_rows("memory://1.tar")
    assert found["image"].startswith(f"{EMBEDDED}memory://1.tar#") and read_embedded(found["image"]) == plain_png(3)
    with pytest.raises(UserError, match=r"memory://none\.json: cannot be opened"):
        list(iter_rows("memory://none.json"))


def test_json_and_its_converted_form_train_to_bit_equal_losses(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    data = tiny_settings["data"]
    convert_rows(data["rows"], tmp_path / "out", images=Path(data["images"]))
    changed = {"rows": [str(tmp_path / "out")], "num_workers": 2}
    settings = build_settings(tiny_settings, tmp_path / "json", "instruct")
    train(build_config(settings))
    converted = settings | {"output_dir": str(tmp_path / "converted"), "data": settings["data"] | changed}
    train(build_config(converted))
    assert losses(tmp_path / "converted") == losses(tmp_path / "json")
    assert len(losses(tmp_path / "json")) == settings["train"]["max_steps"]


def test_a_run_continues_with_its_converted_rows(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    """The rows of a JSON run are converted between a kill and the resume."""
    settings = build_settings(tiny_settings, tmp_path / "run", "instruct")
    data = settings["data"]
    run = train(build_config(settings))
    whole, weights = losses(run), (run / "projector.safetensors").read_bytes()
    unfinish(run, last_step=4)

    rows = [row for _, row in iter_rows(data["rows"][0])]
    convert_rows([write_rows(tmp_path / "fewer.json", rows[1:])], tmp_path / "fewer", images=Path(data["images"]))
    with pytest.raises(UserError, match="restore the rows"):
        train(build_config(settings | {"data": data | {"rows": [str(tmp_path / "fewer")]}}), resume=True)

    convert_rows(data["rows"], tmp_path / "out", images=Path(data["images"]))
    train(build_config(settings | {"data": data | {"rows": [str(tmp_path / "out")]}}), resume=True)
    assert json.loads((run / "history.json").read_text())["resumes"][-1]["step"] == 4
    assert losses(run) == whole
    assert (run / "projector.safetensors").read_bytes() == weights


@pytest.mark.slow
def test_the_benchmark_measures_both_forms(tmp_path: Path) -> None:
    lines = bench_data(tmp_path, 300).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| JSON", "| converted"]
    assert all("| 300 |" in line and line.count(" MB") == 2 for line in lines[2:4])
