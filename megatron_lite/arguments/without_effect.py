"""Flags that mean something only together with others: given alone they are accepted, and said to do nothing."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

from megatron_lite.arguments.run_config import RunConfig
from megatron_lite.transformer.moe.moe_config import BALANCE_LOSSES, MoEConfig

# What must hold, in words and as a question -> the fields that are read only then.
CONDITIONS: tuple[tuple[str, Callable[[RunConfig], bool], tuple[str, ...]], ...] = (
    (
        "--pipeline-model-parallel-size above 1",
        lambda run: run.transformer.pipeline_model_parallel_size > 1,
        ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"),
    ),
    (
        "--window-size",
        lambda run: run.transformer.window_size is not None,
        ("window_attn_skip_freq",),
    ),
    (
        "--position-embedding-type rope or yarn",
        lambda run: run.gpt.position_embedding_type in ("rope", "yarn"),
        ("rotary_base", "rotary_percent", "rotary_interleaved", "no_rope_freq"),
    ),
    (
        "--multi-latent-attention",
        lambda run: run.transformer.multi_latent_attention,
        ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim", "rope_type"),
    ),
    (
        "attention without --multi-latent-attention",
        lambda run: not run.transformer.multi_latent_attention,
        ("kv_channels", "rotary_interleaved"),
    ),
    (
        "norms without --apply-layernorm-1p",
        lambda run: not run.transformer.layernorm_zero_centered_gamma,
        ("norm_impl",),
    ),
    (
        "--mtp-num-layers",
        lambda run: run.transformer.mtp_num_layers is not None,
        ("mtp_loss_scaling_factor",),
    ),
    ("--use-rope-scaling", lambda run: run.gpt.use_rope_scaling, ("rope_scaling_factor",)),
    (
        "--position-embedding-type yarn",
        lambda run: run.gpt.yarn(run.transformer.multi_latent_attention) is not None,
        (
            "rotary_scaling_factor",
            "yarn_original_max_position_embeddings",
            "yarn_beta_fast",
            "yarn_beta_slow",
            "mscale",
            "mscale_all_dim",
            "yarn_correction_range_round_to_int",
        ),
    ),
    (
        "an MLP of plain gelu",
        lambda run: not (run.transformer.gated_linear_unit or run.transformer.squared_relu),
        ("openai_gelu", "bias_gelu_fusion"),
    ),
    (
        "--num-experts",
        lambda run: run.transformer.num_moe_experts is not None,
        tuple(
            field.name
            for field in dataclasses.fields(MoEConfig)
            if field.name.startswith("moe_") or field.name == "expert_tensor_parallel_size"
        ),
    ),
    (
        "--moe-router-enable-expert-bias",
        lambda run: run.transformer.num_moe_experts is None or run.transformer.moe_router_enable_expert_bias,
        ("moe_router_bias_update_rate",),
    ),
    (
        "--moe-router-load-balancing-type with a balance loss",
        lambda run: run.transformer.num_moe_experts is None or run.transformer.balance_types != ["none"],
        ("moe_aux_loss_coeff",),
    ),
    (
        "--moe-aux-loss-coeff above 0",
        lambda run: (
            run.transformer.num_moe_experts is None
            or bool(run.transformer.balance_coefficients)
            or not set(run.transformer.balance_types) <= set(BALANCE_LOSSES)
        ),
        ("moe_router_load_balancing_type",),
    ),
    (
        "--moe-expert-capacity-factor",
        lambda run: run.transformer.num_moe_experts is None or run.transformer.moe_expert_capacity_factor is not None,
        ("moe_token_drop_policy",),
    ),
    (
        "--moe-router-score-function softmax",
        lambda run: run.transformer.num_moe_experts is None or run.transformer.moe_router_score_function == "softmax",
        ("moe_router_pre_softmax",),
    ),
    (
        "--moe-token-dispatcher-type flex",
        lambda run: (
            run.transformer.num_moe_experts is None
            or run.transformer.moe_token_dispatcher_type == "flex"
            or run.transformer.moe_flex_dispatcher_backend != "deepep"
        ),
        ("moe_flex_dispatcher_backend",),
    ),
    (
        "--moe-use-upcycling",
        lambda run: run.transformer.num_moe_experts is None or run.transformer.moe_use_upcycling,
        ("moe_upcycling_granularity",),
    ),
    (
        "--fp8-format",
        lambda run: run.transformer.fp8 is not None,
        ("fp8_recipe", "first_last_layers_bf16"),
    ),
    (
        "--first-last-layers-bf16 and --fp8-format",
        lambda run: run.transformer.first_last_layers_bf16 and run.transformer.fp8 is not None,
        ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"),
    ),
    (
        "--recompute-granularity selective",
        lambda run: run.transformer.recompute_granularity == "selective",
        ("recompute_modules",),
    ),
    (
        "--use-torch-fsdp2 or --use-megatron-fsdp",
        lambda run: run.ddp.use_torch_fsdp2 or run.ddp.use_megatron_fsdp,
        ("torch_fsdp2_reshard_after_forward",),
    ),
    ("--optimizer sgd", lambda run: run.optimizer.optimizer == "sgd", ("sgd_momentum",)),
    (
        "--optimizer adam or muon",
        lambda run: run.optimizer.optimizer in ("adam", "muon"),
        ("adam_beta1", "adam_beta2", "adam_eps", "adam_impl"),
    ),
    (
        "--optimizer muon",
        lambda run: run.optimizer.optimizer == "muon",
        (
            "muon_momentum",
            "muon_nesterov",
            "muon_split_qkv",
            "muon_scale_mode",
            "muon_extra_scale_factor",
            "muon_coefficient_type",
            "muon_num_ns_steps",
            "muon_fp32_matmul_prec",
            "muon_tp_mode",
            "muon_scalar_optimizer",
        ),
    ),
    (
        "--optimizer-cpu-offload",
        lambda run: run.optimizer.optimizer_cpu_offload,
        ("optimizer_offload_fraction",),
    ),
    (
        "an optimizer with moments, and --optimizer-offload-fraction above 0",
        lambda run: run.optimizer.has_moments and run.optimizer.optimizer_offload_fraction > 0,
        ("optimizer_cpu_offload",),
    ),
    ("--decoupled-lr", lambda run: run.optimizer.decoupled_lr is not None, ("decoupled_min_lr",)),
    (
        "--fp16 without --loss-scale",
        lambda run: run.transformer.fp16 and run.optimizer.loss_scale is None,
        ("initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis"),
    ),
    (
        "--lr-decay-style WSD",
        lambda run: run.scheduler.lr_decay_style == "WSD",
        ("lr_wsd_decay_iters", "lr_wsd_decay_samples", "lr_wsd_decay_style"),
    ),
    ("--data-path", lambda run: bool(run.data.data_path or run.data.data_args_path), ("split",)),
    (
        "--context-parallel-size above 1",
        lambda run: run.transformer.context_parallel_size > 1,
        ("cp_comm_type", "hierarchical_context_parallel_sizes"),
    ),
    (
        "--cp-comm-type a2a+p2p",
        lambda run: run.transformer.context_parallel_size == 1 or run.transformer.has_hierarchical_context_parallelism,
        ("hierarchical_context_parallel_sizes",),
    ),
    (
        "--context-parallel-size above 1 or --sequence-parallel",
        lambda run: run.transformer.context_parallel_size > 1 or run.transformer.sequence_parallel,
        ("pad_to_multiple",),
    ),
    ("--eval-interval", lambda run: run.validation.eval_interval is not None, ("start_eval_at_iter",)),
    ("--exit-signal-handler", lambda run: run.training.exit_signal_handler, ("exit_signal",)),
    ("--manual-gc", lambda run: run.training.manual_gc, ("manual_gc_interval", "manual_gc_eval")),
    (
        "--tensorboard-dir or --wandb-project",
        lambda run: bool(run.logger.tensorboard_dir or run.logger.wandb_project),
        (
            "tensorboard_log_interval",
            "tensorboard_queue_size",
            "log_loss_scale_to_tensorboard",
            "log_validation_ppl_to_tensorboard",
            "log_memory_to_tensorboard",
            "log_world_size_to_tensorboard",
        ),
    ),
    (
        "--wandb-project",
        lambda run: run.logger.wandb_project is not None,
        ("wandb_exp_name", "wandb_entity", "wandb_save_dir"),
    ),
    (
        "--profile",
        lambda run: run.profiling.profile,
        (
            "use_pytorch_profiler",
            "pytorch_profiler_collect_shapes",
            "pytorch_profiler_collect_callstack",
        ),
    ),
    (
        "--profile or --record-memory-history",
        lambda run: run.profiling.profile or run.profiling.record_memory_history,
        ("profile_step_start", "profile_step_end", "profile_ranks"),
    ),
    ("--record-memory-history", lambda run: run.profiling.record_memory_history, ("memory_snapshot_path",)),
    (
        "--save",
        lambda run: run.checkpoint.save is not None,
        ("save_interval", "save_retain_interval", "keep_last", "save_optim", "save_rng"),
    ),
    (
        "--load or --pretrained-checkpoint",
        lambda run: bool(run.checkpoint.load or run.checkpoint.pretrained_checkpoint),
        ("ckpt_step", "finetune", "load_optim", "load_rng"),
    ),
    (
        "--load",
        lambda run: run.checkpoint.load is not None,
        ("override_opt_param_scheduler", "use_checkpoint_opt_param_scheduler"),
    ),
)


def flags_without_effect(run: RunConfig, given: Mapping[str, str]) -> Iterator[str]:
    """One sentence for each flag of the command line that this run never reads.

    Args:
        run: the settings, values that follow from others filled in.
        given: field -> the flag that set it.
    """
    for needed, holds, fields in CONDITIONS:
        idle = [given[field] for field in fields if field in given]
        if idle and not holds(run):
            yield f"{', '.join(idle)}: without effect, because it belongs to {needed}."
