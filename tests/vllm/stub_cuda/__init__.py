"""vLLM's CUDA path without a GPU: its CUDA platform and GPU model runners over tensors in host memory.

Read `device` (streams and events of the stub driver in `tests/cuda/stub`), `torch_cuda` (what torch says of a GPU),
`platform` (vLLM's own CUDA platform, told that there is one), `accesses` (what attention does to the KV cache, told to
the stub's checker), `engine` (the program that a test runs).
"""
