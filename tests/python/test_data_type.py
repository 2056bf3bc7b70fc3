"""The data type of the small model follows the processor, and sizes follow the data type."""

import pytest
from quickstart_lib import arguments
from quickstart_lib.data_type import BYTES, choose
from quickstart_lib.fleet import arguments as fleet_arguments

AVX2 = "fpu vme sse4_2 fma avx avx2 bmi2 f16c"
PROCESSORS = [
    (f"flags\t\t: {AVX2}", "float32"),
    (f"flags\t\t: {AVX2} avx512f avx512bw avx512_vnni", "float32"),
    (f"flags\t\t: {AVX2} avx512f avx512_bf16", "bfloat16"),
    (f"flags\t\t: {AVX2} avx512f amx_tile amx_bf16", "bfloat16"),
    ("Features\t: fp asimd i8mm bf16", "bfloat16"),
    ("Features\t: fp asimd", "float32"),
    # Names that only look alike.
    (f"flags\t\t: {AVX2} avx512_bf16x\nbugs\t\t: amx_bf16", "float32"),
    ("model name\t: bf16", "float32"),
    ("", "float32"),
]


@pytest.mark.parametrize(("flags", "name"), PROCESSORS)
def test_bfloat16_is_taken_only_where_the_processor_multiplies_it(flags: str, name: str) -> None:
    assert choose(None, f"processor\t: 0\n{flags}\n").name == name


@pytest.mark.parametrize("wish", sorted(BYTES))
def test_a_wish_goes_before_the_processor(wish: str) -> None:
    for flags, _ in PROCESSORS:
        assert choose(wish, flags).name == wish


def test_an_unknown_type_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'bf16' is no data type.*bfloat16 or float32"):
        choose("bf16", "")


@pytest.mark.parametrize(
    ("wish", "dram", "nvme"), [("bfloat16", "256MiB", "2048MiB"), ("float32", "512MiB", "4096MiB")]
)
def test_the_quickstarts_tiers_hold_as_many_tokens_in_either_type(wish: str, dram: str, nvme: str) -> None:
    chosen = arguments.parse(["--dtype", wish])
    assert (chosen.data_type.name, chosen.dram_size, chosen.nvme_size) == (wish, dram, nvme)
    assert wish in chosen.data_type.sentence()
    given = arguments.parse(["--dtype", wish, "--dram-size", "1GiB", "--nvme-size", "3GiB"])
    assert (given.dram_size, given.nvme_size) == ("1GiB", "3GiB")
    assert fleet_arguments.parse(["--fleet", "--dtype", wish]).data_type == chosen.data_type
