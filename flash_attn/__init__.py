"""Exact attention as a drop-in `flash_attn` package: pure Python, kernels compiled on first use."""

from pkgutil import extend_path

# `flash_attn.cute` may come from another distribution that is installed beside this one.
__path__ = extend_path(__path__, __name__)

__version__ = "2.8.4"

from flash_attn.dispatch import explain, use_backend
from flash_attn.errors import ArgumentTypeError, ArgumentValueError, FlashAttnError, UnsupportedError
from flash_attn.flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from flash_attn.integrations import pytorch as _pytorch

_pytorch.register()  # offers torch.nn.attention.activate_flash_attention_impl("FAPLUS"); changes nothing by itself

__all__ = [
    "ArgumentTypeError",
    "ArgumentValueError",
    "FlashAttnError",
    "UnsupportedError",
    "explain",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "use_backend",
    "warmup",
]


def warmup(problems, backward=False):
    """Compile the kernels of each `Problem` ahead of its first call; see `flash_attn.utils.example.warmup`."""
    from flash_attn.utils.example import warmup as run_once  # not needed to import the package

    run_once(problems, backward)
