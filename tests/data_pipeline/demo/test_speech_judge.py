import numpy as np

from data_pipeline.demo.speech_judge import FEATURES, LONGEST_RUN, run_features, train_speech_judge

WORDS = [np.array([10 + digit, 30 + digit * 2 % 7, 40 + digit]) for digit in range(10)]


def utterances(count: int, seed: int) -> tuple[list[np.ndarray], list[tuple[int, ...]]]:
    """Words of digits between random units, some of which occur in words too."""
    random = np.random.default_rng(seed)
    made, said = [], []
    for _ in range(count):
        digits = random.choice(10, random.integers(0, 4))
        parts = [random.integers(0, 45, 6)]
        for digit in digits:
            parts += [WORDS[digit], random.integers(0, 45, 6)]
        made.append(np.concatenate(parts))
        said.append(tuple(sorted(set(digits.tolist()))))
    return made, said


def test_words_are_heard_in_utterances_that_were_not_trained_on() -> None:
    judge = train_speech_judge(*utterances(400, 1))
    made, said = utterances(100, 2)
    heard = judge.digits(made)
    assert np.mean([h == s for h, s in zip(heard, said, strict=True)]) > 0.8  # 0.97 measured
    assert judge.digits([np.array([1, 2])]) == [()]


def test_features_are_the_runs_of_an_utterance() -> None:
    features = run_features([np.array([5, 6, 5, 6]), np.array([5, 6]), np.array([7])])
    runs = {(5,), (6,), (5, 6), (6, 5), (5, 6, 5), (6, 5, 6), (5, 6, 5, 6)}
    assert features.shape == (3, FEATURES) and LONGEST_RUN == 4
    assert features[0].nnz == len(runs) and features[1].nnz == 3 and features[2].nnz == 1
    assert features[0].multiply(features[1]).nnz == 3 and not features[2].multiply(features[0]).nnz
