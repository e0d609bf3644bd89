"""`motley` and its verbs. Parsing is here, work is in the packages; `--help` imports no torch."""

import argparse
import sys
from collections.abc import Sequence

from data_pipeline.toml_config import ConfigError


def _demo_corpus(args: argparse.Namespace) -> int:
    from data_pipeline.demo_corpus import write_demo_corpus

    write_demo_corpus(args.out, num_documents=args.documents, seed=args.seed, processes=args.processes)
    return 0


def _tokenize(args: argparse.Namespace) -> int:
    from data_pipeline.prepare import tokenize

    tokenize(args.src, args.out, config_path=args.config, processes=args.processes)
    return 0


def _train(args: argparse.Namespace) -> int:
    from pretrain.train import launch

    return launch(args.run, args.overrides, processes=args.processes)


def _compare(args: argparse.Namespace) -> int:
    from pretrain.compare import run_comparison

    return run_comparison(args.comparison, args.overrides, jobs=args.jobs, report_only=args.report_only)


def _describe(args: argparse.Namespace) -> int:
    from pretrain.config import load
    from pretrain.models.accounting import describe

    print(describe(load(args.run, args.overrides).model))
    return 0


def _bench(args: argparse.Namespace) -> int:
    if args.what == "model":
        from tools.bench_model import main as bench
    else:
        from tools.bench_data import main as bench
    return bench(args.arguments)


def parser() -> argparse.ArgumentParser:
    """All verbs with their arguments."""
    top = argparse.ArgumentParser(
        prog="motley",
        description="Pretrain multimodal transformers and compare dense with sparse under matched compute.",
    )
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    verb = verbs.add_parser("demo-corpus", help="write the demo corpus as raw WebDataset shards")
    verb.add_argument("out", help="folder to write train/ and heldout/ shards into")
    verb.add_argument("--documents", type=int, default=20_000, help="documents in all (default %(default)s)")
    verb.add_argument("--seed", type=int, default=1)
    verb.add_argument("--processes", type=int, default=None, help="worker processes (default: all cores)")
    verb.set_defaults(work=_demo_corpus)

    verb = verbs.add_parser("tokenize", help="raw WebDataset shards -> token shards, index and manifest")
    verb.add_argument("src", help="folder of raw shards (*.tar: .json, .N.png, .N.wav)")
    verb.add_argument("out", help="folder for token shards")
    verb.add_argument("--config", required=True, help="data.toml: the tokenizers and their settings")
    verb.add_argument("--processes", type=int, default=None, help="worker processes (default: all cores)")
    verb.set_defaults(work=_tokenize)

    verb = verbs.add_parser("train", help="train a run, or continue it from its last good checkpoint")
    verb.add_argument("run", help="RUN.toml")
    verb.add_argument(
        "overrides", nargs="*", metavar="key=value", help="such as optimizer.learning_rate=1e-3"
    )
    verb.add_argument("--processes", type=int, default=1, help="ranks on this machine (default %(default)s)")
    verb.set_defaults(work=_train)

    verb = verbs.add_parser(
        "compare", help="run arms x seeds of a comparison and report which won, by how much"
    )
    verb.add_argument("comparison", help="COMPARE.toml")
    verb.add_argument(
        "overrides", nargs="*", metavar="key=value", help="applied to the base run of every arm"
    )
    verb.add_argument("--jobs", type=int, default=None, help="runs at a time (default: the file's)")
    verb.add_argument("--report-only", action="store_true", help="report on what has run; start nothing")
    verb.set_defaults(work=_compare)

    verb = verbs.add_parser("describe", help="parameters and FLOPs of a run's model, per module and modality")
    verb.add_argument("run", help="RUN.toml")
    verb.add_argument("overrides", nargs="*", metavar="key=value")
    verb.set_defaults(work=_describe)

    verb = verbs.add_parser(
        "bench", help="measure the model or the data path against what one would pick instead"
    )
    verb.add_argument("what", choices=("model", "data"))
    verb.add_argument("arguments", nargs=argparse.REMAINDER, help="see `motley bench model --help`")
    verb.set_defaults(work=_bench)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; a user's mistake is one message on stderr and exit code 2."""
    args = parser().parse_args(argv)
    try:
        return args.work(args)
    except ConfigError as error:
        print(f"motley {args.verb}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
