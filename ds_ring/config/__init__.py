"""What a run is: its fields, and the file that holds them."""

from ds_ring.config.run_config import RunConfig, flatten
from ds_ring.config.sections import (
    BASELINE_DEGREES,
    BenchmarkConfig,
    DType,
    FusionChoice,
    Implementation,
    Mode,
    ParallelConfig,
    RingConfig,
    RingVariant,
    TransportName,
    WorkloadConfig,
)

__all__ = [
    "BASELINE_DEGREES",
    "BenchmarkConfig",
    "DType",
    "FusionChoice",
    "Implementation",
    "Mode",
    "ParallelConfig",
    "RingConfig",
    "RingVariant",
    "RunConfig",
    "TransportName",
    "WorkloadConfig",
    "flatten",
]
