"""ModelParallelConfig: the parallel sizes, the precision, and the rules between them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_lite.config_field import Validated, knob
from megatron_lite.lazy import LazyModule

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")


def nearest_multiples(value: int, divisor: int) -> str:
    """The multiples of `divisor` just below and above `value`, for error messages."""
    below, above = value // divisor * divisor, (value // divisor + 1) * divisor
    return f"{below} or {above}" if below > 0 else f"{above}"


def divisors(value: int) -> str:
    """The divisors of `value` as text, for error messages."""
    return ", ".join(str(candidate) for candidate in range(1, value + 1) if value % candidate == 0)


CP_COMM_TYPES = ("p2p", "all_gather", "a2a", "a2a+p2p")
"""How context parallel ranks can communicate in attention; docs/context_parallel.md says which is for what."""


@dataclass
class ModelParallelConfig(Validated):
    """What every parallel layer needs to know: sizes of the axes and the dtype it computes in.

    Field names and defaults are Megatron's. `TransformerConfig` extends it.
    """

    tensor_model_parallel_size: int = knob(1, "Ranks over which each weight matrix is split (TP).")
    pipeline_model_parallel_size: int = knob(1, "Stages into which the layers are split (PP).")
    virtual_pipeline_model_parallel_size: int | None = knob(None, "Model chunks per pipeline rank.", flag=False)
    sequence_parallel: bool = knob(
        False, "Split activations along the sequence between the tensor parallel regions (norms, dropout, residual)."
    )
    tp_comm_overlap: bool = knob(
        False,
        "Under sequence parallelism, gather and reduce-scatter parts of the sequence while others are multiplied.",
    )
    context_parallel_size: int = knob(1, "Ranks over which each sequence is split (CP).")
    hierarchical_context_parallel_sizes: list[int] | None = knob(
        None, "Sizes of the inner and outer context parallel groups for --cp-comm-type a2a+p2p."
    )
    expert_model_parallel_size: int = knob(1, "Ranks over which the experts are distributed (EP).")
    expert_tensor_parallel_size: int | None = knob(
        None, "Ranks over which each expert's matrices are split (ETP); default: the tensor parallel size."
    )

    fp16: bool = knob(False, "Compute in float16 with loss scaling; parameters keep float32 masters.")
    bf16: bool = knob(False, "Compute in bfloat16; parameters keep float32 masters.")
    fp64: bool = knob(False, "Compute and store everything in float64, to verify a layout against another.")
    params_dtype: "torch.dtype" = knob(
        None, "Compute dtype, else float32; follows --fp16, --bf16 and --fp64.", flag=False
    )
    deterministic_mode: bool = knob(False, "Choose deterministic kernels, at some cost in speed.")
    disable_bf16_reduced_precision_matmul: bool = knob(
        False,
        "Have cuBLAS add up the parts of a product in float32, in runs in bf16 and fp16, where torch lets it use the "
        "16-bit type.",
    )

    perform_initialization: bool = knob(True, "Fill new weights with initial values.", flag="--no-initialization")
    use_cpu_initialization: bool = knob(False, "Draw initial weights on the CPU, whatever the training device.")

    def __post_init__(self) -> None:
        if self.expert_tensor_parallel_size is None:
            self.expert_tensor_parallel_size = self.tensor_model_parallel_size
        self.params_dtype = self.params_dtype or torch.float32
        chosen = {torch.float16: self.fp16, torch.bfloat16: self.bf16, torch.float64: self.fp64}
        for dtype, wanted in chosen.items():
            if wanted:
                self.params_dtype = dtype

    @property
    def main_params_dtype(self) -> "torch.dtype":
        """The dtype parameters are stored and updated in: float64 under --fp64, otherwise float32."""
        return torch.float64 if self.params_dtype == torch.float64 else torch.float32

    def violations(self) -> list[str]:
        """Every rule these settings break, one sentence each."""
        found = super().violations()
        for name in (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "context_parallel_size",
            "expert_model_parallel_size",
            "expert_tensor_parallel_size",
        ):
            size = getattr(self, name)
            if size < 1:
                found.append(f"{name} is {size}, but a parallel size must be at least 1; 1 switches the axis off.")
        if self.tp_comm_overlap and not (self.sequence_parallel and self.tensor_model_parallel_size > 1):
            found.append(
                f"tp_comm_overlap is set with tensor_model_parallel_size {self.tensor_model_parallel_size} and "
                f"sequence_parallel {self.sequence_parallel}, but what overlaps is the communication of sequence "
                "parallelism: write --tensor-model-parallel-size above 1 and --sequence-parallel, or leave it out."
            )
        dtypes = [name for name in ("fp16", "bf16", "fp64") if getattr(self, name)]
        if len(dtypes) > 1:
            flags = " and ".join(f"--{name}" for name in dtypes)
            found.append(f"{flags} are given together, but a run computes in one dtype; keep one of them.")
        return found
