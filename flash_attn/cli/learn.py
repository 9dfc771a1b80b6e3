"""`flash-attn learn`: the lessons and exercises of the checkout, listed, run, drawn and graded."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

import flash_attn

ROOT = Path(flash_attn.__file__).resolve().parents[1]


def lessons() -> list[Path]:
    found = sorted((ROOT / "learn").glob("step_*.py"))
    if not found:
        typer.secho(
            f"The lessons are part of the repository, not of the installed package: no {ROOT / 'learn'} here. "
            "Clone the repository and run ./build_and_run.sh once, then flash-attn learn.",
            fg="red",
            err=True,
        )
        raise typer.Exit(1)
    return found


def title(path: Path) -> str:
    """The first line of a lesson's docstring, or of a CUDA step's comment."""
    with open(path, encoding="utf-8") as file:
        return file.readline().removeprefix("//").strip().strip('"')


def cuda_steps() -> list[Path]:
    folder = ROOT / "learn" / "cuda"
    return [folder / "flash_attn_minimal.cu", *sorted(folder.glob("step_*.cu"))]


def choose(number: int) -> Path:
    found = lessons()
    if not 1 <= number <= len(found):
        raise typer.BadParameter(f"lesson must be from 1 to {len(found)}, got {number}")
    return found[number - 1]


def run_module(*words: str) -> int:
    """`python -m words...` in the checkout; its exit status."""
    return subprocess.run([sys.executable, "-m", *words], cwd=ROOT, env=dict(os.environ)).returncode


def register(app: typer.Typer) -> None:
    group = typer.Typer(
        help="The algorithm from softmax to Hopper, one idea a lesson.", invoke_without_command=True
    )
    app.add_typer(group, name="learn")

    @group.callback()
    def overview(context: typer.Context) -> None:
        if context.invoked_subcommand is None:
            for path in lessons():
                typer.echo(title(path))
            typer.echo("\nThe kernel in CUDA C++, with or without a GPU: learn/cuda/build_and_run.sh")
            for path in cuda_steps():
                typer.echo(title(path))
            typer.echo(
                "\nEach lesson is a file in learn/ that is made to be read: its text, its code, and what it prints."
            )
            typer.echo("flash-attn learn run 1    shows a lesson's text and runs it")
            typer.echo("flash-attn learn draw 3   draws its picture as a PNG")
            typer.echo("flash-attn learn check    grades the exercises in learn/exercises")

    @group.command()
    def run(lesson: Annotated[int, typer.Argument(help="number of the lesson")]) -> None:
        """Show the text of a lesson and run it."""
        path = choose(lesson)
        source = path.read_text(encoding="utf-8")
        typer.echo(source.split('"""')[1].strip())
        typer.secho(f"\n--- running learn/{path.name}", bold=True)
        status = run_module(f"learn.{path.stem}")
        after = f"; then: flash-attn learn run {lesson + 1}" if lesson < len(lessons()) else ""
        typer.secho(
            f"--- the code: learn/{path.name}; its picture: flash-attn learn draw {lesson}{after}", dim=True
        )
        raise typer.Exit(status)

    @group.command()
    def draw(
        lesson: Annotated[int, typer.Argument(help="number of the lesson")],
        output: Annotated[Path, typer.Option(help="folder for the PNG")] = Path("learn-output"),
    ) -> None:
        """Draw the picture of a lesson."""
        sys.path.insert(0, str(ROOT))
        from learn.pictures import draw as draw_picture

        choose(lesson)
        typer.echo(f"written: {draw_picture(lesson, output)}")

    @group.command()
    def check(
        solutions: Annotated[
            bool, typer.Option("--solutions", help="grade the reference solutions instead")
        ] = False,
    ) -> None:
        """Grade the exercises in learn/exercises."""
        lessons()
        raise typer.Exit(run_module("learn.exercises.check", *(["--solutions"] if solutions else [])))
