import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.shards.index import Document
from data_pipeline.shards.vocabulary import BOS
from data_pipeline.tokenize.media.pictures import png
from pretrain.generation.choices import answer, read_questions
from pretrain.generation.decoding import read_tokens
from pretrain.generation.key_cache import KeyCache
from pretrain.generation.trained_model import TrainedModel, open_model
from tools.cli import main

GOOD: dict[str, Any] = {
    "prompt": [{"image": "grey.png"}, {"text": "A"}],
    "options": [" red 3", [{"text": " blue"}], [{"text": " green "}, {"image": "grey.png"}]],
    "answer": 2,
}


@pytest.fixture
def model(speaker: Path) -> TrainedModel:
    return open_model(speaker / "weights", speaker / "tokenizers")


def write(folder: Path, *questions: Any) -> Path:
    (folder / "grey.png").write_bytes(png(np.full((8, 8, 3), 90, np.uint8)))
    path = folder / "choices.jsonl"
    path.write_text("".join(f"{q if isinstance(q, str) else json.dumps(q)}\n" for q in questions))
    return path


def test_log_likelihoods_equal_those_of_one_token_at_a_time(model: TrainedModel, tmp_path: Path) -> None:
    """Each id's own logits, from a pass over what stands before it."""
    (question,) = read_questions(write(tmp_path, GOOD), model)
    found = answer(model, question)
    assert question.prompt.ids[0] == BOS and len(question.options) == 3 and found.answer == 2
    assert found.tokens == tuple(map(len, question.options))
    for option, nats in zip(question.options, found.log_likelihoods, strict=True):
        expected, whole = 0.0, question.prompt.ids
        for token in option:
            logits, _ = read_tokens(
                model.decoder,
                KeyCache.empty(1),
                [0],
                [Document(whole)],
                model.vocabulary,
                model.routing_state,
            )
            expected += float(logits[0].double().log_softmax(0)[token])
            whole = np.append(whole, token)
        assert nats == pytest.approx(expected, rel=1e-5)  # 2e-7 in fp32, whose sums run in another order
    assert found.per_token[0] == pytest.approx(found.log_likelihoods[0] / found.tokens[0])


def test_accuracy_is_that_of_the_likeliest_options(
    speaker: Path, model: TrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = write(tmp_path, *({**GOOD, "answer": right} for right in (0, 1, 2)))
    command = ["evaluate", str(speaker / "weights"), "--tokenizers", str(speaker / "tokenizers")]
    assert main([*command, "--choices", str(questions), "--out", str(tmp_path / "out.jsonl")]) == 0
    told = capsys.readouterr().out
    assert f"{questions}: 3 questions, accuracy 0.333 (standard error 0.272; chance 0.333)" in told
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    likeliest = int(
        torch.tensor(answer(model, next(iter(read_questions(questions, model)))).per_token).argmax()
    )
    assert [row["chosen"] for row in rows] == [likeliest] * 3 and [row["answer"] for row in rows] == [0, 1, 2]


MISTAKES = {
    "no JSON": ("{", "choices.jsonl:2: not valid JSON"),
    "no table": ("[]", 'choices.jsonl:2: needs "prompt"'),
    "one option": ({**GOOD, "options": [" a"]}, '"options" is a list of two or more'),
    "answer": ({**GOOD, "answer": 3}, '"answer" is 3; legal: 0 to 2'),
    "bool": ({**GOOD, "answer": True}, '"answer" is True'),
    "empty option": ({**GOOD, "options": ["", " a"], "answer": 0}, "an option is empty"),
    "part": ({**GOOD, "prompt": [3]}, "prompt: a part is {modality: text or name of a file}; got 3"),
    "file": ({**GOOD, "prompt": [{"image": "no.png"}]}, "no.png: cannot be read: No such file"),
    "modality": ({**GOOD, "prompt": [{"video": "no.npy"}]}, "the model knows no video"),
    "long": ({**GOOD, "prompt": "red blue " * 60}, "but the context has 40; shorten it"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_names_its_line(
    name: str, speaker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line, message = MISTAKES[name]
    questions = write(tmp_path, GOOD, line)
    words = ["evaluate", speaker / "weights", "--tokenizers", speaker / "tokenizers", "--choices", questions]
    assert main([*map(str, words), "--out", str(tmp_path / "out.jsonl")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out.jsonl").exists()
