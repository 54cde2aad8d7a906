"""Chromium and the image viewer: real mouse, wheel, keys and touch. The canvas and the server must agree on pixels."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import requests
from helpers.serving import free_port, png, start, stop_all, wait_until
from helpers.study_files import ct_slice, zipped
from helpers.web_ui import (
    PATIENT,
    START_S,
    axe_violations,
    box_of,
    browser,
    enter,
    expect,
    load,
    needs_chromium,
    patient_dicom,
    switch_scheme,
    tab,
    visitor,
)
from PIL import Image
from pydicom.examples import get_path

pytestmark = [needs_chromium, pytest.mark.slow]

READ_CANVAS = """(region) => {
  const canvas = document.querySelector('#bd-canvas canvas');
  const [a, b, c, d, e, f] = canvas.dataset.matrix.split(',').map(Number);
  const at = (x, y) => [a * x + c * y + e, b * x + d * y + f];
  const [p, q] = [at(region[0], region[1]), at(region[2], region[3])];
  const [x, y] = [Math.min(p[0], q[0]), Math.min(p[1], q[1])];
  const [width, height] = [Math.abs(p[0] - q[0]), Math.abs(p[1] - q[1])];
  const {data} = canvas.getContext('2d').getImageData(x, y, width, height);
  return [width, height, Array.from(data)];
}"""


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The web UI without a controller, which the viewer does not need."""
    folder, port = tmp_path_factory.mktemp("viewer"), free_port()
    url = f"http://127.0.0.1:{port}"
    web = start(
        ["web", f"page.port={port}", "--controller", f"http://127.0.0.1:{free_port()}"], url, folder / "page.log"
    )
    wait_until(lambda: requests.get(f"{url}/healthz", timeout=2).ok, START_S, "the web UI")
    yield SimpleNamespace(page=web, folder=folder)
    stop_all([web])


def canvas(tab: Any) -> Any:
    return tab.locator("#bd-canvas canvas")


def settle(tab: Any) -> None:
    """Wait until the server renders what the canvas shows, and the canvas is drawn."""
    expect(tab.locator("#bd-canvas .bd-screen")).to_have_attribute("data-sync", "done")
    tab.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def open_image(tab: Any, data: bytes) -> None:
    figure, before = tab.locator("#bd-viewer [data-viewer]"), "{}"
    if figure.count():
        before = figure.get_attribute("data-viewer")
    load(tab, data)
    expect(figure).not_to_have_attribute("data-viewer", before)
    expect(canvas(tab)).to_have_attribute("data-shown", json.loads(figure.get_attribute("data-viewer"))["key"])
    expect(tab.locator("#bd-facts dl")).to_be_visible()
    settle(tab)


def middle(tab: Any) -> tuple[float, float]:
    canvas(tab).scroll_into_view_if_needed()
    box = box_of(canvas(tab))
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def drag(tab: Any, x: float, y: float, *, button: str = "left", start: tuple[float, float] = (0, 0)) -> None:
    """Drag by (x, y) from a point next to the middle, in CSS pixels."""
    mx, my = middle(tab)
    mx, my = mx + start[0], my + start[1]
    tab.mouse.move(mx, my)
    tab.mouse.down(button=button)
    tab.mouse.move(mx + x, my + y, steps=5)
    tab.mouse.up(button=button)


def key(tab: Any, name: str) -> None:
    canvas(tab).focus()
    tab.keyboard.press(name)


def sent(tab: Any) -> np.ndarray:
    """The image that the model receives, uint8 ``[rows, columns, 3]``."""
    url = tab.locator("#bd-viewer img").get_attribute("src")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB"))


def drawn(tab: Any, region: tuple[int, int, int, int]) -> np.ndarray:
    """The same part of the canvas at 1:1."""
    key(tab, "z")
    settle(tab)
    width, height, data = tab.evaluate(READ_CANVAS, list(region))
    return np.array(data, np.uint8).reshape(round(height), round(width), 4)[..., :3]


def caption(tab: Any) -> str:
    return tab.locator("#bd-viewer figcaption").inner_text()


def shown_window(tab: Any) -> tuple[float, float]:
    found = re.search(r"level (\S+), width (\S+)", tab.locator("#bd-canvas .where").inner_text())
    assert found is not None
    return float(found[1]), float(found[2])


def scale(tab: Any) -> float:
    settle(tab)
    matrix = [float(part) for part in canvas(tab).get_attribute("data-matrix").split(",")]
    return abs(matrix[0]) + abs(matrix[1])


WHOLE = (0, 0, 128, 128)


@pytest.mark.parametrize("changes", [{}, {"PhotometricInterpretation": "MONOCHROME1"}])
def test_the_canvas_shows_what_the_model_gets(tab, changes: dict[str, str]):
    enter(tab)
    open_image(tab, patient_dicom(WindowCenter=100, WindowWidth=700, **changes))
    assert (drawn(tab, WHOLE) == sent(tab)).all()
    # Level and width by the mouse; the controls follow.
    drag(tab, 60, -40)
    settle(tab)
    center, width = shown_window(tab)
    assert center < 100 and width > 700
    expect(tab.locator("#bd-center input[type=number]")).to_have_value(f"{center:g}")
    expect(tab.locator("#bd-width input[type=number]")).to_have_value(f"{width:g}")
    assert f"level {center:g}, width {width:g}" in caption(tab)
    assert (drawn(tab, WHOLE) == sent(tab)).all()
    # Inversion, mirroring, turns.
    for name, said in (("i", "inverted"), ("h", "flipped"), ("t", "rotated 90°"), ("v", "rotated"), ("t", "rotated")):
        key(tab, name)
        settle(tab)
        assert said in caption(tab)
        assert (drawn(tab, WHOLE) == sent(tab)).all(), (name, caption(tab))
    # A region.
    tab.get_by_role("button", name="Ask about a region").click()
    drag(tab, 40, 30, start=(-30, -20))
    settle(tab)
    found = re.search(r"region of (\d+) × (\d+) pixels from column (\d+), row (\d+)", caption(tab))
    assert found is not None
    wide, high, left, top = map(int, found.groups())
    region = (left - 1, top - 1, left - 1 + wide, top - 1 + high)
    assert sent(tab).shape[:2] in ((wide, high), (high, wide)) and wide < 100
    assert (drawn(tab, region) == sent(tab)).all()
    tab.get_by_role("button", name="Whole image").click()
    settle(tab)
    assert sent(tab).shape[:2] == (128, 128)
    # A double click resets everything.
    tab.mouse.dblclick(*middle(tab))
    settle(tab)
    assert shown_window(tab) == (100, 700) and "inverted" not in caption(tab) and "rotated" not in caption(tab)


def test_the_controls_and_the_canvas_stay_in_sync(tab):
    enter(tab)
    open_image(tab, patient_dicom())
    expect(tab.locator("#bd-preset input")).to_have_value("soft-tissue")
    tab.get_by_label("Window", exact=True).click()
    tab.get_by_role("option", name="lung").click()
    expect(tab.locator("#bd-canvas .where")).to_contain_text("level -600, width 1500")
    assert (drawn(tab, WHOLE) == sent(tab)).all()
    number = tab.locator("#bd-width input[type=number]")
    number.fill("321")
    expect(tab.locator("#bd-canvas .where")).to_contain_text("level -600, width 321")
    key(tab, "5")
    expect(tab.locator("#bd-canvas .where")).to_contain_text("level 40, width 80")
    expect(tab.locator("#bd-preset input")).to_have_value("brain")
    expect(number).to_have_value("80")
    key(tab, "0")
    settle(tab)
    assert (drawn(tab, WHOLE) == sent(tab)).all()
    expect(tab.locator("#bd-preset input")).to_have_value("automatic")


def test_zoom_move_values_and_ruler(tab):
    enter(tab)
    open_image(tab, patient_dicom())
    key(tab, "f")
    fitting = scale(tab)
    tab.mouse.move(*middle(tab))
    tab.keyboard.down("Control")
    tab.mouse.wheel(0, -300)
    tab.keyboard.up("Control")
    expect(tab.locator("#bd-canvas .where")).not_to_contain_text(f"{fitting:.0%}")
    larger = scale(tab)
    assert larger > 1.5 * fitting
    drag(tab, 0, 50, button="right")
    assert scale(tab) > larger
    before = canvas(tab).get_attribute("data-matrix").split(",")
    drag(tab, 20, 10, button="middle")
    settle(tab)
    after = canvas(tab).get_attribute("data-matrix").split(",")
    assert [round(float(a) - float(b)) for a, b in zip(after[4:], before[4:], strict=True)] == [20, 10]
    key(tab, "f")
    assert scale(tab) == fitting
    # The value under the pointer, as pydicom reads it.
    import pydicom

    dataset = pydicom.dcmread(get_path("ct"))
    key(tab, "z")
    settle(tab)
    tab.mouse.move(*middle(tab))
    found = re.fullmatch(r"column (\d+), row (\d+): (\S+) HU", tab.locator("#bd-canvas .value").inner_text())
    assert found is not None
    column, row, value = int(found[1]), int(found[2]), float(found[3])
    assert value == dataset.pixel_array[row - 1, column - 1] * dataset.RescaleSlope + dataset.RescaleIntercept
    # 0.661 mm a pixel: 40 pixels at 1:1 are 26.5 mm.
    key(tab, "m")
    drag(tab, 40, 0, start=(-20, 0))
    expect(tab.locator("#bd-canvas .bd-ruler text")).to_have_text(re.compile(r"26\.[45] mm"))
    expect(tab.locator("#bd-canvas .bd-screen")).to_have_attribute(
        "data-sync", "done"
    )  # this does not concern the model


def test_orientation_letters_follow_turns(tab):
    enter(tab)
    open_image(tab, patient_dicom(ImageOrientationPatient=[1, 0, 0, 0, 1, 0]))

    def letters() -> str:
        settle(tab)
        edges = ("left", "top", "right", "bottom")
        return "".join(tab.locator(f"#bd-canvas .bd-mark.{edge}").inner_text() for edge in edges)

    assert letters() == "RALP"
    key(tab, "t")  # clockwise: what was at the left is now at the top
    assert letters() == "PRAL"
    key(tab, "h")
    assert letters() == "ARPL"
    key(tab, "r")
    assert letters() == "RALP"
    open_image(tab, png())
    assert letters() == ""


def test_frames_by_wheel_keys_and_cine(tab):
    enter(tab)
    open_image(tab, Path(get_path("ybr_color")).read_bytes())
    where = tab.locator("#bd-canvas .where")
    expect(where).to_contain_text("frame 1 of 30")
    tab.mouse.move(*middle(tab))
    tab.mouse.wheel(0, 100)
    expect(where).to_contain_text("frame 2 of 30")
    expect(tab.locator("#bd-frame input[type=number]")).to_have_value("2")
    key(tab, "End")
    expect(where).to_contain_text("frame 30 of 30")
    expect(tab.locator("#bd-viewer")).to_contain_text("frame 30 of 30")
    assert (drawn(tab, (0, 0, 320, 240)) == sent(tab)).all()
    key(tab, "Home")
    key(tab, "ArrowDown")
    expect(where).to_contain_text("frame 2 of 30")
    key(tab, " ")
    expect(where).not_to_contain_text("frame 2 of 30")
    key(tab, " ")
    settle(tab)
    number = re.search(r"frame (\d+) of 30", where.inner_text())
    assert number is not None and f"frame {number[1]} of 30" in caption(tab)


def open_study(tab: Any, files: list[bytes], num_series: int) -> None:
    named = [{"name": f"{PATIENT} {i}", "mimeType": "", "buffer": data} for i, data in enumerate(files)]
    tab.locator("#bd-file").set_input_files(named)
    expect(tab.locator("#bd-study .bd-series")).to_have_count(num_series)
    expect(tab.locator("#bd-canvas .where")).to_contain_text("image")
    settle(tab)


def test_a_series_is_scrolled_by_position_and_the_model_gets_the_image_on_the_canvas(tab):
    enter(tab)
    # Each position has a different gray level, so a wrong image has different pixels.
    open_study(tab, [zipped([*(ct_slice(place) for place in (3, 0, 4, 1, 2)), b"no image"])], 1)
    study, where = tab.locator("#bd-study"), tab.locator("#bd-canvas .where")
    expect(study).to_contain_text("CT axial, CHEST")
    expect(study).to_contain_text("This series is sorted by position.")
    study.get_by_text("1 file not shown").click()
    expect(study.locator("li")).to_have_text(re.compile("^1: no image"))
    expect(where).to_contain_text("image 3 of 5")
    seen = [sent(tab)]
    assert (drawn(tab, WHOLE) == seen[0]).all()
    tab.mouse.move(*middle(tab))
    tab.mouse.wheel(0, 100)
    expect(where).to_contain_text("image 4 of 5")
    expect(tab.locator("#bd-viewer")).to_contain_text("image 4 of 5")
    key(tab, "i")
    settle(tab)
    seen.append(sent(tab))
    assert (drawn(tab, WHOLE) == seen[1]).all() and "inverted" in caption(tab)
    key(tab, "i")
    key(tab, "End")
    expect(tab.locator("#bd-viewer")).to_contain_text("image 5 of 5")
    settle(tab)
    seen.append(sent(tab))
    assert (drawn(tab, WHOLE) == seen[2]).all()
    # From head to feet the levels of gray fall.
    assert seen[0].mean() > seen[2].mean()
    assert PATIENT not in tab.content()


def drop(tab: Any, *paths: Path) -> None:
    """Drag files or folders from the desktop onto the drop zone, as the browser gets it from the operating system."""
    box = box_of(tab.locator("#bd-drop .bd-drop"))
    place = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
    data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
    session = tab.context.new_cdp_session(tab)
    for kind in ("dragEnter", "dragOver", "drop"):
        session.send("Input.dispatchDragEvent", {"type": kind, **place, "data": data})


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_study_is_dropped(tab, tmp_path: Path, kind: str):
    files = {f"CT/1/IM{place}": ct_slice(place) for place in range(3)}
    files |= {f"CT/2/IM{place}": ct_slice(place + 20, "2", Rows=64, PixelData=bytes(2 * 64 * 128)) for place in (1, 2)}
    # A browser lists at most 100 files of a folder at a time.
    files |= {f"CT/notes/{number}.txt": f"note {number}".encode() for number in range(101)}
    dropped = tmp_path / f"{PATIENT}.zip"
    if kind == "zip":
        dropped.write_bytes(zipped(files))
    else:
        dropped = tmp_path / PATIENT
        for name, data in files.items():
            (dropped / name).parent.mkdir(parents=True, exist_ok=True)
            (dropped / name).write_bytes(data)
    enter(tab)
    drop(tab, dropped)
    series = tab.locator("#bd-study .bd-series")
    expect(series).to_have_count(2)
    assert series.locator("span").all_inner_texts() == ["CT axial, CHEST\n3 images", "CT axial, CHEST\n2 images"]
    edges = "pictures => pictures.map((picture) => [picture.naturalWidth, picture.naturalHeight])"
    wait_until(lambda: all(min(edge) > 0 for edge in series.locator("img").evaluate_all(edges)), START_S, "thumbnails")
    wide = [width > height for width, height in series.locator("img").evaluate_all(edges)]
    assert wide == [False, True]
    expect(tab.locator("#bd-study summary")).to_have_text("101 files not shown")
    expect(tab.locator("#bd-canvas .where")).to_contain_text("image 2 of 3")
    expect(tab.locator(".bd-drop")).not_to_have_class(re.compile("over"))
    settle(tab)
    assert (drawn(tab, WHOLE) == sent(tab)).all()
    assert PATIENT not in tab.content()


def test_two_series_are_scrolled_together(tab, parts: Any):
    enter(tab)
    thick = [ct_slice(place, "2") for place in (0, 4, 8)]
    prior = [
        ct_slice(place, "3", StudyInstanceUID="1.9", StudyDate="20030120", FrameOfReferenceUID="1.8")
        for place in (100, 101, 102, 103)
    ]
    open_study(tab, [*(ct_slice(place) for place in range(9)), *thick, *prior], 3)
    study, second = tab.locator("#bd-study"), tab.locator("#bd-second-canvas")
    first_where, second_where = tab.locator("#bd-canvas .where"), second.locator(".where")
    expect(study).to_contain_text("364 days before study 1")
    expect(first_where).to_contain_text("image 5 of 9")
    study.get_by_role("button", name="Compare with series 2").click()
    expect(second.locator(".bd-link-note")).to_have_text("Linked by position.")
    expect(second_where).to_contain_text("image 2 of 3")
    key(tab, "End")
    expect(second_where).to_contain_text("image 3 of 3")
    second.locator("canvas").focus()
    tab.keyboard.press("Home")
    expect(first_where).to_contain_text("image 1 of 9")
    settle(tab)
    assert "image 1 of 9" in caption(tab)
    tab.screenshot(path=parts.folder / "two_series.png", full_page=True)
    for pane in ("#bd-canvas .bd-pane", "#bd-second-canvas .bd-pane"):
        box = box_of(tab.locator(pane))
        assert box["width"] > 300 and box["y"] + box["height"] < 800, box
    assert axe_violations(tab) == []
    switch_scheme(tab)
    assert axe_violations(tab) == []
    # Without the link only one of them moves.
    second.locator("canvas").focus()
    tab.keyboard.press("l")
    expect(second.locator(".bd-link-note")).to_have_text("Not linked.")
    tab.keyboard.press("End")
    expect(second_where).to_contain_text("image 3 of 3")
    expect(first_where).to_contain_text("image 1 of 9")
    tab.keyboard.press("l")
    # The prior has another frame of reference: both move by the same distance.
    study.get_by_role("button", name="Compare with series 3").click()
    expect(second.locator(".bd-link-note")).to_contain_text("Linked by distance from here")
    expect(second_where).to_contain_text("image 2 of 4")
    key(tab, "ArrowDown")
    expect(second_where).to_contain_text("image 3 of 4")
    settle(tab)
    # The model receives the prior instead, and the viewports swap.
    second.get_by_role("button", name="Ask about this series").click()
    expect(tab.locator("#bd-viewer")).to_contain_text("image 3 of 4")
    expect(second_where).to_contain_text("image 2 of 9")
    settle(tab)
    assert (drawn(tab, WHOLE) == sent(tab)).all()
    second.get_by_role("button", name="Close").click()
    expect(second.locator("canvas")).to_be_hidden()


def test_dragging_keeps_60_frames_per_second_without_the_server(tab):
    import pydicom

    dataset = pydicom.dcmread(get_path("ct"))
    values = np.kron(dataset.pixel_array, np.ones((4, 4), dataset.pixel_array.dtype))
    enter(tab)
    open_image(tab, patient_dicom(PixelData=values.tobytes(), Rows=512, Columns=512))
    calls: list[str] = []
    tab.on("request", lambda request: calls.append(request.url) if "predict" in request.url else None)
    tab.evaluate(
        """() => {
          const real = CanvasRenderingContext2D.prototype.putImageData;
          window.paints = 0;
          CanvasRenderingContext2D.prototype.putImageData = function (...all) {
            window.paints++;
            real.apply(this, all);
          };
        }"""
    )
    mx, my = middle(tab)
    tab.mouse.move(mx, my)
    tab.mouse.down()
    before = len(calls)
    for step in range(1, 31):
        tab.mouse.move(mx + step, my)
        tab.evaluate("() => new Promise((done) => requestAnimationFrame(done))")
    assert tab.evaluate("window.paints") >= 25 and len([url for url in calls[before:] if "predict" in url]) <= 1
    tab.mouse.up()
    cost_ms = tab.evaluate(
        """async () => {
          const {paint} = await import(new URL('page/static/viewer_frames.js', document.baseURI));
          const values = Float64Array.from({length: 4096}, (_, i) => i - 1024);
          const index = Uint16Array.from({length: 512 * 512}, (_, i) => i % 4096);
          const frame = {rows: 512, columns: 512, levels: 4096, values, index, shown: new Uint8Array(4096)};
          const canvas = document.createElement('canvas');
          const times = [];
          for (let i = 0; i < 25; i++) {
            const from = performance.now();
            paint(frame, {center: i, width: 400}, false, canvas);
            times.push(performance.now() - from);
          }
          return times.sort((a, b) => a - b)[5];
        }"""
    )
    assert cost_ms < 16  # of 16.7; the fastest fifth, because of other load


def test_touch(browser: Any, parts: Any):
    with visitor(browser, parts, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True) as tab:
        enter(tab)
        open_image(tab, patient_dicom(WindowCenter=100, WindowWidth=700))
        x, y = middle(tab)
        session = tab.context.new_cdp_session(tab)

        def touch(kind: str, *points: tuple[float, float]) -> None:
            touches = [{"x": px, "y": py, "id": i} for i, (px, py) in enumerate(points)]
            session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": touches})

        touch("touchStart", (x, y))
        touch("touchMove", (x + 30, y))
        touch("touchEnd")
        settle(tab)
        assert shown_window(tab)[1] > 700 and (drawn(tab, WHOLE) == sent(tab)).all()
        key(tab, "f")
        fitting = scale(tab)
        touch("touchStart", (x - 20, y), (x + 20, y))
        touch("touchMove", (x - 60, y), (x + 60, y))
        touch("touchEnd")
        assert scale(tab) > 2 * fitting
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_frames_are_for_their_own_tab_only(tab, parts: Any):
    enter(tab)
    with tab.expect_response(re.compile("/page/frame/")) as answer:
        open_image(tab, patient_dicom())
    assert answer.value.status == 200 and answer.value.headers["cache-control"] == "no-store"
    url = answer.value.url
    assert "Zzyzx" not in requests.get(url, timeout=30).content.decode("latin-1")
    assert requests.get(url.removesuffix("0") + "1", timeout=30).status_code == 404
    assert requests.get(f"{parts.page.url}/page/frame/{'x' * 22}/0", timeout=30).status_code == 404
    load(tab, png())  # another image replaces it
    expect(tab.locator("#bd-facts")).to_contain_text("picture")
    assert requests.get(url, timeout=30).status_code == 404
