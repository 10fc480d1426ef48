"""The families of models whose weights can be exchanged."""

from megatron_lite.checkpoint.huggingface.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from megatron_lite.checkpoint.huggingface.families.gpt2 import GPT2
from megatron_lite.checkpoint.huggingface.families.gpt_oss import GPT_OSS
from megatron_lite.checkpoint.huggingface.families.llama import LLAMA, MISTRAL
from megatron_lite.checkpoint.huggingface.families.mixtral import MIXTRAL
from megatron_lite.checkpoint.huggingface.families.phi3 import PHI3
from megatron_lite.checkpoint.huggingface.families.qwen import QWEN2, QWEN3, QWEN3_MOE
from megatron_lite.checkpoint.huggingface.family import Family

# In the order in which export tries them: where several fit, the first is the plainest.
FAMILIES: dict[str, Family] = {
    one.model_type: one
    for one in (
        GPT2,
        LLAMA,
        MISTRAL,
        QWEN2,
        QWEN3,
        PHI3,
        MIXTRAL,
        QWEN3_MOE,
        DEEPSEEK_V2,
        DEEPSEEK_V3,
        GPT_OSS,
    )
}
