"""`python -m pretrain.train RUN.toml key=value...` is one rank of a run, for launchers that start ranks
themselves (torchrun, srun). `motley train` is pretrain/train/launch.py."""

import sys

from data_pipeline.files.printable import printable_output
from pretrain.train.rank import main
from pretrain.train.stop_signal import ignore_from_here_on

if __name__ == "__main__":
    with printable_output():
        exit_code = main(sys.argv[1:])
    ignore_from_here_on()
    raise SystemExit(exit_code)
