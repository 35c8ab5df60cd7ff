"""The noun table, the short list, text files of nouns, and paths among synsets."""

import hashlib

import pyarrow.parquet as pq
import pytest

from tac_ray.encoders.nouns import TABLE, WordNet, load_nouns

DOG = 2084071
ENGLISH_SPRINGER = 2102040
SPRINGER_SPANIEL = 2101861
WELSH_SPRINGER = 2102177
TENCH = 1440764

SEEN = (
    "tench, English springer, cassette player, chain saw, church, French horn, garbage truck, "
    "gas pump, golf ball, parachute, cat, dog, apple, car, guitar, hammer, airplane, frog, horse, "
    "ship, truck, deer, bird, tiger, castle, table, lampshade, sunglasses"
)
# Abstract nouns, proper names, taxa (one that WordNet hangs below an animal), a drug, a plant.
UNSEEN = (
    "freedom, thought, Eiffel Tower, Africa, Canis, Aegypiidae, Tinca tinca, aspirin, ceratozamia"
)


@pytest.fixture(scope="module")
def short() -> frozenset[str]:
    return frozenset(load_nouns("short", "clean"))


@pytest.fixture(scope="module")
def every() -> frozenset[str]:
    return frozenset(load_nouns("wordnet", "clean"))


def test_raw_nouns_are_wordnets_lemmas_in_file_order():
    nouns = load_nouns("wordnet", "raw")
    digest = hashlib.sha256("\n".join(nouns).encode()).hexdigest()
    assert digest == "506808f16d7c5c1b6b39b7ae541c6d321e732a39228311c9435e40d1a7d96801"
    assert len(nouns) == 146_347
    assert len(set(nouns)) == 119_034
    assert nouns[:3] == ["entity", "physical_entity", "abstraction"]


def test_clean_nouns_are_distinct_and_spaced_in_order_of_first_occurrence():
    nouns = load_nouns("wordnet", "clean")
    assert len(nouns) == len(set(nouns)) == 119_034
    assert nouns[:4] == ["entity", "physical entity", "abstraction", "abstract entity"]
    assert not any("_" in noun for noun in nouns)
    first = {}
    for place, noun in enumerate(load_nouns("wordnet", "raw")):
        first.setdefault(noun.replace("_", " "), place)
    assert [first[noun] for noun in nouns] == sorted(first.values())


def test_short_list_has_about_8000_distinct_nouns_of_at_most_two_words():
    nouns = load_nouns("short", "clean")
    assert 7_500 <= len(nouns) <= 8_500
    assert len({noun.lower() for noun in nouns}) == len(nouns)
    assert max(noun.count(" ") for noun in nouns) == 1
    assert [noun.replace("_", " ") for noun in load_nouns("short", "raw")] == nouns


@pytest.mark.parametrize("noun", SEEN.split(", "))
def test_short_list_keeps_what_one_sees(noun, short):
    assert noun in short


@pytest.mark.parametrize("noun", UNSEEN.split(", "))
def test_short_list_drops_what_one_does_not_see_or_know(noun, short, every):
    assert noun in every
    assert noun not in short


def test_table_has_no_glosses():
    schema = pq.read_schema(TABLE)
    columns = {field.name: str(field.type) for field in schema}
    assert columns == {
        "lemma": "string",
        "synset": "int32",
        "hypernyms": "list<element: int32>",
        "lexical_file": "dictionary<values=string, indices=int32, ordered=0>",
        "short": "bool",
    }
    assert TABLE.stat().st_size < 3_000_000


def test_text_file_is_trimmed_and_tolerates_a_byte_order_mark(tmp_path):
    file = tmp_path / "nouns.txt"
    file.write_bytes(b"\xef\xbb\xbf  hot_dog \r\n\r\n\t\ncaf\xc3\xa9\nhot dog\nhot_dog")
    assert load_nouns(str(file), "raw") == ["hot_dog", "café", "hot dog", "hot_dog"]
    assert load_nouns(str(file), "clean") == ["hot dog", "café"]


def test_text_file_may_be_a_uri(tmp_path):
    file = tmp_path / "nouns.txt"
    file.write_text("cat\ndog\n")
    assert load_nouns(file.as_uri(), "raw") == ["cat", "dog"]


def test_missing_text_file_is_named_with_what_to_give(tmp_path):
    file = str(tmp_path / "nowhere.txt")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt' does not exist; give 'wordnet'"):
        load_nouns(file, "raw")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"bad\.txt' has 0 nouns; needs at least 1, one a line"),
        (b" \n\n\t\n_\n", r"bad\.txt' has 0 nouns"),
        (b"cat\ncaf\xe9\n", r"bad\.txt' has byte 0xe9 at offset 7; needs UTF-8"),
        (b"\xef\xbb\xbfcaf\xe9\n", r"bad\.txt' has byte 0xe9 at offset 6; needs UTF-8"),
        (b"cat\n" + b"x" * 201, r"bad\.txt' has 201 characters on line 2; a noun has at most 200"),
    ],
)
def test_bad_text_file_is_refused_with_its_values(tmp_path, content, message):
    file = tmp_path / "bad.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_nouns(str(file), "clean")


def test_text_file_may_have_a_noun_of_200_characters(tmp_path):
    file = tmp_path / "long.txt"
    file.write_text(f"  {'x' * 200}  \n")
    assert load_nouns(str(file), "raw") == ["x" * 200]


def test_synsets_of_a_noun_ignore_case_and_spaces():
    wordnet = WordNet.load()
    assert wordnet.synsets("English springer") == (ENGLISH_SPRINGER,)
    assert wordnet.synsets("english_Springer_spaniel") == (ENGLISH_SPRINGER,)
    assert DOG in wordnet.synsets("dog")
    assert len(wordnet.synsets("dog")) == 7
    assert wordnet.synsets("no such noun") == ()


def test_lemmas_of_a_synset():
    wordnet = WordNet.load()
    assert wordnet.lemmas(TENCH) == ("tench", "Tinca_tinca")
    assert wordnet.lemmas(ENGLISH_SPRINGER) == ("English_springer", "English_springer_spaniel")


@pytest.mark.parametrize(
    ("a", "b", "steps"),
    [
        (DOG, DOG, 0),
        (ENGLISH_SPRINGER, SPRINGER_SPANIEL, 1),
        (ENGLISH_SPRINGER, WELSH_SPRINGER, 2),
        # springer spaniel, spaniel, sporting dog, hunting dog, dog
        (ENGLISH_SPRINGER, DOG, 5),
    ],
)
def test_steps_between_synsets(a, b, steps):
    wordnet = WordNet.load()
    assert wordnet.steps(a, b, limit=10) == steps
    assert wordnet.steps(b, a, limit=steps) == steps
    assert wordnet.steps(a, b, limit=steps - 1) is None


def test_steps_follow_instances():
    wordnet = WordNet.load()
    (tower,) = wordnet.synsets("Eiffel Tower")
    assert any(wordnet.steps(tower, other, limit=1) == 1 for other in wordnet.synsets("tower"))


def test_unknown_synset_is_refused():
    wordnet = WordNet.load()
    with pytest.raises(ValueError, match=r"synset 7 is not one of WordNet 3\.0's 82,115"):
        wordnet.steps(DOG, 7, limit=3)
    with pytest.raises(ValueError, match="synset 7 is not one of"):
        wordnet.lemmas(7)
