"""A model of the `transformers` package, in training mode with its attention by torch's SDPA.

This file imports torch and transformers only.
"""

import os
from typing import Any

from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # there is nothing to look for


def build(values: dict[str, Any], weights: dict[str, Tensor]) -> nn.Module:
    """The model that a config.json describes, with these float32 weights under the names its files have."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {key: value for key, value in values.items() if key != "architectures"}
    config = AutoConfig.for_model(**values, use_cache=False)
    kind: Any = AutoModelForCausalLM._model_mapping[type(config)]
    model: nn.Module = kind.from_pretrained(None, config=config, state_dict=weights, attn_implementation="sdpa")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def loss_of(model: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of labels [b, s] that are one token ahead already, a scalar."""
    return model(input_ids=tokens, labels=labels, shift_labels=labels).loss  # type: ignore[no-any-return]
