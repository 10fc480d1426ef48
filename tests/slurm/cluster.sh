# Sourced by run.sh: a SLURM cluster of three pretended nodes on this machine.
#
# Each node is a slurmd of its own and has a loopback address as its name, so that no name has to be made known, and two
# pretended GPUs. All files are in $WORK/cluster, all ports are of our own: a SLURM that runs here is left alone.
NODES=(127.0.0.11 127.0.0.12 127.0.0.13)
DAEMONS=()
export SLURM_CONF="$WORK/cluster/slurm.conf"

install_slurm() {
    [ "$(id -u)" = 0 ] || fail "a SLURM of one's own needs root: its daemons start processes of others"
    local missing=()
    command -v slurmctld > /dev/null || missing+=(slurmctld)
    command -v slurmd > /dev/null || missing+=(slurmd)
    command -v sbatch > /dev/null || missing+=(slurm-client)
    command -v munged > /dev/null || missing+=(munge)
    command -v ps > /dev/null || missing+=(procps)
    [ ${#missing[@]} -gt 0 ] || return 0
    command -v apt-get > /dev/null || fail "no apt-get; install what has ${missing[*]} by hand"
    echo "installing ${missing[*]}"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${missing[@]}" > /dev/null
}

write_configuration() {
    local cluster="$WORK/cluster" port=$((20000 + RANDOM % 10000)) node
    mkdir -p "$cluster/state" "$cluster/spool"
    mkdir -m 700 "$cluster/munge"
    (umask 077 && head -c 128 /dev/urandom > "$cluster/munge/key")
    touch "$cluster/gpu0" "$cluster/gpu1"
    printf 'AutoDetect=off\nName=gpu File=%s/gpu[0-1]\n' "$cluster" > "$cluster/gres.conf"
    cat > "$SLURM_CONF" <<END
ClusterName=pretended
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
AuthType=auth/munge
# A requeued job waits as long as a credential is valid.
AuthInfo=socket=$cluster/munge/socket,cred_expire=5
StateSaveLocation=$cluster/state
SlurmdSpoolDir=$cluster/spool/%n
SlurmctldPidFile=$cluster/slurmctld.pid
SlurmdPidFile=$cluster/slurmd-%n.pid
SlurmctldLogFile=$cluster/slurmctld.log
SlurmdLogFile=$cluster/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MailProg=/bin/true
ReturnToService=2
SlurmdTimeout=10
KillWait=20
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=2
END
    for node in "${NODES[@]}"; do
        mkdir "$cluster/spool/$node"
        echo "NodeName=$node CPUs=2 Gres=gpu:2 Port=$((port += 1))" >> "$SLURM_CONF"
    done
}

start_daemon() { # PROGRAM ARGUMENTS: one that stays in the foreground, in the background
    "$@" > /dev/null 2>&1 < /dev/null &
    DAEMONS+=($!)
    disown # or bash reports its end
}

start_node() { # NODE: what slurmd starts inherits the variable, so that all processes of a node can be found
    PRETENDED_NODE="$1" start_daemon slurmd -D -N "$1"
}

start_cluster() {
    local munge="$WORK/cluster/munge" node
    write_configuration
    start_daemon munged --foreground --force --socket="$munge/socket" --key-file="$munge/key" --pid-file="$munge/pid" \
        --log-file="$munge/log" --seed-file="$munge/seed"
    wait_until 10 "munged" test -S "$munge/socket"
    start_daemon slurmctld -D
    for node in "${NODES[@]}"; do start_node "$node"; done
    wait_until 60 "three idle nodes" nodes_idle 3
}

stop_cluster() {
    local node pid
    scancel --user="$(id -un)" 2> /dev/null || true
    for node in "${NODES[@]}"; do
        for pid in $(processes_of_node "$node"); do kill -KILL "$pid" 2> /dev/null || true; done
    done
    kill -KILL "${DAEMONS[@]}" 2> /dev/null || true
}

nodes_idle() { [ "$(sinfo -h -N -p main -t idle -o %N 2> /dev/null | wc -l)" -ge "$1" ]; }

processes_with() { # NAME=VALUE ...: processes of this cluster that have these in their environment, the oldest first
    local files=(/proc/[0-9]*/environ) line pids
    for line in "$@" "SLURM_CONF=$SLURM_CONF"; do
        mapfile -t files < <(grep -lzxF -- "$line" "${files[@]}" 2> /dev/null)
        [ ${#files[@]} -gt 0 ] || return 0
    done
    pids="$(printf '%s\n' "${files[@]}" | tr -dc '0-9\n' | paste -sd,)"
    ps -o pid= --sort=start_time -p "$pids" || true
}

processes_of_node() { # all, of SLURM and of jobs; slurmstepd writes over its environment, and is found as a parent
    local pids parents
    pids="$({ processes_with "PRETENDED_NODE=$1"; processes_with "SLURMD_NODENAME=$1"; } | tr -d ' ' | sort -u | paste -sd,)"
    [ -n "$pids" ] || return 0
    parents="$(ps -o ppid= -p "$pids" | tr -d ' ' | sort -u | paste -sd,)"
    ps -o pid= -p "$pids" || true
    { ps -o pid=,comm= -p "$parents" || true; } | awk '$2 ~ /^slurmstepd/ { print $1 }'
}

ranks_processes() { # JOB RANK: the rank itself, then its data workers
    processes_with "SLURM_JOB_ID=$1" "RANK=$2"
}

agent() { # JOB NODE: the torchrun of a node
    processes_with "SLURM_JOB_ID=$1" "SLURM_STEP_ID=0" "SLURMD_NODENAME=$2" | head -n 1
}

state_of() { # JOB
    scontrol show job -o "$1" | sed 's/.* JobState=\([A-Z_]*\).*/\1/'
}

job_is() { # JOB STATE
    [ "$(state_of "$1")" = "$2" ]
}

first_node() { # JOB
    scontrol show hostnames "$(squeue -h -j "$1" -o %N)" | sed -n 1p
}
