"""Build tac_ray/encoders/wordnet_nouns.parquet from WordNet 3.0.

    apt-get install wordnet-base
    pip install nltk pyarrow
    python scripts/build_wordnet.py

The table has one row per (synset, lemma) in the order of WordNet's data.noun:

    lemma         string        as in the file: underscores and capitals kept
    synset        int32         the synset's offset in data.noun
    hypernyms     list<int32>   offsets of its hypernyms and instance hypernyms, ascending
    lexical_file  dictionary    e.g. noun.animal
    short         bool          a row of the short list

The short list is meant to name what one can see. A noun is on it when some synset passes all of:

1. Visible: the synset's lexical file is noun.animal (and it lies under `animal`), noun.artifact
   or noun.object (under `object`, so no drugs), noun.body, noun.food or noun.plant; it is no
   instance (a particular thing with a proper name), and no hypernym path leads to `abstraction`
   (as those of genera and families do).
2. Name: the noun is the synset's first lemma, has at most two words, and is neither a lemma of a
   taxonomic group nor a Latin binomial (several words, the first naming a taxonomic group).
3. Meaning: a third or more of the noun's weight is on visible synsets, where each of its noun
   synsets weighs one more than its count in WordNet's sense-tagged texts.
4. Familiar: for animals, artifacts, food and objects each word of the noun is known. A word is
   known when it was tagged twice or more, as any part of speech, or at least five nouns of
   WordNet contain it. A noun of one word may instead be a known word joined to the name of one
   of its hypernyms, three letters or more each (lampshade is a shade), and an animal may have a
   Latin binomial among its lemmas, as single species do. A plant or body part must itself have
   been tagged twice, since most of WordNet's are known to specialists only.

A taxonomic group is a synset at or under `taxonomic_group`, or one that also has its lemma
preceded by a rank, such as family_Aegypiidae.

Where several synsets of a noun pass, its row is the one with the highest count, then the first.

Takes half a minute.
"""

import argparse
import hashlib
import re
import shutil
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import nltk
import pyarrow as pa
import pyarrow.parquet as pq
from nltk.corpus.reader.wordnet import WordNetCorpusReader

OUT = Path(__file__).parents[1] / "tac_ray" / "encoders" / "wordnet_nouns.parquet"
LEMMAS_SHA256 = "506808f16d7c5c1b6b39b7ae541c6d321e732a39228311c9435e40d1a7d96801"
SHORT_SIZES = range(7_500, 8_501)

# The standard lexicographer files by number; the reader wants them, Debian does not ship them.
LEXICAL_FILES = (
    "adj.all adj.pert adv.all noun.Tops noun.act noun.animal noun.artifact noun.attribute "
    "noun.body noun.cognition noun.communication noun.event noun.feeling noun.food noun.group "
    "noun.location noun.motive noun.object noun.person noun.phenomenon noun.plant "
    "noun.possession noun.process noun.quantity noun.relation noun.shape noun.state "
    "noun.substance noun.time verb.body verb.change verb.cognition verb.communication "
    "verb.competition verb.consumption verb.contact verb.creation verb.emotion verb.motion "
    "verb.perception verb.possession verb.social verb.stative verb.weather adj.ppl"
)
PART_OF_SPEECH = {"noun": 1, "verb": 2, "adj": 3, "adv": 4}

# Visible lexical files and the synset that a visible synset of each lies under, if any.
VISIBLE_UNDER = {
    "noun.animal": "animal.n.01",
    "noun.artifact": "object.n.01",
    "noun.object": "object.n.01",
    "noun.body": None,
    "noun.food": None,
    "noun.plant": None,
}
MAX_WORDS = 2
MIN_VISIBLE_SHARE = 1 / 3
MIN_TAGGED = 2
MIN_NOUNS_WITH_WORD = 5
MIN_JOINED_LETTERS = 3


@dataclass(frozen=True)
class Row:
    """One lemma of one noun synset; `count` is how often it was tagged with this meaning."""

    lemma: str
    synset: int
    hypernyms: tuple[int, ...]
    lexical_file: str
    is_first: bool
    is_instance: bool
    count: int


def open_wordnet(wordnet: Path, scratch: Path) -> WordNetCorpusReader:
    """NLTK's reader of the dictionary files in `wordnet`, copied below `scratch`.

    NLTK reads only inside its data folders, and by the names of its own package.

    Raises:
        FileNotFoundError: `wordnet` has no data.noun.
    """
    if not (wordnet / "data.noun").is_file():
        raise FileNotFoundError(
            f"no data.noun in '{wordnet}'; run apt-get install wordnet-base, or pass --wordnet"
        )
    folder = scratch / "corpora" / "wordnet"
    folder.mkdir(parents=True)
    for pattern in ("data.*", "index.*", "*.exc", "cntlist.rev"):
        for file in wordnet.glob(pattern):
            shutil.copy(file, folder)
    lexnames = (
        f"{number:02d}\t{name}\t{PART_OF_SPEECH[name.split('.')[0]]}\n"
        for number, name in enumerate(LEXICAL_FILES.split())
    )
    (folder / "lexnames").write_text("".join(lexnames))
    # Only maps other WordNet versions to this one, which nothing here asks for.
    (folder / "index.sense").touch()
    nltk.data.path.insert(0, str(scratch))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The multilingual functions")
        return WordNetCorpusReader(nltk.data.find("corpora/wordnet"), None)


def sense_counts(wordnet: Path) -> dict[str, int]:
    """How often each sense key was tagged; one pass, where NLTK searches the file per lemma."""
    lines = (wordnet / "cntlist.rev").read_text(encoding="utf-8").splitlines()
    return {key: int(count) for key, _, count in map(str.split, lines)}


def read_rows(reader: WordNetCorpusReader, counts: dict[str, int]) -> Iterator[Row]:
    """Every lemma of every noun synset, in file order."""
    for synset in sorted(reader.all_synsets("n"), key=lambda synset: synset.offset()):
        instance_of = synset.instance_hypernyms()
        above = synset.hypernyms() + instance_of
        # NLTK holds links in sets, whose order differs from run to run.
        hypernyms = tuple(sorted(other.offset() for other in above))
        for position, lemma in enumerate(synset.lemmas()):
            yield Row(
                lemma=lemma.name(),
                synset=synset.offset(),
                hypernyms=hypernyms,
                lexical_file=synset.lexname(),
                is_first=position == 0,
                is_instance=bool(instance_of),
                count=counts.get(lemma.key(), 0),
            )


def words(lemma: str) -> list[str]:
    """The lower-case words of a lemma, split at underscores and hyphens."""
    return re.split("[_-]", lemma.lower())


def short_rows(
    rows: list[Row], counts: dict[str, int], reader: WordNetCorpusReader
) -> set[tuple[int, str]]:
    """(synset, lemma) of the short list's rows, by the rule in the module's docstring."""
    hypernyms = {row.synset: row.hypernyms for row in rows}
    taxonomic_group = reader.synset("taxonomic_group.n.01").offset()
    abstraction = reader.synset("abstraction.n.06").offset()
    root = {
        file: reader.synset(name).offset() if name else None for file, name in VISIBLE_UNDER.items()
    }

    @cache
    def at_or_above(synset: int) -> frozenset[int]:
        return frozenset({synset}).union(*map(at_or_above, hypernyms[synset]))

    def is_visible(row: Row) -> bool:
        if row.lexical_file not in root or row.is_instance:
            return False
        above = at_or_above(row.synset)
        return abstraction not in above and root[row.lexical_file] in {None, *above}

    lemmas_of: dict[int, set[str]] = defaultdict(set)
    for row in rows:
        lemmas_of[row.synset].add(row.lemma)

    # genus, family, order, ...
    ranks = {row.lemma for row in rows if taxonomic_group in row.hypernyms}

    def is_taxon(row: Row) -> bool:
        # WordNet hangs a few families and orders below an animal instead of a group.
        with_rank = {f"{rank}_{row.lemma}" for rank in ranks}
        return taxonomic_group in at_or_above(row.synset) or not with_rank.isdisjoint(
            lemmas_of[row.synset]
        )

    taxa = {row.lemma for row in rows if is_taxon(row)}

    def is_binomial(lemma: str) -> bool:
        return "_" in lemma and lemma.split("_")[0] in taxa

    has_binomial = {row.synset for row in rows if is_binomial(row.lemma)}
    weight: dict[str, int] = defaultdict(int)
    visible_weight: dict[str, int] = defaultdict(int)
    synsets_of: dict[str, set[int]] = defaultdict(set)
    for row in rows:
        synsets_of[row.lemma.lower()].add(row.synset)
        weight[row.lemma.lower()] += row.count + 1
        visible_weight[row.lemma.lower()] += (row.count + 1) * is_visible(row)

    tagged: Counter[str] = Counter()
    for key, count in counts.items():
        tagged[key.split("%")[0]] += count
    nouns_with = Counter(word for lemma in weight for word in set(words(lemma)))

    def is_known(word: str) -> bool:
        return tagged[word] >= MIN_TAGGED or nouns_with[word] >= MIN_NOUNS_WITH_WORD

    def is_joined(row: Row) -> bool:
        word = row.lemma.lower()
        cuts = range(MIN_JOINED_LETTERS, len(word) - MIN_JOINED_LETTERS + 1)
        ends = [word[cut:] for cut in cuts if is_known(word[:cut])]
        above = at_or_above(row.synset) - {row.synset}
        return any(not above.isdisjoint(synsets_of[end]) for end in ends if end in synsets_of)

    def is_familiar(row: Row) -> bool:
        if row.lexical_file in ("noun.plant", "noun.body"):
            return tagged[row.lemma.lower()] >= MIN_TAGGED
        if row.lexical_file == "noun.animal" and row.synset in has_binomial:
            return True
        parts = words(row.lemma)
        return all(map(is_known, parts)) or (len(parts) == 1 and is_joined(row))

    best: dict[str, Row] = {}
    for row in rows:
        noun = row.lemma.lower()
        if (
            row.is_first
            and row.lemma.count("_") < MAX_WORDS
            and row.lemma not in taxa
            and not is_binomial(row.lemma)
            and is_visible(row)
            and visible_weight[noun] >= MIN_VISIBLE_SHARE * weight[noun]
            and is_familiar(row)
            and (noun not in best or row.count > best[noun].count)
        ):
            best[noun] = row
    return {(row.synset, row.lemma) for row in best.values()}


def build(wordnet: Path) -> pa.Table:
    """The table described above.

    Raises:
        ValueError: the nouns are not WordNet 3.0's, or the short list is out of its bounds.
    """
    with tempfile.TemporaryDirectory() as scratch:
        reader = open_wordnet(wordnet, Path(scratch))
        counts = sense_counts(wordnet)
        rows = list(read_rows(reader, counts))
        short = short_rows(rows, counts, reader)
    digest = hashlib.sha256("\n".join(row.lemma for row in rows).encode()).hexdigest()
    if digest != LEMMAS_SHA256:
        raise ValueError(
            f"the {len(rows):,} lemmas of '{wordnet}' have sha256 {digest}; "
            f"WordNet 3.0's have {LEMMAS_SHA256}: pass --wordnet with version 3.0's files"
        )
    if len(short) not in SHORT_SIZES:
        raise ValueError(
            f"the short list has {len(short):,} nouns; the rule should keep "
            f"{SHORT_SIZES.start:,} to {SHORT_SIZES.stop - 1:,}: adjust its constants"
        )
    return pa.table(
        {
            "lemma": pa.array([row.lemma for row in rows], pa.string()),
            "synset": pa.array([row.synset for row in rows], pa.int32()),
            "hypernyms": pa.array([row.hypernyms for row in rows], pa.list_(pa.int32())),
            "lexical_file": pa.array([row.lexical_file for row in rows]).dictionary_encode(),
            "short": pa.array([(row.synset, row.lemma) in short for row in rows], pa.bool_()),
        }
    )


def main() -> None:
    """Build the table, write it and say what was written."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--wordnet", type=Path, default=Path("/usr/share/wordnet"), help="WordNet 3.0's folder"
    )
    parser.add_argument("--out", type=Path, default=OUT, help="the Parquet file to write")
    args = parser.parse_args()
    table = build(args.wordnet)
    pq.write_table(
        table,
        args.out,
        compression="zstd",
        compression_level=19,
        use_dictionary=["lexical_file"],
        column_encoding={
            "lemma": "DELTA_BYTE_ARRAY",
            "synset": "DELTA_BINARY_PACKED",
            "hypernyms.list.element": "DELTA_BINARY_PACKED",
        },
    )
    n_short = table["short"].to_pylist().count(True)
    print(f"{args.out}: {table.num_rows:,} rows, {n_short:,} of them short")
    print(f"sha256 of the lemmas: {LEMMAS_SHA256}")
    print(f"sha256 of the file: {hashlib.sha256(args.out.read_bytes()).hexdigest()}")
    print(f"file size: {args.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
