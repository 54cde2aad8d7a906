"""roco-instruct from ROCO's files: which captions become rows, and what is reported about the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from babydoctor.data.rows import Sample, check_rows, load_rows
from babydoctor.data.sets import roco
from babydoctor.data.sets.roco import prepare_roco, prepare_roco_from_hub, read_articles, read_captions
from babydoctor.schema import UserError

QUESTION = "The following image is a radiology scan. Deeply analyze and diagnose this image.\n<image>"


def write_split(folder: Path, captions: dict[str, str], images: list[str], articles: dict[str, str]) -> Path:
    """A folder as ROCO's ``radiology``."""
    (folder / "images").mkdir(parents=True)
    (folder / "captions.txt").write_text("".join(f"ROCO_{k}\t {v}\n" for k, v in captions.items()), encoding="utf-8")
    lines = "".join(
        f"ROCO_{k},{v}_fig,1.jpg,CC BY\n" if "," in v else f"ROCO_{k},{v}_f.jpg,CC BY\n" for k, v in articles.items()
    )
    (folder / "licences.txt").write_text("ROCO_ID,PMC_ID,CC\n" + lines, encoding="utf-8")
    for name in images:
        Image.new("L", (8, 8), 9).save(folder / "images" / f"ROCO_{name}.jpg")
    return folder


def read(path: Path) -> list[dict]:
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


def test_a_row_is_kept_if_its_jpeg_exists(tmp_path: Path) -> None:
    captions = {"00002": " Ein é „scan“. ", "00007": "Gone.", "00011": "CT."}
    write_split(tmp_path / "roco" / "data" / "test" / "radiology", captions, ["00002", "00011", "00099"], {})
    made = prepare_roco(tmp_path / "roco", "test", tmp_path / "out")
    assert read(made.rows)[0] == {
        "id": "00002",
        "image": "ROCO_00002.jpg",
        "conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": "Ein é „scan“."}],
    }
    assert [row["id"] for row in read(made.rows)] == ["00002", "00011"]
    assert (made.num_rows, made.num_read, made.num_images, made.num_expected) == (2, 3, 2, 8_179)
    assert made.left_out == {"no_image": 1, "image_without_row": 1} and made.left_out_list is not None
    assert [(item["reason"], item["image"]) for item in read(made.left_out_list)] == [
        ("no_image", "ROCO_00007.jpg"),
        ("image_without_row", "ROCO_00099.jpg"),
    ]
    assert [path.name for path in sorted(made.images.iterdir())] == ["ROCO_00002.jpg", "ROCO_00011.jpg"]
    assert all(isinstance(result, Sample) for result in check_rows(load_rows(made.rows), made.images))


@pytest.mark.parametrize("copy", [True, False])
def test_splits_share_one_folder_of_images(tmp_path: Path, copy: bool) -> None:
    for split, name in (("train", "1"), ("test", "2")):
        write_split(tmp_path / "roco" / split / "radiology", {name: "CT.", "3": "MR."}, [name, "4"], {})
    for split in ("train", "test", "train"):  # may be repeated
        made = prepare_roco(tmp_path / "roco", split, tmp_path / "out", copy=copy)
    assert sorted(path.name for path in made.images.iterdir()) == ["ROCO_1.jpg", "ROCO_2.jpg"]
    original = tmp_path / "roco" / "train" / "radiology" / "images" / "ROCO_1.jpg"
    assert (made.images / "ROCO_1.jpg").samefile(original) != copy
    assert all(isinstance(result, Sample) for result in check_rows(load_rows(made.rows), made.images))


def test_rows_that_share_an_article_are_dropped(tmp_path: Path) -> None:
    captions = {"1": "A.", "2": "B.", "3": "C.", "4": "D."}
    write_split(tmp_path / "test", captions, list(captions), {"1": "PMC10", "2": "PMC11", "3": "PMC1"})
    train = write_split(tmp_path / "train" / "radiology", {"8": "E."}, ["8"], {"8": "PMC10"})
    validation = write_split(tmp_path / "validation" / "radiology", {"9": "F."}, ["9"], {"9": "PMC11"})
    once = prepare_roco(tmp_path / "test", "test", tmp_path / "a", disjoint_from=[train])
    assert [row["id"] for row in read(once.rows)] == ["2", "3"]
    both = prepare_roco(tmp_path / "test", "test", tmp_path / "b", disjoint_from=[train, validation.parent])
    assert [row["id"] for row in read(both.rows)] == ["3"]  # PMC1 is not PMC10
    assert both.left_out == {"article_shared": 2, "article_unknown": 1}


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no captions\.txt"):
        prepare_roco(tmp_path, "train", tmp_path / "out")
    with pytest.raises(UserError, match="'dev': must be one of train, validation, test"):
        prepare_roco(tmp_path, "dev", tmp_path / "out")
    folder = write_split(tmp_path / "train", {"1": "A."}, [], {})
    (folder / "captions.txt").write_text("ROCO_1\t A.\nROCO_2 no tab\n")
    with pytest.raises(UserError, match=r"captions\.txt:2"):
        list(read_captions(folder / "captions.txt"))
    (folder / "licences.txt").unlink()
    with pytest.raises(UserError, match=r"licences\.txt: no such file"):
        read_articles(folder)
    (folder / "images").rmdir()
    with pytest.raises(UserError, match="images: no such directory"):
        prepare_roco(tmp_path, "train", tmp_path / "out")


def test_the_real_validation_split(shared_dir: Path, tmp_path: Path) -> None:
    source = shared_dir / "data" / "roco"
    made = prepare_roco(source, "validation", tmp_path)
    assert made.num_read == made.num_expected == 8_180
    assert made.left_out == {"no_image": 8_178, "image_without_row": 1}
    assert [row["image"] for row in read(made.rows)] == ["ROCO_00027.jpg", "ROCO_00278.jpg"]
    assert read(made.rows)[0]["conversations"][1]["value"] == "Postoperative anteroposterior radiograph of the pelvis."

    folder = source / "validation" / "radiology"
    captions = dict(read_captions(folder / "captions.txt"))
    assert len(captions) == 8_180 and all(captions.values())
    assert max(map(len, captions.values())) == 1_979
    articles = read_articles(folder)
    assert articles.keys() == captions.keys()
    itself = prepare_roco(source, "validation", tmp_path / "itself", disjoint_from=[folder])
    assert itself.num_rows == 0 and itself.left_out["article_shared"] == 2


def test_the_hub_set_is_read_from_downloaded_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    source = write_split(tmp_path / "roco" / "validation" / "radiology", {"1": "A.", "2": "B."}, ["1"], {})
    rows = [roco.build_row("1", "A."), roco.build_row("2", "B.")]
    by_hand = tmp_path / "out" / "roco-instruct-65k" / "data"
    by_hand.mkdir(parents=True)
    datasets.Dataset.from_list(rows).to_parquet(by_hand / "validation-00000-of-00001.parquet")
    with pytest.raises(UserError, match="2 rows, published are 8,174"):
        prepare_roco_from_hub(source, "validation", tmp_path / "out")
    monkeypatch.setitem(roco.NUM_HUB_ROWS, "validation", 2)
    with pytest.raises(UserError, match="images come from the ROCO project"):
        prepare_roco_from_hub(None, "validation", tmp_path / "out")
    made = prepare_roco_from_hub(tmp_path / "roco", "validation", tmp_path / "out")
    assert read(made.rows) == rows[:1] and made.left_out == {"image_missing": 1}


def test_the_offline_error_of_the_hub_set_names_the_fix(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        prepare_roco_from_hub(None, "train", tmp_path)
    assert "huggingface.co/datasets/photonmz/roco-instruct-65k" in str(caught.value)
    assert str(tmp_path / "roco-instruct-65k") in str(caught.value)
