"""The entry point that batch scripts name, also those queued before slurm/supervise/ existed."""

from slurm.supervise.attempt import main

if __name__ == "__main__":
    raise SystemExit(main())
