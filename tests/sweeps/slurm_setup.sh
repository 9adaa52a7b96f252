#!/usr/bin/env bash
# A real Slurm of one node on a Debian or Ubuntu machine, for the tests marked `slurm`. Run as root; repeat at will.
#
#     bash tests/sweeps/slurm_setup.sh          install what is missing, configure, start, wait until a job runs
#     bash tests/sweeps/slurm_setup.sh stop     stop the daemons that it started
#
# No systemd is needed (containers have none), and an existing /etc/slurm/slurm.conf of another maker is left alone.
set -euo pipefail

CONF=/etc/slurm/slurm.conf
MARK='# made by tests/sweeps/slurm_setup.sh'

[ "$(id -u)" = 0 ] || { echo "slurm_setup.sh: run it as root (it installs packages and starts daemons)" >&2; exit 2; }
if [ -e "$CONF" ] && ! grep -qF "$MARK" "$CONF"; then
  echo "slurm_setup.sh: $CONF was written by someone else; not touched" >&2
  exit 2
fi

stop() {
  for pidfile in /run/ldm-slurmd.pid /run/ldm-slurmctld.pid /run/munge/munged.pid; do
    if [ -s "$pidfile" ]; then kill "$(cat "$pidfile")" 2>/dev/null || true; fi
  done
}
if [ "${1:-start}" = stop ]; then stop; exit 0; fi

if ! command -v slurmctld >/dev/null || ! command -v slurmd >/dev/null || ! command -v munged >/dev/null; then
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends slurm-wlm munge >/dev/null
fi

# munge: one key, one daemon under its own user (it refuses folders that others can write).
install -d -o munge -g munge -m 0700 /etc/munge /var/lib/munge /var/log/munge
install -d -o munge -g munge -m 0755 /run/munge
if [ ! -s /etc/munge/munge.key ]; then mungekey --create --force; fi
chown munge:munge /etc/munge/munge.key
chmod 0400 /etc/munge/munge.key
if ! munge -n 2>/dev/null | unmunge >/dev/null 2>&1; then
  runuser -u munge -- munged --force
fi

host=$(hostname -s)
cpus=$(nproc)
# Half of the memory: a container may see its host's /proc/meminfo, and slurmd drains a node that has
# less than the RealMemory stated here.
memory=$(awk '/MemTotal/ {print int($2 / 2048)}' /proc/meminfo)
install -d -m 0755 /etc/slurm /var/spool/slurmctld /var/spool/slurmd /var/log/slurm
cat > "$CONF" <<END
$MARK
ClusterName=ldm
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
StateSaveLocation=/var/spool/slurmctld
SlurmdSpoolDir=/var/spool/slurmd
SlurmctldPidFile=/run/ldm-slurmctld.pid
SlurmdPidFile=/run/ldm-slurmd.pid
SlurmctldLogFile=/var/log/slurm/slurmctld.log
SlurmdLogFile=/var/log/slurm/slurmd.log
ReturnToService=2
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
KillWait=10
SchedulerParameters=sched_interval=5,bf_interval=5,batch_sched_delay=1
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cpus RealMemory=$memory State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP
END

if scontrol ping 2>/dev/null | grep -q 'is UP'; then scontrol reconfigure; else slurmctld; fi
if ! { [ -s /run/ldm-slurmd.pid ] && kill -0 "$(cat /run/ldm-slurmd.pid)" 2>/dev/null; }; then slurmd; fi

for _ in $(seq 60); do
  if timeout 20 srun --ntasks=1 --immediate=5 true 2>/dev/null; then
    echo "slurm is up: $(sinfo --noheader --format='%P %D node, %c cpus, %t')"
    exit 0
  fi
  scontrol update nodename="$host" state=resume 2>/dev/null || true
  sleep 1
done
echo "slurm_setup.sh: no job ran; the last lines of the logs:" >&2
tail -n 20 /var/log/slurm/slurmctld.log /var/log/slurm/slurmd.log >&2
exit 1
