"""Figures of articles with captions: ROCOv2, PMC-OA and PMC-15M from small files in their published layouts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.data_sets import good_rows, run_data, save_image

from babydoctor.data.sets.pmc import prepare_pmc
from babydoctor.data.sets.rocov2 import prepare_rocov2
from babydoctor.schema import UserError


@pytest.fixture
def rocov2(tmp_path: Path) -> Path:
    source = tmp_path / "rocov2"
    captions = {
        "train": ['ROCOv2_2023_train_000001,"Axial CT, chest. CC BY [Doe et al. (2019)]"'],
        "valid": ["ROCOv2_2023_valid_000001,MRI."],
        "test": [
            'ROCOv2_2023_test_000001,"A ""target"" sign,\nin two lines."',
            "ROCOv2_2023_test_000002,Gone.",
            "ROCOv2_2023_test_000003,",
            "ROCOv2_2023_test_000004,X-ray.",
        ],
    }
    articles = ["train_000001,PMC10", "valid_000001,PMC11", "test_000001,PMC1", "test_000004,PMC10"]
    for split, lines in captions.items():
        (source / split).mkdir(parents=True)
        (source / f"{split}_captions.csv").write_text("ID,Caption\n" + "\n".join(lines) + "\n")
        (source / f"{split}_concepts.csv").write_text("ID,CUIs\n")
    for name in ("train_000001", "valid_000001", "test_000001", "test_000003", "test_000004", "test_000005"):
        save_image(source / name.partition("_")[0] / f"ROCOv2_2023_{name}.jpg")
    licenses = "".join(f"ROCOv2_2023_{line},https://example.org\n" for line in articles)
    (source / "license_information.csv").write_text("ID,PMCID,Link\n" + licenses)
    return source


def test_rocov2_from_csv(rocov2: Path, tmp_path: Path) -> None:
    options = ("--release", "v2", "--source", rocov2, "--split", "test", "--disjoint-from", "train")
    assert "test.json: 1 rows, 1 images" in run_data("roco", *options, "--out", tmp_path / "command")
    made = prepare_rocov2(rocov2, "test", tmp_path / "out")
    assert [(row["id"], row["conversations"][1]["value"]) for row in good_rows(made)] == [
        ("ROCOv2_2023_test_000001", 'A "target" sign, in two lines.'),
        ("ROCOv2_2023_test_000004", "X-ray."),
    ]
    assert made.left_out == {"no_image": 1, "no_caption": 1, "image_without_row": 1}
    assert (made.num_read, made.num_expected) == (4, 9_927)
    disjoint = prepare_rocov2(rocov2, "test", tmp_path / "disjoint", disjoint_from=["train", "validation"])
    assert [row["id"][-6:] for row in good_rows(disjoint)] == ["000001"] and disjoint.left_out["article_shared"] == 1
    validation = prepare_rocov2(rocov2, "validation", tmp_path / "out")  # the splits share a folder of images
    assert len(good_rows(validation)) == 1 and len(list(validation.images.iterdir())) == 3


def test_rocov2_that_is_not_as_published(rocov2: Path, tmp_path: Path) -> None:
    (rocov2 / "license_information.csv").write_text("ID,Link\nROCOv2_2023_train_000001,https://example.org\n")
    with pytest.raises(UserError, match=r"names no article .*\['ID', 'Link'\]"):
        prepare_rocov2(rocov2, "test", tmp_path / "out", disjoint_from=["train"])
    (rocov2 / "test_captions.csv").write_text("ID,Caption\nROCOv2_2023_test_000001,not quoted, so cut\n")
    with pytest.raises(UserError, match=r"test_captions\.csv:2: must be ID,Caption"):
        prepare_rocov2(rocov2, "test", tmp_path / "out")
    with pytest.raises(UserError, match=r"must have the columns ID and Caption; has \['name'\]"):
        (rocov2 / "test_captions.csv").write_text("name\n")
        prepare_rocov2(rocov2, "test", tmp_path / "out")


@pytest.fixture
def pmc_oa(tmp_path: Path) -> Path:
    """Four articles; PMC4 is in train and in test."""
    lines = {
        "train": ["PMC1_Fig1_0", "PMC1_Fig2_0", "PMC4_Fig1_1", "PMC1_Fig9_0"],
        "valid": ["PMC2_Fig1_0"],
        "test": ["PMC3_Fig1_0", "PMC4_Fig1_0"],
    }
    source = tmp_path / "pmc_oa"
    for split, names in lines.items():
        for name in names:
            caption = " A.  Real time\nimage. " if name != "PMC1_Fig2_0" else " "
            line = {"image": f"{name}.jpg", "caption": caption, "pmcid": name[:4], "url_name": "1471-2121-4-13-3.jpg"}
            save_image(source / "images" / f"{name}.jpg")
            with (source / f"{split}.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
    (source / "images" / "PMC1_Fig9_0.jpg").unlink()
    return source


def test_pmc_oa_keeps_its_splits_without_shared_articles(pmc_oa: Path, tmp_path: Path) -> None:
    train, validation, test = prepare_pmc(pmc_oa, tmp_path / "out")
    assert [row["id"] for row in good_rows(train)] == ["PMC1_Fig1_0"] and len(good_rows(validation)) == 1
    assert good_rows(test)[1]["conversations"][1]["value"] == "A. Real time image."
    assert train.left_out == {"no_caption": 1, "article_shared": 1, "image_missing": 1} and train.num_read == 4
    assert [row["id"] for row in good_rows(test)] == ["PMC3_Fig1_0", "PMC4_Fig1_0"]
    out = run_data("pmc", "--source", pmc_oa, "--out", tmp_path / "kept", "--keep-shared-articles")
    assert "train.json: 2 rows, 2 images" in out and "1 of its rows are of articles that another split has too" in out
    with (pmc_oa / "valid.jsonl").open("a") as file:
        file.write('{"image": "x.jpg", "caption": null, "pmcid": "PMC2"}\n')
    with pytest.raises(UserError, match=r"valid\.jsonl:2: caption is missing"):
        prepare_pmc(pmc_oa, tmp_path / "bad")
    assert not (tmp_path / "bad" / "train.json").exists()


def test_pmc_15m_is_split_by_article(tmp_path: Path) -> None:
    source = tmp_path / "pmc-15m"
    lines = []
    for article in range(30):
        figures = []
        for figure in ("F1", "F2"):
            image = f"PMC{article}/{figure}.jpg"
            save_image(source / image)
            reference = str(source / image) if figure == "F1" else image
            id = f"{article}_{figure}"
            figures.append({"fig_caption": "CT.", "fig_id": figure, "graphic_ref": reference, "pair_id": id})
        lines.append({"pmid": str(article), "pmc": str(article), "location": "x", "figures": figures})
    lines[0]["figures"] = [
        {"fig_caption": "CT.", "fig_id": "F1", "graphic_ref": None, "pair_id": "0_F1"},
        {"fig_caption": "CT.", "fig_id": "F2", "graphic_ref": "/etc/hostname", "pair_id": "0_F2"},
    ]
    (source / "pubmed_parsed_data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    splits = prepare_pmc(source, tmp_path / "out", hold_out=0.3)
    articles = [{row["id"].split("_")[0] for row in good_rows(split)} for split in splits]
    assert articles[1] and not articles[0] & articles[1] and len(articles[0] | articles[1]) == 29
    assert sum((split.left_out for split in splits[1:]), splits[0].left_out) == {"no_image": 1, "image_path": 1}
    [again] = prepare_pmc(source, tmp_path / "again")
    assert len(good_rows(again)) == 58
