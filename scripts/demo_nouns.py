"""What the demo's encoder is told of its pictures: WordNet's noun for each character of the font.

A character's noun is its Unicode name or the part of it that WordNet has; NOUNS puts right by hand
where that leads elsewhere. `python scripts/train_demo_encoder.py --list` prints what comes out.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import pyarrow.parquet as pq
import torch
from numpy.random import Generator
from torch import Tensor

from tac_ray.encoders.nouns import TABLE

# Where pictures of things are among the characters; symbols and letters are elsewhere.
BLOCKS = (
    *(0x231A, 0x2328, 0x23F0, 0x23F1, 0x2602, 0x2603, 0x260E, 0x2615, 0x2618, 0x2620),
    *range(0x2692, 0x269A),
    *range(0x26B0, 0x2700),
    *(0x2702, 0x2708, 0x2709, 0x270F, 0x2712, 0x2744),
    *range(0x1F302, 0x1F3FB),
    *range(0x1F400, 0x1F4FE),
    *range(0x1F50B, 0x1F517),
    *range(0x1F525, 0x1F52F),
    *range(0x1F54A, 0x1F550),
    *range(0x1F56F, 0x1F5A5),
    *range(0x1F5A5, 0x1F600),
    *range(0x1F600, 0x1F645),
    *range(0x1F645, 0x1F6A5),
    *range(0x1F6B2, 0x1F700),
    *range(0x1F90C, 0x1FB00),
)
NOT_THINGS = re.compile(
    r"\b(symbol|sign|hearts?|component|mark|moon symbol|silhouette|left|right|compression|level"
    r"|squared|indicator|hole|diamond|no|low|battery|anger|hundred|dizzy)\b"
)

# What names mean whose own words lead elsewhere: one noun or two, or none to leave the character
# out. Behind "<" is another noun of the same synset or of one above, where there are several.
NOUNS = {
    "admission tickets": "ticket<commercial document",
    "adult": "person<soul",
    "airplane arriving": "airplane",
    "airplane departure": "airplane",
    "american football": "football<ball",
    "artist palette": "palette<pallet",
    "automobile": "car<auto",
    "baby": "baby<babe",
    "baby angel": "cherub",
    "baggage claim": "baggage<case",
    "ball of yarn": "yarn",
    "ballet shoes": "shoe<footwear",
    "bank": "bank<bank building",
    "bar of soap": "soap",
    "beans": "bean<legume",
    "bellhop bell": "bell<acoustic device",
    "bento box": "meal<repast",
    "beverage box": "carton/juice",
    "billiards": "billiard ball",
    "blossom": "blossom<bloom",
    "blueberries": "blueberry<edible fruit",
    "bomb": "bomb<explosive device",
    "bookmark tabs": "book<product",
    "bottle with popping cork": "wine<vino/bottle<vessel",
    "bowling": "bowling ball",
    "boy": "boy<male child",
    "bubble tea": "tea<beverage",
    "camping": "tent",
    "candy": "candy<sweet",
    "cheese wedge": "cheese",
    "cherries": "cherry<edible fruit",
    "cherry blossom": "blossom<bloom",
    "chestnut": "chestnut<nut",
    "chicken": "chicken<gallinaceous bird",
    "child": "child<kid",
    "children crossing": "",
    "christmas tree": "tree<woody plant",
    "cityscape": "skyscraper",
    "cityscape at dusk": "skyscraper",
    "clapper board": "",
    "clapping hands sign": "hand<manus",
    "clinking beer mugs": "beer mug/beer",
    "clinking glasses": "champagne/glass<drinking glass",
    "closed book": "book<product",
    "closed lock with key": "lock<fastener",
    "cocktail glass": "cocktail/glass<drinking glass",
    "confetti ball": "",
    "construction worker": "workman",
    "cooked rice": "rice<starches",
    "cooking": "egg<foodstuff/frying pan",
    "crown": "crown<jewelled headdress",
    "cup with straw": "cup<crockery/soft drink",
    "currency exchange": "",
    "customs": "",
    "deaf person": "person<soul",
    "derelict house building": "house<dwelling",
    "diamond shape with a dot inside": "",
    "direct hit": "target<sports equipment",
    "disguised face": "face<external body part",
    "dragon": "dragon<monster",
    "dragon face": "dragon<monster",
    "drop of blood": "blood",
    "drum with drumsticks": "drum<percussion instrument",
    "dumpling": "dumpling<pasta",
    "ear of maize": "corn<edible corn",
    "ear of rice": "rice<grain",
    "egg": "egg<foodstuff",
    "electric plug": "plug<electrical device",
    "european post office": "post office<local post office",
    "eyes": "eye<oculus",
    "face holding back tears": "face<external body part",
    "face massage": "woman<adult female",
    "face palm": "person<soul",
    "face savouring delicious food": "face<external body part",
    "face screaming in fear": "face<external body part",
    "face throwing a kiss": "face<external body part",
    "family": "",
    "fire": "fire<combustion",
    "fog": "",
    "gem stone": "gem<jewelry",
    "girl": "girl<young lady",
    "girls symbol": "",
    "glass of milk": "milk<beverage/glass<drinking glass",
    "graduation cap": "mortarboard<cap",
    "grapes": "grape<edible fruit",
    "green book": "book<product",
    "grimacing face": "face<external body part",
    "haircut": "woman<adult female",
    "hamburger": "hamburger<sandwich",
    "handshake": "hand<manus",
    "happy person raising one hand": "woman<adult female",
    "hibiscus": "hibiscus/flower<bloom",
    "hole": "",
    "hocho": "knife<edge tool",
    "honey pot": "honey",
    "horse racing": "horse",
    "hot beverage": "beverage<liquid",
    "information desk person": "woman<adult female",
    "jack-o-lantern": "pumpkin",
    "japanese post office": "post office<local post office",
    "jigsaw puzzle piece": "jigsaw puzzle",
    "juggling": "juggler",
    "kiss": "",
    "kissing face": "face<external body part",
    "kite": "kite<plaything",
    "kiwifruit": "kiwi<edible fruit",
    "label": "",
    "leaf fluttering in wind": "leaf<plant organ",
    "leafy green": "cabbage<vegetable",
    "light rail": "train<public transport",
    "long drum": "drum<percussion instrument",
    "lotus": "lotus/flower<bloom",
    "love letter": "envelope",
    "man": "man<adult male",
    "man and woman holding hands": "person<soul",
    "man dancing": "dancer",
    "man in business suit levitating": "man<adult male",
    "man in tuxedo": "man<adult male",
    "man with gua pi mao": "man<adult male",
    "man with turban": "man<adult male",
    "mate drink": "beverage<liquid",
    "metro": "train<public transport",
    "milky way": "",
    "monorail": "train<public transport",
    "moon cake": "cake<baked goods",
    "moon viewing ceremony": "",
    "mother christmas": "woman<adult female",
    "mountain cableway": "cable car",
    "mountain railway": "train<public transport",
    "mushroom": "mushroom<vegetable",
    "musical keyboard": "piano",
    "name badge": "",
    "night with stars": "skyscraper",
    "no entry": "",
    "nose": "nose<olfactory organ",
    "notebook": "notebook<book",
    "notebook with decorative cover": "notebook<book",
    "oil drum": "barrel",
    "ok hand sign": "hand<manus",
    "older adult": "person<soul",
    "older man": "man<adult male",
    "older woman": "woman<adult female",
    "oncoming automobile": "car<auto",
    "page facing up": "document<writing",
    "page with curl": "document<writing",
    "palms up together": "hand<manus",
    "party popper": "",
    "passport control": "",
    "peanuts": "peanut<nut",
    "performing arts": "mask",
    "person bowing deeply": "person<soul",
    "person climbing": "person<soul",
    "person doing cartwheel": "gymnast",
    "person frowning": "woman<adult female",
    "person raising both hands in celebration": "hand<manus",
    "person with ball": "person<soul",
    "person with blond hair": "person<soul",
    "person with folded hands": "hand<manus",
    "person with pouting face": "woman<adult female",
    "pig": "pig<swine",
    "pig face": "pig<swine",
    "pig nose": "snout",
    "pile of poo": "crap",
    "place of worship": "",
    "playground slide": "slide<plaything",
    "postal horn": "horn<brass",
    "pot of food": "stew",
    "pouch": "pouch<bag",
    "poultry leg": "drumstick<helping",
    "pregnant woman": "woman<adult female",
    "raised back of hand": "hand<manus",
    "rice ball": "rice<starches",
    "roll of paper": "toilet paper",
    "rolling on the floor laughing": "face<external body part",
    "rose": "rose/flower<bloom",
    "rosette": "flower<bloom",
    "rugby football": "football<ball",
    "runner": "runner<athlete",
    "sake bottle and cup": "sake/bottle<vessel",
    "scales": "scale<measuring instrument",
    "school satchel": "bag<container",
    "scooter": "scooter<wheeled vehicle",
    "seal": "seal<aquatic mammal",
    "shallow pan of food": "dish<nutriment",
    "shaved ice": "ice<frozen dessert",
    "shooting star": "",
    "shopping trolley": "shopping cart",
    "shrug": "woman<adult female",
    "slice of pizza": "pizza",
    "smiling face with halo": "face<external body part",
    "snowflake": "snowflake<crystal",
    "speech balloon": "",
    "spiral calendar pad": "calendar",
    "spiral note pad": "notebook<book",
    "spiral shell": "shell<animal material",
    "sponge": "sponge<absorbent material",
    "spool of thread": "thread<cord",
    "staff of aesculapius": "",
    "standing person": "man<adult male",
    "steaming bowl": "noodle",
    "strawberry": "strawberry<edible fruit",
    "sunflower": "sunflower/flower<bloom",
    "sunrise": "",
    "sunrise over mountains": "sun",
    "sunset over buildings": "sun",
    "suspension railway": "train<public transport",
    "teacup without handle": "tea<beverage/teacup",
    "thought balloon": "",
    "three button mouse": "mouse<electronic device",
    "thumbs down sign": "hand<manus",
    "thumbs up sign": "hand<manus",
    "ticket": "ticket<commercial document",
    "toilet": "toilet<plumbing fixture",
    "tram": "streetcar",
    "tram car": "streetcar",
    "troll": "troll<imaginary being",
    "tropical drink": "cocktail/beverage<liquid",
    "tropical fish": "fish<aquatic vertebrate",
    "tulip": "tulip/flower<bloom",
    "tumbler glass": "whiskey/tumbler<glass",
    "turkey": "turkey<gallinaceous bird",
    "two men holding hands": "man<adult male",
    "two women holding hands": "woman<adult female",
    "vibration mode": "",
    "video game": "joystick",
    "volcano": "volcano<mountain",
    "water closet": "",
    "water wave": "wave<moving ridge",
    "waving hand sign": "hand<manus",
    "wedding": "church<church building",
    "weight lifter": "person<soul",
    "white flower": "flower<bloom",
    "wilted flower": "flower<bloom",
    "window": "window<framework",
    "wine glass": "wine<vino/glass<drinking glass",
    "woman": "woman<adult female",
    "woman with bunny ears": "woman<adult female",
    "womans clothes": "blouse",
    "wrapped present": "gift",
    "zombie": "zombie<spirit",
}

MAX_LINKS_UP = 6


@dataclass(frozen=True, eq=False)
class Nouns:
    """WordNet's nouns with the links upward that tac_ray's table holds.

    `above` has for each synset itself and all above it, with the links it takes to get there.
    """

    lemmas: dict[int, list[str]]
    above: dict[int, dict[int, int]]
    top: set[int]
    meaning: dict[str, int]
    short: list[str]

    @staticmethod
    @cache
    def load() -> "Nouns":
        """Read the table: each noun means its row of the short list, else its first row."""
        table = pq.read_table(TABLE).to_pydict()
        lemmas: dict[int, list[str]] = {}
        hypernyms: dict[int, list[int]] = {}
        top = set()
        meaning: dict[str, int] = {}
        short = {}
        visible = {f"noun.{n}" for n in ("animal", "artifact", "body", "food", "object", "plant")}
        rows = list(zip(*table.values(), strict=True))
        for lemma, synset, above, file, _ in rows:
            lemmas.setdefault(synset, []).append(lemma.replace("_", " "))
            hypernyms[synset] = above
            if file == "noun.Tops":
                top.add(synset)
        preferences = (
            lambda file, is_short: is_short,
            lambda file, is_short: file in visible,
            lambda file, is_short: file == "noun.person",
            lambda file, is_short: True,
        )
        for preferred in preferences:
            for lemma, synset, _, file, is_short in rows:
                if preferred(file, is_short):
                    meaning.setdefault(lemma.replace("_", " ").lower(), synset)
                if is_short:
                    short[lemma.replace("_", " ")] = None
        above = {synset: _links_up(synset, hypernyms) for synset in hypernyms}
        return Nouns(lemmas, above, top, meaning, list(short))

    def texts_above(self, synset: int) -> list[int]:
        """The synsets above that say something: few links away and not at WordNet's very top."""
        links = self.above[synset].items()
        return [s for s, n in links if 0 < n <= MAX_LINKS_UP and s not in self.top]

    def sample_text(self, synset: int, rng: Generator, noun_share: float) -> tuple[str, int]:
        """A lemma of the synset or of one above it, and which synset it was."""
        above = self.texts_above(synset)
        if above and rng.random() >= noun_share:
            synset = above[rng.integers(len(above))]
        lemmas = self.lemmas[synset]
        return (lemmas[0] if rng.random() < 0.6 else lemmas[rng.integers(len(lemmas))]), synset

    def related(self, a: Sequence[int], b: Sequence[int]) -> Tensor:
        """Whether a[i] and b[j] are equal or one is above the other, (len(a), len(b))."""
        return _contains(self._padded(a), b) | _contains(self._padded(b), a).T

    def _padded(self, synsets: Sequence[int]) -> Tensor:
        rows = [list(self.above[synset]) for synset in synsets]
        width = max(map(len, rows))
        return torch.tensor([row + [-1] * (width - len(row)) for row in rows], dtype=torch.int32)


def _links_up(synset: int, hypernyms: dict[int, list[int]]) -> dict[int, int]:
    reached = {synset: 0}
    queue = [synset]
    for at in queue:
        for upper in hypernyms[at]:
            if upper not in reached:
                reached[upper] = reached[at] + 1
                queue.append(upper)
    return reached


def _contains(rows: Tensor, values: Sequence[int]) -> Tensor:
    return (rows[:, None] == torch.tensor(values, dtype=torch.int32)[None, :, None]).any(-1)


def noun_of(character: str, nouns: Nouns) -> str | None:
    """The noun of WordNet that a character's Unicode name leads to, as in NOUNS."""
    name = unicodedata.name(character, "").lower()
    if name in NOUNS:
        return NOUNS[name] or None
    if not name or ord(character) not in BLOCKS or NOT_THINGS.search(name):
        return None
    if name in nouns.meaning:
        return name
    head = re.split(r" (?:with|of|and|in|on|over|at|behind|without|under|to|from) ", name)[0]
    words = head.split()
    if len(words) > 1 and words[-1] == "face" and words[0] in nouns.meaning:
        under = nouns.above[nouns.meaning[words[0]]]
        if nouns.meaning["animal"] in under or nouns.meaning["imaginary being"] in under:
            words = words[:-1]
    for start in range(len(words)):
        noun = " ".join(words[start:])
        for form in (noun, noun.removesuffix("s"), noun.removesuffix("es")):
            if form in nouns.meaning:
                return form
    return None


def synset_of(noun: str, nouns: Nouns) -> int:
    """The synset of a noun as in NOUNS.

    Raises:
        ValueError: there is none.
    """
    noun, _, upper = noun.partition("<")
    if not upper:
        return nouns.meaning[noun]
    fitting = [
        synset
        for synset, lemmas in nouns.lemmas.items()
        if noun in map(str.lower, lemmas)
        and any(upper in nouns.lemmas[above] for above in nouns.above[synset])
    ]
    if not fitting:
        raise ValueError(f"WordNet has no '{noun}' under '{upper}'; correct NOUNS")
    return fitting[0]
