"""The verbs of `motley` about what a run was trained on."""

import argparse
from pathlib import Path
from typing import Any

from data_pipeline.files.toml_config import ConfigError
from parallel.exit_codes import ExitCode

Verbs = Any  # of argparse, whose type is private


def add_step(verb: argparse.ArgumentParser) -> None:
    """The options of `motley inspect data`."""
    data = verb.add_argument_group("inspect data: one page of what a step was trained on")
    data.add_argument("--step", type=int, metavar="N", help="the step, counted from 1; required")
    data.add_argument("--sequences", type=int, default=16, help="sequences to show (default %(default)s)")
    data.add_argument("--tokenizers", metavar="DIR", help="their folder (default: beside the run's data)")


def inspect_data(args: argparse.Namespace, run: Path, out: Path | None) -> int:
    """Write the page of a step."""
    from pretrain.audit import step_page

    if args.step is None or args.sequences < 1:
        raise ConfigError("inspect data: name the step with --step N; --sequences is 1 or more")
    tokenizers = None if args.tokenizers is None else Path(args.tokenizers)
    step_page.inspect_data(run, args.step, out, num_sequences=args.sequences, tokenizers=tokenizers)
    return 0


def _audit(args: argparse.Namespace) -> int:
    from pretrain.audit.report import audit, compare

    if args.other is not None:
        if args.documents is not None or args.document is not None:
            raise ConfigError("--documents and --document are of one run; leave the second run out")
        same = compare(Path(args.run), Path(args.other))
        return ExitCode.DONE if same else ExitCode.FAILED
    documents = None if args.documents is None else Path(args.documents)
    agrees = audit(Path(args.run), documents=documents, name=args.document)
    return ExitCode.DONE if agrees else ExitCode.FAILED


def _import_tokens(args: argparse.Namespace) -> int:
    from data_pipeline.tokenize.ready_ids import import_tokens

    import_tokens(Path(args.src), Path(args.out), config_path=Path(args.config), end=args.end)
    return 0


def add_import_data(verbs: Verbs) -> None:
    """import-data."""
    verb = verbs.add_parser("import-data", help="ids that are ready -> token shards, index and manifest")
    verb.add_argument("what", choices=("tokens",), help="ids of a text tokenizer")
    verb.add_argument("src", help="ids.npy, Megatron's PREFIX.bin beside PREFIX.idx, or a folder of these")
    verb.add_argument("out", help="folder for token shards; must not exist")
    verb.add_argument("--config", required=True, help="data.toml: the text tokenizer that made the ids")
    verb.add_argument("--end", type=int, metavar="ID", help="the id that ends a document in SRC, left out")
    verb.set_defaults(work=_import_tokens)


def add_audit(verbs: Verbs) -> None:
    """audit."""
    verb = verbs.add_parser(
        "audit", help="how often a run consumed each document, and in which step; or whether two runs differ"
    )
    verb.add_argument("run", help="a run directory, or RUN.toml")
    verb.add_argument("other", nargs="?", help="another run: did it consume the same?")
    verb.add_argument("--documents", metavar="FILE.csv", help="write a line per piece of a document and step")
    verb.add_argument("--document", metavar="SHARD/KEY", help="print the steps of one document")
    verb.set_defaults(work=_audit)
