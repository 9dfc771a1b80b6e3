"""The module of this name at top level, where Megatron-LM looks for it."""

from flash_attn_interface import *  # noqa: F403
