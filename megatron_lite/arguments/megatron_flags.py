"""Megatron-LM's flags that no field of ours stands for: those that change nothing here, and those refused by name.

Each table maps a reason to flags. A flag is followed by nothing if it takes no value, by `=` if it takes one, by `=*`
if it takes several; after `=` may stand values, split by `|`, with which even a refused flag asks for nothing special.
"""

# Accepted, and said so at start-up.
NO_EFFECT: dict[str, str] = {
    "documents are kept apart without attention masks": """
        --no-create-attention-mask-in-dataloader --disable-create-attention-mask-in-dataloader
    """,
    "process groups are made by torch with its own defaults": """
        --pipeline-model-parallel-comm-backend= --local-rank= --nccl-communicator-config-path=
        --disable-gloo-process-groups --use-sharp --sharp-enabled-group= --high-priority-stream-groups=*
        --distributed-timeout-seconds-after-init= --flight-recorder-dump-path= --flight-recorder-trace-buffer-size=
        --no-flight-recorder-dump-on-timeout --disable-flight-recorder-dump-on-timeout
        --flight-recorder-include-stack-trace --no-flight-recorder-include-only-active
        --disable-flight-recorder-include-only-active --no-flight-recorder-extra-dump-on-exec
        --disable-flight-recorder-extra-dump-on-exec --no-barrier-with-level-1-timing
    """,
    "communication overlaps with computation wherever it can, without being asked": """
        --delay-wgrad-compute --use-ring-exchange-p2p --defer-embedding-wgrad-compute --wgrad-deferral-limit=
        --overlap-p2p-communication-warmup-flush --symmetric-ar-type= --no-align-grad-reduce
        --disable-align-grad-reduce --no-overlap-p2p-communication --overlap-grad-reduce --overlap-param-gather
        --overlap-param-gather-with-optimizer-step --no-align-param-gather --create-all-gather-group
    """,
    "--tp-comm-overlap is one switch for gathers and reduce-scatters, which changes no result": """
        --no-tp-comm-overlap-ag --disable-tp-comm-overlap-ag --no-tp-comm-overlap-rs --disable-tp-comm-overlap-rs
        --no-tp-comm-split-ag --disable-tp-comm-split-ag --no-tp-comm-split-rs --disable-tp-comm-split-rs
    """,
    "in a column layer's backward, gather and reduce-scatter always run beside the other gradient's whole product": """
        --no-tp-comm-bulk-wgrad --disable-tp-comm-bulk-wgrad --no-tp-comm-bulk-dgrad --disable-tp-comm-bulk-dgrad
        --tp-comm-overlap-rs-dgrad
    """,
    "--tp-comm-overlap works with torch's process groups alone, and there is nothing to tune": """
        --tp-comm-overlap-cfg= --tp-comm-bootstrap-backend=
    """,
    "the order of work of --pipeline-schedule interleaved is torch's, and changes no result": """
        --microbatch-group-size-per-virtual-pipeline-stage=
    """,
    "fused kernels are chosen automatically, and never change the result": """
        --cross-entropy-loss-fusion --cross-entropy-fusion-impl=native
        --use-fused-weighted-squared-relu --fused-residual-rmsnorm --use-transformer-engine-op-fuser
        --no-clone-scatter-output-in-embedding --disable-clone-scatter-output-in-embedding --use-te-activation-func
        --no-masked-softmax-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion --no-rope-fusion
        --no-persist-layer-norm --no-gradient-accumulation-fusion --disable-jit-fuser
        --no-gradient-reduce-div-fusion --mla-down-proj-fusion --moe-permute-fusion --moe-router-fusion
        --use-grouped-gemm-for-shared-expert --use-grouped-gemm-for-dense-mlp --muon-use-syrk
    """,
    "when tokens travel changes no result; the order of computation and communication is chosen automatically": """
        --overlap-moe-expert-parallel-comm --overlap-dispatch-backward-with-experts-wgrad
        --ep-overlap-early-attn-memory-release --high-priority-a2a-comm-stream --moe-flex-dispatcher-num-sms=
        --moe-deepep-num-sms= --moe-hybridep-num-sms= --moe-hybridep-num-blocks-permute=
        --moe-hybridep-num-blocks-unpermute= --moe-hybridep-num-sms-preprocessing=
        --moe-permute-fusion-into-hybridep --moe-hybridep-pad-uneven-dispatch-inputs --moe-ncclep-zero-copy
    """,
    "the products of experts take any number of rows, in fp8 too": """
        --moe-router-padding-for-quantization --moe-router-padding-for-fp8
    """,
    "the experts of a rank are one tensor already": """
        --moe-use-grouped-tensor --moe-single-grouped-weight --moe-single-grouped-bias
    """,
    "the balance of each layer is always logged": """
        --moe-per-layer-logging
    """,
    "tuning of a memory or launch cost that this framework does not have": """
        --cpu-offloading-retain-pinned-cpu-buffers --cuda-graph-warmup-steps= --min-offloaded-tensor-size=
        --train-sync-interval=
    """,
    "--optimizer-cpu-offload moves moments alone, by copies that overlap; torch's kernel on the device updates": """
        --use-torch-optimizer-for-cpu-offload --overlap-cpu-optimizer-d2h-h2d --no-pin-cpu-grads --no-pin-cpu-params
    """,
    "attention uses the best backend present; choose one with --attention-backend": """
        --flash-attention-version= --use-flash-attn
    """,
    "parameters are always created where they are trained; initial values do not depend on the layout": """
        --init-model-with-meta-device
    """,
    "this monitoring is not part of megatron_lite; the run goes on without it": """
        --config-logger-dir= --pytorch-profiler-collect-chakra --record-shapes --nvtx-ranges
        --gpu-sniff-test-interval=
        --result-rejected-tracker-filename= --dump-param-to-param-group-map= --adlr-autoresume
        --adlr-autoresume-interval= --log-progress --timing-log-level= --timing-log-option=
        --log-timers-to-tensorboard --log-memory-interval= --log-device-memory-used --logging-level= --log-energy
        --otel-enabled --otel-service-name= --otel-span-groups= --log-straggler --straggler-ctrlr-port=
        --straggler-minmax-count= --disable-straggler-on-startup --run-workload-inspector-server --no-one-logger
        --one-logger-project= --one-logger-run-name= --one-logger-async --app-tag-run-name= --app-tag-run-version=
        --enable-ft-package --calc-ft-timeouts --ft-num-warmup-iters=
        --rerun-mode=disabled|validate_results|report_stats --moe-routing-trace-path=
        --moe-routing-trace-max-training-iters= --moe-routing-trace-capture-logits
        --moe-routing-trace-capture-hidden-states --moe-routing-trace-dump-weights
        --save-tokens-per-expert-interval=
    """,
    "batches are read in the order of consumed samples": """
        --exit-signal-handler-for-dataloader
    """,
    "a signal without --exit-signal-handler ends the processes at once": """
        --exit-signal-handler-for-training
    """,
    "one flag is enough here: the model is always the one of megatron_lite": """
        --use-mcore-models
    """,
    "random states are kept by torch, one stream for each purpose": """
        --te-rng-tracker --inference-rng-tracker
    """,
    "saving and loading are sharded over all ranks and checked key by key": """
        --no-use-tokenizer-model-from-checkpoint-args --disable-use-tokenizer-model-from-checkpoint-args
        --auto-detect-ckpt-format --no-ckpt-fully-parallel-save
        --async-strategy= --use-persistent-ckpt-worker --async-ckpt-cpu-priority= --async-ckpt-io-priority=
        --async-ckpt-use-cpu-shm --ckpt-fully-parallel-load --ckpt-fully-parallel-load-exchange-algo=
        --ckpt-fully-parallel-load-per-rank-objects --ckpt-fully-parallel-save-process-group=
        --ckpt-fully-parallel-load-process-group= --ckpt-assume-constant-structure --ckpt-pg-tensors-cache-path=
        --ckpt-pg-tensors-cache-create --no-ckpt-load-validate-sharding-integrity
        --disable-ckpt-load-validate-sharding-integrity --no-strict-fsdp-dtensor-load
        --disable-strict-fsdp-dtensor-load --dist-ckpt-strictness= --dist-ckpt-optim-fully-reshardable
        --distrib-optim-fully-reshardable-mem-efficient --no-save-tokenizer-assets --disable-save-tokenizer-assets
        --use-dist-ckpt --dist-ckpt-format=torch_dist|torch_dcp --dist-ckpt-workers=
        --ckpt-fully-parallel-save --ckpt-drop-redundant-extra-state
    """,
    "checkpoints are of torch.distributed.checkpoint, as torch_dist is; other formats cannot be read, nor written": """
        --ckpt-format=torch_dist|torch_dcp
    """,
    "softmax over attention scores and vocabulary is always computed in float32": """
        --attention-softmax-in-fp32 --fp16-lm-cross-entropy --output-logit-dtype=fp32
    """,
    "master weights and gradients are float32; --grad-reduce-in-bf16 is the one choice": """
        --accumulate-allreduce-grads-in-fp32 --main-grads-dtype=fp32 --main-params-dtype=fp32
        --megatron-fsdp-main-params-dtype=fp32 --megatron-fsdp-main-grads-dtype=auto|fp32
        --megatron-fsdp-grad-comm-dtype=auto|fp32
    """,
    "buckets and buffers of data parallel communication are managed by torch": """
        --ddp-num-buckets= --ddp-bucket-size= --ddp-pad-buckets-for-high-nccl-busbw
        --gtp-remat-reduce-scatter-with-fp32-accumulation
        --ddp-average-in-collective --megatron-fsdp-version=
        --no-use-layer-wise-param-layout --use-nccl-ub --disable-symmetric-registration --gtp-remat-nccl-ub
        --gtp-expert-remat-nccl-ub --fsdp-manual-registration --fsdp-double-buffer
        --suggested-communication-unit-size= --keep-fp8-transpose-cache
        --megatron-fsdp-enable-fine-grained-param-gather --megatron-fsdp-max-pool-double-buffer
        --fsdp-db-use-persist-buf-on-alloc-fail
    """,
    "the indexed files are plain memory-mapped files": """
        --per-dataset-sequences-path= --dataloader-fast-cache-load --dataloader-defer-npy-index-mmap
        --object-storage-cache-path= --enable-msc --disable-msc
    """,
    "Megatron-LM itself no longer reads it": """
        --fp8-interval=
    """,
    "experimental parts are switched one by one": """
        --enable-experimental
    """,
    "every data parallel replica starts from the same weights, as in Megatron-LM, which broadcasts them": """
        --data-parallel-random-init
    """,
    "Megatron-LM reads it with --modelopt-enabled alone": """
        --export-te-mcore-model --export-force-local-attention --export-default-te-spec --enable-gpt-oss
    """,
    "--check-weight-hash-across-dp-replicas-interval compares weights over ranks here": """
        --test-mode
    """,
    "an evaluation has the micro-batch size of training, which changes no result": """
        --eval-micro-batch-size=
    """,
    "parameters are gathered in the dtype of the run, and cast to fp8 where they are multiplied": """
        --fp8-param-gather
    """,
    "CUDA graphs are not implemented, and change no result; --compile makes steps faster": """
        --enable-cuda-graph --external-cuda-graph --cuda-graph-impl= --cuda-graph-scope=* --cuda-graph-modules=*
        --optimizer-cuda-graph
    """,
    "withdrawn from Megatron-LM: data parallelism is torch's FSDP2, see --data-parallel-sharding-strategy": """
        --DDP-impl=local|torch --use-contiguous-buffers-in-local-ddp --no-contiguous-buffers-in-local-ddp
        --delay-grad-reduce --no-delay-grad-reduce --delay-param-gather
    """,
    "withdrawn from Megatron-LM: communication overlaps with computation; see --tp-comm-overlap": """
        --no-async-tensor-model-parallel-allreduce --scatter-gather-tensors-in-pipeline
        --no-scatter-gather-tensors-in-pipeline
    """,
    "withdrawn from Megatron-LM: --moe-grouped-gemm takes the best grouped product there is": """
        --moe-use-legacy-grouped-gemm
    """,
    "withdrawn from Megatron-LM: there is one implementation of the model": """
        --use-legacy-models --no-query-key-layer-scaling
    """,
}

# Refused: the run would not be what was asked for.
REFUSED: dict[str, str] = {
    "weight sharding is chosen with --data-parallel-sharding-strategy": """
        --tensor-parallel-num-weight-shards=1 --expert-tensor-parallel-num-weight-shards=1
        --gtp-remat-opt-in-modules=* --outer-dp-sharding-strategy=no_shard --enable-full-sharding-in-hsdp
    """,
    "all samples are split over the same context parallel ranks (--context-parallel-size)": """
        --max-seqlen-per-dp-cp-rank= --hybrid-context-parallel
    """,
    "--moe-token-dispatcher-type allgather and alltoall, and flex with DeepEP, are the ways tokens travel": """
        --moe-expert-rank-capacity-factor= --moe-dispatch-fwd-dtype=bf16 --moe-combine-bwd-dtype=bf16
    """,
    "this variant of a mixture of experts is not implemented": """
        --moe-latent-size= --moe-apply-probs-on-input --moe-router-quantile-balancing-ema=0|0.0
        --moe-router-force-biased= --moe-enable-routing-replay --moe-shared-expert-glu-interleave-size=
        --moe-mlp-glu-interleave-size= --freeze-all-layers
    """,
    "experts' activations are recomputed (--recompute-modules moe_act) rather than stashed": """
        --moe-paged-stash --moe-paged-stash-page-size= --moe-paged-stash-buffer-size-factor-cuda=
        --moe-paged-stash-buffer-size-factor-cpu=
    """,
    "this variant of multi-token prediction is not implemented; its layers stand in the last pipeline stage": """
        --mtp-standalone --mtp-use-repeated-layer --mtp-detach-heads --mtp-hsm --mtp-hybrid-override-pattern=
    """,
    "activations move to the host by whole layers: write --cpu-offloading-num-layers": """
        --fine-grained-activation-offloading --offload-modules=*
        --delay-offload-until-cuda-graph --delta-offload-bytes-across-pp-ranks= --activation-offload-fraction=
        --fine-grained-offloading-max-inflight-offloads=
    """,
    "this attention variant is not implemented": """
        --qk-l2-norm --qk-clip --qk-clip-alpha= --qk-clip-threshold= --cache-mla-latents
        --experimental-attention-variant= --dsa-indexer-n-heads= --dsa-indexer-head-dim= --dsa-indexer-topk=
        --dsa-indexer-topk-freq= --dsa-indexer-skip-topk-offset= --dsa-indexer-loss-coeff=
        --dsa-indexer-use-sparse-loss --dsa-kernel-backend= --dsa-indexer-rope-interleaved
        --no-dsa-indexer-rotate-activation --disable-dsa-indexer-rotate-activation --no-dsa-indexer-scoring-relu
        --disable-dsa-indexer-scoring-relu --dsa-indexer-k-norm-epsilon= --dsa-indexer-k-norm-fp32
        --linear-conv-kernel-dim= --linear-key-head-dim= --linear-value-head-dim= --linear-num-key-heads=
        --linear-num-value-heads= --batch-invariant-mode --batch-invariant-backend= --mrope-section=*
        --relative-attention-num-buckets= --relative-attention-max-distance=
        --linear-attention-freq= --log-max-attention-logit
    """,
    "this MLP variant is not implemented": """
        --mlp-chunks-for-training=1
    """,
    "this kind of model is not implemented; GPT is": """
        --use-mup --mup-width-mult= --mup-base-hidden-size= --mup-embedding-mult= --mup-output-mult=
        --mup-base-head-dim= --mup-attn-scale-power= --enable-mhc-connections --mhc-num-residual-streams=
        --mhc-sinkhorn-iterations= --mhc-init-gating-factor= --mhc-recompute-layer-num= --is-hybrid-model
        --mamba-state-dim= --mamba-head-dim= --mamba-num-groups= --mamba-num-heads= --gdp-num-householder=
        --disable-mamba-mem-eff-path --gdp-cutedsl-kernel --gdp-num-chunk-states-to-recompute= --decoder-num-layers=
        --onnx-safe= --bert-no-binary-head --mamba-training-ssm-states-dtype= --encoder-seq-length=
        --decoder-seq-length= --sample-rate= --mask-prob= --short-seq-prob= --vocab-extra-ids=0
        --heterogeneous-layers-config-path= --heterogeneous-layers-config-encoded-json= --output-bert-embeddings
        --bert-embedder-type= --mamba-inference-conv-states-dtype= --mamba-inference-ssm-states-dtype= --spec=*
        --hybrid-layer-pattern= --hybrid-override-pattern=
    """,
    "with --grad-reduce-in-bf16 gradients are accumulated and summed in bfloat16": """
        --ddp-reduce-scatter-with-fp32-accumulation --ddp-param-name-patterns-for-fp32-local-accumulation=*
    """,
    "fp8 scales are those of the tensor at hand (--fp8-recipe tensorwise or rowwise), not of earlier steps": """
        --fp8-margin=0 --fp8-amax-history-len=1 --fp8-amax-compute-algo=most_recent
    """,
    "fp8 is for the products of linear layers; parameters, their communication and the output layer are not in fp8": """
        --fp8-output-proj --reuse-grad-buf-for-mxfp8-param-ag
    """,
    "--fp8-format and --fp8-recipe say how linear layers are computed, all three products of a dense one alike": """
        --no-fp8-wgrad --disable-fp8-wgrad --fp8-quantizer-factory= --te-precision-config-file=
        --use-kitchen-attention --kitchen-attention-backend=
    """,
    "FP4 training is not implemented; train with --bf16, or with --fp8-format": """
        --fp4-format= --fp4-recipe= --fp4-quantizer-factory= --fp4-param-gather
    """,
    "serving is not part of training; see tools/generate.py": """
        --moe-pad-experts-for-cuda-graph-inference
        --inference-cuda-graph-scope= --flash-decode --nccl-all-reduce-for-prefill --inference-fuse-tp-communication
        --inference-disable-triton-nvls-kernels --inference-grouped-gemm-backend=
        --inference-moe-disable-fused-quant-kernels --inference-moe-token-dispatcher-type=
        --mlp-chunks-for-prefill=1 --inference-batch-times-seqlen-threshold= --max-tokens-to-oom=
        --use-legacy-static-engine --inference-max-requests= --inference-max-seq-length=
        --inference-dynamic-batching --inference-dynamic-batching-buffer-size-gb=
        --inference-dynamic-batching-paused-buffer-size-gb= --inference-dynamic-batching-mamba-memory-ratio=
        --inference-dynamic-batching-block-size= --inference-dynamic-batching-max-requests=
        --inference-dynamic-batching-max-tokens= --inference-dynamic-batching-num-cuda-graphs=
        --inference-dynamic-batching-track-paused-request-events
        --inference-dynamic-batching-track-generated-token-events --decode-only-cuda-graphs
        --inference-cuda-graph-all-prefills --inference-cuda-graph-max-tokens=
        --inference-dynamic-batching-unified-memory-level= --enable-chunked-prefill --num-speculative-tokens=
        --inference-dynamic-batching-prefix-caching --no-inference-dynamic-batching-prefix-caching
        --inference-dynamic-batching-prefix-caching-eviction-policy=
        --inference-dynamic-batching-prefix-caching-coordinator-policy=
        --inference-dynamic-batching-prefix-caching-routing-alpha=
        --inference-dynamic-batching-prefix-caching-mamba-gb=
        --inference-dynamic-batching-cuda-graph-mixed-prefill-count=
        --inference-dynamic-batching-cuda-graph-sizing-distribution= --inference-dynamic-batching-sampling-backend=
        --use-same-sampling-seed-across-dp-ranks --inference-dynamic-batching-async-sched-mode=
        --inference-dynamic-batching-logprobs-mode= --inference-logging-step-interval=
        --inference-text-gen-server-logging --no-inference-text-gen-server-logging --inference-wandb-logging
        --no-inference-wandb-logging --inference-coordinator-port= --inference-use-synchronous-zmq-collectives
        --no-inference-use-synchronous-zmq-collectives --inference-disable-ep-consensus
        --no-inference-disable-ep-consensus --inference-shards=
    """,
    "learned positions are the default: write --position-embedding-type none, or rope or yarn": """
        --no-position-embedding
    """,
    "this optimizer is not implemented; --optimizer adam, sgd and muon are": """
        --lion-beta1= --lion-beta2=
    """,
    "it was withdrawn from Megatron-LM: write --micro-batch-size": """
        --batch-size=
    """,
    "gradients are checked by their norm: --check-for-nan-in-loss-and-grad and --clip-grad": """
        --check-for-large-grads
    """,
    "it was withdrawn from Megatron-LM: write --expert-tensor-parallel-size": """
        --moe-extended-tp
    """,
    "it was withdrawn from Megatron-LM: write --moe-router-num-groups and --moe-router-group-topk": """
        --moe-router-topk-limited-devices=
    """,
    "it was withdrawn from Megatron-LM: write --pipeline-model-parallel-layout": """
        --standalone-embedding-stage --pipeline-model-parallel-split-rank=
    """,
    "it was withdrawn from Megatron-LM: write --lr-warmup-fraction": """
        --warmup=
    """,
    "this kind of checkpoint is not implemented; --save and --save-interval are": """
        --save-params-interval= --save-activations-interval= --save-wgrads-interval= --save-dgrads-interval=
        --load-main-params-from-ckpt --non-persistent-save-interval= --non-persistent-ckpt-type=
        --non-persistent-global-ckpt-dir= --non-persistent-local-ckpt-dir= --non-persistent-local-ckpt-algo=
        --ckpt-convert-format= --ckpt-convert-save= --ckpt-convert-update-legacy-dist-opt-format
        --dist-ckpt-save-pre-mcore-014 --replication --replication-jump= --replication-factor=
    """,
    "the position in the data is that of the checkpoint; --ckpt-step loads another, --finetune starts over": """
        --override-ckpt-iteration=
    """,
    "a checkpoint loads at any layout, so none is taken from it; --use-checkpoint-args takes the model's settings": """
        --use-mp-args-from-checkpoint-args
    """,
    "process groups are always initialized by the training script itself": """
        --lazy-mpu-init
    """,
    "it was withdrawn from Megatron-LM: write --tensor-model-parallel-size": """
        --model-parallel-size=
    """,
    "a cluster is imagined with --dry-run --world-size N": """
        --fake-process-group
    """,
    "each validation uses all --eval-iters batches of the training batch size on one blend": """
        --eval-global-batch-size= --full-validation --multiple-validation-sets
        --validation-set-names=*
    """,
    "a run has one phase; start the next one from its checkpoint": """
        --phase-transition-iterations=
    """,
    "fill-in-the-middle data are not implemented": """
        --fim-data --fim-rate= --fim-spm-rate= --fim-split-sample= --fim-fragment-rate= --fim-no-prefix=
        --fim-prefix-token= --fim-middle-token= --fim-suffix-token= --fim-pad-token= --fim-eod-token=
    """,
    "the tokenizer does not have this variant": """
        --tokenizer-metadata= --tokenizer-sentencepiece-legacy --no-tokenizer-sentencepiece-ignore-extra-whitespaces
        --disable-tokenizer-sentencepiece-ignore-extra-whitespaces --use-gigatoken
    """,
    "fine-tuning on conversations is not implemented": """
        --chat-template= --sft --sft-tokenizer-prompt-format=
    """,
    "quantization, pruning and distillation by ModelOpt are not implemented": """
        --modelopt-enabled --export-kd-teacher-load= --export-kd-teacher-model-config=
        --export-kd-teacher-ckpt-format= --export-kd-cfg= --export-model-type= --export-quant-cfg=
        --export-real-quant-cfg= --export-offline-model --export-qk-l2-norm --export-moe-apply-probs-on-input
        --qad-train-target= --freeze-base-for-mtp
    """,
    "distillation from stored logits is not implemented": """
        --logits-save-top-k= --logits-save-top-p= --logits-save-top-p-min-k= --logits-save-dir= --logits-save-dtype=
        --logits-load-dir= --logits-load-decode-threads= --logits-load-prefetch-factor=
        --logits-load-msc-prefetch-depth= --logits-load-kd-loss-alpha= --logits-load-ignore-errors
    """,
    "this restarts or breaks ranks on purpose, which is not implemented": """
        --inprocess-restart --inprocess-max-iterations= --inprocess-monitor-thread-interval=
        --inprocess-monitor-process-interval= --inprocess-progress-watchdog-interval=
        --inprocess-heartbeat-interval= --inprocess-soft-timeout= --inprocess-hard-timeout=
        --inprocess-heartbeat-timeout= --inprocess-barrier-timeout= --inprocess-completion-timeout=
        --inprocess-last-call-wait= --inprocess-termination-grace-time= --inprocess-granularity=
        --inprocess-active-world-size= --inprocess-empty-cuda-cache --error-injection-rate= --error-injection-type=
        --fault-injector-ranks= --fault-injector-num-ranks= --fault-injector-fault-types=
        --fault-injector-fault-probabilities= --fault-injector-fault-delay= --fault-injector-delay-start-iteration=
        --fault-injector-mtti-seconds= --fault-injector-offset-seconds= --fault-injector-seed=
    """,
}
