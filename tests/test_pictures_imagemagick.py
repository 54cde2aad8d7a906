"""Compare pictures with ImageMagick: those in the installed packages, and every format that it writes.

``scripts/test.sh`` installs ImageMagick if it can. A table lists each difference with its reason.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from babydoctor.imaging.containers import picture_format
from babydoctor.imaging.dicom import is_dicom
from babydoctor.imaging.limits import ImageError
from babydoctor.imaging.load import load_image

PACKAGES = Path(np.__file__).parents[1]


def imagemagick() -> str | None:
    for name in ("magick", "convert-im6.q16", "convert"):
        path = shutil.which(name)
        if path and b"ImageMagick" in subprocess.run([path, "-version"], capture_output=True, check=False).stdout[:40]:
            return path
    return None


MAGICK = imagemagick()
pytestmark = pytest.mark.skipif(MAGICK is None, reason="ImageMagick is not installed (apt-get install imagemagick)")

# Made with ImageMagick from one picture: name -> (arguments, file type).
KINDS: dict[str, tuple[list[str], str]] = {
    "PNG, interlaced": (["-interlace", "PNG"], "png"),
    "PNG, palette": (["-colors", "16"], "png8"),
    "PNG, two levels": (["-monochrome"], "png"),
    "PNG, 4-bit gray": (["-colorspace", "Gray", "-depth", "4"], "png"),
    "PNG, gray and alpha": (["-colorspace", "Gray", "-alpha", "on", "-channel", "A", "-evaluate", "set", "60%"], "png"),
    "PNG, alpha": (["-alpha", "on", "-channel", "A", "-evaluate", "set", "60%"], "png"),
    "PNG, 16-bit color": (["-depth", "16"], "png48"),
    "PNG, 16-bit color, interlaced": (["-depth", "16", "-interlace", "PNG"], "png48"),
    "PNG, 16-bit color and alpha": (["-depth", "16", "-alpha", "on"], "png64"),
    "PNG, 16-bit gray": (["-colorspace", "Gray", "-depth", "16"], "png"),
    "PNG, 16-bit gray and alpha": (["-colorspace", "Gray", "-depth", "16", "-alpha", "on"], "png"),
    "GIF": ([], "gif"),
    "GIF, interlaced": (["-interlace", "GIF"], "gif"),
    "BMP": ([], "bmp"),
    "BMP version 2": (["-type", "truecolor"], "bmp2"),
    "BMP, palette": (["-colors", "200"], "bmp3"),
    "BMP, run-length": (["-colors", "200", "-compress", "RLE"], "bmp3"),
    "BMP, two levels": (["-monochrome"], "bmp3"),
    "BMP, alpha": (["-alpha", "on", "-channel", "A", "-evaluate", "set", "60%"], "bmp"),
    "TIFF": (["-compress", "None"], "tiff"),
    "TIFF, LZW": (["-compress", "LZW"], "tiff"),
    "TIFF, Zip": (["-compress", "Zip"], "tiff"),
    "TIFF, run-length": (["-compress", "RLE"], "tiff"),
    "TIFF, tiles": (["-define", "tiff:tile-geometry=16x16"], "tiff"),
    "TIFF, separate planes": (["-interlace", "plane", "-compress", "None"], "tiff"),
    "TIFF, big endian": (["-endian", "MSB"], "tiff"),
    "TIFF, 64-bit offsets": ([], "tiff64"),
    "TIFF, palette": (["-type", "palette", "-colors", "50"], "tiff"),
    "TIFF, fax": (["-monochrome", "-compress", "Group4"], "tiff"),
    "TIFF, white is zero": (["-colorspace", "Gray", "-define", "quantum:polarity=min-is-white"], "tiff"),
    "TIFF, two levels, white is zero": (["-monochrome", "-define", "quantum:polarity=min-is-white"], "tiff"),
    "TIFF, 4-bit gray": (["-colorspace", "Gray", "-depth", "4"], "tiff"),
    "TIFF, alpha": (["-alpha", "on", "-channel", "A", "-evaluate", "set", "60%"], "tiff"),
    "TIFF, 16-bit gray": (["-colorspace", "Gray", "-depth", "16"], "tiff"),
    "TIFF, 16-bit gray, white is zero": (
        ["-colorspace", "Gray", "-depth", "16", "-define", "quantum:polarity=min-is-white"],
        "tiff",
    ),
    "TIFF, 16-bit color": (["-depth", "16"], "tiff"),
    "TIFF, 16-bit color, LZW, big endian": (["-depth", "16", "-compress", "LZW", "-endian", "MSB"], "tiff"),
    "TIFF, 16-bit color, planes": (["-depth", "16", "-interlace", "plane"], "tiff"),
    "TIFF, 16-bit color and alpha": (["-depth", "16", "-alpha", "on"], "tiff"),
    "TIFF, floats": (["-colorspace", "Gray", "-depth", "32", "-define", "quantum:format=floating-point"], "tiff"),
    "TIFF, 32-bit gray": (["-colorspace", "Gray", "-depth", "32"], "tiff"),
    "WebP, lossless": (["-define", "webp:lossless=true"], "webp"),
    "JPEG": (["-quality", "90"], "jpg"),
    "JPEG, progressive": (["-quality", "90", "-interlace", "JPEG"], "jpg"),
    "JPEG, gray": (["-quality", "90", "-colorspace", "Gray"], "jpg"),
}

# Kind -> (largest difference, why).
DIFFERENCES: dict[str, tuple[int, str]] = {
    "JPEG": (4, "the two libraries smooth subsampled colors differently"),
    "JPEG, progressive": (4, "the two libraries smooth subsampled colors differently"),
}

REFUSED: dict[str, str] = {
    "TIFF, 16-bit color, planes": "Pillow reads bytes of separate wide planes as samples",
}


def run(*arguments: str, data: bytes = b"") -> bytes:
    assert MAGICK is not None
    done = subprocess.run([MAGICK, *arguments], input=data, capture_output=True, check=False, timeout=120)
    return done.stdout


def expected(data: bytes) -> np.ndarray | None:
    """ImageMagick's upright picture over black, uint16 ``[h, w, 3]``; None if it cannot read the file."""
    over_black = ("-auto-orient", "+set", "comment", "-background", "black", "-alpha", "remove", "-colorspace", "sRGB")
    shown = run("-[0]", *over_black, "-depth", "16", "-type", "truecolor", "ppm:-", data=data)
    fields = shown.split(maxsplit=4)[:4]
    if len(fields) < 4 or fields[0] != b"P6" or fields[3] != b"65535":
        return None
    width, height = int(fields[1]), int(fields[2])
    return np.frombuffer(shown[-6 * width * height :], ">u2").reshape(height, width, 3).astype(np.float64)


def test_every_installed_picture_looks_the_same_in_imagemagick() -> None:
    unexplained, seen = [], set[bytes]()
    for path in sorted(PACKAGES.rglob("*")):
        if path.suffix in (".py", ".pyc", ".so") or not path.is_file():
            continue
        with path.open("rb") as file:
            if picture_format(file.read(16)) is None:
                continue
        data = path.read_bytes()
        # Some DICOM files begin like a TIFF; JPEG-LS begins like a JPEG, and neither side reads it.
        if data in seen or is_dicom(data) or data.startswith(b"\xff\xd8\xff\xf7"):
            continue
        seen.add(data)
        theirs, ours = expected(data), np.asarray(load_image(data)).astype(float)
        if theirs is None or theirs.shape != ours.shape or np.abs(ours - theirs / 257).max() > 1.01:
            unexplained.append(str(path.relative_to(PACKAGES)))
    assert unexplained == [] and len(seen) >= 20


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_looks_the_same_in_imagemagick(kind: str, tmp_path: Path) -> None:
    arguments, suffix = KINDS[kind]
    source = tmp_path / "source.png"
    run("-size", "40x31", "gradient:red-blue", "-swirl", "200", "-modulate", "90", "-depth", "8", str(source))
    data = run(str(source), *arguments, f"{suffix}:-")
    assert picture_format(data) is not None, kind
    if kind in REFUSED:
        with pytest.raises(ImageError):
            load_image(data)
        return
    theirs = expected(data)
    assert theirs is not None
    ours = np.asarray(load_image(data)).astype(float)
    if "16-bit" in kind or "32-bit" in kind or "floats" in kind:
        low, high = np.percentile(theirs, [0.5, 99.5])
        theirs = np.clip((theirs - low) / (high - low), 0, 1) * 65535
    worst = np.abs(ours - theirs / 257).max()
    assert worst <= DIFFERENCES.get(kind, (1.01, ""))[0], f"{kind} differs by {worst:.1f}"
