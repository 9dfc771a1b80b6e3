"""The `flash-attn` command: one module a command, each with `register(app)`."""

import importlib
import os
import sys

COMMANDS = ("demo", "explain", "env", "bench", "cost", "learn", "tune")


def main() -> None:
    # the profiler that measures memory would report its every start; read when torch is imported
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    try:
        import rich  # noqa: F401
        import typer
    except ImportError as error:
        sys.exit(
            f"flash-attn: {error.name} is missing; install the command line with: pip install 'flash-attn[cli]'"
        )
    app = typer.Typer(
        help="Exact attention on any machine: try it, explain it, measure it.",
        no_args_is_help=True,
        pretty_exceptions_show_locals=False,
    )
    for name in COMMANDS:
        importlib.import_module(f"flash_attn.cli.{name}").register(app)
    app()


if __name__ == "__main__":
    main()
