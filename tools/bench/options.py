"""The options of `motley bench model`, `sparse` and `generate`. Imports no torch: --help answers at once."""

import argparse
from collections.abc import Sequence

_DESCRIPTIONS = {
    "model": "Time a forward and backward pass of dense, of MoT, and of MoT routed as published.",
    "sparse": "Time a forward and backward pass of dense, of depth routing and of experts, and set it "
    "against their FLOPs.",
    "generate": "Time prompts and the tokens written behind them, of dense, MoT and p-MoD models, beside "
    "their FLOPs and the bytes of their caches.",
}


def parse_options(verb: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of `motley bench <verb>`; a usage error ends the process with exit code 2."""
    parser = argparse.ArgumentParser(prog=f"motley bench {verb}", description=_DESCRIPTIONS[verb])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=20, help="passes of each variant (default %(default)s)")
    parser.add_argument(
        "--layers", type=int, help="with the next four: one case of your own (0: a block alone)"
    )
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=2816)
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: at least 1 is needed")
    return args
