"""Which ids may follow in a document: a modality's codes inside its delimiters alone, as many as it takes.

Pure functions of a state. This module imports no torch.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from data_pipeline.shards.vocabulary import TEXT, Vocabulary

FREE = "free"
"""The goal of a sample that may hold any modality."""


class Place(NamedTuple):
    """Where a document stands behind its last id."""

    modality: str = TEXT
    """The modality of the span that is open; text: none is."""
    codes: int = 0
    """Codes that the open span holds so far."""
    ended: bool = False
    """Whether nothing follows: <eos> was written, or the span that was asked for is whole."""


@dataclass(frozen=True)
class Grammar:
    """The grammar of the documents of a vocabulary. A sample of goal "free" goes on until <eos>, one of goal
    "text" writes text until <eos>, and one of another modality writes one span of it."""

    vocabulary: Vocabulary
    span_codes: Mapping[str, int]
    """Modality -> codes of each of its spans; a modality that is not named has any number, at least one."""
    goal: str = FREE
    context_only: frozenset[str] = frozenset()
    """Modalities that may stand in a prompt alone: the model did not learn to write them."""

    def after(self, place: Place, token: int) -> Place:
        """The place behind one more id, which `allowed` lets follow."""
        if place.modality != TEXT:
            if token == self._closing[place.modality]:
                return Place(ended=self.goal not in (FREE, TEXT))
            return Place(place.modality, place.codes + 1)
        if token in self._opened_by:
            return Place(self._opened_by[token])
        return Place(ended=token == self.vocabulary.eos)

    def allowed(self, place: Place, room: int) -> Bool[np.ndarray, " vocabulary"]:
        """The ids that may follow where `room` of them still fit. A span is opened only if it can be closed,
        and closed in time."""
        if place.modality != TEXT:
            closing, wanted = self._closing[place.modality], self.span_codes.get(place.modality)
            if place.codes == wanted or (wanted is None and place.codes and room <= 1):
                return self._only([closing])
            codes = self._codes[place.modality]
            return codes if wanted is not None or not place.codes else codes | self._only([closing])
        openings = [
            opening
            for opening, modality in self._opened_by.items()
            if self.goal in (FREE, modality)
            and modality not in self.context_only
            and room >= self.span_codes.get(modality, 1) + 2
        ]
        if self.goal not in (FREE, TEXT):
            return self._only(openings)
        return self._codes[TEXT] | self._only([*openings, self.vocabulary.eos])

    def least_room(self) -> int:
        """Ids that a sample needs at least."""
        return 1 if self.goal in (FREE, TEXT) else self.span_codes.get(self.goal, 1) + 2

    @cached_property
    def _opened_by(self) -> dict[int, str]:
        return {self.vocabulary.delimiters(m)[0]: m for m in self.vocabulary.modalities if m != TEXT}

    @cached_property
    def _closing(self) -> dict[str, int]:
        return {m: self.vocabulary.delimiters(m)[1] for m in self.vocabulary.modalities if m != TEXT}

    @cached_property
    def _codes(self) -> dict[str, Bool[np.ndarray, " vocabulary"]]:
        """Modality -> its ids without special tokens."""
        ids = np.arange(self.vocabulary.size)
        of = np.where(self.vocabulary.is_special(ids), -1, self.vocabulary.modality_of(ids).astype(int))
        return {modality: of == index for index, modality in enumerate(self.vocabulary.modalities)}

    def _only(self, ids: Iterable[int]) -> Bool[np.ndarray, " vocabulary"]:
        allowed = np.zeros(self.vocabulary.size, bool)
        allowed[list(ids)] = True
        return allowed
