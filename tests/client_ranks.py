"""Runs in a process of its own, once per rank: a context-parallel client on its share of a sequence, over gloo.

    python client_ranks.py ring-flash-attn|diffusers RANK WORLD DIRECTORY

Writes DIRECTORY/RANK.pt: {variant: (rows of the sequence it holds, out, dq, dk, dv)}.
"""

import sys
import types
from pathlib import Path

import torch
import torch.distributed as dist

B, S, H, D = 1, 64, 4, 16
LENGTHS = (16, 48)  # of the packed sequences, in the variants that take them


def tensors() -> tuple[torch.Tensor, ...]:
    """The whole q, k, v and dout, the same in every rank."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(B, S, H, D, generator=generator).bfloat16() for _ in range(4))


def rows(how: str, rank: int, world: int) -> torch.Tensor:
    """The rows of the sequence that a rank holds."""
    every = torch.arange(S)
    if how == "stripe":
        return every[rank::world]
    if how == "zigzag":
        parts = every.chunk(2 * world)
        return torch.cat([parts[rank], parts[-1 - rank]])
    if how == "varlen":  # each packed sequence is divided by itself
        sequences = every.split(LENGTHS)
        return torch.cat([s.chunk(world)[rank] for s in sequences])
    return every.chunk(world)[rank]


def run(how: str, attend, rank: int, world: int):
    """(rows, out, dq, dk, dv) of one rank."""
    mine = rows(how, rank, world)
    q, k, v, dout = (x[:, mine].contiguous() for x in tensors())
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attend(*leaves)
    return mine, out.detach(), *torch.autograd.grad(out, leaves, dout)


def ring_flash_attn(rank: int, world: int) -> dict:
    # Its adapter imports a name that Transformers 5 has dropped, whatever flash_attn is installed.
    adapters = types.ModuleType("ring_flash_attn.adapters")
    adapters.substitute_hf_flash_attn = adapters.update_ring_flash_attn_params = None
    sys.modules["ring_flash_attn.adapters"] = adapters
    import ring_flash_attn as r

    cu = torch.tensor([0, *(n // world for n in LENGTHS)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    longest = max(LENGTHS) // world

    def packed(q, k, v):
        flat = (x.squeeze(0) for x in (q, k, v))
        return r.ring_flash_attn_varlen_func(*flat, cu, longest, causal=True)[None]

    return {
        "full": run("chunk", lambda q, k, v: r.ring_flash_attn_func(q, k, v), rank, world),
        "causal": run("chunk", lambda q, k, v: r.ring_flash_attn_func(q, k, v, causal=True), rank, world),
        "zigzag": run(
            "zigzag", lambda q, k, v: r.zigzag_ring_flash_attn_func(q, k, v, causal=True), rank, world
        ),
        "stripe": run("stripe", lambda q, k, v: r.stripe_flash_attn_func(q, k, v, causal=True), rank, world),
        "varlen": run("varlen", packed, rank, world),
    }


def diffusers(rank: int, world: int) -> dict:
    from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig
    from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn

    results = {}
    for name, degrees in {"ring": (world, 1), "ulysses": (1, world)}.items():
        context = ContextParallelConfig(ring_degree=degrees[0], ulysses_degree=degrees[1])
        mesh = dist.init_device_mesh("cpu", degrees, mesh_dim_names=("ring", "ulysses"))
        context.setup(rank, world, torch.device("cpu"), mesh)
        config = ParallelConfig(context_parallel_config=context)

        def attend(q, k, v, config=config):
            with attention_backend("flash"):
                return dispatch_attention_fn(q, k, v, parallel_config=config)

        results[name] = run("chunk", attend, rank, world)
    return results


CLIENTS = {"ring-flash-attn": ring_flash_attn, "diffusers": diffusers}

if __name__ == "__main__":
    client, rank, world, directory = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    dist.init_process_group("gloo", f"file://{directory}/rendezvous", rank=rank, world_size=world)
    torch.save(CLIENTS[client](rank, world), directory / f"{rank}.pt")
    dist.destroy_process_group()
