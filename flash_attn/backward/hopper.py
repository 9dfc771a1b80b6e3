"""The Hopper backward: a warp-specialised Gluon kernel for dK and dV (sm_90a), up to head dimension 128 for dQ as well.

A producer warp feeds Q, dO and their row statistics through TMA to two warpgroups, which share the keys of a tile
(`hopper_narrow.py`) or, above 128, the products (`hopper_wide.py`; dQ has a kernel of its own, `hopper_dq.py`).
What runs before and after it is in `hopper_pre.py`; `hopper_launch.py` starts all of them.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from flash_attn.backward import hopper_narrow, hopper_wide
from flash_attn.backward.hopper_ops import ONES_IN_REGISTERS, stacked
from flash_attn.backward.hopper_tiles import produce, write_dq, zero_ahead


@gluon.jit
def attn_bwd_hopper(
    q_desc, do_desc, k_desc, v_desc,  # one tile of (batch, heads, rows, dim), or ragged (see tile/hopper.py)
    stats_desc,  # per padded query tile, BLOCK_M of -lse (in the score's units), then of -delta: fp32, or `thirds`
    dq_desc,  # fp32 sums of dQ, 256 columns; this and the next three are None above 128
    dk_desc, dv_desc,  # like those of k and v
    units,  # of q, dout, k, v, dk, dv: (batch stride, row stride) in 16 bytes; None unless ragged
    dq_acc,  # the same sums, to be zeroed
    zeroed,  # programs that have zeroed their share of a pair's sums
    turns,  # programs that have added to each piece of dQ; None unless ordered
    seqs,  # (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k), each may be None
    sizes,  # (max_q, max_k, heads, kv_heads, batch * kv_heads, width of a group, key tiles, padded query tiles,
    # how many pairs ahead sums are zeroed, then `hopper_launch.Plan.dividers` and query heads per kv head)
    band,  # keys (left, right) of the diagonal
    scores,  # `tile/score.py: factors`
    scale,
    F: gl.constexpr, T: gl.constexpr,
):  # fmt: skip
    """dQ, dK and dV of one key tile per program; grid (key tiles * batch * kv_heads,), 12 warps or fewer."""
    # buffers of the key tile: one per warpgroup where each owns its keys
    BLOCKS: gl.constexpr = 1 if T.D == 256 else 2
    STAGES: gl.constexpr = T.STAGES
    COLS: gl.constexpr = T.D if T.BLOCK_M == 128 else T.D // 2
    dtype: gl.constexpr = q_desc.dtype
    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    q_s = gl.allocate_shared_memory(dtype, stacked(STAGES, q_desc.block_type.shape), q_desc.layout)
    do_s = gl.allocate_shared_memory(dtype, stacked(STAGES, do_desc.block_type.shape), do_desc.layout)
    k_s = gl.allocate_shared_memory(dtype, stacked(BLOCKS, k_desc.block_type.shape), k_desc.layout)
    v_s = gl.allocate_shared_memory(dtype, stacked(BLOCKS, v_desc.block_type.shape), v_desc.layout)
    # dS; above 128 P
    ds_s = gl.allocate_shared_memory(dtype, [2 * T.DS_STAGES, 64, T.BLOCK_M], SWIZZLED)
    if T.D < 256:  # dQ on its way
        dq_s = gl.allocate_shared_memory(gl.float32, [2, 64 * COLS // 256, 256], dq_desc.layout)
    STATS: gl.constexpr = stacked(STAGES, stats_desc.block_type.shape)
    lse_s = gl.allocate_shared_memory(stats_desc.dtype, STATS, stats_desc.layout)
    delta_s = gl.allocate_shared_memory(stats_desc.dtype, STATS, stats_desc.layout)
    ones_s = lse_s  # a tuple of captured values cannot hold None
    if T.FOLD and not ONES_IN_REGISTERS:
        ones_s = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 16], stats_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    kv_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(do_full.index(i), count=1)
    mbarrier.init(kv_full.index(0), count=1)
    dq_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(dq_empty.index(i), count=1)
    fence_async_shared()
    bars = (q_full, do_full, kv_full, dq_empty)
    loads = (q_desc, do_desc, k_desc, v_desc, stats_desc)
    loaded = (q_s, do_s, k_s, v_s, lse_s, delta_s)
    problem = (seqs, sizes, band, scores, scale)
    load = (loads, units, zeroed, turns, loaded, bars, problem)
    # 240 registers for a consumer's thread, 24 for the producer's
    if T.D == 256:
        work = ((dk_desc, dv_desc), units, (q_s, do_s, k_s, v_s, lse_s, delta_s, ds_s), bars, problem)
        gl.warp_specialize([
            (hopper_wide.sum_dv, (work, F, T)), (hopper_wide.sum_dk, (work, F, T)), (produce, (load, F, T)),
        ], [4, 1], [240, 24])  # fmt: skip
    else:
        rings = (q_s, do_s, k_s, v_s, lse_s, delta_s, ds_s, dq_s, ones_s)
        tile = ((dq_desc, dk_desc, dv_desc), units, rings, bars, problem)
        if T.ORDERED:
            write = (dq_desc, dq_acc, zeroed, turns, dq_s, bars, problem)
            gl.warp_specialize([
                (hopper_narrow.consume, (tile, 0, F, T)), (hopper_narrow.consume, (tile, 1, F, T)),
                (produce, (load, F, T)), (write_dq, (write, 0, F, T)), (write_dq, (write, 1, F, T)),
            ], [4, 1, 1, 1], [240, 24, 24, 24])  # fmt: skip
        else:
            gl.warp_specialize([
                (hopper_narrow.consume, (tile, 0, F, T)), (hopper_narrow.consume, (tile, 1, F, T)),
                (produce, (load, F, T)), (zero_ahead, (dq_acc, zeroed, seqs, sizes, T)),
            ], [4, 1, 1], [240, 24, 24])  # fmt: skip
