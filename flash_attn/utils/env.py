"""The environment variables of this package; no other module reads one of them.

FLASH_ATTN_BACKEND  run every call on this backend, or raise (see `flash_attn.dispatch.BACKENDS`)
FLASH_ATTN_CHECK    1: also check the values of GPU tensors (cu_seqlens, block_table, ...), at the cost of a
                    synchronisation per call

Each is read once, at the first call that needs it: a look into os.environ costs a microsecond of every call.
"""

import os
from functools import cache


@cache
def backend() -> str | None:
    return os.environ.get("FLASH_ATTN_BACKEND") or None


@cache
def check_values() -> bool:
    return os.environ.get("FLASH_ATTN_CHECK") == "1"
