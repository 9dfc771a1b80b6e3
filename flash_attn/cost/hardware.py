"""What machines can do by their data sheets, each number with its source; and the sustained share of it.

Rates are per second in powers of ten (FLOP/s, bytes/s); capacities in bytes. Matrix rates are dense.
"""

from typing import NamedTuple

from flash_attn.errors import ArgumentValueError

# Share of the data sheet that large, plain work sustains. Measured on one H200 (2026-11-21, torch 2.11): 8192^3 bf16
# product 694 of 989 TFLOP/s (769 to 798 on cooler ones), copy 4294 of 4800 GB/s.
SUSTAINED_MATRIX = 0.75
SUSTAINED_BANDWIDTH = 0.895
# Of the nominal L2 bandwidth: kernels that are bound by it (backward at head dim 256) reach 5.8 of 9.4 TB/s there.
SUSTAINED_L2 = 0.62
GB, MB = 10**9, 2**20


class Hardware(NamedTuple):
    """One device. `sources` names where each number is from; a field without an entry follows from the others."""

    name: str
    title: str
    matrix: dict[str, float]  # FLOP/s of dense products by input type
    bandwidth: float  # of device memory
    memory: int
    l2: int  # last-level cache, bytes
    l2_bandwidth: float
    processors: int  # SMs, CUs or cores
    clock: float  # Hz, the clock that `matrix` is stated at
    exps_per_clock: float  # exp2 a clock and processor
    shared_bandwidth: float  # shared memory, bytes a clock and processor
    link: float  # to other devices, bytes/s in one direction
    link_latency: float  # s
    launch: float  # s from the end of one kernel to the start of the next one in a stream
    wgmma: bool  # products read their operands straight from shared memory
    sources: dict[str, str]

    @property
    def exps(self) -> float:
        return self.exps_per_clock * self.processors * self.clock

    def matrix_rate(self, dtype: str) -> float:
        """FLOP/s for inputs of `dtype` (a torch dtype's name, or bf16, fp16, fp8, fp32)."""
        short = _SHORT.get(dtype, dtype)
        if short not in self.matrix:
            raise ArgumentValueError(
                f"dtype must be one of {', '.join(self.matrix)} on {self.title}, got {dtype}"
            )
        return self.matrix[short]


_SHORT = {
    "bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64", "half": "fp16",
    "float8_e4m3fn": "fp8", "float8_e5m2": "fp8",
}  # fmt: skip
_CUDA = "https://docs.nvidia.com/cuda/cuda-c-programming-guide/#arithmetic-instructions"
_MUFU = f"16 special-function results a clock and SM for every capability from 7.5 to 10.0: {_CUDA}"
_SMEM = "128 bytes a clock and SM: NVIDIA Ampere and Hopper tuning guides, shared memory"
_LAUNCH = "typical back-to-back latency of small kernels on one stream; --calibrate measures it"
_A100 = "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf"
_A100_WP = (
    "https://images.nvidia.com/aem-dam/en-zz/Solutions/data-center/nvidia-ampere-architecture-whitepaper.pdf"
)
_H100 = "https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet"
_H100_WP = "https://resources.nvidia.com/en-us-tensor-core/gtc22-whitepaper-hopper"
_H200 = "https://nvdam.widen.net/s/nb5zzzsjdf/hpc-datasheet-sc23-h200-datasheet-3002446"
_B200 = "https://resources.nvidia.com/en-us-blackwell-architecture (HGX B200, 1000 W)"
_L40S = "https://resources.nvidia.com/en-us-l40s/l40s-datasheet-28413"
_ADA = "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"
_MI300 = "https://www.amd.com/content/dam/amd/en/documents/instinct-tech-docs/data-sheets/amd-instinct-mi300x-data-sheet.pdf"
_CDNA3 = "https://www.amd.com/content/dam/amd/en/documents/instinct-tech-docs/white-papers/amd-cdna-3-white-paper.pdf"
_EPYC = "https://www.amd.com/en/products/processors/server/epyc/4th-generation-9004-and-8004-series/amd-epyc-9654.html"


def _nvidia(
    name: str, title: str, sheet: str, paper: str, *, matrix: dict, bandwidth: float, memory: float, l2: int, sms: int,
    clock: float, link: float, wgmma: bool = False, link_latency: float = 2e-6, notes: dict | None = None,
) -> Hardware:  # fmt: skip
    sources = {"matrix": sheet, "bandwidth": sheet, "memory": sheet, "link": sheet}
    sources |= {"processors": paper, "l2": paper, "clock": paper, "exps_per_clock": _MUFU}
    sources |= {
        "shared_bandwidth": _SMEM,
        "launch": _LAUNCH,
        "link_latency": "typical NCCL small-message latency",
    }
    sources["l2_bandwidth"] = f"5120 bytes a clock for the whole device, as stated for A100: {_A100_WP}"
    return Hardware(
        name, title, {k: v * 1e12 for k, v in matrix.items()}, bandwidth * GB, int(memory * GB), l2 * MB, 5120 * clock,
        sms, clock, 16, 128, link * GB, link_latency, 4e-6, wgmma, sources | (notes or {}),
    )  # fmt: skip


HARDWARE = {
    h.name: h
    for h in (
        _nvidia(
            "a100", "NVIDIA A100 80 GB SXM", _A100, _A100_WP, matrix={"bf16": 312, "fp16": 312, "fp32": 19.5},
            bandwidth=2039, memory=80, l2=40, sms=108, clock=1.41e9, link=300,
        ),
        _nvidia(
            "h100", "NVIDIA H100 80 GB SXM", _H100, _H100_WP,
            matrix={"bf16": 989.4, "fp16": 989.4, "fp8": 1978.9, "fp32": 66.9},
            bandwidth=3350, memory=80, l2=50, sms=132, clock=1.83e9, link=450, wgmma=True,
            notes={"clock": "989.4 TFLOP/s / (132 SMs x 4096 FLOP a clock)"},
        ),
        _nvidia(
            "h200", "NVIDIA H200 141 GB SXM", _H200, _H100_WP,
            matrix={"bf16": 989.4, "fp16": 989.4, "fp8": 1978.9, "fp32": 66.9},
            bandwidth=4800, memory=141, l2=50, sms=132, clock=1.83e9, link=450, wgmma=True,
            notes={"clock": "989.4 TFLOP/s / (132 SMs x 4096 FLOP a clock)"},
        ),
        _nvidia(
            "b200", "NVIDIA B200 180 GB", _B200, _B200,
            matrix={"bf16": 2250, "fp16": 2250, "fp8": 4500, "fp32": 75},
            bandwidth=7700, memory=180, l2=126, sms=148, clock=1.85e9, link=900, wgmma=True,
            notes={"clock": "2250 TFLOP/s / (148 SMs x 8192 FLOP a clock)", "l2": "cudaDeviceProp.l2CacheSize"},
        ),
        _nvidia(
            "l40s", "NVIDIA L40S 48 GB", _L40S, _ADA,
            matrix={"bf16": 362, "fp16": 362, "fp8": 733, "fp32": 91.6},
            bandwidth=864, memory=48, l2=96, sms=142, clock=2.52e9, link=32, link_latency=5e-6,
            notes={"link": "PCIe 4.0 x16"},
        ),
        _nvidia(
            "rtx4090", "NVIDIA GeForce RTX 4090 24 GB", _ADA, _ADA,
            matrix={"bf16": 165.2, "fp16": 165.2, "fp8": 330.3, "fp32": 82.6},
            bandwidth=1008, memory=24, l2=72, sms=128, clock=2.52e9, link=32, link_latency=5e-6,
            notes={"link": "PCIe 4.0 x16", "matrix": f"with fp32 accumulation: {_ADA}"},
        ),
        Hardware(
            "mi300x", "AMD Instinct MI300X 192 GB",
            {"bf16": 1307.4e12, "fp16": 1307.4e12, "fp8": 2614.9e12, "fp32": 163.4e12},
            5300 * GB, 192 * GB, 256 * MB, 17.2e12, 304, 2.1e9, 16, 128, 448 * GB, 3e-6, 6e-6, False,
            {
                "matrix": _MI300, "bandwidth": _MI300, "memory": _MI300, "processors": _MI300, "clock": _MI300,
                "l2": f"Infinity Cache: {_CDNA3}", "l2_bandwidth": f"peak of the Infinity Cache: {_CDNA3}",
                "exps_per_clock": f"quarter rate of 64 lanes a clock and CU: {_CDNA3}",
                "shared_bandwidth": f"LDS, 128 bytes a clock and CU: {_CDNA3}",
                "link": f"7 Infinity Fabric links of 64 GB/s a direction: {_MI300}",
                "link_latency": "typical RCCL small-message latency", "launch": _LAUNCH,
            },
        ),
        Hardware(
            "epyc9654", "AMD EPYC 9654, 96 cores (a CPU)",
            {"fp32": 7.37e12, "bf16": 14.7e12, "fp16": 7.37e12, "fp64": 3.69e12},
            460.8 * GB, 768 * GB, 384 * MB, 5e12, 96, 2.4e9, 2, 128, 32 * GB, 5e-6, 5e-6, False,
            {
                "matrix": f"96 cores x 2.4 GHz x 2 x 256-bit FMA (bf16 dot products: twice that): {_EPYC}",
                "bandwidth": f"12 channels of DDR5-4800: {_EPYC}", "memory": "12 modules of 64 GB",
                "processors": _EPYC, "clock": f"base clock: {_EPYC}", "l2": f"L3: {_EPYC}",
                "l2_bandwidth": "about 32 bytes a clock and core, less the fabric",
                "exps_per_clock": "polynomial of about 8 vector operations on 16 lanes",
                "shared_bandwidth": "two 512-bit L1 loads a clock", "link": "PCIe 5.0 x8",
                "link_latency": "typical", "launch": "waking a thread pool",
            },
        ),
    )
}  # fmt: skip
ALIASES = {
    "cpu": "epyc9654",
    "a100-80gb": "a100",
    "a100_80gb_gpu": "a100",
    "h100_gpu": "h100",
    "4090": "rtx4090",
}


def get_hardware(name: "str | Hardware") -> Hardware:
    """A device by name ("local": this machine, as `flash-attn cost --calibrate` measured it).

    Raises:
        ArgumentValueError: unknown name; the message lists the known ones.
    """
    if isinstance(name, Hardware):
        return name
    key = str(name).lower().replace(" ", "")
    key = ALIASES.get(key, key)
    if key == "local":
        from flash_attn.cost.calibrate import load

        return load()
    if key not in HARDWARE:
        raise ArgumentValueError(
            f"hardware must be one of {', '.join([*HARDWARE, 'cpu', 'local'])}, got {name!r}"
        )
    return HARDWARE[key]
