"""The backward in one launch: half of the programs make dQ, the other half dK and dV and their own row statistics."""

import triton
import triton.language as tl

from flash_attn.backward.kernel import attn_bwd_dkdv, attn_bwd_dq


@triton.jit
def attn_bwd_short(
    q, k, v, out, dout, dq, dk, dv, q_strides, k_strides, v_strides, out_strides, dout_strides, dq_strides, dk_strides,
    dv_strides, lse, dlse, lse_strides, keep_share,  # as for attn_bwd_dq
    lengths,
    rows, keys,  # `sizes` of attn_bwd_dq and of attn_bwd_dkdv, then the number of programs
    band, factors, alibi, drop, F: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Grid: (the larger number of programs, 2)."""
    pid = tl.program_id(0)
    if tl.program_id(1) == 0:
        if pid < keys[7]:
            own = (out, out_strides, lse, dlse, lse_strides, keep_share)
            attn_bwd_dkdv(
                q, k, v, dout, dk, dv, q_strides, k_strides, v_strides, dout_strides, dk_strides, dv_strides,
                None, None, own, lengths, keys, band, factors, alibi, drop, F, T,
            )  # fmt: skip
    else:
        if pid < rows[7]:
            attn_bwd_dq(
                q, k, v, out, dout, dq, q_strides, k_strides, v_strides, out_strides, dout_strides, dq_strides,
                lse, dlse, lse_strides, None, None, keep_share, None, None, lengths, rows, band, factors, alibi, drop,
                F, T,
            )  # fmt: skip
