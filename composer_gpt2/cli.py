"""The command line ``composer-gpt2``: the table of its commands."""

from __future__ import annotations

import sys

import typer

from composer_gpt2.commands.bench import bench_command
from composer_gpt2.commands.compare import compare_command
from composer_gpt2.commands.corpus import prepare_command, verify_command
from composer_gpt2.commands.demo import demo_command
from composer_gpt2.commands.doctor import doctor_command
from composer_gpt2.commands.download import download_command
from composer_gpt2.commands.evaluate import evaluate_command
from composer_gpt2.commands.export import export_command
from composer_gpt2.commands.generate import generate_command
from composer_gpt2.commands.project import project_command
from composer_gpt2.commands.train import quickstart_command, train_command

__all__ = ["app", "main"]

app = typer.Typer(
    help="Tools around GPT-2 pretraining with MosaicML Composer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# In the order of a project: text, training, what comes of it.
app.command("prepare")(prepare_command)
app.command("verify")(verify_command)
app.command("train")(train_command)
app.command("doctor")(doctor_command)
app.command("evaluate")(evaluate_command)
app.command("generate")(generate_command)
app.command("demo")(demo_command)
app.command("compare")(compare_command)
app.command("export")(export_command)
app.command("download")(download_command)
app.command("quickstart")(quickstart_command)
app.command("project")(project_command)
app.command("bench")(bench_command)


def main() -> None:
    """Runs a command; what the user can mend is one message without a traceback."""
    try:
        app()
    except (ValueError, OSError, RuntimeError) as error:
        is_ours = type(error).__module__.startswith("composer_gpt2")  # CheckpointError, ShardError
        if not is_ours and isinstance(error, RuntimeError):
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
