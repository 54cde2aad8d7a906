"""``babydoctor bench peers``: our worker beside llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from babydoctor.cli.benchmarks.guide_table import print_table

GUIDE = Path("babydoctor/bench/README.md")


def peers(
    users: Annotated[str, typer.Option(help="numbers of concurrent users, with commas")] = "1,16",
    weights: Annotated[str, typer.Option(help="bf16, int8 (beside llama.cpp's q8_0), or both with a comma")] = (
        "bf16,int8"
    ),
    requests_per_user: Annotated[int, typer.Option(min=1)] = 4,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="length of each answer")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="rounds in which the programs take turns")] = 5,
    guide: Annotated[bool, typer.Option("--guide", help=f"write the table into {GUIDE}")] = False,
) -> None:
    """Measure our worker and llama.cpp in turn on the same weights, for one user and for many. CPU, mini model."""
    import tempfile

    from babydoctor.bench.peers.compare import compare
    from babydoctor.bench.serve_figures import parse_users
    from babydoctor.progress import named_progress
    from babydoctor.runtime import hide_saving_progress, prepare_bench

    numbers = parse_users(users)
    prepare_bench()
    hide_saving_progress()

    def measure() -> str:
        with tempfile.TemporaryDirectory(prefix="babydoctor-peers-") as folder, named_progress() as update:
            return compare(
                Path(folder),
                users=numbers,
                weights=tuple(weights.split(",")),
                requests_per_user=requests_per_user,
                max_new_tokens=max_new_tokens,
                rounds=rounds,
                on_progress=update,
            )

    print_table(measure, "peers", GUIDE if guide else None, option="--guide")
