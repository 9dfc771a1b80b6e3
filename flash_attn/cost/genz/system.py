"""The machine as GenZ describes it, in GenZ's units: FLOP in powers of ten, bytes and bytes/s in powers of two."""

from dataclasses import dataclass, fields
from typing import Any

from flash_attn.errors import ArgumentTypeError, ArgumentValueError

_DECIMAL = {"K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "m": 1e-3, "u": 1e-6, "n": 1e-9, "p": 1e-12}
_BINARY = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_COMPUTE_COST = {
    "int8": 0.5,
    "bf16": 1,
    "f32": 2,
    "int4": 0.25,
    "int2": 0.125,
    "fp8": 0.5,
    "fp6": 0.5,
    "fp4": 0.25,
}
_ITEM_BYTES = {"int8": 1, "bf16": 2, "f32": 4, "int4": 0.5, "int2": 0.25, "fp8": 1, "fp6": 0.75, "fp4": 0.5}


@dataclass(frozen=True)
class Unit:
    """The units a table is printed in; the first letter is the prefix."""

    unit_mem: str = "MB"
    unit_compute: str = "Tflops"
    unit_time: str = "msec"
    unit_bw: str = "GBsec"
    unit_freq: str = "MHz"
    unit_flop: str = "MFLOP"

    def __post_init__(self):
        for field in fields(self):
            known = _BINARY if field.name in ("unit_mem", "unit_bw") else _DECIMAL
            if getattr(self, field.name)[:1] not in known:
                raise ArgumentValueError(
                    f"{field.name} must start with one of {', '.join(known)}, got {getattr(self, field.name)!r}"
                )

    def value(self, kind: str) -> float:
        """Size of one unit of `kind`: C compute, M memory, T time, BW bandwidth, F frequency, O operations."""
        names = {
            "C": self.unit_compute, "M": self.unit_mem, "T": self.unit_time,
            "BW": self.unit_bw, "F": self.unit_freq, "O": self.unit_flop,
        }  # fmt: skip
        if kind not in names:
            raise ArgumentValueError(f"unit kind must be one of {', '.join(names)}, got {kind!r}")
        return (_BINARY if kind in ("M", "BW") else _DECIMAL)[names[kind][0]]

    def raw_to_unit(self, data: float, type: str = "C") -> float:
        return data / self.value(type)

    def unit_to_raw(self, data: float, type: str = "C") -> float:
        return data * self.value(type)


@dataclass
class System:
    """One accelerator. Arguments are in `unit`; the attributes that end in `_raw` are FLOP/s, bytes/s, bytes, Hz.

    Raises:
        ArgumentValueError: unknown `bits`, or a rate or efficiency that is not positive.
    """

    flops: float = 123  # TFLOP/s
    onchip_mem_bw: float = 18000  # GB/s
    on_chip_mem_size: float = float("inf")  # MB
    offchip_mem_bw: float = 900  # GB/s
    off_chip_mem_size: float = float("inf")  # MB
    external_mem_bw: float = 0  # GB/s; host memory, for offloading
    frequency: float = 940  # MHz
    bits: str = "bf16"
    compute_efficiency: float = 1
    memory_efficiency: float = 1
    comm_efficiency: float = 1
    interchip_link_bw: float = 25  # GB/s
    interchip_link_latency: float = 1.9  # microseconds
    unit: Unit = Unit()

    def __post_init__(self):
        if self.bits not in _ITEM_BYTES:
            raise ArgumentValueError(f"bits must be one of {', '.join(_ITEM_BYTES)}, got {self.bits!r}")
        for name in (
            "flops", "onchip_mem_bw", "offchip_mem_bw", "frequency", "interchip_link_bw", "off_chip_mem_size",
            "compute_efficiency", "memory_efficiency", "comm_efficiency",
        ):  # fmt: skip
            if not getattr(self, name) > 0:
                raise ArgumentValueError(f"{name} must be positive, got {getattr(self, name)}")

    @property
    def ops_raw(self) -> float:
        """MACs a second."""
        return self.unit.unit_to_raw(self.flops, "C") / 2

    @property
    def frequency_raw(self) -> float:
        return self.unit.unit_to_raw(self.frequency, "F")

    @property
    def link_raw(self) -> float:
        return self.unit.unit_to_raw(self.interchip_link_bw, "BW")

    @property
    def latency_s(self) -> float:
        return self.interchip_link_latency * 1e-6

    def bandwidth_raw(self, onchip: bool) -> float:
        return self.unit.unit_to_raw(self.onchip_mem_bw if onchip else self.offchip_mem_bw, "BW")

    @property
    def compute_cost(self) -> float:
        """Time of one operation relative to bf16."""
        return _COMPUTE_COST[self.bits]

    @property
    def item_bytes(self) -> float:
        return _ITEM_BYTES[self.bits]


# (TFLOP/s, GB, GB/s, interconnect GB/s, interconnect latency us) as GenZ 0.0.16 has them.
SYSTEMS = {
    "A100_40GB_GPU": (312, 40, 1600, 150, 1),
    "A100_80GB_GPU": (312, 80, 2039, 150, 1),
    "H100_GPU": (989, 80, 3400, 450, 1),
    "GH200_GPU": (1979, 144, 4900, 450, 1),
    "B100": (3500, 192, 8000, 900, 0.25),
    "GB200": (4500, 192, 8000, 900, 0.25),
    "TPUv6": (926, 32, 1640, 100, 1),
    "TPUv5e": (197, 16, 820, 50, 1),
    "TPUv5p": (459, 95, 2765, 450, 1),
    "TPUv4": (275, 32, 1228, 24, 1),
    "MI300X": (1307, 192, 5300, 400, 1),
    "MI325X": (1307, 256, 6000, 400, 1),
    "Gaudi3": (1835, 128, 3675, 300, 1),
}
_HOST_GBS = 128  # GenZ's bandwidth to host memory
_DICT_KEYS = ("Flops", "Memory_size", "Memory_BW", "ICN", "ICN_LL")


def get_inference_system(
    system_name: "str | dict | System" = "A100_40GB_GPU", bits: str = "bf16", efficiency: float = 1
) -> System:
    """A System by GenZ's name, GenZ's dict (Flops, Memory_size, Memory_BW, ICN[, ICN_LL]) or as given.

    As in GenZ `bits` and `efficiency` replace those of a given System; the argument itself is left unchanged.

    Raises:
        ArgumentValueError: unknown name (the known ones are listed), or keys missing in the dict.
    """
    common: dict[str, Any] = {"bits": bits, "compute_efficiency": efficiency, "memory_efficiency": efficiency}
    if isinstance(system_name, System):
        kept = {field.name: getattr(system_name, field.name) for field in fields(System)}
        return System(**(kept | common))
    if isinstance(system_name, str):
        if system_name not in SYSTEMS:
            raise ArgumentValueError(f"system_name must be one of {', '.join(SYSTEMS)}, got {system_name!r}")
        values = SYSTEMS[system_name]
    elif isinstance(system_name, dict):
        missing = [key for key in _DICT_KEYS[:4] if key not in system_name]
        if missing:
            raise ArgumentValueError(f"the system dict lacks {', '.join(missing)}")
        values = tuple(system_name.get(key, 1) for key in _DICT_KEYS)
    else:
        raise ArgumentTypeError(f"system_name must be str, dict or System, got {type(system_name).__name__}")
    flops, memory, bandwidth, link, latency = values
    return System(
        frequency=1000, flops=flops, off_chip_mem_size=memory * 1024, offchip_mem_bw=bandwidth,
        external_mem_bw=_HOST_GBS, interchip_link_bw=link, interchip_link_latency=latency, **common,
    )  # fmt: skip
