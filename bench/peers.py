"""Peers that only a development machine has: FlashAttention-3's forward, loaded from a shared library."""

import torch
from torch import Tensor

from flash_attn.problem import Problem
from flash_attn.utils.peers import Attention, CannotRun, Peer


def flash_attn_3(library: str) -> Peer:
    """The forward that vLLM ships (`_vllm_fa3_C.abi3.so`), through its packed interface; it has no backward."""
    torch.ops.load_library(library)

    def make(p: Problem) -> Attention:
        if p.alibi or p.dropout_p:
            raise CannotRun("FlashAttention-3 has no ALiBi and no dropout")
        cu_q, cu_k = (
            torch.arange(0, (p.batch + 1) * n, n, device=p.device, dtype=torch.int32)
            for n in (p.max_q, p.max_k)
        )
        left, right = (-1 if w is None else w for w in (p.left, p.right))

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if torch.is_grad_enabled() and q.requires_grad:
                raise CannotRun("this build has only the forward")
            packed = [t.reshape(-1, *t.shape[2:]) for t in (q, k, v)]
            out = torch.ops._vllm_fa3_C.fwd(
                *packed, None, None, None, None, cu_q, cu_k, None, None, None, p.max_q, p.max_k, None, None, None,
                None, None, None, None, None, None, p.scale, p.causal, left, right, p.softcap, True, None, 1, None,
                0, None, 1, 0, None,
            )[0]  # fmt: skip
            return out.view(*q.shape[:-1], v.shape[-1])

        return run

    return Peer("fa3", make)
