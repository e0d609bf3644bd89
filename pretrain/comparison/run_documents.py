"""documents.json of a run, read back: sums of losses per held-out document. This module imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float

from data_pipeline.files.json_file import check_fields, read_object
from data_pipeline.files.toml_config import ConfigError
from pretrain.checkpoint.folder import file_digest
from pretrain.comparison.document_variance import DocumentLosses
from pretrain.run_files import DOCUMENTS, DOCUMENTS_FORMAT, RECORD

_FIELDS = {"format": int, "step": int, "documents": list, "targets": dict, "nats": dict}


@dataclass(frozen=True)
class RunDocuments:
    """Sums over the targets of every document, in one run."""

    step: int
    names: tuple[str, ...]
    targets: dict[str, Float[np.ndarray, " documents"]]
    """By modality."""
    nats: dict[str, Float[np.ndarray, " documents"]]
    """By modality, under the rule by which the run is judged."""
    image_weights: Mapping[str, float] = field(default_factory=dict)
    """Of the run (RunConfig.image_weights): its loss over all targets adds means over images by them."""


class Judged(Protocol):
    """A run that tells its documents and the step that it was judged at."""

    @property
    def documents(self) -> RunDocuments | None: ...

    @property
    def last_eval_step(self) -> int: ...


def read_documents(
    run_dir: Path, record: Mapping[str, Any], prefix: str, image_weights: Mapping[str, float] | None = None
) -> RunDocuments | None:
    """The documents of a run under the rule `prefix`, such as "eval/"; None if it kept none. `image_weights`:
    of its config.

    Raises ConfigError for a file that is missing, that has changed since, or that lacks what it should hold.
    """
    sealed, path = record.get("documents"), run_dir / DOCUMENTS
    if sealed is None:
        return None
    if not path.exists() or file_digest(path)["sha256"] != sealed["sha256"]:
        raise ConfigError(
            f"{path} is not the file that the run wrote: its SHA-256 differs from the one in {RECORD}; put "
            f"the file back, or remove {run_dir} and train the run again"
        )
    content = read_object(path, _FIELDS)
    if content["format"] != DOCUMENTS_FORMAT:
        raise ConfigError(f"{path}: format {content['format']}, and this version reads {DOCUMENTS_FORMAT}")
    rule = prefix.rstrip("/")
    check_fields(content["nats"], {rule: dict}, where=f"{path}: nats", advice="was it edited?")
    names, by_rule = tuple(content["documents"]), content["nats"][rule]
    tables = {"targets": content["targets"], f"nats.{rule}": by_rule}
    for key, table in tables.items():
        for modality, values in table.items():
            if len(values) != len(names):
                raise ConfigError(
                    f"{path}: {key}.{modality}: {len(values)} numbers for {len(names)} documents"
                )
    return RunDocuments(
        content["step"],
        names,
        {m: np.array(values, float) for m, values in content["targets"].items()},
        {m: np.array(values, float) for m, values in by_rule.items()},
        image_weights or {},
    )


def paired_documents(
    runs: Sequence[Judged], outcomes: Sequence[str], all_targets: str
) -> dict[str, DocumentLosses] | None:
    """By outcome (a modality, or `all_targets` for all together), the losses of all runs on every document.

    None unless all runs kept the same documents after the step at which they are judged.
    """
    kept = [run.documents for run in runs if run.documents is not None]
    at_the_end = [run.documents.step == run.last_eval_step for run in runs if run.documents is not None]
    if len(kept) < len(runs) or not all(at_the_end):
        return None
    first = kept[0]
    for other in kept[1:]:
        same = other.names == first.names and other.targets.keys() == first.targets.keys()
        if not same or any(not np.array_equal(other.targets[m], t) for m, t in first.targets.items()):
            return None
    out = {}
    for outcome in outcomes:
        modalities = list(first.targets) if outcome == all_targets else [outcome]
        targets = np.asarray(sum(first.targets[m] for m in modalities))
        if outcome == all_targets and any(one.image_weights for one in kept):
            nats = [_objective(one) for one in kept]
        else:
            nats = [sum(one.nats[m] for m in modalities) for one in kept]
        out[outcome] = DocumentLosses(np.array(nats), targets)
    return out


def _objective(of: RunDocuments) -> Float[np.ndarray, " documents"]:
    """By document, what stands for its nats where the loss of all targets is the objective: the mean over ids
    plus the weighted means over images (pretrain/models/modality_sums.py).

    The sum over documents, divided by the number of all targets, is the objective. Less its targets at the
    objective, a document has its linearised share in it: the weighted sum of its residuals of every mean.
    """
    ids = [modality for modality in of.targets if modality not in of.image_weights]
    means = [(1.0, ids), *((weight, [modality]) for modality, weight in of.image_weights.items())]
    whole, share = 0.0, np.zeros(len(of.names))
    for weight, modalities in means:
        nats = np.asarray(sum(of.nats[m] for m in modalities))
        targets = np.asarray(sum(of.targets[m] for m in modalities))
        if (count := targets.sum()) > 0:
            mean = nats.sum() / count
            whole += weight * mean
            share += weight * (nats - targets * mean) / count
    everything = np.asarray(sum(of.targets.values()))
    return everything * whole + everything.sum() * share
