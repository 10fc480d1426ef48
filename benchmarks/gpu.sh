#!/usr/bin/env bash
# Makes the tables of one GPU of 80 GB or more, about 25 minutes: dense shapes and mixtures in bf16 against plain torch and transformers, then
# both in fp8 against bf16, and dense ones with each of torch's attention kernels. Results go to benchmarks/results/DATE-gpu-*.md and .json;
# arguments go to tools/benchmark.py (--steps 5).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# Segments that grow, as several models share the memory and each wants other sizes.
if [[ -z "${PYTORCH_ALLOC_CONF:-}${PYTORCH_CUDA_ALLOC_CONF:-}" ]]; then
    export PYTORCH_ALLOC_CONF=expandable_segments:True
fi
PEERS=(plain)
if python -c "import transformers"; then
    PEERS+=(huggingface)
else
    echo "transformers cannot be imported: compared with plain torch only" >&2
fi
OUT="benchmarks/results/$(date +%F)-gpu"
DENSE=(benchmarks/configs/llama_1b.yaml benchmarks/configs/llama_8b_layers.yaml)
EXPERTS=(benchmarks/configs/mixtral_layer.yaml benchmarks/configs/qwen3_moe_layers.yaml)
COMMON=(--steps 10 --warmup 5 --rounds 3 --breakdown "$@")
python tools/benchmark.py --config "${DENSE[@]}" --compile off on --against "${PEERS[@]}" --output "$OUT-dense" "${COMMON[@]}"
python tools/benchmark.py --config "${EXPERTS[@]}" --compile off on --against "${PEERS[@]}" --output "$OUT-experts" "${COMMON[@]}"
python tools/benchmark.py --config "${DENSE[@]}" --compile on --output "$OUT-fp8" "${COMMON[@]}" \
    --against "--fp8-format hybrid --fp8-recipe tensorwise" "--fp8-format hybrid --fp8-recipe rowwise"
python tools/benchmark.py --config "${EXPERTS[@]}" --compile on --output "$OUT-experts-fp8" "${COMMON[@]}" --against "--fp8-format hybrid"
python tools/benchmark.py --config "${DENSE[@]}" --compile on --output "$OUT-attention" "${COMMON[@]}" \
    --against "--attention-backend flash" "--attention-backend fused"
