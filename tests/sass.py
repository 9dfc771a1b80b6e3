"""What ptxas made of a kernel: registers, spills, warnings and the order of instructions in its SASS."""

import collections
import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import triton.backends.nvidia as nvidia


class Report(NamedTuple):
    spills: int  # bytes stored and loaded
    warnings: list[str]  # C75xx: wgmma serialised, setmaxnreg ignored
    count: collections.Counter  # SASS instructions by name
    register_a: int  # HGMMA with operand A in registers
    overlap: list[int]  # exponentials between "all but the last product done" and "all done", per such window
    shared: int  # bytes


def inspect(compiled, tmp: Path) -> Report:
    """Assemble a compiled kernel once more for ptxas' report, and disassemble the cubin that would be launched."""
    tools = Path(nvidia.__file__).parent / "bin"
    (tmp / "k.ptx").write_text(compiled.asm["ptx"])
    (tmp / "k.cubin").write_bytes(compiled.asm["cubin"])
    log = None
    for name in ("ptxas", "ptxas-blackwell"):  # Triton 3.9 emits PTX that only the second one accepts
        command = [tools / name, "-v", "--gpu-name=sm_90a", tmp / "k.ptx", "-o", tmp / "again.cubin"]
        if os.path.exists(tools / name):
            run = subprocess.run(command, capture_output=True, text=True)
            if run.returncode == 0:
                log = run.stdout + run.stderr
                break
    assert log is not None, run.stderr
    sass = subprocess.run(
        [tools / "cuobjdump", "-sass", tmp / "k.cubin"], capture_output=True, text=True, check=True
    )
    instruction = re.compile(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_]*)([^;]*);")
    listing = instruction.findall(sass.stdout)
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log))
    return Report(
        spills,
        sorted(set(re.findall(r"C75\d\d", log))),
        collections.Counter(name for name, _ in listing),
        len(re.findall(r"HGMMA[^;]* R[0-9]+, R[0-9]+, gdesc", sass.stdout)),
        _overlap(listing),
        compiled.metadata.shared,
    )


def _overlap(listing: list[tuple[str, str]]) -> list[int]:
    windows: list[int] = []
    inside = None
    for name, operands in listing:
        if name == "WARPGROUP" and "DEPBAR" in operands:
            if "0x0" not in operands.split(",")[-1]:
                inside = 0
            elif inside is not None:
                windows.append(inside)
                inside = None
        elif name == "MUFU" and "EX2" in operands and inside is not None:
            inside += 1
    return windows
