"""FlashAttention-3's interface on this package: `operators` below its functions, `interface` the functions.

Clients import it as `flash_attn_interface` or `flash_attn_3.flash_attn_interface`, as they import the original.
"""
