"""The entry point of batch scripts, under a name that jobs keep which are queued while Motley is updated."""

from data_pipeline.files.printable import printable_output
from slurm.supervise.attempt import main

if __name__ == "__main__":
    with printable_output():
        raise SystemExit(main())
