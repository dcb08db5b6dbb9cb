"""``splitserve bench NAME``: the benchmarks, each a program of its own. The command becomes the program."""

from __future__ import annotations

import os
import sys

import typer

_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

app = typer.Typer(name="bench", help="Measures a running server, and the parts of one.", no_args_is_help=True)


def _add(name: str, text: str) -> None:
    @app.command(name, help=f"{text} `splitserve bench {name} --help` lists its flags.", context_settings=_PASS_ON)
    def run(context: typer.Context) -> None:
        os.execv(sys.executable, [sys.executable, "-m", f"bench.{name}", *context.args])  # noqa: S606


_add("serve", "Load on any OpenAI-compatible server, with the figures of `vllm bench serve`.")
_add("compare", "SplitServe and its peers in turns, same client, same cores.")
_add("router", "What the router adds, with workers that echo.")
_add("transfer", "KV blocks between two processes, beside the machine's copy rate.")
_add("kernels", "CPU kernels, beside the machine's memory and GEMM rates.")
_add(
    "overload",
    "More than a server can do: what is left of its goodput, how soon it refuses, how soon it recovers.",
)
_add("simulate", "The routing policy against hundreds of modelled workers.")
