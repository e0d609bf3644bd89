"""The command line: `motley` and its verbs.

This module only parses; the packages do the work. `--help` imports no torch.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.files.os_errors import is_misplaced, os_error_text
from data_pipeline.files.printable import printable_output
from data_pipeline.files.toml_config import ConfigError
from parallel.exit_codes import ExitCode
from tools.data_verbs import Verbs, add_audit, add_import_data
from tools.model_verbs import add_bench, add_generate, add_models, add_overrides, add_weights

if TYPE_CHECKING:
    from pretrain.lineage.begin import Ask


def _demo_corpus(args: argparse.Namespace) -> int:
    from data_pipeline.demo.corpus import write_demo_corpus

    write_demo_corpus(args.out, num_documents=args.documents, seed=args.seed, processes=args.processes)
    return 0


def _tokenize(args: argparse.Namespace) -> int:
    if (args.profile is None) != (args.parts is None):
        raise ConfigError("--profile PROFILE.toml and --parts N go together: an array of N jobs of that site")
    if args.profile is not None:
        from slurm.submit.tokenize import submit_tokenize

        return submit_tokenize(
            args.src, args.out, config_path=args.config, processes=args.processes,
            profile_path=args.profile, parts=args.parts, concurrent_parts=args.concurrent_parts,
            dry_run=args.dry_run,
        )  # fmt: skip
    from data_pipeline.tokenize.prepare import tokenize, tokenize_part

    if args.part is not None:
        tokenize_part(args.src, args.out, args.part, config_path=args.config, processes=args.processes)
    else:
        tokenize(
            args.src, args.out, config_path=args.config, processes=args.processes,
            tokenizers_only=args.tokenizers_only,
        )  # fmt: skip
    return 0


def _look(args: argparse.Namespace) -> int:
    from data_pipeline.tokenize.look import look

    print(look(args.src))
    return 0


def _part(text: str) -> tuple[int, int]:
    """ "1/8" -> (1, 8)."""
    k, _, n = text.partition("/")
    if not (k.isdecimal() and n.isdecimal() and 1 <= int(k) <= int(n)):
        raise argparse.ArgumentTypeError(f'"{text}": expected K/N with 1 <= K <= N, such as 1/8')
    return int(k), int(n)


def _count(text: str) -> int:
    """A whole number of at least 1."""
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f'"{text}": expected a whole number, 1 or more')
    return int(text)


def _train(args: argparse.Namespace) -> int:
    from pretrain.train.launch import launch

    return launch(args.run, args.overrides, processes=args.processes, ask=_ask(args))


def _ask(args: argparse.Namespace) -> "Ask":
    from pretrain.lineage.begin import Ask

    return Ask(extend=args.extend, branch=args.branch, from_step=args.from_step)


def _submit(args: argparse.Namespace) -> int:
    from pretrain.comparison.config import is_comparison
    from pretrain.lineage.begin import NOTHING_ELSE

    if not Path(args.run).is_dir() and is_comparison(args.run):
        if _ask(args) != NOTHING_ELSE:
            raise ConfigError(f"--extend, --branch and --from-step are for runs; {args.run} is a comparison")
        from slurm.submit.comparison import submit_comparison

        return submit_comparison(
            args.run, args.overrides, profile_path=args.profile,
            nodes=args.nodes, concurrent_runs=args.concurrent_runs, dry_run=args.dry_run, wait=args.wait,
        )  # fmt: skip
    from slurm.submit.run import submit

    if args.concurrent_runs is not None:
        raise ConfigError(f"--concurrent-runs is for comparisons; {args.run} is one run")
    return submit(
        args.run, args.overrides,
        profile_path=args.profile, nodes=args.nodes, dry_run=args.dry_run, wait=args.wait, ask=_ask(args),
    )  # fmt: skip


def _status(args: argparse.Namespace) -> int:
    from slurm.monitor.status import status

    overrides = [text for text in args.paths if "=" in text and not Path(text).exists()]
    return status([text for text in args.paths if text not in overrides], overrides)


def _cancel(args: argparse.Namespace) -> int:
    from slurm.monitor.cancel import cancel_jobs

    return cancel_jobs(args.path, args.overrides)


def _logs(args: argparse.Namespace) -> int:
    from slurm.monitor.logs import logs

    return logs(
        args.run, args.overrides,
        follow=args.follow, rank=args.rank, attempt=args.attempt, whole=args.all,
    )  # fmt: skip


def _compare(args: argparse.Namespace) -> int:
    if args.logs is not None:
        from pretrain.comparison.foreign.compare import compare_logs

        if args.report_only or args.dry_run or args.first_only or args.concurrent_runs is not None:
            raise ConfigError(
                "--from starts no run: leave --report-only, --dry-run, --first-only and --concurrent-runs out"
            )
        return compare_logs(args.logs, args.comparison, args.overrides)
    if args.comparison is None:
        raise ConfigError("name a COMPARE.toml, or logs of runs made elsewhere with --from runs.csv")
    from pretrain.comparison.planned_cost import run_speed
    from pretrain.comparison.run import run_comparison

    return run_comparison(
        args.comparison, args.overrides, concurrent_runs=args.concurrent_runs,
        report_only=args.report_only, dry_run=args.dry_run, first_only=args.first_only,
        speed=run_speed(args.flops_per_s, args.gpu, args.mfu, needs_dry_run=not args.dry_run),
    )  # fmt: skip


class _Version(argparse.Action):
    """Print the installed version and stop. It is looked up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"motley {version('motley')}")
        parser.exit()


def parser() -> argparse.ArgumentParser:
    """The parser of all verbs with their arguments."""
    top = argparse.ArgumentParser(
        prog="motley",
        description="Pretrain multimodal transformers and compare dense with sparse under matched compute.",
    )
    top.add_argument("--version", action=_Version, nargs=0, help="print the installed version and exit")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    own = (_add_data, add_import_data, _add_runs, _add_monitoring, _add_compare)
    for add in (*own, add_audit, add_weights, add_generate, add_models, add_bench):
        add(verbs)
    return top


def _add_data(verbs: Verbs) -> None:
    """demo-corpus, look and tokenize."""
    verb = verbs.add_parser("demo-corpus", help="write the demo corpus as raw WebDataset shards")
    verb.add_argument("out", help="folder to write train/ and heldout/ shards into")
    verb.add_argument("--documents", type=int, default=20_000, help="documents in all (default %(default)s)")
    verb.add_argument("--seed", type=int, default=1)
    verb.add_argument("--processes", type=int, default=None, help="worker processes (default: all cores)")
    verb.set_defaults(work=_demo_corpus)

    verb = verbs.add_parser("look", help="name the layout of raw data, and print the config that reads it")
    verb.add_argument(
        "src", help="folder, file or pattern of raw data: tars, Parquet, JSON lines, JSON, text"
    )
    verb.set_defaults(work=_look)

    verb = verbs.add_parser("tokenize", help="raw data -> token shards, index and manifest")
    verb.add_argument("src", help="folder, file or pattern of raw data; `motley look` says what is in it")
    verb.add_argument("out", help="folder for token shards")
    verb.add_argument("--config", required=True, help="data.toml: the tokenizers and their settings")
    verb.add_argument("--processes", type=int, default=None, help="worker processes (default: all cores)")
    how = verb.add_mutually_exclusive_group()
    how.add_argument("--tokenizers-only", action="store_true", help="fit the tokenizers and stop")
    how.add_argument(
        "--part",
        type=_part,
        metavar="K/N",
        help="every N-th token shard only; all parts may run at once, and without --part the rest is done",
    )
    how.add_argument(
        "--profile", help="PROFILE.toml: do it as Slurm jobs, the shards as an array of --parts N"
    )
    jobs = verb.add_argument_group("with --profile")
    jobs.add_argument("--parts", type=_count, metavar="N", help="parts of the array, a job each; required")
    jobs.add_argument("--concurrent-parts", type=_count, metavar="M", help="parts at a time (default: all)")
    jobs.add_argument("--dry-run", action="store_true", help="print the scripts; submit and write nothing")
    verb.set_defaults(work=_tokenize)


def _add_runs(verbs: Verbs) -> None:
    """train and submit."""
    verb = verbs.add_parser("train", help="train a run, or continue it from its last good checkpoint")
    verb.add_argument("run", help="RUN.toml, or the directory of a run that has begun")
    add_overrides(verb, "such as optimizer.learning_rate=1e-3")
    _add_beginning(verb)
    verb.add_argument("--processes", type=int, default=1, help="ranks on this machine (default %(default)s)")
    verb.set_defaults(work=_train)

    verb = verbs.add_parser(
        "submit",
        help="train a run, or all of a comparison, as Slurm jobs, which start again until they are done",
    )
    verb.add_argument("run", metavar="run|comparison", help="RUN.toml, or COMPARE.toml")
    add_overrides(verb, "such as parallel.tp=8")
    _add_beginning(verb)
    verb.add_argument("--profile", required=True, help="PROFILE.toml: the site; see slurm/profiles/")
    verb.add_argument("--nodes", type=int, default=None, help="nodes (default: the profile's)")
    verb.add_argument(
        "--concurrent-runs",
        type=_count,
        metavar="M",
        help="for a comparison: runs at a time (default: the file's)",
    )
    verb.add_argument("--wait", action="store_true", help="stay until the job has ended; exit with its code")
    verb.add_argument("--dry-run", action="store_true", help="print the script; submit and write nothing")
    verb.set_defaults(work=_submit)


def _add_beginning(verb: argparse.ArgumentParser) -> None:
    """Options say how a run goes on, where it does not just continue."""
    how = verb.add_argument_group("a run that has begun")
    how.add_argument(
        "--extend", action="store_true", help="go on to the total_tokens=... that is given, past its old end"
    )
    how.add_argument(
        "--branch", metavar="NAME", help="begin a new run at its checkpoint --from-step, with the keys given"
    )
    how.add_argument(
        "--from-step", type=_count, metavar="N", help="go back to this checkpoint; later ones are set aside"
    )


def _add_monitoring(verbs: Verbs) -> None:
    """status, cancel and logs."""
    verb = verbs.add_parser("status", help="the state of runs and comparisons; a page if it is one run")
    verb.add_argument(
        "paths",
        nargs="*",
        metavar="RUN|COMPARE|key=value",
        help="files, with overrides as they were submitted with, or directories (default: all in runs/)",
    )
    verb.set_defaults(work=_status)

    verb = verbs.add_parser("cancel", help="end the Slurm jobs of a run or a comparison; runs save and stop")
    verb.add_argument("path", help="RUN.toml, COMPARE.toml, or the directory of one")
    add_overrides(verb, "as it was submitted with")
    verb.set_defaults(work=_cancel)

    verb = verbs.add_parser("logs", help="what a run's job and its ranks printed in the newest attempt")
    verb.add_argument("run", help="RUN.toml, or the run's directory")
    add_overrides(verb, "as it was submitted with")
    verb.add_argument("-f", "--follow", action="store_true", help="stay until the run ends, over attempts")
    verb.add_argument("--rank", type=int, metavar="R", help="its log (default: the job's and rank 0's)")
    verb.add_argument("--attempt", type=int, metavar="K", help="as `motley status` numbers them, from 0")
    verb.add_argument("--all", action="store_true", help="from the first line on (default: the last 200)")
    verb.set_defaults(work=_logs)


def _add_compare(verbs: Verbs) -> None:
    verb = verbs.add_parser(
        "compare", help="run arms x seeds of a comparison and report which won, by how much"
    )
    verb.add_argument("comparison", nargs="?", help="COMPARE.toml; with --from, a file with the question")
    add_overrides(verb, "applied to the base run of every arm; with --from, to the question")
    verb.add_argument(
        "--from",
        dest="logs",
        nargs="+",
        metavar="PATH",
        help="report on runs made elsewhere: CSV files, run directories (docs/compare.md); start nothing",
    )
    verb.add_argument(
        "--concurrent-runs", type=int, default=None, help="runs at a time (default: the file's)"
    )
    verb.add_argument("--report-only", action="store_true", help="report on what has run; start nothing")
    verb.add_argument(
        "--first-only", action="store_true", help="end behind timing rounds and the grid of learning rates"
    )
    verb.add_argument("--dry-run", action="store_true", help="print every run and its cost; start nothing")
    verb.add_argument(
        "--flops-per-s", type=float, default=None, help="with --dry-run: measured training FLOP/s of a rank"
    )
    verb.add_argument("--gpu", default=None, help="with --dry-run and --mfu: a rank's GPU, such as H100")
    verb.add_argument(
        "--mfu", type=float, default=None, help="with --gpu: share of its peak that runs reach, such as 0.4"
    )
    verb.set_defaults(work=_compare)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of one verb; a usage error ends the process with exit code 2."""
    top = parser()
    args, rest = top.parse_known_args(argv)
    # argparse accepts a list of positionals in one place only, but people write key=value after options too.
    if rest and not (hasattr(args, "overrides") and all("=" in text and text[0] != "-" for text in rest)):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    args.argv = list(sys.argv[1:] if argv is None else argv)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code.

    A mistake of the user gives one message on stderr and code 2. A file that the system refuses gives one
    line that names it, and code 2 if a person must mend its path, else 1.
    """
    with printable_output():
        args = parse(argv)
        try:
            code = args.work(args)
            sys.stdout.flush()
            return code
        except ConfigError as error:
            print(f"motley {args.verb}: {error}", file=sys.stderr)
            return ExitCode.USER_ERROR
        except BrokenPipeError:  # as in `motley logs ... | head`; Python must not flush at its end either
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except KeyboardInterrupt:
            return 128 + signal.SIGINT
        except OSError as error:
            if (told := os_error_text(error)) is None:
                raise
            print(f"motley {args.verb}: {told}", file=sys.stderr)
            return ExitCode.USER_ERROR if is_misplaced(error) else ExitCode.FAILED


if __name__ == "__main__":
    raise SystemExit(main())
