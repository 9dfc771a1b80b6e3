"""GenZ's operators: sizes, operations and roofline time of one row of a model.

A row is [name, B, *sizes, residency, op_type]; sizes of Logit and Attend are (H, M, N, D, Hkv).
"""

from enum import IntEnum
from math import prod
from typing import Any

from flash_attn.cost.genz import flash_attention_config as config
from flash_attn.cost.genz.system import System, Unit
from flash_attn.errors import ArgumentValueError


class OpType(IntEnum):
    GEMM = 3
    Logit = 4
    Attend = 5
    Sync = 6
    Logit_BM_PREFILL = 9  # over the prefix that all beams share: read once for all of them
    Attend_BM_PREFILL = 10
    REPEAT = 13
    ENDREPEAT = 14


class ResidencyInfo(IntEnum):
    """Which of (A, B = weights or K/V, C = output) stay on chip."""

    All_offchip = 0
    A_onchip = 1
    B_onchip = 2
    C_onchip = 3
    AB_onchip = 4
    AC_onchip = 5
    BC_onchip = 6
    All_onchip = 7


class CollectiveType(IntEnum):
    AllReduce = 1
    All2All = 2
    AllGather = 3
    MessagePass = 5


_ON_CHIP = {
    0: (), 1: (0,), 2: (1,), 3: (2,), 4: (0, 1), 5: (0, 2), 6: (1, 2), 7: (0, 1, 2),
}  # fmt: skip
MEMORY_VIEWS = ("residency", "coefficient")


class Operator:
    """One row. `shapes()` gives the three tensors, `get_num_ops()` the multiply-adds."""

    kind = ""
    intermediate: int | None = None  # the tensor that flash attention never stores: S or P

    def __init__(self, dim: list[Any]):
        self.name, self.dim = dim[0], dim[1:]

    def shapes(self) -> tuple[tuple, tuple, tuple]:
        raise NotImplementedError

    def get_num_ops(self) -> float:
        raise NotImplementedError

    def dimension(self) -> Any:
        return [list(shape) for shape in self.shapes()]

    def sizes(self, system: System) -> list[float]:
        """Bytes of (A, B, C)."""
        return [prod(shape) * system.item_bytes for shape in self.shapes()]

    def on_chip(self, intermediate_on_chip: bool) -> set[int]:
        resident = set(_ON_CHIP[self.dim[-2]])
        if intermediate_on_chip and self.intermediate is not None:
            resident.add(self.intermediate)
        return resident

    def memory_efficiency_coefficient(self, intermediate_on_chip: bool, system: System) -> float:
        """All bytes over those that flash attention moves (seed 000's benefit of flash, per operator)."""
        sizes, resident = self.sizes(system), self.on_chip(intermediate_on_chip)
        moved = sum(size for i, size in enumerate(sizes) if i not in resident)
        return sum(sizes) / moved if moved else float("inf")

    def memory_time(self, system: System, intermediate_on_chip: bool, view: str) -> float:
        """Seconds; `view` credits flash attention through residency or through the coefficient, never both."""
        sizes, resident = self.sizes(system), self.on_chip(intermediate_on_chip)
        if view == "coefficient" and self.intermediate is not None:
            plain = sum(sizes) / system.bandwidth_raw(onchip=False)
            return plain / self.memory_efficiency_coefficient(intermediate_on_chip, system)
        return sum(size / system.bandwidth_raw(onchip=i in resident) for i, size in enumerate(sizes))

    def communication_time(self, system: System) -> float:
        return 0.0

    def characteristics(self, system: System, unit: Unit) -> dict[str, Any]:
        """GenZ's row without times; operations are MACs."""
        a, b, c = self.sizes(system)
        ops, data = self.get_num_ops(), a + b + c
        return self._row(unit, (a, b, c), ops, {"Op Intensity": ops / data if data else 0})

    def roofline(self, system: System, unit: Unit, intermediate_on_chip: bool, view: str) -> dict[str, Any]:
        """GenZ's row with times; operations are FLOPs, twice the MACs."""
        a, b, c = self.sizes(system)
        flops, data = self.get_num_ops() * 2, a + b + c
        compute = self.get_num_ops() * system.compute_cost / system.ops_raw / system.compute_efficiency
        memory = self.memory_time(system, intermediate_on_chip, view) / system.memory_efficiency
        memory = memory if compute else 0  # GenZ: a row without operations moves nothing
        comm = self.communication_time(system) / system.comm_efficiency
        total = max(compute, memory, comm)
        ratio = compute / memory if memory else 0
        bound = "Collective" if ratio == 0 else "Compute" if ratio > 1 else "Memory"
        head = {"Bound": bound, "C/M ratio": ratio, "Op Intensity": flops / data if data else 0}
        head |= {
            f"Latency ({unit.unit_time})": unit.raw_to_unit(total, "T"),
            "Cycles": total * system.frequency_raw,
        }
        head |= {"C Effcy": system.compute_efficiency}
        row = self._row(unit, (a, b, c), flops, head)
        row[f"Throughput ({unit.unit_compute})"] = unit.raw_to_unit(flops / total if total else 0, "C")
        times = {"Compute": compute, "Memory": memory, "Communication": comm}
        row |= {f"{name} time ({unit.unit_time})": unit.raw_to_unit(t, "T") for name, t in times.items()}
        return row | {f"{name} cycle": t * system.frequency_raw for name, t in times.items()}

    def _row(self, unit: Unit, sizes: tuple[float, float, float], ops: float, head: dict) -> dict[str, Any]:
        row = {"Layer Name": self.name, "Op Type": self.kind, "Dimension": self.dimension()} | head
        row[f"Num ops ({unit.unit_flop})"] = unit.raw_to_unit(ops, "O")
        for name, size in zip(
            ("Input_a", "Input_w", "Output", "Total Data"), (*sizes, sum(sizes)), strict=True
        ):
            row[f"{name} ({unit.unit_mem})"] = unit.raw_to_unit(size, "M")
        return row


class GEMM(Operator):
    kind = "GEMM"

    def shapes(self):
        batch, m, n, k = self.dim[:4]
        return (batch, k, n), (m, k), (batch, m, n)

    def dimension(self):
        return [[list(shape) for shape in self.shapes()]]

    def get_num_ops(self):
        return prod(self.dim[:4])


class _AttentionProduct(Operator):
    def __init__(self, dim):
        super().__init__(dim)
        heads, kv_heads = self.dim[1], self.dim[5]
        if heads % kv_heads:
            raise ArgumentValueError(f"Hkv must divide H, got H={heads}, Hkv={kv_heads}")

    def get_num_ops(self) -> float:
        """B H M N D multiply-adds; times C under seed 000's correction, read from the switch at call time."""
        batch, heads, m, n, d = self.dim[:5]
        return batch * heads * m * n * d * config.softmax_constant()


class Logit(_AttentionProduct):
    """S = Q K^T."""

    kind, intermediate = "Logit", 2

    def shapes(self):
        batch, heads, m, n, d, kv_heads = self.dim[:6]
        return (batch, heads, m, d), (batch, kv_heads, n, d), (batch, heads, m, n)


class Attend(_AttentionProduct):
    """O = P V."""

    kind, intermediate = "Attend", 0

    def shapes(self):
        batch, heads, m, n, d, kv_heads = self.dim[:6]
        return (batch, heads, m, n), (batch, kv_heads, n, d), (batch, heads, m, d)


class _Empty(Operator):
    def shapes(self):
        return (0,), (0,), (0,)

    def get_num_ops(self):
        return 0


class Repeat(_Empty):
    kind = "Repeat"

    def dimension(self):
        return self.dim[1]


class EndRepeat(Repeat):
    kind = "EndRepeat"


class Sync(_Empty):
    """Data moved between chips: (B, M, N) elements over `nodes`."""

    kind = "Sync"

    def __init__(self, dim):
        super().__init__(dim)
        self.nodes, self.collective = self.dim[-3], self.dim[-2]

    @property
    def _idle(self) -> bool:
        return self.nodes == 1 and self.collective != CollectiveType.MessagePass

    def dimension(self):
        return None if self._idle else list(self.dim[:3])

    def communication_time(self, system):
        """Ring collectives with a start-up of 5 us; a message is one hop."""
        data = 0 if self._idle else prod(self.dim[:3]) * system.item_bytes
        if not data:
            return 0.0
        latency, link, n = system.latency_s, system.link_raw, self.nodes
        if self.collective == CollectiveType.MessagePass:
            return latency + data / link
        if n == 1:
            return 0.0
        one_round = (n - 1) * (latency + data / n / link)
        return 5e-6 + one_round * (2 if self.collective == CollectiveType.AllReduce else 1)


OPERATORS = {
    OpType.GEMM: GEMM, OpType.Logit: Logit, OpType.Attend: Attend, OpType.Sync: Sync,
    OpType.Logit_BM_PREFILL: Logit, OpType.Attend_BM_PREFILL: Attend,
    OpType.REPEAT: Repeat, OpType.ENDREPEAT: EndRepeat,
}  # fmt: skip
