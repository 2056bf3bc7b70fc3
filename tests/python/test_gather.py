"""The gather kernel compiles for the common architectures with the NVRTC that torch brings, within its registers."""

import ctypes
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "cuda" / "gather.cu"
# A block of 1,024 threads on a multiprocessor, which has 65,536 registers.
REGISTERS_MAX = 64


def nvrtc() -> ctypes.CDLL:
    """The library as the connector finds it."""
    torch = find_spec("torch")
    if torch is None or torch.origin is None:
        pytest.skip("torch is not installed (scripts/test --quick)")
    libraries = sorted(Path(torch.origin).parents[1].glob("nvidia/*/lib/libnvrtc.so.*"), reverse=True)
    assert libraries, "torch is there without the NVRTC it brings"
    # The compiler looks for its own part by name only: it has to be there already.
    for part in libraries[0].parent.glob("libnvrtc-builtins.so.*"):
        ctypes.CDLL(str(part), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(libraries[0]))


def text(library: ctypes.CDLL, question: str, program: ctypes.c_void_p) -> bytes:
    """The answer to one of NVRTC's two-part questions."""
    size = ctypes.c_size_t()
    assert getattr(library, f"{question}Size")(program, ctypes.byref(size)) == 0
    answer = ctypes.create_string_buffer(size.value)
    assert getattr(library, question)(program, answer) == 0
    return answer.raw


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_the_kernel_compiles_without_spilling(capability: int) -> None:
    library = nvrtc()
    program = ctypes.c_void_p()
    source = SOURCE.read_bytes()
    assert library.nvrtcCreateProgram(ctypes.byref(program), source, b"gather.cu", 0, None, None) == 0
    flags = [f"--gpu-architecture=sm_{capability}".encode(), b"--ptxas-options=-v"]
    code = library.nvrtcCompileProgram(program, len(flags), (ctypes.c_char_p * len(flags))(*flags))
    log = text(library, "nvrtcGetProgramLog", program).decode()
    assert code == 0, log
    assert text(library, "nvrtcGetCUBIN", program)[:4] == b"\x7fELF"
    used = re.search(r"Used (\d+) registers", log)
    assert used is not None, log
    assert int(used[1]) <= REGISTERS_MAX
    assert re.search(r"\b0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", log), log
    assert library.nvrtcDestroyProgram(ctypes.byref(program)) == 0


def test_the_kernel_names_no_file_but_itself() -> None:
    assert "#include" not in SOURCE.read_text()
