#!/bin/bash
# A Slurm of one node on this machine, to try the batch scripts without a cluster. Needs root and Debian's packages
# slurm-wlm and munge.
#
#   eval "$(benchmarks/slurm/one_node.sh start FOLDER)"     # starts it, sets SLURM_CONF
#   benchmarks/slurm/one_node.sh stop FOLDER
set -euo pipefail
action=${1:?start or stop}
folder=$(realpath -m "${2:?folder for configuration, state and logs}")

stop() {
  for daemon in slurmd slurmctld; do
    [ -f "$folder/$daemon.pid" ] && kill "$(cat "$folder/$daemon.pid")" 2>/dev/null || true
  done
}

if [ "$action" = stop ]; then
  stop
  exit 0
fi

mkdir -p "$folder/spool" "$folder/state" /run/munge
if ! munge -n >/dev/null 2>&1; then
  [ -f /etc/munge/munge.key ] || mungekey >&2
  chown -R munge:munge /run/munge /etc/munge/munge.key
  runuser -u munge -- /usr/sbin/munged >&2
fi
host=$(hostname -s)
cat > "$folder/slurm.conf" <<CONF
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
KillWait=5
MpiDefault=none
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc) State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF=$folder/slurm.conf
stop
slurmctld -i >&2
slurmd >&2
for _ in $(seq 60); do
  state=$(sinfo -h -o %t 2>/dev/null || true)
  [ "$state" = idle ] && break
  sleep 1
done
[ "$state" = idle ] || { echo "the node is not idle but '${state}', see $folder/*.log" >&2; exit 1; }
echo "export SLURM_CONF=$SLURM_CONF"
