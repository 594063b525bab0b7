"""Quality and cost of a model: `measure` one, `compare` several side by side, and the `environment`."""

from leanformers.measure.cost import (
    FlopCount,
    FolderBytes,
    bytes_in_memory,
    bytes_of_state,
    bytes_on_disk,
    count_flops,
    parameters,
)
from leanformers.measure.environment import environment
from leanformers.measure.latency import Candidate, Timing, time_together
from leanformers.measure.measurement import Measurement
from leanformers.measure.memory import peak_memory
from leanformers.measure.run import compare, measure

__all__ = [
    "Candidate",
    "FlopCount",
    "FolderBytes",
    "Measurement",
    "Timing",
    "bytes_in_memory",
    "bytes_of_state",
    "bytes_on_disk",
    "compare",
    "count_flops",
    "environment",
    "measure",
    "parameters",
    "peak_memory",
    "time_together",
]
