"""Stands where FlashAttention-2 has its compiled module, for clients that import it by name."""

from flash_attn._raw import bwd, fwd, fwd_kvcache, varlen_bwd, varlen_fwd

__all__ = ["bwd", "fwd", "fwd_kvcache", "varlen_bwd", "varlen_fwd"]
