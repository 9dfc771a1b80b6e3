"""The autograd function of this package under the name that its plan gave it; it lives in `flash_attn/attention.py`."""

from flash_attn.attention import _Attention as FlashAttnFunction

__all__ = ["FlashAttnFunction"]
