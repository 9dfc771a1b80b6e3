"""What attention costs: exact counts, four accounting modes, GenZ re-implemented, whole models, kernel times.

Needs no GPU and no Triton. Names of seed 000 are importable from here; `USE_CORRECTED_FLASH_ATTENTION` is read and
written through to `flash_attn.cost.genz.flash_attention_config`, so every place sees the same switch.
"""

import sys
from types import ModuleType

from flash_attn.cost.accounting import (
    MODES,
    SOFTMAX_CONSTANT,
    Account,
    account,
    memory_efficiency_coefficient,
    softmax_factor,
)
from flash_attn.cost.counts import Work, count, visible_pairs
from flash_attn.cost.genz import flash_attention_config
from flash_attn.cost.genz.flash_attention_config import (
    get_flash_attention_implementation,
    set_flash_attention_mode,
)
from flash_attn.cost.genz.inference import (
    ModdelingOutput,
    chunked_moddeling,
    decode_moddeling,
    get_model_df,
    get_runtime_breakdown,
    get_summary_table,
    prefill_moddeling,
    simplify_df,
)
from flash_attn.cost.genz.layers import (
    ParallelismConfig,
    create_full_chunked_model,
    create_full_decode_model,
    create_full_prefill_model,
    get_configs,
    mha_flash_attention_chunked,
    mha_flash_attention_corrected_chunked,
    mha_flash_attention_corrected_decode,
    mha_flash_attention_corrected_prefill,
    mha_flash_attention_decode,
    mha_flash_attention_prefill,
)
from flash_attn.cost.genz.operators import Attend, Logit, OpType, ResidencyInfo
from flash_attn.cost.genz.patch import patch_genz
from flash_attn.cost.genz.system import System, Unit
from flash_attn.cost.models import ModelShape, get_model

USE_CORRECTED_FLASH_ATTENTION: bool  # a property of this module, below

__all__ = [
    "MODES",
    "SOFTMAX_CONSTANT",
    "USE_CORRECTED_FLASH_ATTENTION",
    "Account",
    "Attend",
    "Logit",
    "ModdelingOutput",
    "ModelShape",
    "OpType",
    "ParallelismConfig",
    "ResidencyInfo",
    "System",
    "Unit",
    "Work",
    "account",
    "chunked_moddeling",
    "count",
    "create_full_chunked_model",
    "create_full_decode_model",
    "create_full_prefill_model",
    "decode_moddeling",
    "flash_attention_config",
    "get_configs",
    "get_flash_attention_implementation",
    "get_model",
    "get_model_df",
    "get_runtime_breakdown",
    "get_summary_table",
    "memory_efficiency_coefficient",
    "mha_flash_attention_chunked",
    "mha_flash_attention_corrected_chunked",
    "mha_flash_attention_corrected_decode",
    "mha_flash_attention_corrected_prefill",
    "mha_flash_attention_decode",
    "mha_flash_attention_prefill",
    "patch_genz",
    "prefill_moddeling",
    "set_flash_attention_mode",
    "simplify_df",
    "softmax_factor",
    "visible_pairs",
]


class _CostModule(ModuleType):
    @property
    def USE_CORRECTED_FLASH_ATTENTION(self) -> bool:  # noqa: N802
        return flash_attention_config.USE_CORRECTED_FLASH_ATTENTION

    @USE_CORRECTED_FLASH_ATTENTION.setter
    def USE_CORRECTED_FLASH_ATTENTION(self, value: bool) -> None:  # noqa: N802
        set_flash_attention_mode(use_corrected=value)


sys.modules[__name__].__class__ = _CostModule
