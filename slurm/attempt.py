"""The entry point of batch scripts, under a name that jobs keep which are queued while Motley is updated."""

from slurm.supervise.attempt import main

if __name__ == "__main__":
    raise SystemExit(main())
