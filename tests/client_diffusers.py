"""Runs in a process of its own: a tiny Flux transformer of Diffusers on each of its attention backends that is ours.

python client_diffusers.py OUT.pt      {name: output}, {name: calls of our function}
"""

import copy
import sys
from collections import Counter

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models import attention_dispatch

calls: Counter = Counter()


def count(name: str) -> None:
    """Count the calls that Diffusers makes of our function `name`."""
    function = getattr(attention_dispatch, name)

    def counted(*args, **kwargs):
        calls[name] += 1
        return function(*args, **kwargs)

    setattr(attention_dispatch, name, counted)


count("flash_attn_func")
count("flash_attn_varlen_func")
torch.manual_seed(0)
model = FluxTransformer2DModel(
    patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
).bfloat16()  # fmt: skip
inputs = dict(
    hidden_states=torch.randn(2, 16, 4), encoder_hidden_states=torch.randn(2, 7, 32),
    pooled_projections=torch.randn(2, 32), timestep=torch.ones(2), img_ids=torch.randn(16, 3),
    txt_ids=torch.zeros(7, 3),
)  # fmt: skip
rounded = {k: v if k.endswith("ids") else v.bfloat16() for k, v in inputs.items()}
outputs = {}
with torch.no_grad():
    for backend in ("native", "flash", "flash_varlen"):
        model.set_attention_backend(backend)
        outputs[backend] = model(**rounded).sample
    exact = copy.deepcopy(model).float()
    exact.set_attention_backend("_native_math")
    outputs["exact"] = exact(**{k: v.float() for k, v in rounded.items()}).sample

q, k, v = (torch.randn(2, 9, 2, 16).bfloat16().requires_grad_() for _ in range(3))
with attention_dispatch.attention_backend("flash"):
    # the call that training under context parallelism used to make to get at the lse
    outputs["negligible"] = attention_dispatch.dispatch_attention_fn(q, k, v, dropout_p=1e-30).detach()
    outputs["none"] = attention_dispatch.dispatch_attention_fn(q, k, v).detach()
    out, lse = attention_dispatch.dispatch_attention_fn(q, k, v, attention_kwargs={"return_lse": True})
    assert out.shape == q.shape and lse.shape == (2, 2, 9) and lse.dtype == torch.float32
torch.save((outputs, dict(calls)), sys.argv[1])
