"""Exact attention as a drop-in `flash_attn` package: pure Python, kernels compiled on first use."""

from pkgutil import extend_path

# `flash_attn.cute` may come from another distribution that is installed beside this one.
__path__ = extend_path(__path__, __name__)

__version__ = "2.8.4"
