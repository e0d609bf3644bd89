"""A judge of speech of the demo corpus: which of the words "zero" to "nine" an utterance holds.

The judge is a scikit-learn classifier for each word, of the short runs of units that an utterance holds. It
is trained on utterances of training documents, whose sentences are written beside them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

LONGEST_RUN = 4
"""Units of the longest run that is a feature."""
FEATURES = 2**18
"""Number of features that runs are hashed to."""

Units = Int[np.ndarray, " units"]


@dataclass(frozen=True)
class SpeechJudge:
    """A trained judge; made by `train_speech_judge`."""

    classifiers: Sequence[Any]
    """Of scikit-learn: for each digit, features of an utterance -> whether its word is said."""

    def digits(self, utterances: Sequence[Units]) -> list[tuple[int, ...]]:
        """For every utterance the digits whose words are heard, in ascending order."""
        features = run_features(utterances)
        heard = np.stack([classifier.predict(features) for classifier in self.classifiers])
        return [tuple(np.flatnonzero(column).tolist()) for column in heard.T]


def run_features(utterances: Sequence[Units]) -> Any:
    """A sparse matrix [utterances, FEATURES]: which runs of 1 to LONGEST_RUN units an utterance holds."""
    from scipy.sparse import csr_matrix

    columns = [np.unique(np.concatenate(_hashed_runs(units))) for units in utterances]
    ends = np.cumsum([0, *map(len, columns)])
    flat = np.concatenate(columns) if columns else np.zeros(0, np.int64)
    return csr_matrix((np.ones(len(flat), np.float32), flat, ends), (len(utterances), FEATURES))


def _hashed_runs(units: Units) -> list[Int[np.ndarray, " runs"]]:
    """The numbers of the features of all runs, by their length."""
    found, codes = [], units.astype(np.uint64)
    value = np.zeros(len(codes), np.uint64)
    for length in range(1, LONGEST_RUN + 1):
        if len(codes) < length:
            break
        count = len(codes) - length + 1
        value = value[:count] * np.uint64(0x9E3779B97F4A7C15) + codes[length - 1 :] + np.uint64(1)
        mixed = (value ^ (value >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        found.append(((mixed >> np.uint64(32)) % np.uint64(FEATURES)).astype(np.int64))
    return found


def train_speech_judge(utterances: Sequence[Units], said: Sequence[Sequence[int]]) -> SpeechJudge:
    """A judge that is trained on utterances and the digits whose words they hold."""
    from sklearn.linear_model import LogisticRegression

    features = run_features(utterances)
    classifiers = []
    for digit in range(10):
        holds = np.array([digit in digits for digits in said])
        classifiers.append(LogisticRegression(solver="liblinear", C=1.0, random_state=0).fit(features, holds))
    return SpeechJudge(classifiers)
