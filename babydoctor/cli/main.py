"""The ``babydoctor`` command. Importing this module loads typer and nothing heavier."""

from __future__ import annotations

import importlib
import sys

import typer

from babydoctor.files import explain_unreadable
from babydoctor.runtime import prepare_process
from babydoctor.schema import UserError
from babydoctor.train.interrupt import TrainingStopped

# The groups in the order in which `babydoctor --help` lists them.
COMMAND_MODULES = (
    "doctor",
    "train",
    "chat",
    "demo",
    "data",
    "config",
    "plan",
    "eval",
    "interop",
    "serve",
    "replay",
    "bench",
)


def build_app() -> typer.Typer:
    """Build the typer application from the modules in ``babydoctor.cli``."""
    app = typer.Typer(
        name="babydoctor",
        help="Train and serve a radiology vision-language model on one 24 GB GPU. For academic research only: "
        "it is not a medical device and never replaces a doctor.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_show_locals=False,
        rich_markup_mode=None,
    )
    for name in COMMAND_MODULES:
        importlib.import_module(f"babydoctor.cli.{name}").register(app)
    return app


def main() -> None:
    """Run the command line.

    Exit status: that of a ``UserError``, which is printed as one paragraph on stderr (2: bad input); 128 + the signal's
    number if a signal stopped training (130 SIGINT, 143 SIGTERM, 138 SIGUSR1).
    """
    prepare_process()
    try:
        with explain_unreadable():
            build_app()()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except TrainingStopped as stopped:
        sys.exit(stopped.exit_status)
    except KeyboardInterrupt:
        sys.exit(130)
