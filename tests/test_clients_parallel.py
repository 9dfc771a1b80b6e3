"""ring-flash-attention and Diffusers split a sequence over two processes and call this package's private operators.

The real packages, on the CPU over gloo; the joined result is compared with attention over the whole sequence.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import client_ranks
import pytest
import tiny_models
import torch

from flash_attn.problem import Gradients, Operands, Problem
from flash_attn.reference import attention as oracle
from flash_attn.reference import eager
from flash_attn.utils.testing import assert_as_close_as_torch, assert_gradients_as_close_as_torch

WORLD = 2
VARIANTS = [
    ("ring-flash-attn", "full"), ("ring-flash-attn", "causal"), ("ring-flash-attn", "zigzag"),
    ("ring-flash-attn", "stripe"), ("ring-flash-attn", "varlen"), ("diffusers", "ring"), ("diffusers", "ulysses"),
]  # fmt: skip
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def joined(tmp_path_factory):
    """client -> {variant: [out, dq, dk, dv] of the whole sequence}; every client runs once."""
    done: dict[str, dict] = {}

    def get(client: str) -> dict:
        if client not in done:
            if importlib.util.find_spec(client.replace("-", "_")) is None:
                pytest.skip(f"{client} is not installed")
            done[client] = _join(_run(client, tmp_path_factory.mktemp(client)))
        return done[client]

    return get


def _run(client: str, directory: Path) -> list[dict]:
    tiny_models.write_metadata(directory)
    path = os.pathsep.join([str(HERE.parent), str(directory), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, HERE / "client_ranks.py", client, str(rank), str(WORLD), directory],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(WORLD)
    ]  # fmt: skip
    for process in ranks:
        log = process.communicate(timeout=300)[0]
        assert process.returncode == 0, log
    return [torch.load(directory / f"{rank}.pt") for rank in range(WORLD)]


def _join(ranks: list[dict]) -> dict:
    whole = {}
    for variant in ranks[0]:
        parts = [rank[variant] for rank in ranks]
        order = torch.cat([part[0] for part in parts]).argsort()
        whole[variant] = [
            torch.cat(tensors, 1)[:, order] for tensors in zip(*(p[1:] for p in parts), strict=True)
        ]
    return whole


@pytest.mark.parametrize(("client", "variant"), VARIANTS, ids=lambda x: x)
def test_equals_attention_over_the_whole_sequence(joined, client, variant):
    got = joined(client)[variant]
    q, k, v, dout = client_ranks.tensors()
    B, S, H, D = q.shape
    causal = client == "ring-flash-attn" and variant != "full"
    problem = Problem(B, H, H, S, S, D, D, q.dtype, right=0 if causal else None, scale=D**-0.5)
    ops = Operands(q, k, v)
    if variant == "varlen":
        got, (q, k, v, dout) = [x[0] for x in got], (x[0] for x in (q, k, v, dout))
        longest = max(client_ranks.LENGTHS)
        problem = problem._replace(
            batch=len(client_ranks.LENGTHS), varlen_q=True, varlen_k=True, max_q=longest, max_k=longest
        )
        cu = torch.tensor([0, *client_ranks.LENGTHS]).cumsum(0).int()
        ops = Operands(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu)
    out, *grads = got
    assert_as_close_as_torch(out, oracle.forward(problem, ops)[0], eager.forward(problem, ops)[0], name="out")
    # upstream's factor for gradients: the clients add the parts of a gradient after rounding them
    assert_gradients_as_close_as_torch(Gradients(*grads), problem, ops, dout, factor=3)
