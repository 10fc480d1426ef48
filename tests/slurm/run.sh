#!/usr/bin/env bash
# Trains under a real SLURM, on a cluster of three pretended nodes that it makes on this machine, and lets things go
# wrong. After each fault the training goes on and must end with the numbers of one that nothing happened to: equal
# metrics of every iteration, at full precision, and equal tensors in the last checkpoint.
#   tests/slurm/run.sh                  all checks; installs SLURM by apt-get where it is missing, so run it as root
#   tests/slurm/run.sh time_limit ...   these
#   WORK=DIR    a new folder for logs, runs and the configuration of SLURM, which is kept (default: one under /tmp,
#               which is kept if a check fails)
# Needs an environment in which pretrain_gpt.py runs (scripts/environment.sh), no GPU, and 2 cores for some 10 minutes.
set -euo pipefail
REPO="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
CHECKS=(start time_limit afterok requeue preemption killed_rank killed_agent killed_worker stopped_rank node_down)
KEPT="${WORK:-}"
WORK="${WORK:-$(mktemp -d -t megatron_lite-slurm-XXXX)}"
mkdir -p "$WORK"
WORK="$(cd "$WORK" && pwd)"
cd "$REPO"
source tests/slurm/cluster.sh

fail() {
    echo "$*" >&2
    exit 1
}

wait_until() { # SECONDS WHAT COMMAND: until the command succeeds
    local end=$((SECONDS + $1)) what="$2"
    until "${@:3}"; do
        [ $SECONDS -lt $end ] || fail "no $what within $1 s"
        sleep 0.2
    done
}

# ---- one training

pause() { # SECONDS: before each iteration of all trainings, from now on
    echo "$1" > "$WORK/pause"
}

submit() { # RUN [SBATCH OPTIONS]: prints the job's number
    (cd "$WORK" && RUN="$WORK/$1" sbatch --parsable --nodes=2 --gpus-per-node=0 --time=60 --output="$WORK/$1.log" \
        "${@:2}" "$REPO/scripts/slurm/pretrain.sbatch" "$REPO/tests/slurm/tiny.yaml" --save-interval 5 \
        ${PRETRAIN_ARGS:-})
}

iteration_of() { # RUN: the last one in its metrics
    { grep lm_loss "$WORK/$1/metrics.jsonl" 2> /dev/null || true; } | wc -l
}

has_trained() { # RUN ITERATION
    [ "$(iteration_of "$1")" -ge "$2" ]
}

meet_at_work() { # RUN: returns when it has trained 12 iterations, of which 10 are saved
    wait_until 120 "iteration 12 of $1" has_trained "$1" 12
    if has_trained "$1" 25; then fail "$1 is nearly done, too late for a fault"; fi
}

ended() { # JOB
    case "$(state_of "$1")" in PENDING | CONFIGURING | RUNNING | COMPLETING | SUSPENDED | REQUEUED) return 1 ;; esac
}

completes() { # JOB: without further help
    pause 0
    wait_until 300 "end of job $1" ended "$1"
    job_is "$1" COMPLETED || fail "job $1 is $(state_of "$1")"
}

fails() { # JOB: soon
    wait_until 90 "end of job $1" ended "$1"
    job_is "$1" FAILED || fail "job $1 is $(state_of "$1") instead of FAILED"
}

resumed() { # RUN [TIMES]: that it did load a checkpoint, so often
    local times
    times="$(grep -c "successfully loaded checkpoint" "$WORK/$1.log" || true)"
    [ "$times" -ge "${2:-1}" ] || fail "$1 loaded a checkpoint $times times instead of ${2:-1}"
}

equals_whole() { # RUN
    python tests/slurm/compare.py "$WORK/start" "$WORK/$1"
}

# ---- checks

check_start() { # once by the GPUs of the nodes, which is what all others are compared with, and once without GPUs
    local job
    pause 0
    completes "$(NPROC_PER_NODE="" submit start --gpus-per-node=2)"
    job="$(submit without_gpus)"
    completes "$job"
    equals_whole without_gpus
}

check_time_limit() { # it saves when SLURM says so, goes back to the queue, and is continued there
    local job
    pause 1.5
    job="$(REQUEUE=1 submit time_limit --time=1 --signal=B:USR1@20)"
    wait_until 120 "requeue" restarted "$job"
    scontrol update "job=$job" TimeLimit=60 # a second one is not wanted, however slow this machine is
    has_trained time_limit 1 || fail "nothing trained before the time limit"
    completes "$job"
    resumed time_limit
    equals_whole time_limit
}

restarted() { # JOB
    [[ "$(scontrol show job -o "$1")" == *" Restarts=1 "* ]]
}

check_afterok() { # a job that is asked to save is COMPLETED, and the next one goes on
    local first second
    pause 0.5
    first="$(submit afterok)"
    second="$(submit afterok --dependency="afterok:$first")"
    meet_at_work afterok
    scancel --batch --signal=USR1 "$first"
    wait_until 60 "end of job $first" ended "$first"
    job_is "$first" COMPLETED || fail "job $first is $(state_of "$first")"
    has_trained afterok 30 && fail "the first job trained to the end"
    completes "$second"
    resumed afterok
    equals_whole afterok
}

check_requeue() { # by an administrator
    local job
    pause 0.5
    job="$(submit requeue)"
    meet_at_work requeue
    scontrol requeue "$job"
    wait_until 60 "restart" restarted "$job"
    completes "$job"
    resumed requeue
    equals_whole requeue
}

check_preemption() { # within GraceTime: a job of a better partition takes all nodes
    local job urgent
    pause 0.5
    job="$(submit preemption)"
    meet_at_work preemption
    urgent="$(sbatch --parsable --partition=urgent --nodes=3 --exclusive --output=/dev/null --wrap="sleep 1")"
    wait_until 60 "restart" restarted "$job"
    wait_until 60 "end of job $urgent" ended "$urgent"
    completes "$job"
    resumed preemption
    equals_whole preemption
}

check_killed_rank() { # torchrun starts all ranks again
    local job
    pause 0.5
    job="$(TORCHRUN_ARGS="--max-restarts 3" submit killed_rank)"
    meet_at_work killed_rank
    kill -KILL "$(ranks_processes "$job" 3 | sed -n 1p)"
    completes "$job"
    resumed killed_rank
    equals_whole killed_rank
}

check_killed_agent() { # SLURM ends the job, and the next one goes on
    local job
    pause 0.5
    job="$(submit killed_agent)"
    meet_at_work killed_agent
    kill -KILL "$(agent "$job" "$(first_node "$job")")"
    fails "$job"
    [ -z "$(processes_with "SLURM_JOB_ID=$job")" ] || fail "processes of job $job are left"
    completes "$(submit killed_agent)"
    resumed killed_agent
    equals_whole killed_agent
}

check_killed_worker() { # its rank raises, and torchrun starts all ranks again
    local job
    pause 0.5
    job="$(TORCHRUN_ARGS="--max-restarts 3" submit killed_worker)"
    meet_at_work killed_worker
    kill -KILL "$(ranks_processes "$job" 2 | sed -n 2p)"
    completes "$job"
    resumed killed_worker
    equals_whole killed_worker
}

check_stopped_rank() { # the watchdog of another one finds it
    local job
    pause 0.5
    job="$(PRETRAIN_ARGS="--distributed-timeout-minutes 1" TORCHRUN_ARGS="--max-restarts 3" submit stopped_rank)"
    meet_at_work stopped_rank
    kill -STOP "$(ranks_processes "$job" 1 | sed -n 1p)"
    completes "$job"
    grep -q "THE RUN HANGS" "$WORK/stopped_rank.log" || fail "no report of the hang"
    resumed stopped_rank
    equals_whole stopped_rank
}

node_is_down() { # NODE
    [[ "$(sinfo -h -N -n "$1" -p main -o %t)" == down* ]]
}

check_node_down() { # everything on it stands still; SLURM gives the job another node
    local job node pid
    pause 0.5
    job="$(submit node_down)"
    meet_at_work node_down
    node="$(first_node "$job")"
    for pid in $(processes_of_node "$node"); do kill -STOP "$pid" 2> /dev/null || true; done
    wait_until 120 "end of node $node" node_is_down "$node"
    # All nodes have the ports of this machine in common, and the next rendezvous needs that of the last one.
    for pid in $(processes_of_node "$node"); do kill -KILL "$pid" 2> /dev/null || true; done
    wait_until 180 "restart" restarted "$job"
    completes "$job"
    start_node "$node"
    resumed node_down
    equals_whole node_down
}

# ---- all of it

prepare_data() {
    python tools/make_python_corpus.py --output "$WORK/corpus.jsonl" --root "$(python -c 'import email; print(email.__path__[0])')"
    python tools/train_sentencepiece.py --input "$WORK/corpus.jsonl" --model-prefix "$WORK/tokenizer" --vocab-size 400
    python tools/preprocess_data.py --input "$WORK/corpus.jsonl" --output-prefix "$WORK/corpus" --append-eod \
        --tokenizer-type SentencePieceTokenizer --tokenizer-model "$WORK/tokenizer.model" --workers 1
}

main() {
    local checks=("$@") check begin status failed=()
    [ $# -gt 0 ] || checks=("${CHECKS[@]}")
    [ "${checks[0]}" = start ] || checks=(start "${checks[@]}")
    install_slurm
    source scripts/environment.sh
    ensure_environment dev
    ln -s "$REPO/tests/slurm/slow_pretrain_gpt.py" "$WORK/pretrain_gpt.py"
    export DATA_PATH="$WORK/corpus_text_document" TOKENIZER_MODEL="$WORK/tokenizer.model" NPROC_PER_NODE=2
    export PYTHONPATH="$REPO" PAUSE_FILE="$WORK/pause"
    prepare_data > "$WORK/data.log" 2>&1 || fail "no data, see $WORK/data.log"
    start_cluster
    trap stop_cluster EXIT
    for check in "${checks[@]}"; do
        begin=$SECONDS
        # Not within a condition, in which bash would go on after a failure.
        set +e
        (
            set -e
            trap - EXIT
            "check_$check"
        ) 2> "$WORK/$check.reason"
        status=$?
        set -e
        if [ $status -eq 0 ]; then
            echo "ok      $check ($((SECONDS - begin)) s)"
        else
            echo "FAILED  $check ($((SECONDS - begin)) s): $(tail -n 1 "$WORK/$check.reason")"
            failed+=("$check")
            scancel --user="$(id -un)"
            wait_until 90 "idle nodes" nodes_idle 2
        fi
    done
    stop_cluster
    trap - EXIT
    if [ ${#failed[@]} -gt 0 ]; then
        echo "${#failed[@]} of ${#checks[@]} checks failed; see $WORK" >&2
        exit 1
    fi
    echo "all ${#checks[@]} checks passed"
    [ -n "$KEPT" ] || rm -r "$WORK"
}

main "$@"; exit
