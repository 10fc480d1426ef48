"""pretrain_gpt.py with the layers of DeepSeek-V3 and gpt-oss, from the command line: they train, resume and move."""

import pytest

from tests.e2e.commands import pretrain, training_metrics
from tests.e2e.test_pipeline import NUMBERS, SHORT, train_and_move

pytestmark = pytest.mark.e2e
DEEPSEEK = ["--config", "configs/quickstart_deepseek.yaml", *SHORT, "--moe-ffn-hidden-size", "64"]
DEEPSEEK += ["--q-lora-rank", "24", "--kv-lora-rank", "16", "--qk-head-dim", "8", "--qk-pos-emb-head-dim", "4"]
DEEPSEEK += ["--v-head-dim", "8", "--lr", "3e-3"]
SINKS = ["--config", "configs/quickstart_moe.yaml", *SHORT, "--moe-ffn-hidden-size", "64"]
SINKS += ["--softmax-type", "learnable", "--window-size", "15,0", "--window-attn-skip-freq", "2", "--lr", "3e-3"]
SINKS += ["--glu-linear-offset", "1", "--activation-func-clamp-value", "7", "--attention-output-gate"]


@pytest.mark.full
def test_a_small_deepseek_trains_resumes_and_moves(tmp_path):
    """TP 2 x EP 2, then PP 2, then PP 2 x EP 2 in a V: equal in float64, the loss of the token after the next too.

    Mutations: the copy of the embeddings in the last stage not filled after loading; the
    loss of multi-token prediction of one data parallel rank.
    """
    layout = ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--expert-model-parallel-size", "2"]
    stages = ["--pipeline-model-parallel-size", "2", "--expert-model-parallel-size", "1"]
    v_shaped = ["--pipeline-model-parallel-size", "2", "--pipeline-schedule", "zbv", "--use-torch-fsdp2"]
    others = {"stages": (2, stages), "v": (4, v_shaped)}
    output = train_and_move(tmp_path, DEEPSEEK, layout, others, (*NUMBERS, "mtp_1_loss", "moe_balance"))
    assert "| mtp_1 loss: " in output
    (first, *_, last) = training_metrics(tmp_path / "first.jsonl", "mtp_1_loss")
    assert last[1] < first[1] - 0.05


@pytest.mark.full
def test_a_small_deepseek_in_stages_resumes_bit_for_bit(tmp_path):
    stages = ["--pipeline-model-parallel-size", "2", "--expert-model-parallel-size", "1"]
    words = [*DEEPSEEK, *stages, "--save", str(tmp_path / "stages"), "--save-interval", "4"]
    pretrain(2, *words, "--metrics-jsonl", str(tmp_path / "whole.jsonl"))
    again = [*DEEPSEEK, *stages, "--load", str(tmp_path / "stages"), "--ckpt-step", "4"]
    pretrain(2, *again, "--metrics-jsonl", str(tmp_path / "resumed.jsonl"))
    names = ("whole.jsonl", "resumed.jsonl")
    wanted, found = (training_metrics(tmp_path / name, *NUMBERS, "mtp_1_loss") for name in names)
    assert found == wanted[4:]


@pytest.mark.full
def test_sinks_windows_and_gates_train_resume_and_move(tmp_path):
    """TP 2 x CP 2 by all-to-all, then one process: equal in float64. Mutation: sinks left out of the checkpoint."""
    layout = ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--expert-model-parallel-size", "2"]
    layout += ["--context-parallel-size", "2", "--cp-comm-type", "a2a"]
    train_and_move(tmp_path, SINKS, layout, {"one": (1, ["--expert-model-parallel-size", "1"])})
