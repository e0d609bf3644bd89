"""The long options of sbatch that a profile may set by name, and the options that have a key of their own."""

OWN_KEY = {
    "job-name": "the run's name",
    "partition": "partition",
    "account": "account",
    "qos": "qos",
    "nodes": "nodes",
    "ntasks": "nodes and tasks_per_node",
    "ntasks-per-node": "tasks_per_node (one rank a task)",
    "ntasks-per-gpu": "gpus_per_node (one rank a GPU)",
    "gpus-per-node": "gpus_per_node",
    "cpus-per-task": "cpus_per_task",
    "mem": "memory_gb_per_node",
    "time": "time_limit",
    "signal": "signal_lead_s",
    "requeue": "max_requeues",
    "no-requeue": "max_requeues = 0",
    "open-mode": "nothing: the job's output is always appended to, so that a requeue keeps it",
    "output": "nothing: it is <run directory>/slurm/job_<id>.out",
    "error": "nothing: it goes where the output goes",
    "chdir": "nothing: it is the folder that the run is submitted from",
}
"""sbatch option -> the key of a profile that sets it."""

# These are the options in `sbatch --help` of 22.05 and in the manual of 24.11. Left out are options that ask
# instead of submit (help, test-only ...), that change who or what runs (uid, wrap ...), and arrays.
_LEGAL = """
    acctg-freq bb bbf begin cluster-constraint clusters comment constraint container container-id
    contiguous core-spec cores-per-socket cpu-freq cpus-per-gpu deadline delay-boot dependency
    distribution exclude exclusive export export-file extra extra-node-info get-user-env gpu-bind
    gpu-freq gpus gpus-per-socket gpus-per-task gres gres-flags hint hold ignore-pbs input
    kill-on-invalid-dep licenses mail-type mail-user mcs-label mem-bind mem-per-cpu mem-per-gpu mincpus
    network nice no-kill nodefile nodelist ntasks-per-core ntasks-per-socket oom-kill-step overcommit
    oversubscribe power prefer priority profile propagate reboot reservation resv-ports segment
    sockets-per-node spread-job stepmgr switches thread-spec threads-per-core time-min tmp tres-bind
    tres-per-task use-min-nodes wait-all-nodes wckey
"""
LEGAL = frozenset(_LEGAL.split())
"""Options that a profile may set by name."""
