"""LCS-558K and LLaVA-Instruct-80K from files in a folder, and downloads that continue."""

from __future__ import annotations

import http.server
import io
import json
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from babydoctor.data.sets.files import gather_images, link_folder, unpack_zip
from babydoctor.data.sets.hub import NUM_TRIES, download_url
from babydoctor.data.sets.instruct import download_instruct, prepare_instruct
from babydoctor.data.sets.lcs import download_lcs, prepare_lcs
from babydoctor.schema import UserError


def jpeg() -> bytes:
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "JPEG")
    return file.getvalue()


def row(id: str, image: str, answer: str = "a dog") -> dict[str, Any]:
    turns = [{"from": "human", "value": "Describe it.\n<image>"}, {"from": "gpt", "value": answer}]
    return {"id": id, "image": image, "conversations": turns}


def write_zip(path: Path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def test_lcs_from_its_archive_or_unpacked(tmp_path: Path) -> None:
    rows = [row("004539375", "00453/004539375.jpg"), row("2", "00002/gone.jpg"), row("3", "00453/3.jpg", "")]
    names = ("00453/004539375.jpg", "00453/3.jpg")
    for index, kind in enumerate(("zip", "images", "in place")):
        source = tmp_path / str(index)
        source.mkdir()
        (source / "blip_laion_cc_sbu_558k.json").write_text(json.dumps(rows))
        if kind == "zip":
            write_zip(source / "images.zip", {name: jpeg() for name in names})
        else:
            for name in names:
                place = source / ("images" if kind == "images" else ".") / name
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(jpeg())
        made = prepare_lcs(source, tmp_path / f"out-{index}")
        assert json.loads(made.rows.read_text()) == rows[:1]
        assert (made.num_rows, made.num_read, made.num_images, made.num_expected) == (1, 3, 1, 558_128)
        assert made.left_out == {"image_missing": 1, "empty_answer": 1}
        assert (made.images / names[0]).is_file()
    with pytest.raises(UserError, match=r"holds no blip_laion_cc_sbu_558k\.json"):
        prepare_lcs(tmp_path, tmp_path / "out")


def test_a_folder_of_images_is_linked_once(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    assert link_folder(tmp_path / "a", tmp_path / "out").resolve() == tmp_path / "a"
    link_folder(tmp_path / "a", tmp_path / "out")
    with pytest.raises(UserError, match="already links to"):
        link_folder(tmp_path / "b", tmp_path / "out")
    with pytest.raises(UserError, match="links to"):
        gather_images(tmp_path / "b", tmp_path / "out", [], copy=True)
    gather_images(tmp_path / "b", tmp_path / "copied", [], copy=True)
    with pytest.raises(UserError, match="already holds images"):
        link_folder(tmp_path / "b", tmp_path / "copied")


def test_instruct_from_coco(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    text_only = {"id": "t", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    # LLaVA-Instruct names rows by picture, so several conversations share an id.
    rows = [row("1", "000000000001.jpg"), row("1", "000000000001.jpg", "a cat"), text_only]
    (source / "llava_instruct_80k.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match=r"neither train2017\.zip nor train2017/"):
        prepare_instruct(source, tmp_path / "out")
    write_zip(source / "train2017.zip", {"train2017/000000000001.jpg": jpeg(), "train2017/2.jpg": jpeg()})
    made = prepare_instruct(source, tmp_path / "out", copy=True)
    assert json.loads(made.rows.read_text()) == rows and not made.left_out and made.num_images == 1
    assert [path.name for path in made.images.iterdir()] == ["000000000001.jpg"]


def test_unpacking_continues_where_it_stopped_and_stays_in_its_folder(tmp_path: Path) -> None:
    write_zip(tmp_path / "a.zip", {"d/one.txt": b"one", "d/two.txt": b"two!"})
    (tmp_path / "out" / "d").mkdir(parents=True)
    (tmp_path / "out" / "d" / "one.txt").write_bytes(b"ONE")  # same size: taken as done
    (tmp_path / "out" / "d" / "two.txt").write_bytes(b"tw")  # cut off: unpacked again
    unpack_zip(tmp_path / "a.zip", tmp_path / "out")
    assert (tmp_path / "out" / "d" / "one.txt").read_bytes() == b"ONE"
    assert (tmp_path / "out" / "d" / "two.txt").read_bytes() == b"two!"
    write_zip(tmp_path / "evil.zip", {"../evil.txt": b"x"})
    with pytest.raises(UserError, match="would be unpacked outside"):
        unpack_zip(tmp_path / "evil.zip", tmp_path / "out")
    (tmp_path / "cut.zip").write_bytes((tmp_path / "a.zip").read_bytes()[:40])
    with pytest.raises(UserError, match="damaged"):
        unpack_zip(tmp_path / "cut.zip", tmp_path / "out")


def test_offline_downloads_explain_the_manual_steps(tmp_path: Path) -> None:
    for download, repo in ((download_lcs, "LLaVA-Pretrain"), (download_instruct, "LLaVA-Instruct-150K")):
        with pytest.raises(UserError) as caught:
            download(tmp_path)
        message = str(caught.value)
        assert f"huggingface.co/datasets/liuhaotian/{repo}" in message and str(tmp_path) in message
    (tmp_path / "blip_laion_cc_sbu_558k.json").write_text("[]")
    (tmp_path / "images.zip").touch()
    assert download_lcs(tmp_path) == tmp_path  # files that were copied by hand are not downloaded


CONTENT = bytes(range(256)) * 5000


class FileServer(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT with ranges. /cut stops half-way, and /norange does not support ranges."""

    ranges: list[str | None] = []  # noqa: RUF012

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.ranges.append(asked)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.path != "/norange" else 0
        if start >= len(CONTENT):
            self.send_error(416)
            return
        body = CONTENT[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if self.path == "/cut" else body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    FileServer.ranges.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), FileServer) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_an_interrupted_download_continues(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("babydoctor.data.sets.hub._RETRY_WAIT_S", 0)
    target, partial = tmp_path / "sub" / "file.bin", tmp_path / "sub" / "file.bin.partial"
    with pytest.raises(UserError, match="By hand"):
        download_url(f"{server}/cut", target)
    part = partial.stat().st_size
    assert len(FileServer.ranges) == NUM_TRIES and FileServer.ranges[1] == f"bytes={len(CONTENT) // 2}-"
    assert 0 < part < len(CONTENT) and not target.exists()
    download_url(f"{server}/whole", target)
    assert target.read_bytes() == CONTENT and not partial.exists()
    assert FileServer.ranges[NUM_TRIES:] == [f"bytes={part}-"]
    download_url(f"{server}/whole", target)
    assert len(FileServer.ranges) == NUM_TRIES + 1


def test_servers_without_ranges_and_finished_parts(server: str, tmp_path: Path) -> None:
    (tmp_path / "a.partial").write_bytes(b"something else")
    assert download_url(f"{server}/norange", tmp_path / "a").read_bytes() == CONTENT
    (tmp_path / "b.partial").write_bytes(CONTENT)
    assert download_url(f"{server}/whole", tmp_path / "b").read_bytes() == CONTENT
    with pytest.raises(UserError, match="the download failed"):
        download_url("http://127.0.0.1:9/none", tmp_path / "c")
