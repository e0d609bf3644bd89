"""Names of the files of a run directory. Every writer and reader takes them from here. Imports nothing.

runs/NAME/
    config.resolved.json   the config that the run was made with
    record.json            id of the run; every attempt: command, layout, code, first and last step, why it
                           ended
    lock                   held by the process that writes the directory
    metrics.jsonl          a row of metrics a line (pretrain/metrics.py)
    documents.json         sums of losses per held-out document after the last step, if
                           evaluate.last_documents asks for them (pretrain/evaluation/document_sums.py)
    tensorboard/           the same rows, and pictures, as event files
    trunk.jsonl            of a branch: rows of metrics of the runs that it goes on from, up to its first step
    checkpoints/           step_00000500/ and so on (pretrain/checkpoint/folder.py)
        aside_1/           checkpoints and metrics.jsonl of later steps, from before the run went back
    samples/               step_00000500.html and so on: what the model writes (every_steps.samples)
    logs/                  rank0.log, ...; compare.log of a run that `motley compare` started
        job_812_attempt_0/     the same of an attempt of a Slurm job
    slurm/                 submissions and attempts of Slurm jobs (slurm/records.py)
"""

CONFIG = "config.resolved.json"
RECORD = "record.json"
LOCK = "lock"
METRICS = "metrics.jsonl"
TRUNK = "trunk.jsonl"
DOCUMENTS = "documents.json"
DOCUMENTS_FORMAT = 1
TENSORBOARD = "tensorboard"
CHECKPOINTS = "checkpoints"
ASIDE = "aside_"
LOGS = "logs"
SAMPLES = "samples"
COMPARE_LOG = "compare.log"


def rank_log(rank: int) -> str:
    """Name of a rank's log, in LOGS or in the folder of an attempt."""
    return f"rank{rank}.log"


def attempt_logs(job: str, attempt: int) -> str:
    """Name of the folder in LOGS of an attempt of Slurm job `job`, such as "812" or, of an array, "812_3"."""
    return f"job_{job}_attempt_{attempt}"
