"""Where the time of a step goes, by kind of operation, as torch's profiler sees it."""

import re
from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# The first kind whose pattern is found in the name of an operator (on a GPU, of a kernel) takes its time.
KINDS = {
    "compiled kernels": r"^triton_|^cpp_fused|^graph_\d",
    "attention": r"attention|flash|fmha|sdpa|cudnn_generated",
    "matrix products": r"::(mm|addmm_?|bmm|baddbmm|_grouped_mm|_scaled(_grouped)?_mm)$|gemm|nvjet|cutlass|s16816",
    "optimizer": r"adam|sgd|foreach|multi_tensor",
    "communication": r"nccl|gloo|c10d|all_reduce|all_gather|reduce_scatter|all_to_all",
    "softmax of the loss": r"softmax|amax|scatter_add|gather",
    "copies and casts": r"copy_|::cat|memcpy|memset|fill_|CatArray|clone",
}
REST = "elementwise, norms and the rest"


def kind_of(name: str) -> str:
    """The kind of operation that an operator or kernel belongs to."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), REST)


def breakdown(step: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Milliseconds of one call by kind, largest first: of operators in this thread on a CPU, of kernels on a GPU.

    On a CPU waiting for another rank counts, as communication. One call before is not looked at.
    """
    step()
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        step()
        if on_gpu:
            torch.cuda.synchronize(device)
    found = dict.fromkeys([*KINDS, REST], 0.0)
    for event in profiler.key_averages():
        # The operators that launched a kernel carry its time as well, and so do marks around whole steps.
        if on_gpu and (event.device_type != DeviceType.CUDA or event.is_user_annotation):
            continue
        time = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        found[kind_of(event.key)] += time / 1e3
    return dict(sorted(found.items(), key=lambda item: -item[1]))
