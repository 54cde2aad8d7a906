"""Every DICOM file that ships with the installed packages, against Debian's ``dcmtk`` under the same window.

``scripts/test.sh`` installs dcmtk if it can. The tables below list each difference with its reason.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image

from babydoctor.imaging.dicom import DicomImage, read_dicom, render
from babydoctor.imaging.limits import ImageError

pytestmark = [
    pytest.mark.skipif(shutil.which("dcm2pnm") is None, reason="dcm2pnm is not installed (apt-get install dcmtk)"),
    pytest.mark.filterwarnings("ignore"),  # pydicom warns about invalid values in its own test files
]

PACKAGES = Path(pydicom.__file__).parents[1]
TOOLS = ("dcm2pnm", "dcmj2pnm", "dcml2pnm")  # the last two add JPEG and JPEG-LS

# File -> (largest difference in gray levels, why it may differ by more than 1).
DIFFERENCES: dict[str, tuple[int, str]] = {
    "JPGExtended.dcm": (2, "lossy JPEG: the inverse DCT of libjpeg and dcmtk rounds differently"),
    "SC_rgb_dcmtk_+eb+cy+n1.dcm": (2, "lossy JPEG, converted from YBR after rounding"),
    "SC_rgb_dcmtk_+eb+cy+np.dcm": (2, "lossy JPEG, converted from YBR after rounding"),
    "SC_rgb_jpeg_lossy_gdcm.dcm": (2, "lossy JPEG, converted from YBR after rounding"),
    "examples_ybr_color.dcm": (3, "lossy JPEG, converted from YBR after rounding"),
}

# File -> why dcmtk cannot show its picture. No free dcmtk supports JPEG 2000.
NOT_IN_DCMTK: dict[str, str] = {
    "SC_rgb_jpeg.dcm": "written in implicit VR against its transfer syntax, which dcmtk trusts",
}

# File with pixels that are refused here -> (words of the error, why).
REFUSED: dict[str, tuple[str, str]] = {
    "JPEG-lossy.dcm": (
        "cannot be decoded",
        "its scan header breaks the JPEG standard; libjpeg refuses, dcmtk does not",
    ),
    "JPEG2000-embedded-sequence-delimiter.dcm": (
        "inside, the DICOM header says",
        "made to test parsing; not decodable",
    ),
    "MR_truncated.dcm": ("cut off", "the last bytes of the only frame are missing"),
    "badVR.dcm": ("NumberOfFrames", "says how many frames it holds with letters"),
    "meta_missing_tsyntax.dcm": ("no size", "a stub without rows and columns"),
    "nested_priv_SQ.dcm": ("no size", "a stub without rows and columns"),
}


def dicom_files() -> list[Path]:
    """Files with the DICOM prefix or suffix in all installed packages."""
    found = []
    for path in sorted(PACKAGES.rglob("*")):
        if path.suffix in (".py", ".pyc", ".so") or not path.is_file():
            continue
        with path.open("rb") as file:
            if file.read(132)[128:] == b"DICM" or path.suffix == ".dcm":
                found.append(path)
    return found


def dcmtk(path: Path, frame: int, window: list[str], folder: Path) -> np.ndarray | None:
    """dcmtk's picture ``[h, w, 3]`` without overlays and scaling; None if none of its tools reads the file."""
    target = folder / "dcmtk.pnm"
    for tool in TOOLS:
        target.unlink(missing_ok=True)
        command = [tool, "-q", "-O", "-S", "+F", str(frame + 1), "+op", *window, str(path), str(target)]
        subprocess.run(command, capture_output=True, check=False, timeout=120)
        if target.exists():
            return np.asarray(Image.open(target).convert("RGB")).astype(int)
    return None


def same_window(dicom: DicomImage) -> tuple[dict[str, Any], list[str]]:
    """Arguments that give both programs the same window."""
    if not dicom.is_gray:
        return {}, []
    if dicom.windows:
        return {}, ["+Wi", "1"]
    if dicom.dataset.get("VOILUTSequence"):
        return {}, ["+Wl", "1"]
    return {"center": 100.0, "width": 300.0}, ["+Ww", "100", "300"]


def test_every_installed_file_looks_the_same_in_dcmtk(tmp_path: Path) -> None:
    unexplained: list[str] = []
    num_compared = num_without_image = 0
    for path in dicom_files():
        try:
            dicom = read_dicom(path)
            options, window = same_window(dicom)
            for frame in sorted({0, dicom.num_frames - 1}):
                shown = np.asarray(render(dicom, frame, **options, square_pixels=False)).astype(int)
                expected = dcmtk(path, frame, window, tmp_path)
                if expected is None:
                    is_jpeg2000 = dicom.layout.transfer_syntax.startswith("1.2.840.10008.1.2.4.9")
                    if not is_jpeg2000 and path.name not in NOT_IN_DCMTK:
                        unexplained.append(f"{path.name}: dcmtk does not read it")
                    continue
                allowed = DIFFERENCES.get(path.name, (1, ""))[0]
                worst = int(np.abs(shown - expected).max()) if shown.shape == expected.shape else 256
                if worst > allowed:
                    unexplained.append(f"{path.name} frame {frame}: differs by up to {worst}")
                num_compared += 1
        except ImageError as error:
            if error.code == "dicom_without_image":
                num_without_image += 1
                if dcmtk(path, 0, [], tmp_path) is not None:
                    unexplained.append(f"{path.name}: dcmtk finds an image")
            elif path.name not in REFUSED or REFUSED[path.name][0] not in str(error):
                unexplained.append(f"{path.name}: {error.code}: {error}")
    assert unexplained == []
    assert num_compared >= 60 and num_without_image >= 20, (num_compared, num_without_image)
