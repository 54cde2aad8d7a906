"""``babydoctor eval RUN``, ``babydoctor eval compare A B``, ``babydoctor eval stages``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from typer.core import TyperGroup

from babydoctor.runtime import prepare_engine, prepare_inference, prepare_training
from babydoctor.schema import UserError


class DefaultCommandGroup(TyperGroup):
    """A group with a default command: ``eval RUN`` means ``eval run RUN``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["run", *args]
        return super().parse_args(ctx, args)


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    group = typer.Typer(
        cls=DefaultCommandGroup,
        no_args_is_help=True,
        rich_markup_mode=None,
        help="Score a run, any server, or a file of answers: `babydoctor eval RUN --task T --data DIR --out DIR`.",
    )
    group.command()(run)
    group.command()(compare)
    group.command()(stages)
    app.add_typer(group, name="eval")


def run(
    run_directory: Annotated[
        Optional[Path], typer.Argument(metavar="[RUN]", help="run directory; omit it with --predictions")  # noqa: UP045
    ] = None,
    overrides: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(metavar="[engine.KEY=VALUE]...", help="engine settings, for example engine.num_threads=8"),
    ] = None,
    *,
    task: Annotated[str, typer.Option(help="vqa-rad, slake, path-vqa, vqa-med, roco, phantom or rows")],
    data: Annotated[str, typer.Option(help="folder or file of the questions, or hub")],
    out: Annotated[Path, typer.Option(help="folder for metrics.json, report.html and the answers")],
    images: Annotated[Optional[str], typer.Option(help="folder of the images; default: next to the data")] = None,  # noqa: UP045
    split: Annotated[Optional[str], typer.Option(help="part of the data, if the format has several")] = None,  # noqa: UP045
    train: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="rows that the model was trained on, to report leakage; default: those in the run's config"),
    ] = None,
    predictions: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="score the answers in this file (JSONL) instead of a model's"),
    ] = None,
    endpoint: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="URL", help="ask this OpenAI-compatible server, for example http://127.0.0.1:8000/v1"),
    ] = None,
    model: Annotated[Optional[str], typer.Option(help="the server's name of the model, with --endpoint")] = None,  # noqa: UP045
    images_as: Annotated[str, typer.Option(help="image conditions")] = "right,shuffled,blank,noise",
    prompt: Annotated[str, typer.Option(help="how a question is asked; {question} is replaced")] = "{question}",
    template: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="conversation template; default: the run's"),
    ] = None,
    language: Annotated[str, typer.Option(help="SLAKE: en, zh or all")] = "en",
    max_questions: Annotated[int, typer.Option(min=0, help="ask only this many questions, the first ones; 0: all")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=0, help="0: 160 for captions, 48 otherwise")] = 0,
    temperature: Annotated[float, typer.Option(min=0, help="0: greedy")] = 0.0,
    batch_size: Annotated[int, typer.Option(min=1, help="questions answered at the same time")] = 16,
    resamples: Annotated[int, typer.Option(min=100, help="bootstrap resamples and permutations")] = 2000,
    seed: Annotated[int, typer.Option(help="seed of sampling, shuffling and resampling")] = 0,
    metric: Annotated[Optional[list[str]], typer.Option(help="additional caption metrics: meteor, bertscore")] = None,  # noqa: UP045
    localization: Annotated[
        bool,
        typer.Option("--localization", help="phantom: measure whether 'Where it looked' finds the finding"),
    ] = False,
    fill: Annotated[str, typer.Option(help="--localization: hidden parts are filled with blur or mean")] = "blur",
    familiarity: Annotated[
        bool, typer.Option("--familiarity", help="measure whether the run notices images unlike its training images")
    ] = False,
    unfamiliar: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FOLDER", help="photographs that --familiarity must notice, too"),
    ] = None,
    confidence: Annotated[
        bool, typer.Option("--confidence", help="calibrate the confidence of answers to closed questions")
    ] = False,
    device: Annotated[Optional[str], typer.Option(help="default: cuda if available, else cpu")] = None,  # noqa: UP045
    update_model_card: Annotated[
        Optional[Path], typer.Option(metavar="FILE", help="write the figures into MODEL_CARD.md between its markers")  # noqa: UP045
    ] = None,
) -> None:
    """Ask a run, or any server, the questions of a task and score the answers.

    The same command continues an interrupted evaluation. Under ``accelerate launch -m babydoctor eval``, the ranks
    share the questions.
    """
    from babydoctor.cli.evaluation.measure import measure_confidence, measure_familiarity, measure_localization
    from babydoctor.cli.evaluation.tables import print_result
    from babydoctor.config import TaskConfig
    from babydoctor.engine.settings import parse_overrides
    from babydoctor.eval.ask import GenerationConfig
    from babydoctor.eval.endpoint import Endpoint
    from babydoctor.eval.reporting.model_card import update_model_card as update_card
    from babydoctor.eval.run import EvalConfig, answer_share, evaluate
    from babydoctor.plan.hardware import choose_device
    from babydoctor.progress import named_progress
    from babydoctor.ranks import check_alone, join_ranks

    if (endpoint is None) != (model is None):
        raise UserError("--endpoint URL and --model NAME belong together")
    if endpoint is None:
        prepare_inference()
    task_config = TaskConfig(
        task=task,
        data=data,
        images=images,
        split=split,
        language=language,
        prompt=prompt,
        max_questions=max_questions,
        train=tuple(train or ()),
    )
    settings = {**parse_overrides(overrides or []), "on_start": prepare_engine}
    if localization or familiarity or confidence:
        check_alone("measuring a run")
        if run_directory is None or (localization and task != "phantom"):
            raise UserError("--familiarity and --confidence need a run directory, --localization also --task phantom")
        device = device or choose_device("auto")
        if localization:
            measure_localization(run_directory, Path(data), out, max_questions, fill, device)
        if familiarity:
            measure_familiarity(run_directory, task_config, out, unfamiliar=unfamiliar, seed=seed, device=device)
        if confidence:
            measure_confidence(run_directory, task_config, out, seed=seed, device=device, engine=settings)
        return
    config = EvalConfig(
        images_as=tuple(name.strip() for name in images_as.split(",") if name.strip()),
        generation=GenerationConfig(max_new_tokens, temperature, seed=seed, batch_size=batch_size, template=template),
        num_resamples=resamples,
        seed=seed,
        caption_metrics=tuple(metric or ()),
    )
    with join_ranks() as ranks, named_progress() as update:
        if ranks.rank > 0 and run_directory is not None:
            answer_share(out, task_config, config, run=run_directory, device=device, engine=settings, ranks=ranks)
            return

        def advance(label: str, done: int, total: int) -> None:
            share = "" if ranks.size == 1 else f" (this rank's share, 1 of {ranks.size})"
            update(f"{label}{share}", done, total)

        result = evaluate(
            out,
            task_config,
            config,
            run=run_directory,
            predictions=predictions,
            endpoint=None if endpoint is None or model is None else Endpoint(endpoint, model),
            device=device,
            progress=advance,
            engine=settings,
            ranks=ranks,
        )
    print_result(result)
    print(f"\nreport: {out / 'report.html'}   figures: {out / 'metrics.json'}")
    if update_model_card is not None:
        update_card(update_model_card, result)
        print(f"updated: {update_model_card}")


def compare(
    a: Annotated[Path, typer.Argument(help="folder that `babydoctor eval ... --out` wrote")],
    b: Annotated[Path, typer.Argument(help="another such folder, of the same questions")],
    json_file: Annotated[Optional[Path], typer.Option("--json", help="also write the result here")] = None,  # noqa: UP045
    resamples: Annotated[int, typer.Option(min=100, help="bootstrap resamples and permutations")] = 2000,
) -> None:
    """Compare two evaluations of the same questions: differences with intervals and p-values, paired by image."""
    import json

    from babydoctor.cli.evaluation.tables import print_comparison
    from babydoctor.eval.compare import compare as compare_folders

    result = compare_folders(a, b, num_resamples=resamples)
    print_comparison(result)
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def stages(
    out: Annotated[Path, typer.Option(help="folder for runs, scores, table and plot")],
    config: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option(help="config of each stage, in order; default: the tiny preset's"),
    ] = None,
    run: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            metavar="LABEL=DIR",
            help="score these runs instead of training; runs with the same label count as seeds",
        ),
    ] = None,
    task: Annotated[str, typer.Option(help="task that the runs are scored on")] = "phantom",
    data: Annotated[Path, typer.Option(help="data of the task; the tiny preset also trains on it")] = Path(
        ".demo/phantoms"
    ),
    base: Annotated[Path, typer.Option(help="tiny base, with llama/ and clip/")] = Path(".demo/base"),
    seeds: Annotated[int, typer.Option(min=1, help="number of seeds; each trains all variants")] = 3,
    override: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(metavar="[STAGE:]KEY=VALUE", help="setting for all stages, or for one"),
    ] = None,
    max_questions: Annotated[int, typer.Option(min=0, help="ask only this many questions, the first ones; 0: all")] = 0,
    update_file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--update", metavar="FILE", help="write the table between its markers in this Markdown file"),
    ] = None,
    picture: Annotated[Optional[Path], typer.Option(help="also write the plot here")] = None,  # noqa: UP045
) -> None:
    """Ablate the stages: train with all stages and with each one left out, and score the results. Resumable."""
    from babydoctor.demo.ablation import SECTION, StagesConfig, run_stages, write_picture
    from babydoctor.markers import write_section

    prepare_training()
    table = run_stages(
        StagesConfig(
            out=out,
            configs=tuple(config or ()),
            runs=tuple(run or ()),
            task=task,
            data=data,
            base=base,
            num_seeds=seeds,
            overrides=tuple(override or ()),
            max_questions=max_questions,
        )
    )
    if picture is not None:
        write_picture(picture, table)
    text = (out / "stages.md").read_text(encoding="utf-8")
    print(text)
    if update_file is not None:
        write_section(update_file, SECTION, text)
        print(f"updated: {update_file}")
