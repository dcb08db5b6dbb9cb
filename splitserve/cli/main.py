"""The command line. Each command is a function in a module of its own; errors are one line and exit code 1."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import splitserve
from splitserve.cli import bench, chat, models, processes, up
from splitserve.errors import ConfigError

app = typer.Typer(
    name="splitserve",
    help="LLM serving with prefill and decode on separate pools.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command()(up.up)
app.command()(processes.router)
app.command()(processes.prefill)
app.command()(processes.decode)
app.command()(models.pull)
app.command()(chat.chat)
app.add_typer(bench.app)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"splitserve {splitserve.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    pass


def main() -> None:
    try:
        app()
    except ConfigError as error:
        sys.exit(f"splitserve: {error}")
