"""`rms_norm` and `RMSNorm` under flash-attn's names."""

from flash_attn.ops.triton.layer_norm import RMSNorm, rms_norm_fn

__all__ = ["RMSNorm", "rms_norm"]


def rms_norm(x, weight, epsilon):
    """x / sqrt(mean(x^2) + epsilon) * weight over the last dimension, computed in fp32, in the dtype of x."""
    return rms_norm_fn(x, weight, None, eps=epsilon)
