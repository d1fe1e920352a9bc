"""Byte-pair encoding, trained where it is used (arXiv:1508.07909, on bytes)."""

from __future__ import annotations

import heapq
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import pairwise

_WORD = re.compile(r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s")
_BYTES = 256


class Tokenizer:
    """Tokens 0..255 are bytes, 256 ends a text, the rest are merges in the order of training."""

    end = _BYTES

    def __init__(self, merges: list[tuple[int, int]]):
        self.merges = {pair: _BYTES + 1 + i for i, pair in enumerate(merges)}
        self._words: dict[str, list[int]] = {}

    @property
    def vocab_size(self) -> int:
        return _BYTES + 1 + len(self.merges)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Merges the most frequent pair of neighbours until the vocabulary is full.

        It ends early, with a smaller vocabulary, when no pair occurs twice.
        """
        counts = Counter(word for text in texts for word in _WORD.findall(text))
        words = [list(word.encode()) for word in counts]
        weights = list(counts.values())
        pairs: Counter[tuple[int, int]] = Counter()
        places = defaultdict(set)
        for index, (word, weight) in enumerate(zip(words, weights, strict=True)):
            for pair in pairwise(word):
                pairs[pair] += weight
                places[pair].add(index)
        # counts change under the heap: an entry that is out of date is put back with its count
        heap = [(-count, pair) for pair, count in pairs.items()]
        heapq.heapify(heap)
        merges: list[tuple[int, int]] = []
        while heap and len(merges) < vocab_size - _BYTES - 1:
            count, pair = heapq.heappop(heap)
            if -count != pairs[pair]:
                if pairs[pair] > 0:
                    heapq.heappush(heap, (-pairs[pair], pair))
                continue
            if -count < 2:
                break
            token = _BYTES + 1 + len(merges)
            merges.append(pair)
            changed = set()
            for index in places.pop(pair):
                before = words[index]
                after = _merge(before, pair, token)
                for old in pairwise(before):
                    pairs[old] -= weights[index]
                for new in pairwise(after):
                    pairs[new] += weights[index]
                    places[new].add(index)
                    if token in new:
                        changed.add(new)
                words[index] = after
            for new in changed:
                heapq.heappush(heap, (-pairs[new], new))
        return cls(merges)

    def encode(self, text: str) -> list[int]:
        return [token for word in _WORD.findall(text) for token in self._encode_word(word)]

    def _encode_word(self, word: str) -> list[int]:
        if word not in self._words:
            tokens = list(word.encode())
            while len(tokens) > 1:
                pair = min(
                    pairwise(tokens),
                    key=lambda pair: self.merges.get(pair, self.vocab_size),
                )
                if pair not in self.merges:
                    break
                tokens = _merge(tokens, pair, self.merges[pair])
            self._words[word] = tokens
        return self._words[word]

    def decode(self, tokens: Iterable[int]) -> str:
        parts = {token: pair for pair, token in self.merges.items()}

        def spell(token: int) -> bytes:
            if token in parts:
                return b"".join(map(spell, parts[token]))
            return b"" if token == self.end else bytes([token])

        return b"".join(map(spell, tokens)).decode(errors="replace")


def _merge(tokens: list[int], pair: tuple[int, int], merged: int) -> list[int]:
    out, i = [], 0
    while i < len(tokens):
        if tuple(tokens[i : i + 2]) == pair:
            out.append(merged)
            i += 2
        else:
            out.append(tokens[i])
            i += 1
    return out
