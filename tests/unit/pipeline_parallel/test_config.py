"""The flags of pipeline parallelism, and the rules between them."""

import pytest

from megatron_lite.transformer.transformer_config import TransformerConfig


def config(**settings) -> TransformerConfig:
    return TransformerConfig(**{"num_layers": 8, "hidden_size": 16, "num_attention_heads": 2, **settings})


@pytest.mark.parametrize(
    ("settings", "schedule", "chunks"),
    [
        ({}, "1f1b", 1),
        ({"num_virtual_stages_per_pipeline_rank": 4}, "interleaved", 4),
        ({"num_layers_per_virtual_pipeline_stage": 2}, "interleaved", 2),
        ({"num_layers_per_virtual_pipeline_stage": 4}, "1f1b", 1),
        ({"num_layers_per_virtual_pipeline_stage": 2, "num_virtual_stages_per_pipeline_rank": 2}, "interleaved", 2),
        ({"pipeline_schedule": "zbv"}, "zbv", 2),
        ({"pipeline_schedule": "dualpipev"}, "dualpipev", 2),
        ({"pipeline_schedule": "interleaved-zero-bubble"}, "interleaved-zero-bubble", 1),
        ({"pipeline_schedule": "gpipe", "num_virtual_stages_per_pipeline_rank": 2}, "gpipe", 2),
        ({"pipeline_model_parallel_layout": "Et*2|t*2|t*2|t*2L"}, "interleaved", 2),
        (
            {
                "num_layers": 6,
                "num_layers_per_virtual_pipeline_stage": 2,
                "account_for_embedding_in_pipeline_split": True,
                "account_for_loss_in_pipeline_split": True,
            },
            "interleaved",
            2,
        ),
    ],
)
def test_schedule_and_chunks_follow(settings, schedule, chunks):
    """What is not said follows from the rest. Mutation: leave the ends out when layers are divided by chunks."""
    made = config(pipeline_model_parallel_size=2, **settings)
    made.validate()
    assert (made.schedule, made.chunks_per_rank) == (schedule, chunks)
    assert made.virtual_pipeline_model_parallel_size == (chunks if chunks > 1 else None)
    assert made.pipeline_layout.stages_per_rank == chunks
    assert made.pipeline_layout.num_layers == made.num_layers


def test_one_rank_holds_all():
    layout = config().pipeline_layout
    assert (layout.ranks, len(layout.stages), layout.num_layers) == (1, 1, 8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_layers": 9}, "9 must be a multiple of the 2 pipeline stages"),
        ({"num_layers_per_virtual_pipeline_stage": 3}, "3 x 2 pipeline ranks must divide num_layers (8)"),
        (
            {"num_layers_per_virtual_pipeline_stage": 2, "num_virtual_stages_per_pipeline_rank": 4},
            "keep one of the two",
        ),
        (
            {"pipeline_schedule": "zbv", "num_virtual_stages_per_pipeline_rank": 4},
            "whose ranks hold 2 model chunks each",
        ),
        ({"pipeline_schedule": "zbv", "pipeline_model_parallel_layout": "Et*4|t*4L"}, "twice as many stages as ranks"),
        (
            {"pipeline_schedule": "1f1b", "num_virtual_stages_per_pipeline_rank": 2},
            "write --pipeline-schedule interleaved",
        ),
        ({"pipeline_schedule": "interleaved"}, "--num-virtual-stages-per-pipeline-rank 2 or more"),
        ({"pipeline_schedule": "2f2b"}, "must be one of: gpipe, 1f1b"),
        ({"num_virtual_stages_per_pipeline_rank": 0}, "--num-virtual-stages-per-pipeline-rank is 0"),
        ({"num_layers_in_first_pipeline_stage": -1}, "--decoder-first-pipeline-num-layers is -1"),
        ({"num_layers_in_first_pipeline_stage": 2, "num_layers_in_last_pipeline_stage": 2}, "shared alike by 0 ranks"),
        ({"pipeline_model_parallel_layout": "Et|tL"}, "which has 2 layers (t), but num_layers is 8"),
        ({"pipeline_model_parallel_layout": "Et*8|L", "num_layers_in_first_pipeline_stage": 8}, "must be left out"),
        (
            {"pipeline_model_parallel_layout": "Et*4|t*4L", "account_for_loss_in_pipeline_split": True},
            "so --account-for-loss-in-pipeline-split must be left out",
        ),
        (
            {"num_layers_per_virtual_pipeline_stage": 2, "num_layers_in_first_pipeline_stage": 6},
            "write --num-virtual-stages-per-pipeline-rank instead",
        ),
        ({"pipeline_model_parallel_layout": "Et*4|t*3|tL"}, "3 pipeline stages for 2 ranks"),
        (
            {"pipeline_model_parallel_size": 1, "pipeline_schedule": "zbv"},
            "--pipeline-schedule splits layers into pipeline stages, but",
        ),
        (
            {
                "pipeline_model_parallel_size": 1,
                "num_layers_in_first_pipeline_stage": 2,
                "pipeline_model_parallel_layout": "E",
            },
            "split layers into pipeline stages, but",
        ),
    ],
)
def test_what_contradicts_itself_is_told(settings, message):
    found = config(**{"pipeline_model_parallel_size": 2, **settings}).violations()
    assert any(message in sentence for sentence in found), found
