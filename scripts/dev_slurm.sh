#!/usr/bin/env bash
# A real SLURM cluster of two nodes on this host, for tests and for trying launch.sbatch.
# Usage: bash scripts/dev_slurm.sh start|stop|status
#   start   installs slurm-wlm and munge with apt-get if they are missing, starts munged, slurmctld and
#           two slurmd; then `. $STATE/env` in a shell makes sbatch, srun and squeue find the cluster
#   stop    cancels its jobs, ends the daemons that start has started, and removes the state folder
#   status  prints sinfo; exits with 1 if no cluster is there
# Runs as root on Debian or Ubuntu. Everything lies in one folder, STATE=${DEV_SLURM:-/tmp/dev_slurm};
# CPUS (default 2), MEMORY in MB (default 4000) and PORT (default 17000, the next three too) may be set.
set -eu
state=${DEV_SLURM:-/tmp/dev_slurm}
port=${PORT:-17000}
export SLURM_CONF=$state/slurm.conf
PATH=$PATH:/usr/sbin

fail() {
    echo "dev_slurm: $1" >&2
    exit 2
}

install() {
    if command -v slurmctld > /dev/null && command -v slurmd > /dev/null && command -v munged > /dev/null; then
        return
    fi
    command -v apt-get > /dev/null || fail "slurmctld, slurmd and munged are missing, and so is apt-get"
    export DEBIAN_FRONTEND=noninteractive
    # No service of the distribution shall start: this cluster has its own daemons.
    apt-get update -qq > "$state/apt.log" 2>&1 || fail "apt-get update failed: see $state/apt.log"
    apt-get install -y -qq --no-install-recommends slurm-wlm munge >> "$state/apt.log" 2>&1 ||
        fail "apt-get install slurm-wlm munge failed: see $state/apt.log"
}

write_configuration() {
    mkdir -p "$state/ctld" "$state/log"
    dd if=/dev/urandom of="$state/munge.key" bs=128 count=1 status=none
    chmod 600 "$state/munge.key"
    cat > "$SLURM_CONF" << END
ClusterName=dev
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its old credential is void: 120 s by default.
AuthInfo=socket=$state/munge.socket,cred_expire=5
StateSaveLocation=$state/ctld
SlurmdSpoolDir=$state/spool-%n
SlurmctldPidFile=$state/slurmctld.pid
SlurmdPidFile=$state/slurmd-%n.pid
SlurmctldLogFile=$state/log/slurmctld.log
SlurmdLogFile=$state/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,batch_sched_delay=1
SchedulerType=sched/builtin
# More CPUs and memory may be said to be there than are.
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=15
OverTimeLimit=0
JobAcctGatherType=jobacct_gather/none
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=$CPUS RealMemory=$MEMORY
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=$CPUS RealMemory=$MEMORY
PartitionName=dev Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
END
    cat > "$state/env" << END
export SLURM_CONF=$SLURM_CONF
# The nodes' names do not resolve: both are this host.
export MASTER_ADDR=127.0.0.1
END
}

is_running() { # whether the process of a pid file is there and is no zombie
    [ -s "$1" ] && grep -qs '^State:[[:space:]]*[^Z[:space:]]' "/proc/$(cat "$1")/status"
}

start() {
    [ "$(id -u)" -eq 0 ] || fail "start needs root"
    if is_running "$state/slurmctld.pid"; then
        echo "dev_slurm: it runs already; stop comes first" >&2
        exit 2
    fi
    mkdir -p "$state"
    chmod 755 "$state"
    install
    CPUS=${CPUS:-2} MEMORY=${MEMORY:-4000} write_configuration
    munged --force --key-file="$state/munge.key" --socket="$state/munge.socket" \
        --pid-file="$state/munged.pid" --seed-file="$state/munge.seed" \
        --log-file="$state/log/munged.log" 2> "$state/log/munged.err" ||
        fail "munged does not start: see $state/log"
    slurmctld -c || fail "slurmctld does not start: see $state/log/slurmctld.log"
    for node in n1 n2; do
        mkdir -p "$state/spool-$node"
        slurmd -N "$node" || fail "slurmd does not start: see $state/log/slurmd-$node.log"
    done
    for _ in $(seq 100); do
        if [ "$(sinfo --noheader --states=idle --Node --format=%N 2> /dev/null | wc -l)" -eq 2 ]; then
            echo "dev_slurm: two nodes are idle; now: . $state/env"
            return
        fi
        sleep 0.2
    done
    stop
    fail "the nodes did not become idle within 20 s"
}

stop() {
    if is_running "$state/slurmctld.pid"; then
        squeue --noheader --format=%i 2> /dev/null | xargs -r scancel --signal=KILL --full 2> /dev/null || true
        squeue --noheader --format=%i 2> /dev/null | xargs -r scancel 2> /dev/null || true
    fi
    for name in slurmd-n1 slurmd-n2 slurmctld munged; do
        is_running "$state/$name.pid" || continue
        cp "$state/$name.pid" "$state/ending.pid" # the daemon removes its own
        kill "$(cat "$state/ending.pid")"
        for _ in $(seq 100); do
            is_running "$state/ending.pid" || break
            sleep 0.1
        done
    done
    rm -rf "$state"
}

case ${1:-} in
    start) start ;;
    stop) stop ;;
    status) is_running "$state/slurmctld.pid" && sinfo ;;
    *) sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
