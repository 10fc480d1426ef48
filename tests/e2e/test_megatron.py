"""A run of Megatron-LM moves over: from its checkpoint and on its data, our losses are the ones it printed."""

import json

import pytest

from tests.e2e.commands import REPOSITORY, pretrain, run, training_metrics

pytestmark = pytest.mark.e2e
DATA = REPOSITORY / "tests" / "data" / "megatron"
# The command line that Megatron-LM was given; but the vocabulary is that of the checkpoint, with its padding.
ARGUMENTS = [
    *("--num-layers", "2", "--hidden-size", "16", "--num-attention-heads", "4", "--ffn-hidden-size", "32"),
    *("--seq-length", "16", "--max-position-embeddings", "16", "--position-embedding-type", "rope"),
    *("--normalization", "RMSNorm", "--swiglu", "--untie-embeddings-and-output-weights", "--disable-bias-linear"),
    *("--group-query-attention", "--num-query-groups", "2", "--qk-layernorm", "--num-experts", "4"),
    *("--moe-router-topk", "2", "--moe-layer-freq", "[0,1]", "--moe-ffn-hidden-size", "16"),
    *("--moe-shared-expert-intermediate-size", "24", "--moe-token-dispatcher-type", "alltoall"),
    *("--moe-router-score-function", "sigmoid", "--moe-router-enable-expert-bias"),
    *("--moe-router-bias-update-rate", "1e-2", "--moe-router-load-balancing-type", "seq_aux_loss"),
    *("--moe-aux-loss-coeff", "1e-2", "--moe-router-topk-scaling-factor", "1.5", "--moe-router-dtype", "fp32"),
    *("--tokenizer-type", "NullTokenizer", "--vocab-size", "64", "--null-tokenizer-eod-id", "62"),
    *("--data-path", str(DATA / "text"), "--split", "100,0,0", "--num-workers", "0", "--eval-iters", "0"),
    *("--micro-batch-size", "2", "--global-batch-size", "4", "--train-iters", "6", "--lr", "1e-2"),
    *("--min-lr", "1e-3", "--lr-decay-style", "cosine", "--lr-warmup-iters", "2", "--weight-decay", "0.1"),
    *("--clip-grad", "1.0", "--seed", "1234", "--log-interval", "1", "--log-params-norm"),
    "--no-calculate-per-token-loss",
]


def test_a_run_of_megatron_continues(tmp_path):
    """Iterations 4 to 6 from its checkpoint of iteration 3: loss, norms and balance loss to float32's rounding, on one
    process and at TP 2 x EP 2.

    Mutations: moments of the other kind, weights for moments, or their count of updates left at zero; position or
    schedule not taken over; the balance loss weighed twice; the expert bias not updated.
    """
    converter = ["python", "tools/convert_checkpoint.py", "--from", "megatron", "--to", "megatron_lite"]
    run([*converter, "--load", str(DATA / "experts"), "--save", str(tmp_path / "moved")])
    expected = json.loads((DATA / "losses.json").read_text())
    data = ["--data-cache-path", str(tmp_path / "cache"), "--load", str(tmp_path / "moved")]
    split = ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--expert-model-parallel-size", "2"]
    split += ["--expert-tensor-parallel-size", "1"]
    for ranks, layout in ((1, []), (2, split)):
        path = tmp_path / f"{ranks}.jsonl"
        pretrain(ranks, *ARGUMENTS, *data, *layout, "--metrics-jsonl", str(path))
        found = training_metrics(path, "lm_loss", "grad_norm", "params_norm", "seq_load_balancing_loss")
        assert [row[0] for row in found] == [4, 5, 6]
        for row, theirs in zip(found, expected, strict=True):
            values = [theirs[name] for name in ("lm_loss", "grad_norm", "params_norm", "balance")]
            assert row[1:] == pytest.approx(values, rel=1e-6), f"{ranks} ranks, iteration {row[0]}"
