"""vLLM's own CUDA platform, chosen where there is no GPU: it is told of one, and that its tensors lie in host memory.

Triton's kernels run in Triton's interpreter. To be called before anything of vLLM is used.
"""

import os
import sys
from types import ModuleType
from typing import Any

import torch

from tests.vllm.stub_cuda import kernels, torch_cuda
from tests.vllm.stub_cuda.device import Driver

_DRIVER_VERSION = "580.00.00"


def prepare_environment() -> None:
    """What has to be set before torch and Triton are imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = "0"


class _TritonDriver:
    """What Triton asks of its driver while a kernel is interpreted."""

    class utils:  # noqa: N801 - Triton's name
        @staticmethod
        def get_device_properties(_device: int) -> dict[str, int]:
            return {
                "max_shared_mem": torch_cuda.SHARED_BYTES,
                "multiprocessor_count": torch_cuda.MULTIPROCESSORS,
                "max_num_regs": 65536,
                "warpSize": 32,
            }

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, *_: object) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_device_interface(self) -> ModuleType:
        return torch.cuda


def _nvml() -> ModuleType:
    """NVML's module, of a machine with one GPU."""
    nvml = ModuleType("vllm.third_party.pynvml")
    memory = type(
        "Memory", (), {"total": torch_cuda.TOTAL_BYTES, "free": torch_cuda.FREE_BYTES, "used": torch_cuda.GIB}
    )
    answers = {
        "nvmlInit": None,
        "nvmlShutdown": None,
        "nvmlDeviceGetCount": 1,
        "nvmlDeviceGetHandleByIndex": object(),
        "nvmlDeviceGetHandleByUUID": object(),
        "nvmlDeviceGetIndex": 0,
        "nvmlDeviceGetCudaComputeCapability": torch_cuda.CAPABILITY,
        "nvmlDeviceGetName": torch_cuda.NAME,
        "nvmlDeviceGetUUID": "GPU-00000000-0000-0000-0000-000000000000",
        "nvmlDeviceGetMemoryInfo": memory,
        "nvmlDeviceGetNumaNodeId": 0,
        "nvmlSystemGetDriverVersion": _DRIVER_VERSION,
    }
    for name, answer in answers.items():
        setattr(nvml, name, lambda *_, answer=answer: answer)
    nvml.NVMLError = type("NVMLError", (Exception,), {})  # type: ignore[attr-defined]
    return nvml


def install(driver: Driver) -> None:
    """From here on vLLM runs on its CUDA platform."""
    # Imported whole before torch has a GPU: their modules look for one.
    import torch._dynamo.convert_frame
    import torch._dynamo.trace_rules

    torch._dynamo.trace_rules.get_torch_obj_rule_map()
    torch_cuda.install(driver)
    import triton
    from triton.backends import backends

    backends["nvidia"].driver.is_active = staticmethod(lambda: True)
    triton.runtime.driver.set_active(_TritonDriver())
    kernels.install()
    import vllm.platforms
    import vllm.third_party

    vllm.third_party.pynvml = sys.modules["vllm.third_party.pynvml"] = _nvml()
    # The build for the CPU is installed: it has all of vLLM's Python.
    vllm.platforms.vllm_version_matches_substr = lambda _: False
    vllm.platforms.builtin_platform_plugins = {"cuda": lambda: "vllm.platforms.cuda.NvmlCudaPlatform"}
    from vllm.platforms.cuda import CudaPlatformBase, NvmlCudaPlatform

    CudaPlatformBase.device_type, CudaPlatformBase.dispatch_key = "cpu", "CPU"
    CudaPlatformBase.dist_backend = "gloo"
    NvmlCudaPlatform.is_pin_memory_available = classmethod(lambda _cls: False)
    NvmlCudaPlatform.get_default_ir_op_priority = classmethod(_plain_operations)
    vllm.platforms._current_platform = NvmlCudaPlatform()
    _let_worker_start()
    from vllm.v1.sample.ops import topk_topp_sampler

    # Of no concern here, and Triton's interpreter does not get through it.
    topk_topp_sampler.apply_top_k_top_p_triton = topk_topp_sampler.apply_top_k_top_p_pytorch


class _TorchOfWorker:
    """torch for the module of vLLM's worker, which names its device itself: that one lies in host memory."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def device(_name: object) -> torch.device:
        return torch.device("cpu")


def _let_worker_start() -> None:
    from vllm.v1.worker import gpu_worker

    gpu_worker.torch = _TorchOfWorker()
    # Compiles kernels before they are needed; nothing is compiled here.
    gpu_worker.kernel_warmup = lambda *_: None
    init_device = gpu_worker.Worker.init_device

    def on_cuda(worker: Any) -> None:
        worker.device_config.device_type = "cuda"
        init_device(worker)
        worker.device_config.device_type = "cpu"

    gpu_worker.Worker.init_device = on_cuda


def _plain_operations(_cls: type, _vllm_config: object) -> Any:
    from vllm.config.kernel import IrOpPriorityConfig

    return IrOpPriorityConfig.with_default(["native"])
