"""GPUs as XLA's compiler wants them described, and what their data sheets promise."""

import dataclasses

from losa_scenic.common_lib import errors
from losa_scenic.common_lib.types import DType
from losa_scenic.train_lib import device_speed


@dataclasses.dataclass(frozen=True)
class Gpu:
  """One kind of GPU.

  Attributes:
    kind: as JAX names it (`jax.Device.device_kind`).
    capability: compute capability (major, minor).
    memory: bytes that programs see, which is less than the name says.
    bandwidth: bytes a second, from and to its memory.
    int8: operations a second at best, in dense products of int8.
    cores: streaming multiprocessors.
    units: float32 units of one of them.
    threads: at most on one of them.
    shared: bytes of shared memory of one of them.
    shared_block: bytes of that which a block may ask for.
    cache: bytes of the second-level cache.
    clock: GHz.
  """

  kind: str
  capability: tuple[int, int]
  memory: int
  bandwidth: int
  int8: float
  cores: int
  units: int
  threads: int
  shared: int
  shared_block: int
  cache: int
  clock: float

  @property
  def has_bfloat16(self) -> bool:
    """Whether it multiplies bfloat16 matrices: from Ampere on. It also has the fused attention."""
    return self.capability >= (8, 0)

  def peak(self, dtype: DType | str) -> float | None:
    """Operations a second at best, in dense products; see `device_speed.peak`.

    Args:
      dtype: 'float32', 'bfloat16', 'float16' or 'int8'.
    """
    return self.int8 if dtype == 'int8' else device_speed.peak(self.kind, dtype)

  def described(self) -> str:
    """The text that XLA reads: `GpuTargetConfigProto` of its `device_description.proto`."""
    major, minor = self.capability
    return f"""gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {self.shared} shared_memory_per_block_optin: {self.shared_block}
  threads_per_core_limit: {self.threads} core_count: {self.cores} fpus_per_core: {self.units}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {self.bandwidth} l2_cache_size: {self.cache} clock_rate_ghz: {self.clock}
  device_memory_size: {self.memory} registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {major} minor: {minor} }} }}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 2 }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "{self.kind}"
"""


# Data sheets (V100 2020, A100 2021, L4 2023, H100 2024: SXM where there are several forms) and what
# CUDA's device query prints, as OpenXLA's `xla/backends/gpu/target_config/specs` has it of all but
# the L4. V100 has no int8 in its tensor cores: four products of an instruction on its other units.
TARGETS = {
  'v100-16gb': Gpu(
    kind='Tesla V100-SXM2-16GB',
    capability=(7, 0),
    memory=16_935_682_048,
    bandwidth=898_048_000_000,
    int8=62.8e12,
    cores=80,
    units=64,
    threads=2048,
    shared=98_304,
    shared_block=98_304,
    cache=6_291_456,
    clock=1.53,
  ),
  'a100-40gb': Gpu(
    kind='NVIDIA A100-SXM4-40GB',
    capability=(8, 0),
    memory=42_298_834_944,
    bandwidth=1_555_200_000_000,
    int8=624e12,
    cores=108,
    units=64,
    threads=2048,
    shared=167_936,
    shared_block=166_912,
    cache=41_943_040,
    clock=1.41,
  ),
  'a100-80gb': Gpu(
    kind='NVIDIA A100-SXM4-80GB',
    capability=(8, 0),
    memory=84_987_740_160,
    bandwidth=2_039_040_000_000,
    int8=624e12,
    cores=108,
    units=64,
    threads=2048,
    shared=167_936,
    shared_block=166_912,
    cache=41_943_040,
    clock=1.41,
  ),
  'h100-80gb': Gpu(
    kind='NVIDIA H100 80GB HBM3',
    capability=(9, 0),
    memory=84_929_347_584,
    bandwidth=3_352_320_000_000,
    int8=1979e12,
    cores=132,
    units=128,
    threads=2048,
    shared=233_472,
    shared_block=232_448,
    cache=52_428_800,
    clock=1.98,
  ),
  'l4': Gpu(
    kind='NVIDIA L4',
    capability=(8, 9),
    memory=23_583_784_960,
    bandwidth=300_096_000_000,
    int8=242e12,
    cores=58,
    units=128,
    threads=1536,
    shared=102_400,
    shared_block=101_376,
    cache=50_331_648,
    clock=2.04,
  ),
}


def find(name: str) -> Gpu:
  """The GPU of that name. Raises `UserError` for an unknown one."""
  return TARGETS[errors.one_of('GPU', name, TARGETS)]
