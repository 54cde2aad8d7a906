"""Chest radiographs and their reports: MIMIC-CXR and IU X-ray from small files in their published layouts."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from helpers.data_sets import good_rows, run_data, save_image

from babydoctor.data.sets.files import PreparedSplit
from babydoctor.data.sets.iu_xray import prepare_iu_xray
from babydoctor.data.sets.mimic_cxr import prepare_mimic_cxr
from babydoctor.data.sets.reports import parse_sections
from babydoctor.schema import UserError

REPORT = "\n".join(
    (
        "                                 FINAL REPORT",
        " EXAMINATION:  CHEST (PA AND LAT)",
        " ",
        " INDICATION:  ___F with new onset ascites  // eval for infection",
        " ",
        " COMPARISON:  None.",
        " ",
        " FINDINGS: ",
        " ",
        " There is no focal consolidation, pleural effusion or",
        " pneumothorax.",
        " CHEST, PA AND LATERAL: The cardiomediastinal silhouette is normal.",
        " ",
        " IMPRESSION: ",
        " ",
        " No acute cardiopulmonary process. Compared to ___.",
        " ",
        " NOTIFICATION:  Dr. ___ was told.",
        "",
    )
)
FINDINGS = (
    "There is no focal consolidation, pleural effusion or pneumothorax. "
    "CHEST, PA AND LATERAL: The cardiomediastinal silhouette is normal."
)
IMPRESSION = "No acute cardiopulmonary process. Compared to ___."


def listed(split: PreparedSplit) -> list[tuple[str, str, str]]:
    assert split.left_out_list is not None
    items = map(json.loads, split.left_out_list.read_text().splitlines())
    return [(item["split"], item["id"], item["reason"]) for item in items]


def test_sections_of_a_report() -> None:
    assert parse_sections(REPORT) == {"findings": FINDINGS, "impression": IMPRESSION}
    assert parse_sections(" FINDINGS AND IMPRESSION:\n\n Clear.\n") == {"findings": "Clear."}
    assert parse_sections(" CONCLUSION: One.\n IMPRESSION:\n Two.\n") == {"impression": "One. Two."}
    assert parse_sections(" FINAL REPORT\n The lungs are clear.\n FINDINGS:\n \n TECHNIQUE: AP.\n") == {}


@pytest.fixture
def mimic(tmp_path: Path) -> Path:
    """PhysioNet's folder: patients p10000032 (train), p11000001 (validate), p11000002 (test)."""
    images = [
        ("d1", "50414267", "10000032", "train", "PA"),
        ("d2", "50414267", "10000032", "train", "LATERAL"),
        ("d3", "53189527", "10000032", "train", "AP"),
        ("d4", "53189528", "10000032", "train", "AP"),
        ("d5", "50000005", "11000001", "validate", "AP"),
        ("d6", "50000006", "11000002", "test", "PA"),
        ("d7", "50000007", "11000002", "train", "PA"),  # not so in the published list: a patient in two splits
        ("d8", "50000008", "10000033", "train", ""),
    ]
    source = tmp_path / "mimic-cxr-jpg"
    source.mkdir()
    with gzip.open(source / "mimic-cxr-2.0.0-split.csv.gz", "wt") as file:
        file.write("dicom_id,study_id,subject_id,split\n" + "".join(",".join(line[:4]) + "\n" for line in images))
    with gzip.open(source / "mimic-cxr-2.0.0-metadata.csv.gz", "wt") as file:
        file.write("dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,Columns\n")
        file.writelines(f'{d},{p},{s},"CHEST (PA, LAT)",{view},8,8\n' for d, s, p, _, view in images)
    for dicom, study, patient, _, _ in images:
        folder = source / "files" / f"p{patient[:2]}" / f"p{patient}"
        save_image(folder / f"s{study}" / f"{dicom}.jpg")
        (folder / f"s{study}.txt").write_text(REPORT)
    (source / "files/p10/p10000032/s53189527.txt").write_text(" FINAL REPORT\n Only text.\n")
    (source / "files/p10/p10000032/s53189528.txt").unlink()
    return source


def test_mimic_cxr_keeps_the_published_splits(mimic: Path, tmp_path: Path) -> None:
    options = ("--source", mimic, "--views", "all", "--section", "findings", "--out", tmp_path / "all")
    output = run_data("mimic-cxr", *options)
    assert "train.json: 3 rows, 3 images" in output and "this is not the full set" in output
    train, validation, test = prepare_mimic_cxr(mimic, tmp_path / "out")
    answer = f"Findings: {FINDINGS}\nImpression: {IMPRESSION}"
    question = "<image>\nWrite the findings and the impression of the radiology report of this chest radiograph."
    assert good_rows(train) == [
        {
            "id": "d1",
            "image": "p10/p10000032/s50414267/d1.jpg",
            "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
        }
    ]
    assert [row["id"] for row in good_rows(validation)] == ["d5"] and [row["id"] for row in good_rows(test)] == ["d6"]
    assert listed(train) == [
        *(("train", "d2", "other_view"), ("train", "d3", "no_section"), ("train", "d4", "no_report")),
        *(("train", "d7", "patient_shared"), ("train", "d8", "other_view")),
    ]
    assert (train.num_read, train.num_expected, train.left_out["other_view"]) == (6, 368_960, 2)
    assert "3 answers hold ___" in train.notes[0]


def test_mimic_cxr_sections_views_and_separate_reports(mimic: Path, tmp_path: Path) -> None:
    reports = tmp_path / "mimic-cxr" / "mimic-cxr-reports" / "files"
    for report in mimic.glob("files/*/*/*.txt"):
        (moved := reports / report.relative_to(mimic / "files")).parent.mkdir(parents=True, exist_ok=True)
        report.rename(moved)
    made = prepare_mimic_cxr(
        mimic, tmp_path / "out", reports=tmp_path / "mimic-cxr", section="impression", views=(), copy=True
    )
    assert [row["id"] for row in good_rows(made[0])] == ["d1", "d2", "d8"]
    assert {row["conversations"][1]["value"] for row in good_rows(made[0])} == {IMPRESSION}
    assert made[0].left_out == {"no_impression": 1, "no_report": 1, "patient_shared": 1}
    assert (made[0].images / "p10/p10000032/s50414267/d2.jpg").is_file() and not made[0].images.is_symlink()
    with pytest.raises(UserError, match="no reports"):
        prepare_mimic_cxr(mimic, tmp_path / "other")
    (mimic / "mimic-cxr-2.0.0-split.csv.gz").write_bytes(b"\x1f\x8b\x08cut")
    with pytest.raises(UserError, match=r"split\.csv\.gz: damaged or cut off"):
        prepare_mimic_cxr(mimic, tmp_path / "other", reports=tmp_path / "mimic-cxr")


OPEN_I = """<?xml version="1.0" encoding="utf-8"?>
<eCitation><meta type="rr"/><uId id="CXR{number}"/>
<MedlineCitation><Article><Abstract>
<AbstractText Label="COMPARISON">None.</AbstractText>
<AbstractText Label="INDICATION">Positive TB test</AbstractText>
<AbstractText Label="FINDINGS">{findings}</AbstractText>
<AbstractText Label="IMPRESSION">Normal chest &lt; 1 XXXX.</AbstractText>
</Abstract></Article></MedlineCitation>
<MeSH><major>normal</major></MeSH>
{images}
</eCitation>"""
PARENT_IMAGE = '<parentImage id="{id}"><figureId>F1</figureId><caption>Xray Chest PA</caption></parentImage>'


@pytest.fixture
def open_i(tmp_path: Path) -> Path:
    source = tmp_path / "open-i"
    (source / "ecgen-radiology").mkdir(parents=True)
    for number in range(1, 13):
        ids = [f"CXR{number}_IM-{number:04}-{view}001" for view in (1, 2)]
        findings = "" if number == 2 else "The lungs are clear."
        images = "" if number == 3 else "".join(PARENT_IMAGE.format(id=id) for id in ids)
        text = OPEN_I.format(number=number, findings=findings, images=images)
        (source / "ecgen-radiology" / f"{number}.xml").write_text(text)
        for id in ids:
            save_image(source / "NLMCXR_png" / f"{id}.png")
    (source / "NLMCXR_png" / "CXR4_IM-0004-2001.png").unlink()
    return source


def test_iu_xray_from_open_i(open_i: Path, tmp_path: Path) -> None:
    [train] = prepare_iu_xray(open_i, tmp_path / "out")
    found = good_rows(train)
    assert [row["image"] for row in found[:2]] == ["CXR1_IM-0001-1001.png", "CXR1_IM-0001-2001.png"]
    answers = [row["conversations"][1]["value"] for row in found]
    assert answers[0] == "Findings: The lungs are clear.\nImpression: Normal chest < 1 XXXX."
    assert answers[2] == "Impression: Normal chest < 1 XXXX."  # without findings
    assert listed(train) == [("train", "CXR3", "no_image"), ("train", "CXR4_IM-0004-2001", "image_missing")]
    assert "21 rows, 21 images" in run_data("iu-xray", "--source", open_i, "--out", tmp_path / "command")
    held = prepare_iu_xray(open_i, tmp_path / "held", section="findings", hold_out=0.4, first_image=True)
    train_rows, test_rows = (good_rows(split) for split in held)
    assert len(train_rows) + len(test_rows) == 10 and test_rows
    assert not {row["id"].split("_")[0] for row in train_rows} & {row["id"].split("_")[0] for row in test_rows}
    assert sum(split.left_out["no_findings"] for split in held) == 2
    with pytest.raises(UserError, match="not valid XML"):
        (open_i / "ecgen-radiology" / "5.xml").write_text("<eCitation>")
        prepare_iu_xray(open_i, tmp_path / "cut")


def test_iu_xray_with_the_splits_of_r2gen(tmp_path: Path) -> None:
    def entry(id: str) -> dict[str, Any]:
        return {"id": id, "report": "Clear lungs .\n", "image_path": [f"{id}/0.png", f"{id}/1.png"], "split": "x"}

    splits = {"train": ["CXR1_IM-0001", "CXR2_IM-0002", "CXR9_IM-1"], "val": ["CXR8_IM-0008"], "test": ["CXR9_IM-0009"]}
    annotation = {name: [entry(id) for id in ids] for name, ids in splits.items()}
    for id in (id for ids in splits.values() for id in ids):
        for number in (0, 1):
            save_image(tmp_path / "iu_xray" / "images" / id / f"{number}.png")
    (tmp_path / "iu_xray" / "annotation.json").write_text(json.dumps(annotation))
    train, validation, test = prepare_iu_xray(tmp_path / "iu_xray", tmp_path / "out")
    assert [row["id"] for row in good_rows(train)] == [f"CXR{n}_IM-000{n}/{view}" for n in (1, 2) for view in (0, 1)]
    assert good_rows(train)[0]["conversations"][1]["value"] == "Clear lungs ."
    assert (len(good_rows(validation)), len(good_rows(test)), train.left_out) == (2, 2, {"patient_shared": 2})
    with pytest.raises(UserError, match="--hold-out does not go with"):
        prepare_iu_xray(tmp_path / "iu_xray", tmp_path / "out", hold_out=0.1)
