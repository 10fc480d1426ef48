"""Small corpora and settings whose sample order Megatron-LM was run on; its results are in megatron_golden.json."""

import hashlib
from typing import Any

import numpy as np

from megatron_lite.datasets.indexed_dataset import IndexedDatasetBuilder

VOCAB_SIZE = 500
EOD = 0

SIZES = {"a": (180, 100), "b": (60, 40), "c": (25, 300)}
"""Name -> number of documents, longest document."""

CASES: dict[str, dict[str, Any]] = {
    "part of an epoch": {"sizes": [50, 4, 2], "config": {"sequence_length": 32, "blend": (["a"], None)}},
    "exactly what one epoch has": {"sizes": [218, 4, 2], "config": {"sequence_length": 32, "blend": (["a"], None)}},
    "last epoch mostly used": {"sizes": [850, 42, 11], "config": {"sequence_length": 32, "blend": (["a"], None)}},
    "last epoch apart": {"sizes": [600, 55, 11], "config": {"sequence_length": 32, "blend": (["a"], None)}},
    "many epochs of long samples": {"sizes": [70, 7, 3], "config": {"sequence_length": 2048, "blend": (["a"], None)}},
    "whole epoch, last validation sample padded": {
        "sizes": [None, None, None],
        "config": {"sequence_length": 32, "blend": (["a"], None), "drop_last_partial_validation_sequence": False},
    },
    "no extra token": {
        "sizes": [600, 55, 11],
        "config": {"sequence_length": 32, "blend": (["a"], None), "add_extra_token_to_sequence": False},
    },
    "masks": {
        "sizes": [300, 4, 2],
        "config": {
            "sequence_length": 64,
            "blend": (["a"], None),
            "reset_position_ids": True,
            "reset_attention_mask": True,
            "eod_mask_loss": True,
        },
    },
    "blend with weights": {
        "sizes": [900, 90, 20],
        "config": {"sequence_length": 16, "blend": (["a", "b", "c"], [0.2, 3.0, 0.55])},
    },
    "blend by size": {"sizes": [500, 60, 9], "config": {"sequence_length": 16, "blend": (["a", "b", "c"], None)}},
    "blend of everything": {
        "sizes": [None, None, None],
        "config": {"sequence_length": 16, "blend": (["c", "a", "b"], None)},
    },
    "a blend per split": {
        "sizes": [400, 77, 30],
        "config": {
            "sequence_length": 16,
            "blend_per_split": [(["a", "c"], [1.0, 2.0]), (["b"], None), (["c", "b"], None)],
            "split": None,
        },
    },
    "mock": {"sizes": [5000, 200, 10], "config": {"sequence_length": 128, "split": None}},
}


class PlainTokenizer:
    """Only what datasets ask of a tokenizer."""

    vocab_size = VOCAB_SIZE
    eod = EOD
    eos = EOD

    def __init__(self, pad: int = -1) -> None:
        self.pad = pad
        self.unique_identifiers = {"class": "PlainTokenizer", "vocab_size": VOCAB_SIZE}


def settings(case: dict[str, Any], cache: str | None) -> dict[str, Any]:
    """Arguments of GPTDatasetConfig for a case, in Megatron's package as well as here."""
    base = {
        "random_seed": 1234,
        "split": "8,1,1",
        "tokenizer": PlainTokenizer(),
        "path_to_cache": cache,
        "reset_position_ids": False,
        "reset_attention_mask": False,
        "eod_mask_loss": False,
        "create_attention_mask": True,
    }
    return base | case["config"]


def write_corpora() -> None:
    """Write the pairs a, b and c into the current folder."""
    for number, (name, (num_documents, longest)) in enumerate(SIZES.items()):
        random = np.random.RandomState(number)
        builder = IndexedDatasetBuilder(f"{name}.bin", np.uint16)
        for length in random.randint(1, longest, num_documents):
            tokens = random.randint(1, VOCAB_SIZE, length)
            tokens[-1] = EOD
            builder.add_document(tokens, [length])
        builder.finalize(f"{name}.idx")


def digest(array: Any) -> str:
    """A short hash of the values, shape and type of an array."""
    array = np.asarray(array)
    return hashlib.sha256(f"{array.dtype} {array.shape}".encode() + array.tobytes()).hexdigest()[:16]


OURS = ("dataset_id", "document_starts")  # keys of items that Megatron's do not have


def fingerprint(dataset: Any) -> dict[str, Any] | None:
    """What a dataset has to have in common with Megatron's."""
    if dataset is None:
        return None
    found: dict[str, Any] = {"length": len(dataset), "cache_name": dataset.unique_description_hash}
    for name in ("document_index", "sample_index", "shuffle_index", "dataset_index", "dataset_sample_index"):
        if hasattr(dataset, name):
            array = np.asarray(getattr(dataset, name))
            found[name] = [array.reshape(-1)[:4].tolist(), digest(array)]
    if len(dataset):
        for position in (0, len(dataset) - 1):
            item = dataset[position]
            found[f"item {position}"] = {key: digest(item[key]) for key in sorted(item) if key not in OURS}
    return found
