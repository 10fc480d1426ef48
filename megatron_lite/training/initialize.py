"""Start-up and shutdown of one rank: device, threads, process groups, random numbers."""

import ctypes
import os
import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_lite import parallel_state
from megatron_lite.arguments import RunConfig
from megatron_lite.ops.grouped_linear import choose_backend
from megatron_lite.ops.sums_in_float32 import sums_in_float32
from megatron_lite.ops.tf32 import tf32
from megatron_lite.optimizer import OptimizerConfig
from megatron_lite.tensor_parallel.layers import way_of_overlap
from megatron_lite.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron_lite.transformer.attention_choices import describe_communication
from megatron_lite.transformer.fp8 import describe_fp8
from megatron_lite.transformer.moe.experts import grouped_backend
from megatron_lite.transformer.transformer_config import TransformerConfig

# Parameters of mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def training_device(backend: str | None = None) -> torch.device:
    """This rank's device: its own GPU where there are GPUs, the CPU otherwise and where gloo is asked for."""
    if torch.cuda.is_available() and backend != "gloo":
        return parallel_state.local_cuda_device()
    return torch.device("cpu")


def print_rank_0(text: str) -> None:
    """Print on the first rank only."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(text, flush=True)


def print_rank_last(text: str) -> None:
    """Print on the last rank only: the one with the loss, whose output Megatron's users watch."""
    if not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1:
        print(text, flush=True)


@contextmanager
def distributed_environment(config: RunConfig) -> Iterator[torch.device]:
    """Everything a rank needs before it builds a model; yields the device and takes all down again at the end."""
    device = training_device(config.distributed.distributed_backend)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        _share_cores()
    if config.transformer.deterministic_mode:
        _choose_deterministic_kernels()
    parallel_state.initialize_torch_distributed(
        config.distributed.distributed_timeout_minutes, config.distributed.distributed_backend
    )
    initialize_parallel_groups(config)
    set_random_seed(config.rng.seed)
    # What a 16-bit run multiplies in float32 (in routers, and in attention without a kernel) comes of numbers of 16
    # bits, of which TF32 loses none, and is rounded to 16 bits soon.
    narrow = device.type == "cuda" and config.transformer.params_dtype.itemsize == 2
    try:
        with ExitStack() as settings:
            if narrow:
                settings.enter_context(tf32())
            if config.transformer.disable_bf16_reduced_precision_matmul:
                settings.enter_context(sums_in_float32())
            yield device
    except BaseException:
        # Taking groups down waits for the other ranks, which may never come; the error must be seen before that.
        if config.world_size == 1:
            parallel_state.shutdown()
        raise
    parallel_state.shutdown()


def keep_freed_memory(device: torch.device) -> None:
    """On a CPU have the C library keep large blocks of memory that are freed, as the allocator for a GPU does.

    By default glibc returns them to the system and gets them anew, with a page fault for each 4 KiB: 3 to 8% of the
    processor time of a small step. Does nothing where the C library is another one, or the user tuned it.
    """
    tuned = any(name.startswith("MALLOC_") or name in ("LD_PRELOAD", "GLIBC_TUNABLES") for name in os.environ)
    if device.type != "cpu" or tuned or not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        if not mallopt(_M_MMAP_THRESHOLD, 2**30):
            mallopt(_M_MMAP_THRESHOLD, 2**25)  # as much as older versions allow


def initialize_parallel_groups(config: RunConfig) -> None:
    """Megatron's groups for the sizes in `config`, over the ranks of the process group that is up."""
    sizes = config.transformer
    data_and_context = config.data_parallel_size * sizes.context_parallel_size
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=sizes.tensor_model_parallel_size,
        pipeline_model_parallel_size=sizes.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=sizes.virtual_pipeline_model_parallel_size,
        context_parallel_size=sizes.context_parallel_size,
        hierarchical_context_parallel_sizes=(
            sizes.hierarchical_context_parallel_sizes if sizes.has_hierarchical_context_parallelism else None
        ),
        expert_model_parallel_size=sizes.expert_model_parallel_size,
        expert_tensor_parallel_size=sizes.expert_tensor_parallel_size,
        num_distributed_optimizer_instances=config.ddp.number_of_replicas(data_and_context),
        distributed_timeout_minutes=config.distributed.distributed_timeout_minutes,
        order=config.distributed.order,
    )


def set_random_seed(seed: int) -> None:
    """Seed every generator of this rank; streams differ between ranks where their tensors do."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def _share_cores() -> None:
    """Give each local rank its part of the cores; torchrun's default of one thread each leaves cores idle."""
    if "LOCAL_WORLD_SIZE" in os.environ and _launcher_chose_threads():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ["LOCAL_WORLD_SIZE"])))


def _launcher_chose_threads() -> bool:
    """Return True if OMP_NUM_THREADS is torchrun's default and not a user's wish.

    torchrun sets it to 1 for its ranks where it is not set. The environment that torchrun itself was started with,
    which Linux shows, tells the two apart; elsewhere the 1 is taken for a wish.
    """
    if os.environ.get("OMP_NUM_THREADS") != "1":
        return "OMP_NUM_THREADS" not in os.environ
    try:
        started_with = Path(f"/proc/{os.getppid()}/environ").read_bytes()
    except OSError:
        return False
    return not any(variable.startswith(b"OMP_NUM_THREADS=") for variable in started_with.split(b"\0"))


def _choose_deterministic_kernels() -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")  # Transformer Engine's attention
    torch.use_deterministic_algorithms(True)
    # It would fill all memory before it is written, by a kernel each; nothing here reads memory before.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


def _optimizer(config: OptimizerConfig) -> str:
    """What updates the weights, for the line at start-up."""
    host = f", {config.host_fraction:.0%} of moments in the host's memory" if config.host_fraction else ""
    if config.optimizer == "muon":
        steps = f"{config.muon_coefficient_type}, {config.muon_num_ns_steps} steps"
        return f"muon ({steps}), the rest {config.adam_impl} fused adam{host}"
    stored = ""
    if config.use_precision_aware_optimizer:
        stored = f" (moments stored in {config.exp_avg_dtype} and {config.exp_avg_sq_dtype})"
    kernel = config.adam_impl if config.optimizer == "adam" else "torch"
    return f"{kernel} fused {config.optimizer}{stored}{host}"


def _queues(strategy: str | None) -> str:
    """Return a note on a setting that helps tensor parallelism overlap and hinders sharded data parallelism.

    With one hardware queue a kernel waits for those that were queued before it on any stream: FSDP2's gathers and
    reductions, which run on streams of their own, then wait for the computation that they should overlap.
    """
    if os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") != "1" or strategy in (None, "no_shard"):
        return ""
    return (
        f"note: CUDA_DEVICE_MAX_CONNECTIONS is 1 with data_parallel_sharding_strategy {strategy}, whose communication "
        "overlaps less with computation then: unset it, unless tensor parallelism gains more by it."
    )


def _grouped_products(sizes: TransformerConfig, device: torch.device) -> str:
    """What multiplies the experts' matrices."""
    if not sizes.moe_grouped_gemm:
        return "loop (--moe-grouped-gemm computes experts together)"
    width = (sizes.moe_ffn_hidden_size or 0) // (sizes.expert_tensor_parallel_size or 1)
    return choose_backend(sizes.params_dtype, device, sizes.hidden_size, width, grouped_backend(sizes))


def announce(config: RunConfig, device: torch.device) -> None:
    """Say once what this run is made of: layout, device, accelerators, and flags that change nothing here."""
    sizes = config.transformer
    where = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu, {torch.get_num_threads()} threads a rank"
    )
    context = ""
    if sizes.context_parallel_size > 1:
        context = f" x context {sizes.context_parallel_size} ({describe_communication(sizes)})"
    pipeline = ""
    if sizes.pipeline_model_parallel_size > 1:
        pipeline = f" x pipeline {sizes.pipeline_model_parallel_size} ({sizes.schedule})"
    experts = ""
    if sizes.num_moe_experts is not None:
        experts = (
            f"; {sizes.num_moe_experts} experts in {sizes.num_moe_layers} layers: expert parallel "
            f"{sizes.expert_model_parallel_size} x expert tensor {sizes.expert_tensor_parallel_size} "
            f"({sizes.moe_token_dispatcher_type})"
        )
    dtype = str(sizes.params_dtype).removeprefix("torch.")
    print_rank_0(
        f"megatron_lite on {config.world_size} ranks ({where}), {dtype}: tensor {sizes.tensor_model_parallel_size}"
        f"{' with sequence' if sizes.sequence_parallel else ''}{context}{pipeline} x data {config.data_parallel_size} "
        f"({config.ddp.data_parallel_sharding_strategy}){experts}; global batch {config.global_batch_size} sequences "
        f"of {config.data.seq_length} tokens"
    )
    if sizes.pipeline_model_parallel_size > 1:
        for line in sizes.pipeline_layout.describe():
            print_rank_0(f"  {line}")
    compiled = "compiled" if config.training.compile else "eager (--compile compiles them)"
    grouped = "" if sizes.num_moe_experts is None else f" · grouped products: {_grouped_products(sizes, device)}"
    way = way_of_overlap(sizes, parallel_state.get_tensor_model_parallel_group(check_initialized=False))
    overlap = "" if way is None else f" · tensor parallel overlap: {way}"
    engine = sizes.transformer_impl == "transformer_engine"
    products = [describe_fp8(sizes, device)] if sizes.fp8 is not None else []
    products += ["transformer engine"] if engine and (sizes.fp8 is None or sizes.first_last_layers_bf16) else []
    linear = f" · linear layers: {'; '.join(products)}" if products else ""
    cudnn = f", cudnn {torch.backends.cudnn.version()}" if device.type == "cuda" else ""
    attention = "transformer engine" if engine and sizes.attention_backend == "auto" else "torch sdpa"
    print_rank_0(
        f"attention: {attention} ({sizes.attention_backend}{cudnn}) · optimizer: {_optimizer(config.optimizer)} · "
        f"layers: {compiled}{grouped}{linear}{overlap}"
    )
    for notice in config.notices:
        print_rank_0(f"note: {notice}")
    if device.type == "cuda" and (line := _queues(config.ddp.data_parallel_sharding_strategy)):
        print_rank_0(line)
    if config.optimizer.host_fraction and device.type == "cpu":
        print_rank_0(
            "note: --optimizer-cpu-offload: frees nothing on a CPU, whose memory is the host's; moments are copied."
        )
