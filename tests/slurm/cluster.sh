#!/usr/bin/env bash
# A throw-away Slurm cluster of four virtual nodes on this one machine, for tests: Debian's slurm-wlm and munge, no
# systemd, everything below one folder, everything on loopback. Needs root: slurmd does.
#
#   cluster.sh up DIR            starts it; prints the environment of its clients (KEY=VALUE lines)
#   cluster.sh lose-node DIR n3  that node loses its power: daemon, job steps and ranks die at once
#   cluster.sh start-node DIR n3 and comes back
#   cluster.sh processes DIR     pids of everything that belongs to it
#   cluster.sh down DIR          ends its jobs and daemons, by the pids on record, and nothing else; keeps the logs
#
# RLDIFF_TEST_GUARDIAN=PID at `up`: when that process is gone, the cluster goes down by itself.
set -euo pipefail

nodes=(n1 n2 n3 n4)
# what each node pretends to have; jobs of the tests fit side by side
cpus=32 gpus=32 megabytes=64000

verb=${1:?what to do} dir=$(mkdir -p "${2:?the folder}" && cd "$2" && pwd) name=${3:-}
export SLURM_CONF=$dir/etc/slurm.conf

fail() {
    echo "cluster.sh: $*" >&2
    exit 1
}

# is there a process with the pid in file $1, running program $2?
alive() {
    local pid
    pid=$(cat "$1" 2>/dev/null) && [ -n "$pid" ] && [[ $(readlink "/proc/$pid/exe" 2>/dev/null) == */"$2"* ]]
}

# every process that carries this cluster's SLURM_CONF (daemons, steps, ranks), but none above this script
processes() {
    local above=" $$ $PPID " pid=$PPID
    while [ "${pid:-0}" -gt 1 ]; do
        pid=$(awk '/^PPid:/ {print $2}' "/proc/$pid/status" 2>/dev/null || echo 0)
        above+="$pid "
    done
    local environ
    for environ in /proc/[0-9]*/environ; do
        pid=${environ#/proc/}
        pid=${pid%/environ}
        [[ $above == *" $pid "* ]] && continue
        if grep -qzxF "SLURM_CONF=$SLURM_CONF" "$environ" 2>/dev/null; then
            # a subshell of this very script
            [ "$(awk '/^PPid:/ {print $2}' "/proc/$pid/status" 2>/dev/null)" = "$$" ] || echo "$pid"
        fi
    done
}

tree() { # pid: it and everything that descends from it
    local child
    for child in $(cat "/proc/$1"/task/*/children 2>/dev/null); do tree "$child"; done
    echo "$1"
}

# Each node has a host name of its own (a UTS namespace, and a private /etc/hosts that knows the names): MPI's shared
# memory goes by host, so nodes of one name would collide.
start_node() {
    alive "$dir/run/slurmd.$1.pid" slurmd && return
    # what a step leaves that died with its node makes the same step fail when the job is requeued; a reboot clears it
    rm -rf "$dir/run/tmp.$1" "$dir/run/spool.$1"
    mkdir -p "$dir/run/spool.$1" "$dir/run/tmp.$1"
    chmod 1777 "$dir/run/tmp.$1"
    unshare --mount --uts bash -c 'hostname "$1" && mount --bind "$2" /etc/hosts && exec slurmd -N "$1"' \
        _ "$1" "$dir/etc/hosts" </dev/null >>"$dir/log/slurmd.$1.out" 2>&1
}

free_ports() { # the first of six ports in a row that nobody listens on
    local base port
    for _ in $(seq 50); do
        base=$((20000 + RANDOM % 1000 * 10))
        for port in $(seq $base $((base + 5))); do
            (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null && continue 2
        done
        echo $base
        return
    done
    fail "no free ports"
}

configure() {
    local port node index
    port=$(free_ports)
    { cat /etc/hosts; printf '127.0.0.1 %s\n' "${nodes[@]}"; } > "$dir/etc/hosts"
    # pretended GPUs: copies of /dev/null whose names end in a number
    mkdir -p "$dir/run/dev"
    for index in $(seq 0 $((gpus - 1))); do mknod --mode=666 "$dir/run/dev/nvidia$index" c 1 3; done
    echo "Name=gpu File=$dir/run/dev/nvidia[0-$((gpus - 1))]" > "$dir/etc/gres.conf"
    # cred_expire: a requeued job starts after 6 s instead of 121. SlurmdTimeout: a lost node is noticed within 15 s.
    # Every node needs a temporary folder of its own (%n).
    cat > "$SLURM_CONF" <<CONF
ClusterName=rldiff-test
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5,socket=$dir/munge/socket
CredType=cred/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/run/spool.%n
TmpFS=$dir/run/tmp.%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd.%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$dir/log/jobs.log
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=2
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=15
InactiveLimit=0
MinJobAge=600
KillWait=5
MessageTimeout=10
UnkillableStepTimeout=30
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
CONF
    index=0
    for node in "${nodes[@]}"; do
        index=$((index + 1))
        echo "NodeName=$node NodeAddr=127.0.0.1 NodeHostname=$node Port=$((port + index)) CPUs=$cpus Sockets=1" \
            "CoresPerSocket=$cpus ThreadsPerCore=1 RealMemory=$megabytes Gres=gpu:$gpus State=UNKNOWN"
    done >> "$SLURM_CONF"
    cat >> "$SLURM_CONF" <<'CONF'
PartitionName=main Nodes=n[1-4] Default=YES MaxTime=INFINITE DefaultTime=10 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=10 OverSubscribe=NO
PartitionName=urgent Nodes=n[1-4] Default=NO MaxTime=INFINITE DefaultTime=10 State=UP PriorityTier=10 PreemptMode=OFF OverSubscribe=NO
CONF
}

ready_nodes() { timeout 3 sinfo --noheader --Node --partition main --states idle,mixed,allocated --format %N 2>/dev/null | wc -l; }

up() {
    [ "$(id -u)" = 0 ] || fail "needs root"
    down
    rm -rf "$dir"
    umask 022
    mkdir -p "$dir"/{run,log,etc,state,munge}
    chmod 700 "$dir/state"
    chmod 711 "$dir/munge"
    (umask 077 && head -c 128 /dev/urandom > "$dir/munge/key")
    munged --key-file="$dir/munge/key" --socket="$dir/munge/socket" --pid-file="$dir/run/munged.pid" \
        --log-file="$dir/log/munged.log" --seed-file="$dir/munge/seed" --num-threads=2 >"$dir/log/munged.out" 2>&1
    configure
    slurmctld >"$dir/log/slurmctld.out" 2>&1
    for node in "${nodes[@]}"; do start_node "$node"; done
    if [ -n "${RLDIFF_TEST_GUARDIAN:-}" ]; then
        setsid "$0" guard "$dir" </dev/null >"$dir/log/guardian.out" 2>&1 &
    fi
    local deadline=$((SECONDS + 30))
    until [ "$(ready_nodes)" = ${#nodes[@]} ]; do
        [ $SECONDS -lt $deadline ] || fail "not up after 30 s; see $dir/log"
        sleep 0.05
    done
    echo "SLURM_CONF=$SLURM_CONF"
}

lose_node() {
    local victims step
    victims=$(cat "$dir/run/slurmd.$name.pid")
    for step in $(processes); do
        [[ $(readlink "/proc/$step/exe" 2>/dev/null) == */slurmstepd* ]] || continue
        # by its namespace: a step belongs to the node whose host name it has
        [ "$(nsenter --uts --target "$step" hostname 2>/dev/null)" = "$name" ] && victims+=" $(tree "$step" | tr '\n' ' ')"
    done
    # some may be gone by now
    # shellcheck disable=SC2086
    kill -KILL $victims 2>/dev/null || true
    rm -f "$dir/run/slurmd.$name.pid"
}

end() { # pidfile program
    local pid
    alive "$1" "$2" || return 0
    pid=$(cat "$1")
    kill -TERM "$pid" 2>/dev/null || true
    for _ in $(seq 50); do
        alive "$1" "$2" || return 0
        sleep 0.1
    done
    kill -KILL "$pid" 2>/dev/null || true
}

down() {
    local jobs pid node
    [ -f "$SLURM_CONF" ] || return 0
    if alive "$dir/run/slurmctld.pid" slurmctld; then
        jobs=$(timeout 5 squeue --noheader --format %A 2>/dev/null | sort -u | tr '\n' ' ' || true)
        if [ -n "${jobs// /}" ]; then
            # KILL first: a batch script that traps TERM would hold us up
            # shellcheck disable=SC2086
            timeout 5 scancel --quiet --full --signal=KILL $jobs 2>/dev/null || true
            # shellcheck disable=SC2086
            timeout 5 scancel --quiet $jobs 2>/dev/null || true
            for _ in $(seq 50); do
                [ -z "$(timeout 5 squeue --noheader --states R,CG,S --format %A 2>/dev/null || true)" ] && break
                sleep 0.1
            done
        fi
    fi
    for node in "${nodes[@]}"; do end "$dir/run/slurmd.$node.pid" slurmd; done
    end "$dir/run/slurmctld.pid" slurmctld
    end "$dir/run/munged.pid" munged
    # steps that outlived their daemon, and their ranks
    for pid in $(processes); do
        [ "$pid" = "$(cat "$dir/run/guardian.pid" 2>/dev/null)" ] || kill -KILL "$pid" 2>/dev/null || true
    done
    rm -f "$dir"/run/*.pid "$dir"/munge/socket*
}

guard() {
    echo $$ > "$dir/run/guardian.pid"
    # until somebody else has torn the cluster down
    while [ -f "$dir/run/guardian.pid" ]; do
        [ -d "/proc/$RLDIFF_TEST_GUARDIAN" ] || { down; return; }
        sleep 0.5
    done
}

case $verb in
    up) up ;;
    down) down ;;
    guard) guard ;;
    processes) processes ;;
    lose-node) lose_node ;;
    start-node) start_node "$name" ;;
    *) fail "unknown: $verb" ;;
esac
