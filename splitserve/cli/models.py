"""``splitserve pull``: fetches a model."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from splitserve.models import resolve_model


def pull(name: Annotated[str, typer.Argument(help="Hub id (owner/name) or alias (smollm2).")] = "smollm2") -> None:
    """Fetches a model, so that starting a cluster needs no network."""
    console = Console(stderr=True, highlight=False)
    with console.status(f"fetching {name}"):
        path = resolve_model(name)
    typer.echo(path)
