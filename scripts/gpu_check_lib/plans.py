"""Which stages a plan runs, and for how long at most. Stages stand in the order of what they tell."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Plan:
    """How much is run.

    Attributes:
        total_s: all of it; what does not fit any more is skipped, and says so.
        stages: the longest that each may take. A stage that is not here is not part of the plan.
        round_trips: names of tests in `tests/hardware` to run; none: all.
        bus_mib: bytes that each measured copy moves.
        bus_repetitions: how often each copy is measured.
        cells: of the correctness of serving (`serving.CELLS`) to run; none: all.
        lengths: tokens of the prompts whose speed is measured.
        runs: prompts of each length.
        phases: engines whose speed is measured, in this order.
    """

    total_s: float
    stages: Mapping[str, float]
    round_trips: tuple[str, ...]
    bus_mib: int
    bus_repetitions: int
    cells: tuple[str, ...]
    lengths: tuple[int, ...]
    runs: int
    phases: tuple[str, ...]


# Each test once: everything that a copier can get wrong is in these, in one size.
SHORT_ROUND_TRIPS = (
    "test_a_model_on_the_default_stream",
    "test_sizes_that_are_no_words",
    "test_kernel_blocks_finer_than_blocks",
    "test_steps_in_a_row_that_compute_the_same_blocks",
)
INTERLEAVED = ("plain", "native", "ours", "nvme", "plain")

PLANS: Mapping[str, Plan] = MappingProxyType(
    {
        "first": Plan(
            total_s=530.0,
            stages=MappingProxyType(
                {
                    "facts": 15.0,
                    "smoke": 60.0,
                    "copies": 50.0,
                    "bus": 50.0,
                    "correct": 110.0,
                    "speed": 260.0,
                    "graphs": 60.0,
                    "soak": 120.0,
                }
            ),
            round_trips=SHORT_ROUND_TRIPS,
            bus_mib=128,
            bus_repetitions=3,
            cells=("V1 FLASH_ATTN BLHNC", "V2 FLASH_ATTN BLHNC", "V1 TRITON_ATTN BLHNC", "V2 FLASH_ATTN LBNHC"),
            lengths=(2048, 8192),
            runs=3,
            phases=INTERLEAVED,
        ),
        "full": Plan(
            total_s=2700.0,
            stages=MappingProxyType(
                {
                    "facts": 30.0,
                    "smoke": 120.0,
                    "copies": 400.0,
                    "bus": 300.0,
                    "correct": 600.0,
                    "speed": 900.0,
                    "graphs": 240.0,
                    "soak": 600.0,
                }
            ),
            round_trips=(),
            bus_mib=256,
            bus_repetitions=7,
            cells=(),
            lengths=(2048, 8192, 16384),
            runs=5,
            phases=INTERLEAVED,
        ),
        "again": Plan(
            total_s=230.0,
            stages=MappingProxyType(
                {"facts": 10.0, "smoke": 40.0, "copies": 40.0, "bus": 30.0, "correct": 50.0, "speed": 110.0}
            ),
            round_trips=SHORT_ROUND_TRIPS[:2],
            bus_mib=64,
            bus_repetitions=3,
            cells=("V1 FLASH_ATTN BLHNC", "V2 FLASH_ATTN BLHNC"),
            lengths=(8192,),
            runs=3,
            phases=("ours", "plain"),
        ),
    }
)
