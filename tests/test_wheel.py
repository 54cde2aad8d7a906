"""The wheel contains all files that the package needs at run time, and works outside the repository."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "babydoctor"

SERVE_PAGE = """
import asyncio, sys
import httpx
import babydoctor
from babydoctor.serve.page import html
from babydoctor.serve.page.app import build_page_app
from babydoctor.serve.page.session import Session

assert babydoctor.__file__.startswith(sys.argv[1]), babydoctor.__file__

async def main():
    transport = httpx.ASGITransport(build_page_app("http://127.0.0.1:1"))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        page = (await client.get("/")).text
        assert "Load an image" in page and "bd-examples" in page, page[:300]
        script = await client.get("/page/static/page.js")
        assert script.status_code == 200 and "export const restore" in script.text
        css = (await client.get("/page/static/page.css")).text
        assert "#bd-chat" in css and "bd-banner" in page
    assert "Research use only" in html.banner() and "Load an image" in html.chat(Session())
    assert "<style>" in html.export({"notice": "", "exported_at": "", "version": "", "image": {}}, [])

asyncio.run(main())
"""


@pytest.mark.slow
def test_a_wheel_installed_elsewhere_serves_the_web_ui(tmp_path: Path):
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    # A copy, because setuptools leaves a build folder in the source directory.
    copy = tmp_path / "source"
    copy.mkdir()
    files = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "babydoctor", "pyproject.toml", "*.md"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    ).stdout.split("\0")
    for name in [*filter(None, files), "LICENSE"]:
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", str(copy), "--no-deps", "--no-build-isolation", "-q", "-w", wheels]
    subprocess.run([*map(str, command), "--disable-pip-version-check"], check=True, timeout=300)
    (wheel,) = wheels.glob("babydoctor-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    kept = {path.relative_to(site) for path in (site / "babydoctor").rglob("*") if path.is_file()}
    needed = {
        path.relative_to(ROOT)
        for path in PACKAGE.rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".pyi") and "__pycache__" not in path.parts
    }
    assert needed <= kept, sorted(needed - kept)
    environment = {"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
    subprocess.run(
        [sys.executable, "-c", SERVE_PAGE, str(site)], check=True, timeout=300, cwd=tmp_path, env=environment
    )
