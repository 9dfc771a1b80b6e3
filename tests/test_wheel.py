"""The package as users get it: a small wheel, which installs, is found by Transformers, and leaves nothing behind.

Without a network: the dependencies are those of the environment that runs the tests.
"""

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ASK_TRANSFORMERS = """
import importlib.util
if importlib.util.find_spec("transformers"):
    from transformers.utils import import_utils
    import_utils.is_torch_cuda_available = lambda: True  # its other condition
    assert import_utils.is_flash_attn_2_available()
"""


def run(*command, cwd: Path | None = None) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    pytest.importorskip("build")
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, source)
    for path in filter(Path.is_dir, ROOT.glob("flash_attn*")):
        if path.suffix != ".egg-info":
            shutil.copytree(path, source / path.name, ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", source / "dist", source)
    (built,) = (source / "dist").glob("*.whl")
    return built


def test_small_and_complete(wheel):
    assert wheel.stat().st_size < 1e6
    assert wheel.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in ROOT.glob("flash_attn*/**/*"):
        if path.suffix in (".py", ".json") and ".egg-info" not in str(path):
            assert str(path.relative_to(ROOT)) in names
    (top,) = (n for n in names if n.endswith("top_level.txt"))
    assert {n.split("/")[0].removesuffix(".py") for n in names} - {top.split("/")[0]} == set(
        zipfile.ZipFile(wheel).read(top).decode().split()
    )


def test_install_use_uninstall(wheel, tmp_path):
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv/bin/python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip())
    # What this environment has, except for an editable install of this checkout, which .pth files make.
    (site / "parent.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    before = set((tmp_path / "venv").rglob("*"))
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    run(*pip, "install", "--no-deps", "--no-index", "--quiet", "--ignore-installed", wheel)
    where = run(
        python, "-c", "import flash_attn, flash_attn_2_cuda; print(flash_attn.__file__)", cwd=tmp_path
    )
    assert Path(where.strip()).is_relative_to(tmp_path), "not this checkout"
    run(python, "-W", "ignore", "-c", ASK_TRANSFORMERS, cwd=tmp_path)
    assert "2.8.4" in run(tmp_path / "venv/bin/flash-attn", "env", cwd=tmp_path)
    complaints = subprocess.run([*map(str, pip), "check"], capture_output=True, text=True).stdout
    assert "flash-attn" not in complaints
    run(*pip, "uninstall", "--yes", "--quiet", "flash-attn")
    assert set((tmp_path / "venv").rglob("*")) == before
