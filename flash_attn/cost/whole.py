"""Time and memory of a whole model on one or many devices: prefill, decode, one training step.

Products run at the slower of the sustained matrix rate and the sustained memory rate; attention as `kernels` predicts
it; communication by rings. Nothing but context parallelism (which sends K and V while it computes) is overlapped.

Degrees: tensor (heads and feed-forward width), pipeline (layers), sequence (Ulysses: tokens outside attention, heads
inside, exchanged by all-to-all), context (ring: tokens everywhere). Devices = their product.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from flash_attn.cost.counts import positive
from flash_attn.cost.hardware import SUSTAINED_BANDWIDTH, SUSTAINED_MATRIX, Hardware, get_hardware
from flash_attn.cost.kernels import estimate
from flash_attn.cost.models import ModelShape, check, get_model
from flash_attn.errors import ArgumentValueError
from flash_attn.problem import Problem

PHASES = ("prefill", "decode", "train")
DTYPES = {
    "bf16": (2.0, torch.bfloat16), "fp16": (2.0, torch.float16), "fp32": (4.0, torch.float32),
    "fp8": (1.0, torch.bfloat16),
}  # fmt: skip
RESERVED = 0.06  # of the memory: context, fragmentation, communication buffers
# Mixed-precision Adam: weight and gradient in bf16, master weight, two moments in fp32.
TRAIN_BYTES = 2 + 2 + 12
# The optimizer reads the gradient and reads and writes the fp32 state, then writes the bf16 weight.
OPTIMIZER_TRAFFIC = 2 + 12 + 12 + 2


class Parallel(NamedTuple):
    """Degrees of parallelism, and into how many micro batches a pipeline cuts the batch (0: one a stage)."""

    tensor: int = 1
    pipeline: int = 1
    sequence: int = 1
    context: int = 1
    micro_batches: int = 0

    @property
    def devices(self) -> int:
        return self.tensor * self.pipeline * self.sequence * self.context


class Part(NamedTuple):
    name: str
    time_s: float  # in the whole step, on one device
    flops: float
    bytes: float
    bound: str  # "compute", "memory", "network", or what bounds the attention kernel


class ModelEstimate(NamedTuple):
    """One step: a whole prompt, one token of every sequence, or one training step."""

    model: ModelShape
    phase: str
    hardware: Hardware
    devices: int
    time_s: float
    parts: list[Part]
    memory: dict[str, float]  # bytes on the fullest device
    tokens: int  # read, made or trained on in the step

    @property
    def bound(self) -> str:
        """The part that takes longest, and what bounds it."""
        slowest = max(self.parts, key=lambda part: part.time_s)
        return f"{slowest.name} ({slowest.bound})"

    @property
    def memory_bytes(self) -> float:
        return sum(self.memory.values())

    @property
    def usable_bytes(self) -> float:
        return self.hardware.memory * (1 - RESERVED)

    @property
    def fits(self) -> bool:
        return self.memory_bytes <= self.usable_bytes

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.time_s

    @property
    def utilisation(self) -> float:
        """Model FLOPs over what the matrix units of all devices could do: MFU."""
        flops = sum(part.flops for part in self.parts) * self.devices
        return flops / (self.time_s * self.hardware.matrix_rate("bf16") * self.devices)


def estimate_model(
    model: "str | dict | ModelShape",
    phase: str = "prefill",
    hardware: "str | Hardware" = "h100",
    batch: int = 1,
    seqlen: int = 4096,
    parallel: Parallel = Parallel(),  # noqa: B008  (immutable)
    dtype: str = "bf16",
    kv_dtype: str | None = None,
    recompute: bool = False,
    backend: str | None = None,
) -> ModelEstimate:
    """Time and memory of one step of `model`.

    Args:
        phase: "prefill" reads `seqlen` tokens a sequence, "decode" makes one with `seqlen` keys in the cache, "train"
            does forward, backward and optimizer on `seqlen` tokens.
        dtype: of weights and activations: bf16, fp16, fp32 or fp8 (weights; attention then runs in bf16).
        kv_dtype: of the cache; default: dtype.
        recompute: training keeps one tensor a layer and computes the layer again in the backward.
        backend: of attention, see `kernels.estimate`.

    Raises:
        ArgumentValueError: an unknown name, a wrong size, or a degree that does not divide.
    """
    shape, hw = check(get_model(model)), get_hardware(hardware)
    if phase not in PHASES:
        raise ArgumentValueError(f"phase must be one of {', '.join(PHASES)}, got {phase!r}")
    for name, value in (("dtype", dtype), ("kv_dtype", kv_dtype or dtype)):
        if value not in DTYPES:
            raise ArgumentValueError(f"{name} must be one of {', '.join(DTYPES)}, got {value!r}")
    positive("batch", batch)
    positive("seqlen", seqlen)
    parallel = _check_parallel(shape, parallel, phase, batch, seqlen)
    step = _Step(
        shape, hw, phase, batch // parallel.micro_batches, seqlen, parallel, dtype, recompute, backend
    )
    parts = step.parts()
    rounds = parallel.micro_batches + parallel.pipeline - 1
    parts = [part._replace(time_s=part.time_s * parallel.micro_batches, flops=part.flops * parallel.micro_batches)
             for part in parts]  # fmt: skip
    busy = sum(part.time_s for part in parts)
    if rounds > parallel.micro_batches:
        bubble = busy * (rounds / parallel.micro_batches - 1)
        name = "pipeline stages one after the other" if phase == "decode" else "pipeline bubble"
        parts.append(Part(name, bubble, 0.0, 0.0, "pipeline"))
    if phase == "train":
        local = shape.parameters() / parallel.tensor / parallel.pipeline * OPTIMIZER_TRAFFIC
        parts.append(Part("optimizer", local / (hw.bandwidth * SUSTAINED_BANDWIDTH), 0.0, local, "memory"))
    total = sum(part.time_s for part in parts)
    memory = step.memory(batch, DTYPES[kv_dtype or dtype][0])
    tokens = batch * (1 if phase == "decode" else seqlen)
    return ModelEstimate(shape, phase, hw, parallel.devices, total, parts, memory, tokens)


def _check_parallel(shape: ModelShape, par: Parallel, phase: str, batch: int, seqlen: int) -> Parallel:
    for name in ("tensor", "pipeline", "sequence", "context"):
        positive(f"{name} parallelism", getattr(par, name))

    def divides(name: str, degree: int, what: str, size: int) -> None:
        if size % degree:
            raise ArgumentValueError(f"{name} parallelism must divide {what}, got {degree} and {size}")

    divides("tensor", par.tensor, "heads", shape.heads)
    divides("tensor", par.tensor, "intermediate", shape.intermediate)
    divides("pipeline", par.pipeline, "layers", shape.layers)
    divides("sequence", par.tensor * par.sequence, "heads", shape.heads)
    groups = par.tensor * par.sequence
    if shape.kv_heads % groups and groups % shape.kv_heads:
        raise ArgumentValueError(
            f"tensor x sequence parallelism must divide kv_heads or be a multiple, got {groups} and {shape.kv_heads}"
        )
    if phase != "decode":
        divides("sequence x context", par.sequence * par.context, "seqlen", seqlen)
    if par.micro_batches < 0:
        raise ArgumentValueError(f"micro_batches must be 0 (one a stage) or more, got {par.micro_batches}")
    micro = par.micro_batches or (1 if phase == "decode" or batch % par.pipeline else par.pipeline)
    if batch % micro:
        raise ArgumentValueError(f"micro_batches must divide batch, got {micro} and {batch}")
    return par._replace(micro_batches=micro)


class _Step(NamedTuple):
    """One micro batch on one stage of one device."""

    shape: ModelShape
    hw: Hardware
    phase: str
    batch: int
    seqlen: int
    par: Parallel
    dtype: str
    recompute: bool
    backend: str | None

    @property
    def size(self) -> float:
        return DTYPES[self.dtype][0]

    @property
    def layers(self) -> int:
        return self.shape.layers // self.par.pipeline

    @property
    def tokens(self) -> int:
        """Of this device, outside attention."""
        if self.phase == "decode":
            return self.batch
        return self.batch * self.seqlen // (self.par.sequence * self.par.context)

    @property
    def passes(self) -> float:
        """Products of a training step relative to the forward: gradients of inputs and of weights."""
        return 1.0 if self.phase != "train" else 4.0 if self.recompute else 3.0

    def product(
        self, name: str, rows: float, inner: float, columns: float, weights: float | None = None
    ) -> Part:
        """rows x inner times inner x columns; `weights`: elements read, when not inner x columns."""
        flops = 2 * rows * inner * columns
        moved = (rows * (inner + columns) + (inner * columns if weights is None else weights)) * self.size
        compute = flops / (self.hw.matrix_rate(self.dtype) * SUSTAINED_MATRIX)
        memory = moved / (self.hw.bandwidth * SUSTAINED_BANDWIDTH)
        bound = "compute" if compute > memory else "memory"
        return Part(name, max(compute, memory) * self.passes, flops * self.passes, moved * self.passes, bound)

    def elementwise(self, name: str, tensors: float) -> Part:
        """Reads and writes of `tensors` elements a token."""
        moved = self.tokens * tensors * self.size * (1.0 if self.phase != "train" else self.passes - 0.5)
        return Part(name, moved / (self.hw.bandwidth * SUSTAINED_BANDWIDTH), 0.0, moved, "memory")

    def network(self, name: str, bytes_each: float, devices: int, rounds: float) -> Part:
        """`rounds` of a ring over `devices`, each moving a 1/devices share of `bytes_each`."""
        if devices == 1:
            return Part(name, 0.0, 0.0, 0.0, "network")
        twice = 1.0 if self.phase != "train" else 2.0
        moved = bytes_each * (devices - 1) / devices * rounds * twice
        return Part(
            name,
            moved / self.hw.link + rounds * twice * (devices - 1) * self.hw.link_latency,
            0.0,
            moved,
            "network",
        )

    def attention(self) -> Part:
        """Of all layers of this stage; windowed layers by their own problem."""
        kinds = [
            (self.shape.layers - self.shape.windowed_layers, None),
            (self.shape.windowed_layers, self.shape.window),
        ]
        found = [self._attention(count / self.par.pipeline, window) for count, window in kinds if count]
        time_s = sum(part.time_s for part in found)
        slowest = max(found, key=lambda part: part.time_s)
        return Part(
            "attention", time_s, sum(p.flops for p in found), sum(p.bytes for p in found), slowest.bound
        )

    def _attention(self, layers: float, window: int | None) -> Part:
        shape, groups, cp = self.shape, self.par.tensor * self.par.sequence, self.par.context
        decode = self.phase == "decode"
        heads, kv_heads = shape.heads // groups, max(1, shape.kv_heads // groups)
        keys = -(-self.seqlen // cp) if decode else self.seqlen
        problem = Problem(
            self.batch, heads, kv_heads, 1 if decode else self.seqlen, keys, shape.head_dim, shape.head_dim,
            DTYPES[self.dtype][1], left=None if not window or window >= keys else window - 1,
            right=None if decode else 0,
        )  # fmt: skip
        time_s = flops = moved = 0.0
        bound = ""
        runs = {"forward": 2.0 if self.phase == "train" and self.recompute else 1.0}
        if self.phase == "train":
            runs["backward"] = 1.0
        for direction, times in runs.items():
            e = estimate(problem, direction, self.hw, self.backend)
            # A balanced ring gives each device its share of every tile, in `cp` calls.
            share = 1 if decode else cp
            time_s += times * ((e.time_s - e.parts["launch"]) / share + e.parts["launch"] * share)
            flops, moved, bound = (
                flops + times * e.matmul_flops / share,
                moved + times * e.bytes / share,
                e.bound,
            )
        if cp > 1 and not decode:  # K and V travel while the previous ones are used
            kv = 2 * self.batch * self.seqlen / cp * kv_heads * shape.head_dim * self.size * len(runs)
            ring = (cp - 1) * (kv / self.hw.link + self.hw.link_latency)
            time_s, bound = max(time_s, ring), bound if time_s >= ring else "network"
        return Part("attention", time_s * layers, flops * layers, moved * layers, bound)

    def feed_forward(self) -> list[Part]:
        s, tp, rows = self.shape, self.par.tensor, self.tokens
        dense = s.layers - s.moe_layers
        found = []

        def both(prefix: str, rows_each: float, width: float, seen: float = 1.0) -> list[Part]:
            up, down = width * s.up_projections, width
            return [
                self.product(f"{prefix}up", rows_each, s.hidden, up, seen * s.hidden * up),
                self.product(f"{prefix}down", rows_each, down, s.hidden, seen * down * s.hidden),
            ]

        if dense:
            share = dense / self.par.pipeline
            found += _times(share, both("ffn ", rows, (s.dense_intermediate or s.intermediate) / tp))
        if s.moe_layers:
            share = s.moe_layers / self.par.pipeline
            # Experts that at least one of `rows` tokens chooses, each choosing top_k at random.
            seen = s.experts * (1 - (1 - s.top_k / s.experts) ** rows)
            found += _times(share, both("experts ", rows * s.top_k, s.intermediate / tp, seen))
            found += _times(share, [self.product("router", rows, s.hidden, s.experts)])
            if s.shared_intermediate:
                found += _times(share, both("shared expert ", rows, s.shared_intermediate / tp))
        return found

    def parts(self) -> list[Part]:
        """All layers of a stage, and the classifier as if every stage had its share of it."""
        s, par, rows = self.shape, self.par, self.tokens
        q, kv = s.heads * s.head_dim / par.tensor, max(s.kv_heads / par.tensor, 1) * s.head_dim
        last = self.batch if self.phase != "train" else rows
        hidden_bytes = rows * s.hidden * self.size
        exchanged = rows * 2 * (q + kv) * self.size  # q, k, v in, out back
        layer: list[Part] = _times(
            self.layers,
            [
                self.product("qkv projection", rows, s.hidden, q + 2 * kv),
                self.product("output projection", rows, q, s.hidden),
                self.elementwise("norms, residuals, rotary", 8 * s.hidden + 2 * (q + kv)),
                self.elementwise(
                    "activation", (s.up_projections + 1) * s.intermediate * s.top_k / par.tensor
                ),
                self.network("tensor parallel all-reduce", hidden_bytes, par.tensor, 4),
                self.network("sequence parallel all-to-all", exchanged, par.sequence, 1),
            ],
        )
        parts = [self.attention(), *layer, *self.feed_forward()]
        classifier = self.product("classifier", last, s.hidden, s.vocab / par.tensor)
        parts += _times(1 / par.pipeline, [classifier])
        if par.pipeline > 1:
            twice = 2.0 if self.phase == "train" else 1.0
            send = (hidden_bytes / self.hw.link + self.hw.link_latency) * twice
            parts.append(Part("pipeline send", send, 0.0, hidden_bytes * twice, "network"))
        launches = (9.0 + 2 * (par.tensor > 1)) * self.layers * self.hw.launch * self.passes
        parts.append(Part("kernel launches", launches / 2, 0.0, 0.0, "launch"))
        return [part for part in parts if part.time_s > 0]

    def memory(self, batch: int, kv_size: float) -> dict[str, float]:
        """Bytes on the fullest device."""
        s, par = self.shape, self.par
        share = par.tensor * par.pipeline
        weights = s.parameters() / share
        width = (s.heads + 2 * s.kv_heads) * s.head_dim / par.tensor
        ffn = (s.up_projections + 1) * s.intermediate * s.top_k / par.tensor
        if self.phase == "train":
            layer = self.tokens * (4 * s.hidden + width + s.heads * s.head_dim / par.tensor + ffn) * self.size
            kept = self.tokens * s.hidden * self.size if self.recompute else layer
            # The first stage holds the activations of as many micro batches as there are stages.
            alive = min(par.pipeline, par.micro_batches)
            logits = self.tokens * s.vocab / par.tensor * 6  # bf16 and fp32
            return {
                "weights, gradients, optimizer": weights * TRAIN_BYTES,
                "activations": kept * self.layers * alive + (layer if self.recompute else 0),
                "logits": logits,
            }
        groups = min(par.tensor * par.sequence, s.kv_heads)
        kv = self._cached_tokens(batch) * 2 * s.kv_heads * s.head_dim * kv_size / groups / par.context
        activations = self.tokens * (3 * s.hidden + max(width, ffn)) * self.size
        logits = self.batch * s.vocab / par.tensor * 4
        return {"weights": weights * self.size, "KV cache": kv, "activations": activations, "logits": logits}

    def _cached_tokens(self, batch: int) -> float:
        """Tokens times layers of one stage; a windowed layer keeps its window."""
        s = self.shape
        full = (s.layers - s.windowed_layers) * self.seqlen
        windowed = s.windowed_layers * min(self.seqlen, s.window or self.seqlen)
        return batch * (full + windowed) / self.par.pipeline


def _times(number: float, parts: list[Part]) -> list[Part]:
    return [
        p._replace(time_s=p.time_s * number, flops=p.flops * number, bytes=p.bytes * number) for p in parts
    ]


def largest(fits: Callable[[int], bool], limit: int = 2**30) -> int:
    """The largest n in [0, limit] that fits, for a `fits` that never turns true again."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= limit and fits(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
