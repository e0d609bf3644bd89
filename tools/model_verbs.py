"""The verbs of `motley` about one model: its weights, what it chooses, its accounts, its benchmarks."""

import argparse
from pathlib import Path
from typing import Any

from data_pipeline.files.toml_config import ConfigError
from tools.data_verbs import Verbs, add_step, inspect_data


def _export(args: argparse.Namespace) -> int:
    from tools.exchange import export

    export(
        Path(args.src), Path(args.out),
        layout=args.format, dtype=args.dtype, file_gb=args.file_gb, ema=args.ema,
        tokenizers=None if args.tokenizers is None else Path(args.tokenizers),
    )  # fmt: skip
    return 0


def _tower_pair(text: str) -> tuple[str, str]:
    """ "image=text" -> ("image", "text")."""
    new, _, tower = text.partition("=")
    if not (new and tower):
        raise argparse.ArgumentTypeError(f'"{text}": expected NEW=TOWER, such as image=text')
    return new, tower


def _import(args: argparse.Namespace) -> int:
    from tools.exchange import import_weights

    import_weights(
        Path(args.run), Path(args.src), Path(args.out), args.overrides,
        new_towers=dict(args.new_tower), dtype=args.dtype, file_gb=args.file_gb,
        tokenizer=None if args.tokenizer is None else Path(args.tokenizer), unchecked_ids=args.unchecked_ids,
    )  # fmt: skip
    return 0


def _inspect(args: argparse.Namespace) -> int:
    out = None if args.out is None else Path(args.out)
    if args.what[0] == "data" and len(args.what) == 2:
        return inspect_data(args, Path(args.what[1]), out)
    if len(args.what) > 1 or args.step is not None:
        raise ConfigError(f"{' '.join(args.what)}: expected RUN, or `data RUN --step N`")
    from tools.inspection import show

    show(Path(args.what[0]), out, documents=args.documents, causal=args.causal)
    return 0


def _generate(args: argparse.Namespace) -> int:
    from pretrain.generation.generate import Request, generate
    from pretrain.generation.sampling import Sampling

    request = Request(
        parts=args.parts, heldout=args.heldout, goal=args.to, samples=args.samples,
        max_tokens=args.max_tokens, guidance=args.guidance,
        prefill_rule=args.prefill_rule, decode_rule=args.decode_rule,
        sampling=Sampling(
            args.temperature, args.top_k, args.top_p, args.seed, args.image_steps, args.sampler
        ),
    )  # fmt: skip
    src, out = Path(args.src), Path(args.out)
    tokenizers = None if args.tokenizers is None else Path(args.tokenizers)
    return _in_processes(args, lambda world: generate(src, request, out, tokenizers, world))


def _evaluate(args: argparse.Namespace) -> int:
    out, tokenizers = (None if path is None else Path(path) for path in (args.out, args.tokenizers))
    asked = {name: getattr(args, name) for name in _JUDGEMENT if getattr(args, name) is not None}
    if args.choices is not None:
        from pretrain.generation.choices import evaluate_choices

        if asked:
            flags = ", ".join(f"--{name}" for name in asked)
            raise ConfigError(f"--choices has its own questions: leave out {flags}, or --choices")
        src, choices = Path(args.src), Path(args.choices)
        return _in_processes(args, lambda world: evaluate_choices(src, choices, out, tokenizers, world))
    if args.processes > 1:
        raise ConfigError(
            f"--processes {args.processes}: losses and facts are judged in one process; leave it out, "
            "or give --choices"
        )
    from pretrain.generation.judged import Judgement, evaluate
    from pretrain.generation.sampling import Sampling

    sampling = Sampling(temperature=asked.pop("temperature", 1.0), seed=asked.pop("seed", 1))
    evaluate(Path(args.src), Judgement(sampling=sampling, **asked), out, tokenizers)
    return 0


def _in_processes(args: argparse.Namespace, work: Any) -> int:
    from pretrain.generation.processes import work_in_processes

    return work_in_processes(args.verb, ["-m", "tools.cli", *args.argv], args.processes, work)


_JUDGEMENT = ("data", "sequences", "conditional", "facts", "temperature", "seed")
"""Options of `motley evaluate` that say on what losses and facts are judged, and how."""


class _AddPart(argparse.Action):
    """Append (modality, value) to the parts of the prompt, in the order of the command line."""

    def __call__(self, _: argparse.ArgumentParser, args: argparse.Namespace, value: Any, *__: object) -> None:
        args.parts = [*args.parts, (self.const, value)]


def _describe(args: argparse.Namespace) -> int:
    from pretrain.config import load
    from pretrain.models.accounting import describe
    from pretrain.models.decoding_accounting import describe_decoding
    from pretrain.planning.optimizer_groups import describe_groups

    config = load(args.run, args.overrides)
    print(f"{describe(config.model)}\n\n{describe_decoding(config.model)}")
    print(f"\n{describe_groups(config)}")
    return 0


def _plan(args: argparse.Namespace) -> int:
    from pretrain.config import load
    from pretrain.planning.text import report

    print(report(load(args.run, args.overrides), args.gpus, args.gpu_memory_gib, layouts=args.layouts))
    return 0


def _bench(args: argparse.Namespace) -> int:
    if args.what == "data":
        from tools.bench.data import main

        return main(args.arguments)
    from tools.bench.options import parse_options

    options = parse_options(args.what, args.arguments)  # before torch is imported, for --help and mistakes
    if args.what == "model":
        from tools.bench.model import run
    elif args.what == "generate":
        from tools.bench.generate import run
    else:
        from tools.bench.sparse import run
    return run(options)


_TOKENIZERS = "their folder (default: beside the run's data)"


def add_weights(verbs: Verbs) -> None:
    """export and import."""
    _add_export(verbs, _file_options())
    _add_import(verbs, _file_options())


def _file_options() -> argparse.ArgumentParser:
    """The options of both: how files are written."""
    files = argparse.ArgumentParser(add_help=False)
    files.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="(default %(default)s)")
    files.add_argument(
        "--file-gb", type=float, default=4.0, help="size at which another file begins (default %(default)s)"
    )

    return files


def _add_export(verbs: Verbs, files: argparse.ArgumentParser) -> None:
    verb = verbs.add_parser("export", parents=[files], help="a checkpoint's weights -> safetensors files")
    verb.add_argument("src", help="a run (its newest checkpoint), a checkpoint, or exported weights")
    verb.add_argument("out", help="folder to write; must not exist")
    verb.add_argument(
        "--format",
        choices=("motley", "llama"),
        default="motley",
        help="motley: any model, for `motley import` and initial_weights; llama: a dense pre-norm model in "
        "Hugging Face's layout, Qwen3's if it has QK-norm (default %(default)s)",
    )
    verb.add_argument("--ema", action="store_true", help="the averages (optimizer.ema_decay)")
    verb.add_argument("--tokenizers", metavar="DIR", help=f"for llama: {_TOKENIZERS}")
    verb.set_defaults(work=_export)


def _add_import(verbs: Verbs, files: argparse.ArgumentParser) -> None:
    verb = verbs.add_parser(
        "import",
        parents=[files],
        help="weights for a run's model, made from another's, a Llama's or a Qwen3's",
    )
    verb.add_argument("run", help="RUN.toml: the model that the weights are for")
    verb.add_argument("src", help="exported weights, a run, or a local Hugging Face folder (config.json)")
    verb.add_argument("out", help="folder to write; must not exist. Then: initial_weights = OUT in RUN.toml")
    add_overrides(verb, "such as model.vocab_tokens=32000")
    verb.add_argument(
        "--new-tower",
        action="append",
        type=_tower_pair,
        default=[],
        metavar="NEW=TOWER",
        help="the tower of SRC that a new tower starts as, such as image=text; once for each new tower",
    )
    verb.add_argument(
        "--tokenizer", metavar="PATH", help="that of a Hugging Face SRC (default: in its folder)"
    )
    verb.add_argument("--unchecked-ids", action="store_true", help="do not ask what ids of SRC and data mean")
    verb.set_defaults(work=_import)


_PROCESSES = "ranks of this machine that share the model's weights (default %(default)s)"


def add_generate(verbs: Verbs) -> None:
    """generate and evaluate."""
    verb = verbs.add_parser(
        "generate", help="let a trained model write, draw and speak behind a prompt; files and one page"
    )
    verb.add_argument("src", help="a run (its directory or RUN.toml), a checkpoint, or a folder of weights")
    verb.add_argument("--out", required=True, help="folder to write; must not exist")
    prompt = verb.add_argument_group("the prompt: parts in this order, or held-out documents")
    for flag, modality, value in (("prompt", "text", "TEXT"), ("image", "", "FILE"), ("speech", "", "FILE")):
        prompt.add_argument(
            f"--{flag}", action=_AddPart, dest="parts", const=modality or flag, metavar=value, default=[],
            help="a part of the prompt; any number of times",
        )  # fmt: skip
    prompt.add_argument("--heldout", type=int, metavar="N", help="continue N held-out documents from a cut")
    how = verb.add_argument_group("the samples")
    how.add_argument("--to", default="free", help="text, image, speech, ... or free (default %(default)s)")
    how.add_argument("--samples", type=int, default=1, help="per prompt (default %(default)s)")
    how.add_argument("--temperature", type=float, default=1.0, help="0: greedy (default %(default)s)")
    how.add_argument("--top-k", type=int, help="draw from the K likeliest ids (default: all)")
    how.add_argument(
        "--top-p", type=float, default=1.0, help="... from as few as hold P (default %(default)s)"
    )
    how.add_argument("--image-steps", type=int, metavar="N", help="of an image of vectors (default: 250)")
    how.add_argument(
        "--sampler", choices=("ddpm", "ddim", "euler"), help="of such images (default: ddpm, of flow euler)"
    )
    how.add_argument("--guidance", type=float, help="for models trained with dropped conditions")
    how.add_argument("--seed", type=int, default=1, help="(default %(default)s)")
    how.add_argument("--max-tokens", type=int, help="per sample (default: as many as the context holds)")
    _add_rules(verb)
    verb.add_argument("--tokenizers", metavar="DIR", help=_TOKENIZERS)
    verb.add_argument("--processes", type=int, default=1, help=_PROCESSES)
    verb.set_defaults(work=_generate)
    _add_evaluate(verbs)


def _add_evaluate(verbs: Verbs) -> None:
    verb = verbs.add_parser(
        "evaluate",
        help="a trained model's losses on any token shards, facts in what it generates, or choices",
    )
    verb.add_argument("src", help="as of generate; losses and facts need a run or a checkpoint")
    verb.add_argument("--out", metavar="FILE", help="JSON to write; of --choices a line per question")
    on = verb.add_argument_group("losses and facts")
    on.add_argument("--data", type=Path, metavar="DIR", help="token shards (default: the run's data.heldout)")
    on.add_argument("--sequences", type=int, help="of the held-out loss (default: the run's)")
    on.add_argument("--conditional", type=int, help="documents per direction (default: the run's)")
    on.add_argument(
        "--facts", type=int, metavar="N", help="of the demo corpus, on N documents per direction (default: 0)"
    )
    on.add_argument("--temperature", type=float, help="of samples whose facts are judged (default: 1)")
    on.add_argument("--seed", type=int, help="of these samples (default: 1)")
    verb.add_argument(
        "--choices", metavar="FILE", help="questions as JSON lines, in place of losses and facts"
    )
    verb.add_argument("--tokenizers", metavar="DIR", help=_TOKENIZERS)
    verb.add_argument("--processes", type=int, default=1, help=_PROCESSES)
    verb.set_defaults(work=_evaluate)


def _add_rules(verb: argparse.ArgumentParser) -> None:
    rules = verb.add_argument_group("models with depth routing by top_k")
    rules.add_argument(
        "--prefill-rule", choices=("threshold", "top_k"), default="threshold",
        help="how tokens of the prompt are chosen (default %(default)s)",
    )  # fmt: skip
    rules.add_argument(
        "--decode-rule", choices=("threshold", "all"), default="threshold",
        help="... and behind a top_k prompt those that are written: all run (default %(default)s)",
    )  # fmt: skip


def add_models(verbs: Verbs) -> None:
    """inspect, describe and plan."""
    verb = verbs.add_parser(
        "inspect",
        help="which tokens run in which layer and which expert takes them; `inspect data`: what a step read",
    )
    verb.add_argument(
        "what",
        nargs="+",
        metavar="RUN | data RUN",
        help="a run directory (its newest checkpoint), a checkpoint, or RUN.toml",
    )
    verb.add_argument("--out", help="PNG, or page of `data`, to write (default: in the run directory)")
    add_step(verb)
    verb.add_argument(
        "--documents", type=int, default=6, help="images to show, one a document (default %(default)s)"
    )
    verb.add_argument(
        "--causal", action="store_true", help="choose by thresholds, whatever rule it was trained with"
    )
    verb.set_defaults(work=_inspect)

    verb = verbs.add_parser("describe", help="parameters and FLOPs of a run's model, per module and modality")
    verb.add_argument("run", help="RUN.toml")
    add_overrides(verb)
    verb.set_defaults(work=_describe)

    verb = verbs.add_parser(
        "plan", help="memory, FLOPs and bytes sent of a run's layout, or of all legal ones; starts nothing"
    )
    verb.add_argument("run", help="RUN.toml")
    add_overrides(verb, "such as parallel.tp=2")
    verb.add_argument("--gpus", type=int, required=True, help="ranks in all")
    verb.add_argument("--gpu-memory-gib", type=float, help="memory of a GPU; the output says what fits")
    verb.add_argument("--layouts", action="store_true", help="rank all legal layouts and show the first")
    verb.set_defaults(work=_plan)


def add_bench(verbs: Verbs) -> None:
    verb = verbs.add_parser(
        "bench",
        help="measure the model, its sparse variants, decoding or the data path",
    )
    verb.add_argument("what", choices=("model", "sparse", "generate", "data"))
    verb.add_argument("arguments", nargs=argparse.REMAINDER, help="see `motley bench model --help`")
    verb.set_defaults(work=_bench)


def add_overrides(verb: argparse.ArgumentParser, text: str | None = None) -> None:
    verb.add_argument("overrides", nargs="*", metavar="key=value", help=text)
