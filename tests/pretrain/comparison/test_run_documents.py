"""documents.json is read back whole or refused, and documents of runs are paired."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from data_pipeline.files.toml_config import ConfigError
from pretrain.checkpoint.folder import file_digest
from pretrain.comparison.run_documents import RunDocuments, paired_documents, read_documents

CONTENT: dict[str, Any] = {
    "format": 1,
    "step": 20,
    "heldout_fingerprint": "ab",
    "documents": ["s/a", "s/b", "s/c"],
    "targets": {"text": [4, 5, 6], "image": [2, 0, 3]},
    "nats": {
        "eval": {"text": [8.0, 9.0, 12.0], "image": [1.0, 0.0, 2.0]},
        "eval/causal": {"text": [9.0, 9.5, 13.0], "image": [1.5, 0.0, 2.5]},
    },
}


def write(folder: Path, content: Any) -> dict[str, Any]:
    (folder / "documents.json").write_text(json.dumps(content))
    return {"documents": {"sha256": file_digest(folder / "documents.json")["sha256"]}}


def test_a_run_is_read_under_the_rule_by_which_it_is_judged(tmp_path: Path) -> None:
    record = write(tmp_path, CONTENT)
    own, causal = (read_documents(tmp_path, record, prefix) for prefix in ("eval/", "eval/causal/"))
    assert own is not None and causal is not None
    assert own.step == 20 and own.names == ("s/a", "s/b", "s/c")
    assert own.nats["text"].tolist() == [8, 9, 12] and causal.nats["text"].tolist() == [9, 9.5, 13]
    assert read_documents(tmp_path, {}, "eval/") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 2, and this version reads 1"),
        ({"documents": "s/a"}, "documents: a text, should be a list"),
        ({"nats": {"eval/causal": {}}}, "nats: eval: required, but missing"),
        ({"documents": ["s/a"]}, r"targets\.text: 3 numbers for 1 documents"),
    ],
)
def test_what_is_no_such_file_is_one_sentence(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    record = write(tmp_path, CONTENT | change)
    with pytest.raises(ConfigError, match=message):
        read_documents(tmp_path, record, "eval/")


def test_a_changed_or_missing_file_is_refused(tmp_path: Path) -> None:
    record = write(tmp_path, CONTENT)
    write(tmp_path, CONTENT | {"step": 21})
    with pytest.raises(ConfigError, match=r"documents\.json is not the file that the run wrote"):
        read_documents(tmp_path, record, "eval/")
    (tmp_path / "documents.json").unlink()
    with pytest.raises(ConfigError, match=r"documents\.json is not the file that the run wrote"):
        read_documents(tmp_path, record, "eval/")


def run(step: int = 20, **change: Any) -> Any:
    targets = {"text": np.array([4.0, 5.0]), "image": np.array([2.0, 0.0])}
    fields = {"step": 20, "names": ("a", "b"), "targets": targets, "nats": targets} | change
    return SimpleNamespace(documents=RunDocuments(**fields), last_eval_step=step)


def test_documents_of_runs_are_paired_or_not_used() -> None:
    paired = paired_documents([run(), run()], ("text", "all"), "all")
    assert paired is not None
    assert paired["text"].nats.shape == (2, 2) and paired["all"].targets.tolist() == [6, 5]
    none: Any = SimpleNamespace(documents=None, last_eval_step=20)
    other = {"text": np.array([4.0, 6.0]), "image": np.array([2.0, 0.0])}
    for second in (none, run(step=40), run(names=("a", "c")), run(targets=other)):
        assert paired_documents([run(), second], ("text",), "all") is None


def test_with_images_as_vectors_all_targets_are_the_objective() -> None:
    """Its derivative by the weight of a document is that of the objective over documents that count so."""
    generator = np.random.default_rng(1)
    targets = {"text": np.array([4.0, 5.0, 0.0, 7.0]), "image": np.array([2.0, 0.0, 1.0, 1.0])}
    nats = {m: generator.random(4) * of for m, of in targets.items()}
    judged = run(image_weights={"image": 5.0}, names=("a", "b", "c", "d"), targets=targets, nats=nats)
    paired = paired_documents([judged, judged], ("text", "image", "all"), "all")
    assert paired is not None
    assert paired["image"].nats[0].tolist() == nats["image"].tolist()

    def objective(counts: np.ndarray) -> float:
        means = {m: (counts * nats[m]).sum() / (counts * of).sum() for m, of in targets.items()}
        return means["text"] + 5 * means["image"]

    found = paired["all"]
    assert found.losses == pytest.approx([objective(np.ones(4))] * 2, rel=1e-12)
    shares = (found.nats[0] - found.targets * found.losses[0]) / found.targets.sum()
    step = 1e-6  # of central differences, whose error is about its square
    ways = np.ones(4) + step * np.eye(4), np.ones(4) - step * np.eye(4)
    more, less = ([objective(counts) for counts in of] for of in ways)
    assert shares == pytest.approx((np.array(more) - less) / (2 * step), abs=1e-8)
