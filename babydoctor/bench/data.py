"""Cost of the forms of data: the time from the start to the first step's samples, and memory per process."""

from __future__ import annotations

import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from babydoctor.markers import markdown_table

BATCH_SIZE = 128


@dataclass(frozen=True)
class StartCost:
    """The cost of one form. Memory is that of a single process; pages that processes share do not count."""

    start_s: float
    rank_bytes: int
    worker_bytes: int


def generate_rows(path: Path, num_rows: int) -> Path:
    """Write rows of caption length as JSON, and one image for all of them. Returns the image folder."""
    from PIL import Image

    images = path.parent / "images"
    images.mkdir()
    Image.new("RGB", (8, 8)).save(images / "scan.png")
    with path.open("w", encoding="utf-8") as file:
        for number in range(num_rows):
            answer = f"Axial CT of the chest, case {number}: a nodule of {number % 30} mm in the right upper lobe. " * 2
            turns = [{"from": "human", "value": "<image>\nDescribe it."}, {"from": "gpt", "value": answer}]
            row = {"id": str(number), "image": "scan.png", "conversations": turns}
            file.write(("[" if number == 0 else ",\n") + json.dumps(row))
        file.write("]\n")
    return images


def measure_start(rows: str, images: str) -> StartCost:
    """Load rows as training does and read the samples of the first step. Call it in a fresh process."""
    import datasets  # noqa: F401 (so that the import is not measured)

    from babydoctor.data.loader import StepSampler
    from babydoctor.data.rows import fingerprint, load_dataset_rows

    before, started = _private_bytes(), time.perf_counter()
    samples = load_dataset_rows(rows, images)
    fingerprint(samples)
    sampler = StepSampler(len(samples), BATCH_SIZE, seed=0)
    for index in sampler.samples_of_step(0):
        samples[index]
    start_s, rank_bytes = time.perf_counter() - started, _private_bytes() - before

    def read_in_worker(result: multiprocessing.Queue[int]) -> None:
        """Memory that a forked worker adds by reading the samples of 100 steps."""
        begin = _private_bytes()
        for step in range(100):
            for index in sampler.samples_of_step(step):
                samples[index]
        result.put(_private_bytes() - begin)

    context = multiprocessing.get_context("fork")
    result: multiprocessing.Queue[int] = context.Queue()
    worker = context.Process(target=read_in_worker, args=(result,))
    worker.start()
    worker_bytes = result.get(timeout=600)
    worker.join()
    return StartCost(start_s, rank_bytes, worker_bytes)


def bench_data(folder: Path, num_rows: int) -> str:
    """Measure JSON and its converted form in an empty folder. Returns a Markdown table."""
    from babydoctor.data.convert import convert_rows

    source, out = folder / "rows.json", folder / "converted"
    images = generate_rows(source, num_rows)
    started = time.perf_counter()
    convert_rows([source], out, images=images)
    convert_s = time.perf_counter() - started
    lines = []
    for name, path in (("JSON", source), ("converted", out)):
        # A fresh process, so that no memory from earlier measurements is reused.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            cost = pool.submit(measure_start, str(path), str(images)).result()
        memory = (f"{size / 1e6:,.0f} MB" for size in (cost.rank_bytes, cost.worker_bytes))
        lines.append([name, f"{num_rows:,}", f"{cost.start_s:.1f} s", *memory])
    head = ["rows as", "rows", "start to first samples", "memory per rank", "added by a worker"]
    note = f"Converting took {convert_s:.0f} s. Imports, the tokenizer and the model are not counted."
    return "\n".join([*markdown_table(head, lines), "", note])


def _private_bytes() -> int:
    """Memory of this process that it does not share with other processes (Linux)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Private_Dirty", "Private_Clean")))
