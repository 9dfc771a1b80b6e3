"""FlashAttention-3's package name; its interface is `flash_attn_3.flash_attn_interface`."""
