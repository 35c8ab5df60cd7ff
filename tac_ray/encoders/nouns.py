"""The nouns that clusters are named with: WordNet 3.0's, its visible ones, or a text file's."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, TypeVar

import fsspec
import pyarrow.parquet as pq

TABLE = Path(__file__).with_name("wordnet_nouns.parquet")
MAX_NOUN_LENGTH = 200

K = TypeVar("K")
V = TypeVar("V")


def load_nouns(nouns: str, form: Literal["raw", "clean"]) -> list[str]:
    """The nouns to embed, in a fixed order.

    Args:
        nouns: "wordnet", all 146,347 (synset, lemma) rows of WordNet 3.0 in file order; "short",
            about 8,000 nouns for things one can see, by the rule in scripts/build_wordnet.py;
            anything else is the path or URI of a UTF-8 text file, one noun a line, whose blank
            lines and surrounding whitespace do not count.
        form: "raw" keeps duplicates and underscores, as the published code does; "clean" turns
            underscores into spaces and keeps the first of equal nouns, 119,034 of WordNet's.

    Raises:
        FileNotFoundError: there is no such text file.
        ValueError: the text file is not UTF-8, has no noun, or has one over 200 characters.

    Cost: 0.1 s and 30 MB for "wordnet"; one read of the whole file for a text file.
    """
    if nouns in ("wordnet", "short"):
        table = pq.read_table(TABLE, columns=["lemma", "short"])
        if nouns == "short":
            table = table.filter(table["short"])
        found: list[str] = table["lemma"].to_pylist()
    else:
        found = _read_text(nouns)
    if form == "raw":
        return found
    return list(dict.fromkeys(" ".join(noun.replace("_", " ").split()) for noun in found))


def _read_text(uri: str) -> list[str]:
    try:
        filesystem, path = fsspec.url_to_fs(uri)
        content: bytes = filesystem.cat_file(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"nouns file '{uri}' does not exist; "
            "give 'wordnet', 'short', or the path or URI of a text file with one noun a line"
        ) from error
    try:
        lines = content.decode("utf-8").removeprefix("\ufeff").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"nouns file '{uri}' has byte 0x{content[error.start]:02x} at offset {error.start}; "
            "needs UTF-8, so save it in that encoding"
        ) from error
    found = []
    for number, line in enumerate(lines, start=1):
        noun = line.strip()
        if len(noun) > MAX_NOUN_LENGTH:
            raise ValueError(
                f"nouns file '{uri}' has {len(noun)} characters on line {number}; "
                f"a noun has at most {MAX_NOUN_LENGTH}, so put one a line"
            )
        if noun.strip("_ "):
            found.append(noun)
    if not found:
        raise ValueError(f"nouns file '{uri}' has 0 nouns; needs at least 1, one a line")
    return found


@dataclass(frozen=True, eq=False)
class WordNet:
    """WordNet 3.0's noun synsets, named by their offsets, and the hypernym links among them.

    A synset's offset is the number in ImageNet's class id: n02102040 is synset 2102040.
    """

    _synsets: dict[str, tuple[int, ...]]
    _lemmas: dict[int, tuple[str, ...]]
    _neighbors: dict[int, tuple[int, ...]]

    @staticmethod
    @cache
    def load() -> "WordNet":
        """The package's WordNet, read once per process: 0.5 s and 50 MB."""
        table = pq.read_table(TABLE, columns=["lemma", "synset", "hypernyms"])
        lemmas: list[str] = table["lemma"].to_pylist()
        synsets: list[int] = table["synset"].to_pylist()
        above: dict[int, list[int]] = dict(
            zip(synsets, table["hypernyms"].to_pylist(), strict=True)
        )
        links = [(below, upper) for below, uppers in above.items() for upper in uppers]
        return WordNet(
            _synsets=_grouped(
                (lemma.lower(), synset) for lemma, synset in zip(lemmas, synsets, strict=True)
            ),
            _lemmas=_grouped(zip(synsets, lemmas, strict=True)),
            _neighbors=_grouped([*links, *((upper, below) for below, upper in links)]),
        )

    def synsets(self, noun: str) -> tuple[int, ...]:
        """The synsets with this lemma, by offset; none if WordNet lacks the noun.

        Case does not matter, and spaces may stand for underscores.
        """
        return self._synsets.get("_".join(noun.lower().split()), ())

    def lemmas(self, synset: int) -> tuple[str, ...]:
        """The synset's lemmas as WordNet writes and orders them.

        Raises:
            ValueError: there is no such noun synset.
        """
        self._check(synset)
        return self._lemmas[synset]

    def steps(self, a: int, b: int, limit: int) -> int | None:
        """Length of the shortest path from a to b over hypernym links taken up or down.

        Returns:
            0 for a itself, 1 for its hypernyms and hyponyms, ...; None when over `limit`.

        Raises:
            ValueError: a or b is no noun synset.

        Cost: visits the synsets within `limit` links of a: tens for 2, at most all 82,115.
        """
        self._check(a)
        self._check(b)
        reached = frontier = {a}
        for length in range(limit + 1):
            if b in frontier:
                return length
            frontier = {near for at in frontier for near in self._neighbors[at]} - reached
            reached = reached | frontier
        return None

    def _check(self, synset: int) -> None:
        if synset not in self._lemmas:
            raise ValueError(
                f"synset {synset} is not one of WordNet 3.0's {len(self._lemmas):,} noun synsets; "
                "give the offset of one, such as 2102040 for n02102040"
            )


def _grouped(pairs: Iterable[tuple[K, V]]) -> dict[K, tuple[V, ...]]:
    """The distinct values of each key, in order."""
    groups: defaultdict[K, dict[V, None]] = defaultdict(dict)
    for key, value in pairs:
        groups[key][value] = None
    return {key: tuple(values) for key, values in groups.items()}
