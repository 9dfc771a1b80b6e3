"""What importing the package does, and what it leaves alone. Each in a fresh interpreter."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def python(code: str, *paths: Path) -> str:
    """Output of `code` in a new interpreter with `paths` and the package importable."""
    setup = f"import sys; sys.path[:0] = {[str(p) for p in (*paths, ROOT)]!r}\n"
    done = subprocess.run([sys.executable, "-c", setup + code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_loads_no_kernel_language():
    """Triton, and what only a subcommand or a test needs, stays out."""
    code = """
import torch
before = set(sys.modules)
import flash_attn
import flash_attn.flash_attn_interface, flash_attn.bert_padding
new = {name.partition('.')[0] for name in set(sys.modules) - before}
print(sorted(new & {'triton', 'numpy', 'rich', 'typer', 'matplotlib', 'einops', 'transformers', 'flag_gems'}))
parts = ('flash_attn.forward.', 'flash_attn.backward.', 'flash_attn.tile.')
print(sorted(n for n in sys.modules if n.startswith(parts)))
"""
    assert python(code) == "[]\n[]"


def test_a_cpu_call_loads_no_triton():
    code = """
import torch, flash_attn
q = torch.randn(1, 8, 2, 16)
flash_attn.flash_attn_func(q, q, q, causal=True)
print('triton' in sys.modules)
"""
    assert python(code) == "False"


def test_import_is_quick():
    """Under 0.3 s beyond torch, in processor time: another process on the machine must not decide this."""
    code = """
import torch, time
start = time.process_time()
import flash_attn
print(time.process_time() - start)
"""
    assert min(float(python(code)) for _ in range(3)) < 0.3


def test_another_distribution_can_add_flash_attn_cute(tmp_path):
    """FlashAttention-4 installs `flash_attn/cute` beside this package."""
    cute = tmp_path / "flash_attn" / "cute"
    cute.mkdir(parents=True)
    (cute / "__init__.py").write_text("answer = 42\n")
    code = f"""
sys.path.append({str(tmp_path)!r})
import flash_attn, flash_attn.cute
print(flash_attn.cute.answer, flash_attn.__version__)
"""
    assert python(code) == "42 2.8.4"


@pytest.mark.parametrize("name", ["cute", "warmup"])
def test_what_is_not_there_says_so(name):
    """Clients probe with hasattr and import."""
    code = f"import flash_attn; print(hasattr(flash_attn, {name!r}))"
    assert python(code) == str(name == "warmup")
