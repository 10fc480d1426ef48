#!/usr/bin/env bash
# From nothing to a trained GPT in a few minutes, on a laptop or a GPU machine.
#
# Turns the Python standard library on this machine into a corpus, trains a tokenizer and a small GPT on it,
# and lets the model write some Python. Everything lands in $RUN; run it again and it resumes.
#   RUN=DIR              where the run lives (default: quickstart-run)
#   PRECISION=fp32|bf16  what it computes in (default: bf16 where the hardware multiplies it natively)
#   PYTHON=, VENV=       the interpreter and the virtual environment (see scripts/environment.sh)
# Further arguments go to pretrain_gpt.py; to train on with a longer schedule:
#   scripts/quickstart.sh --train-iters 1000 --override-opt_param-scheduler
set -euo pipefail
REPO="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
RUN="${RUN:-$REPO/quickstart-run}"
cd "$REPO"
source scripts/environment.sh

step() { printf '\n\033[1m[%s/6] %s\033[0m (%s s so far)\n' "$1" "$2" "$SECONDS"; }

step 1 "Environment"
ensure_environment
mkdir -p "$RUN"
read -r GPUS CORES TORCH < <(python -c 'import os, torch
cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
print(torch.cuda.device_count(), cores, torch.__version__)')
# Two-way tensor parallelism without a GPU, all GPUs where there are some.
RANKS=$((GPUS > 0 ? GPUS : 2))
TENSOR_PARALLEL=$((GPUS > 0 ? (GPUS % 2 == 0 ? 2 : 1) : 2))
# Each data parallel rank takes micro-batches of 8 sequences; at least as many a step as the preset says.
DATA_PARALLEL=$((RANKS / TENSOR_PARALLEL))
CONFIG=configs/quickstart.yaml GLOBAL_BATCH=$((DATA_PARALLEL > 2 ? DATA_PARALLEL * 8 : 16))
[ "$GPUS" -gt 0 ] || CONFIG=configs/quickstart_cpu.yaml GLOBAL_BATCH=8
VOCABULARY=$(sed -n 's/^vocab_size: //p' "$CONFIG")
# Without this torchrun gives each process one thread, and says so at length.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((CORES > RANKS ? CORES / RANKS : 1))}"
# bfloat16 where it is multiplied natively: on GPUs and on newer CPUs.
if [ "$GPUS" -gt 0 ] || grep -qE 'avx512_bf16|amx_bf16' /proc/cpuinfo 2>/dev/null; then
    PRECISION="${PRECISION:-bf16}"
fi
PRECISION="${PRECISION:-fp32}"
case "$PRECISION" in
    bf16) PRECISION_FLAG=(--bf16) ;;
    fp32) PRECISION_FLAG=() ;;
    *) echo "PRECISION is $PRECISION, but must be fp32 or bf16." >&2; exit 1 ;;
esac
echo "torch $TORCH, $RANKS processes, tensor parallel $TENSOR_PARALLEL, $PRECISION, results in $RUN"

step 2 "Corpus: the Python standard library"
[ -s "$RUN/corpus.jsonl" ] || python tools/make_python_corpus.py --output "$RUN/corpus.jsonl"
ls -lh "$RUN/corpus.jsonl" | awk '{print $5, $NF}'

step 3 "Tokenizer and .bin/.idx files"
[ -s "$RUN/tokenizer.model" ] ||
    python tools/train_sentencepiece.py --input "$RUN/corpus.jsonl" --model-prefix "$RUN/tokenizer" --vocab-size "$VOCABULARY"
[ -s "$RUN/corpus_text_document.idx" ] ||
    python tools/preprocess_data.py --input "$RUN/corpus.jsonl" --output-prefix "$RUN/corpus" --append-eod \
        --tokenizer-type SentencePieceTokenizer --tokenizer-model "$RUN/tokenizer.model" --workers 2
ls -lh "$RUN"/corpus_text_document.* | awk '{print $5, $NF}'

step 4 "Training"
torchrun --nproc-per-node "$RANKS" pretrain_gpt.py --config "$CONFIG" \
    --tensor-model-parallel-size "$TENSOR_PARALLEL" --global-batch-size "$GLOBAL_BATCH" ${PRECISION_FLAG[@]+"${PRECISION_FLAG[@]}"} \
    --data-path "$RUN/corpus_text_document" --data-cache-path "$RUN/cache" \
    --tokenizer-type SentencePieceTokenizer --tokenizer-model "$RUN/tokenizer.model" \
    --save "$RUN/checkpoints" --load "$RUN/checkpoints" \
    --tensorboard-dir "$RUN/tensorboard" --metrics-jsonl "$RUN/metrics.jsonl" "$@"

step 5 "What it learned"
python tools/report_loss.py --metrics "$RUN/metrics.jsonl" --data-path "$RUN/corpus_text_document" --output "$RUN/loss.png"

step 6 "A sample from the model"
python tools/generate.py --load "$RUN/checkpoints" --prompt $'import os\n' --max-new-tokens 90 --temperature 0.7 --top-k 40 --seed 3

cat <<END

Done in $SECONDS s. What to try next:
  train longer               scripts/quickstart.sh --train-iters 1000 --override-opt_param-scheduler
  look at the curves         $(command -v tensorboard) --logdir $RUN/tensorboard   (or open $RUN/loss.png)
  write from your prompt     $(command -v python) tools/generate.py --load $RUN/checkpoints --prompt "class "
  plan a cluster run         $(command -v python) pretrain_gpt.py --dry-run --world-size 1024 --config configs/llama3_70b.yaml
  go to SLURM                scripts/slurm/pretrain.sbatch
END
