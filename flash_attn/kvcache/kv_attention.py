"""Attention over a KV cache under the name of the project's plan (seed 004)."""

from flash_attn.flash_attn_interface import flash_attn_with_kvcache

_flash_attn_with_kvcache = flash_attn_with_kvcache
