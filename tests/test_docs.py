"""The documents: links lead somewhere, code runs, commands exist, both languages agree, figures are measured."""

import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import figures  # noqa: E402

PATTERNS = ("*.md", "docs/**/*.md", "learn/**/*.md", "bench/**/*.md", "examples/*.md")
PAGES = sorted({path.relative_to(ROOT).as_posix() for pattern in PATTERNS for path in ROOT.glob(pattern)})
CHINESE = [page for page in PAGES if page.endswith(".zh.md")]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(?<!`)!?\[[^\]]*\]\(([^)\s]+)\)")
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))

# words that a bash block may begin with and that this test does not look into
ORDINARY = {
    "cd",
    "export",
    "git",
    "source",
    "nvidia-smi",
    "ncu",
    "nsys",
    "nvcc",
    "cmake",
    "time",
    "mkdir",
    "micromamba",
}


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, *languages: str) -> list[str]:
    return [body for language, body in FENCE.findall(text(page)) if language in languages]


def without_code(page: str) -> str:
    return re.sub(r"`[^`\n]*`", "``", FENCE.sub("", text(page)))


def anchor(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
    return re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")


def headings(page: str) -> list[tuple[int, str]]:
    found = re.findall(r"^(#+) (.+)$", FENCE.sub("", text(page)), re.MULTILINE)
    return [(len(marks), title) for marks, title in found]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    broken = []
    for target in LINK.findall(without_code(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, fragment = target.partition("#")
        linked = (ROOT / page).parent / path if path else ROOT / page
        if not linked.exists():
            broken.append(target)
        elif fragment and linked.suffix == ".md":
            name = linked.resolve().relative_to(ROOT).as_posix()
            if fragment not in [anchor(title) for _, title in headings(name)]:
                broken.append(target)
    assert not broken, f"{page}: {broken}"


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python") and page not in CHINESE])
def test_python_blocks_run(page, monkeypatch, tmp_path, capsys):
    """A page's blocks in the order of the page, in one namespace, on a CPU; a missing optional package skips.

    The Chinese pages have the same code, see below.
    """
    code = blocks(page, "python")
    for package in ("transformers", "matplotlib", "triton"):
        if any(
            re.search(rf"^\s*(from|import) {package}\b|integrations\.{package}", body, re.M) for body in code
        ):
            pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict = {"__name__": "__main__"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number, body in enumerate(code, 1):
            exec(compile(body, f"{page}, block {number}", "exec"), namespace)


def options_of(command: list[str]) -> set[str]:
    """The options of a flash-attn command, from the command line itself."""
    pytest.importorskip("typer")
    import typer

    from flash_attn.cli import __main__ as cli

    app = typer.Typer()
    importlib.import_module(f"flash_attn.cli.{command[0]}").register(app)
    app.callback()(lambda: None)
    found = typer.main.get_command(app).commands[command[0]]  # type: ignore[attr-defined]
    assert command[0] in cli.COMMANDS
    if len(command) > 1 and hasattr(found, "commands") and not command[1].startswith("-"):
        found = found.commands[command[1]]
    return {name for option in found.params for name in (*option.opts, *option.secondary_opts)} | {"--help"}


def problem_with(words: list[str]) -> str | None:
    """What is wrong with one command of a bash block, or None."""
    while words and (re.match(r"[A-Z_0-9]+=", words[0]) or words[0] in ("time", "env", "exec")):
        words = words[1:]
    if not words or words[0].startswith("#") or words[0] in ORDINARY:
        return None
    name = words[0].removeprefix(".venv/bin/")
    if name == "flash-attn":
        unknown = [w for w in words[1:] if w.startswith("-") and w.split("=")[0] not in options_of(words[1:])]
        return f"no option {unknown}" if unknown else None
    if name in ("make",):
        makefiles = "\n".join(
            path.read_text() for path in (ROOT / "Makefile", ROOT / "learn/cuda/Makefile") if path.exists()
        )
        missing = [w for w in words[1:] if "=" not in w and w != "-C" and not (ROOT / w).is_dir()]
        missing = [w for w in missing if not re.search(rf"^{re.escape(w)}:", makefiles, re.MULTILINE)]
        return f"no make target {missing}" if missing else None
    if name in ("python", "python3", "pytest", "pip"):
        return problem_with_python(name, words[1:])
    if "/" in name:
        places = (ROOT, ROOT / "learn/cuda")
        return None if any((place / name).is_file() for place in places) else f"no file {name}"
    return f"unknown command {name}"


def problem_with_python(name: str, words: list[str]) -> str | None:
    if name == "pip" or words[:2] == ["-m", "pip"]:
        extras = re.findall(r"\.\[(.*?)\]", " ".join(words))
        known = re.search(r"\[project.optional-dependencies\](.*?)\n\[", text("pyproject.toml"), re.DOTALL)[1]  # type: ignore[index]
        missing = [e for group in extras for e in group.split(",") if not re.search(rf"^{e} = ", known, re.M)]
        return f"no extra {missing}" if missing else None
    if name != "pytest" and words[:1] == ["-m"]:
        local = ROOT / words[1].replace(".", "/")
        there = local.with_suffix(".py").exists() or (local / "__init__.py").exists()
        return (
            None
            if there or importlib.util.find_spec(words[1]) or words[1] == "mkdocs"
            else f"no module {words[1]}"
        )
    files = [w for w in words if re.search(r"\.py$|^tests/|^examples/", w)]
    missing = [w for w in files if not (ROOT / w.split("::")[0]).exists()]
    return f"no file {missing}" if missing else None


def commands(body: str) -> list[list[str]]:
    lines = body.replace("\\\n", " ").splitlines()
    return [shlex.split(part, comments=True) for line in lines for part in re.split(r"&&|\|", line)]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "bash")])
def test_commands_exist(page):
    wrong = [
        f"{' '.join(words)}: {why}"
        for body in blocks(page, "bash")
        for words in commands(body)
        if (why := problem_with(words))
    ]
    assert not wrong, f"{page}: {wrong}"


def test_commands_that_do_not_exist_are_found():
    """The check above can fail."""
    for line in (
        "flash-attn explain --wings",
        "make nothing",
        "python scripts/none.py",
        "./none.sh",
        "pip install '.[none]'",
    ):
        assert problem_with(shlex.split(line)), line


def bare(code: str) -> str:
    """Code without its comments, which are translated, and without blank ends of lines."""
    return "\n".join(re.sub(r"(^|\s+)(#|//) .*$", "", line).rstrip() for line in code.splitlines())


@pytest.mark.parametrize("page", CHINESE)
def test_both_languages_say_the_same(page):
    """The same headings by level, the same code but for comments, as many rows of tables, links to the same places."""
    english = page.replace(".zh.md", ".md")
    assert [level for level, _ in headings(page)] == [level for level, _ in headings(english)]
    codes = [
        [(lang, "" if lang == "text" else bare(body)) for lang, body in FENCE.findall(text(p))]
        for p in (page, english)
    ]
    for mine, theirs in zip(*codes, strict=True):
        assert mine == theirs
    rows = [len(re.findall(r"^\|", FENCE.sub("", text(p)), re.MULTILINE)) for p in (page, english)]
    assert rows[0] == rows[1], "rows of tables"
    targets = [
        {t.split("#")[0].replace(".zh.md", ".md") for t in LINK.findall(without_code(p)) if t.split("#")[0]}
        for p in (page, english)
    ]
    mine, theirs = (t - {Path(english).name} for t in targets)
    assert mine == theirs
    assert re.search("[\u4e00-\u9fff]", text(page))


def test_what_newcomers_read_is_there_in_both_languages():
    wanted = ["README", "QUICK_REFERENCE", "ARCHITECTURE", "CONTRIBUTING", "ROADMAP"]
    pages = (
        "lessons",
        "algorithm",
        "faq",
        "usage",
        "performance",
        "numerics",
        "api",
        "cost-model",
        "migrate",
    )
    wanted += ["learn/cuda/README", *(f"docs/{name}" for name in pages)]
    assert [name for name in wanted if f"{name}.zh.md" not in CHINESE] == []


@pytest.mark.parametrize("page", sorted(figures.TABLES))
def test_figures_are_those_of_the_results(page):
    found = figures.BLOCK.search(text(page))
    assert found and found[0] == figures.block(page, found[1]), "run: python scripts/figures.py"
    assert found[1] == figures.sources()


def test_picture_is_that_of_the_results():
    assert text(figures.PICTURE) == figures.picture(figures.sources()), "run: python scripts/figures.py"


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name):
    """In its own process, as a reader would: on a CPU, in seconds, and it says what it has shown."""
    if "transformers" in name:
        pytest.importorskip("transformers")
    done = subprocess.run(
        [sys.executable, f"examples/{name}.py", "--device", "cpu"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_every_page_is_on_the_site():
    """mkdocs.yml names each page of both languages, so that none is only found by accident."""
    navigation = text("mkdocs.yml")
    assert [
        page for page in PAGES if page not in navigation and not page.startswith(("examples/", "bench/"))
    ] == []


def test_api_reference_names_every_public_function():
    """docs/api.md names modules and members that exist, and together they cover `flash_attn.__all__`."""
    import flash_attn

    covered = set()
    for target, members in re.findall(
        r"^::: ([\w.]+)\n(?:    options:\n      members:([^:]*?)\n\n)?", text("docs/api.md"), re.M
    ):
        try:
            module = importlib.import_module(target)
        except ImportError:  # a function
            covered.add(target.split(".")[-1])
            continue
        own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == target]
        names = re.findall(r"\w+", members) or own
        assert [name for name in names if not hasattr(module, name)] == [], target
        covered.update(name for name in names if getattr(module, name) is getattr(flash_attn, name, None))
    assert set(flash_attn.__all__) - covered == set()
