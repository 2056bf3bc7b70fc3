"""How large things are in the data type that the engines of these tests compute in.

A test names sizes in bytes of bfloat16: an engine then has as many blocks in either type.
"""

import os

from scripts.quickstart_lib.data_type import of_this_machine

# Overrides the choice by processor: bfloat16 or float32.
VARIABLE = "KVCELLAR_TEST_DTYPE"
DATA_TYPE = of_this_machine(os.environ.get(VARIABLE))
MIB = 1 << 20


def kv_bytes(bfloat16_bytes: int) -> int:
    """Bytes that hold as much KV as so many do in bfloat16."""
    return DATA_TYPE.scaled(bfloat16_bytes)


def kv_mib(bfloat16_mib: int) -> str:
    """A size for our configuration that holds as much KV as so many MiB do in bfloat16."""
    return f"{kv_bytes(bfloat16_mib)}MiB"
