"""Stands where FlashAttention-3 has its compiled module: importing it defines `torch.ops.flash_attn_3.*` (xFormers)."""

from flash_attn.fa3 import operators  # noqa: F401
