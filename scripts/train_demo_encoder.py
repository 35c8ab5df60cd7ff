"""Train the demo's encoder, tac_ray/demo/encoder: a small CLIP that knows emoji and WordNet.

    apt-get install fonts-noto-color-emoji
    python scripts/train_demo_encoder.py

Pictures come from scripts/render_demo.py: every character of Noto Color Emoji whose Unicode name
leads to a noun of WordNet (`--list` prints them), except the demo's unseen glyphs and what looks
the same to the pixel. The demo's own pictures are not among them. Its classes are not told,
though some of their names are hypernyms of what is drawn.

A picture's text is its noun, a synonym or a hypernym, bare or in one of TAC's prompt templates:
lemmas and links of tac_ray's noun table, nothing else. Both towers start from random weights and
learn with CLIP's contrastive loss on

- pictures and texts, where further nouns of WordNet are among each picture's wrong texts, and
- nouns and their synonyms or hypernyms, over all WordNet, so that a noun that was never pictured
  lies near its kind. The names of unseen glyphs are among these nouns: words, not pictures.

A wrong pair whose synsets are equal or one above the other is no pair at all: it is left out.

Writes open_clip_config.json and open_clip_model.safetensors (fp16, 10 MB). Takes 13 minutes on two
cores and 3 GB of memory. Everything random comes from one seed.
"""

import argparse
import json
import math
import re
import time
import unicodedata
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import open_clip
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from render_demo import DEMO, FONT, TRAINING_STREAM, demo_glyphs, glyph_image, picture
from safetensors.torch import save_file
from torch import Tensor

from tac_ray.encoders.nouns import TABLE
from tac_ray.encoders.prompts import PROMPT_TEMPLATES

IMAGE_SIZE = 64
CONTEXT_LENGTH = 32  # WordNet's longest noun in the longest template has 28 tokens.
MODEL = {
    "embed_dim": 64,
    "vision_cfg": {
        "layers": [2, 2, 2, 2],
        "width": 16,
        "head_width": 64,
        "image_size": IMAGE_SIZE,
    },
    "text_cfg": {
        "context_length": CONTEXT_LENGTH,
        "vocab_size": 49408,
        "width": 64,
        "heads": 4,
        "layers": 2,
    },
}
PREPROCESS = {
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}

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

MAX_GLYPHS_PER_NOUN = 10  # So that 150 smileys do not outweigh the animals.
TEXT_SHARES = {"noun": 0.4, "bare": 0.25, "short": 0.7}
MAX_LINKS_UP = 6
TEXT_LOSS_WEIGHT = 0.5
N_WARM_UP_STEPS = 100


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


def training_glyphs(nouns: Nouns, font: Path) -> dict[str, str]:
    """The characters to train on and their nouns: none that an unseen one looks like."""
    unseen = {glyph.character for glyph in demo_glyphs() if not glyph.seen}
    unseen_pixels = {glyph_image(character, font).tobytes() for character in unseen}
    tofu = glyph_image("\U0010fffd", font).tobytes()
    found = {}
    for code_point in BLOCKS:
        character = chr(code_point)
        noun = noun_of(character, nouns)
        if noun is None:
            continue
        pixels = glyph_image(character, font).tobytes()
        is_new = pixels and pixels != tofu and pixels not in unseen_pixels
        if is_new and list(found.values()).count(noun) < MAX_GLYPHS_PER_NOUN:
            found[character] = noun
    return found


def render(character: str, n_pictures: int, font: Path) -> NDArray[np.uint8]:
    """Training pictures of a character, as the encoder takes them, (n_pictures, 64, 64, 3)."""
    size = (IMAGE_SIZE, IMAGE_SIZE)
    images = (picture(character, TRAINING_STREAM, n, font) for n in range(n_pictures))
    return np.stack([np.asarray(i.resize(size, Image.Resampling.BICUBIC)) for i in images])


class Prompter:
    """Tokens of prompts. Nouns and templates are encoded once and joined, which is quick."""

    def __init__(self) -> None:
        self._tokenizer = open_clip.SimpleTokenizer()
        self._frames = [("", ""), *(t.split("{}") for t in PROMPT_TEMPLATES)]
        self._encode = cache(self._tokenizer.encode)

    def __call__(self, texts: Sequence[str], rng: Generator) -> Tensor:
        """The texts in random templates or bare, (n, longest)."""
        rows = []
        for text in texts:
            is_bare = rng.random() < TEXT_SHARES["bare"]
            before, after = self._frames[0 if is_bare else rng.integers(1, len(self._frames))]
            body = [*self._encode(before), *self._encode(text), *self._encode(after)]
            body = body[: CONTEXT_LENGTH - 2]
            rows.append([self._tokenizer.sot_token_id, *body, self._tokenizer.eot_token_id])
        width = max(map(len, rows))
        return torch.tensor([row + [0] * (width - len(row)) for row in rows])


def encode_texts(model: open_clip.CLIP, tokens: Tensor) -> Tensor:
    """The text tower on short rows: positions and causal mask are cut to their length."""
    length = tokens.shape[1]
    x = model.token_embedding(tokens) + model.positional_embedding[:length]
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
    x = x[torch.arange(len(x)), tokens.argmax(dim=1)] @ model.text_projection
    return F.normalize(x.float(), dim=-1)


def encode_images(model: open_clip.CLIP, pixels: Tensor) -> Tensor:
    """The image tower on uint8 pixels, (n, height, width, 3)."""
    x = pixels.permute(0, 3, 1, 2).float() / 255
    x = (x - PREPROCESS["mean"][0]) / PREPROCESS["std"][0]
    with torch.autocast("cpu", torch.bfloat16):
        x = model.encode_image(x)
    return F.normalize(x.float(), dim=-1)


def contrast(a: Tensor, b: Tensor, related: Tensor, scale: Tensor) -> Tensor:
    """InfoNCE of a[i] and b[i] against all of b but those related to a[i]."""
    target = torch.arange(len(a))
    related = related.clone()
    related[target, target] = False
    return F.cross_entropy((scale * a @ b.T).masked_fill(related, -math.inf), target)


def shuffled(n: int, size: int, rng: Generator) -> Iterator[NDArray[np.int64]]:
    """Batches of row numbers, epoch after epoch, without end."""
    while True:
        order = rng.permutation(n)
        yield from (order[at : at + size] for at in range(0, n - size + 1, size))


def jittered(pixels: NDArray[np.uint8], rng: Generator) -> Tensor:
    """The pictures flipped and shifted a little, brighter or darker, each its own way."""
    pad = 3
    padded = np.pad(pixels, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="edge")
    out = np.empty_like(pixels)
    for n, (y, x) in enumerate(rng.integers(0, 2 * pad + 1, (len(pixels), 2))):
        crop = padded[n, y : y + IMAGE_SIZE, x : x + IMAGE_SIZE]
        out[n] = crop[:, ::-1] if rng.random() < 0.5 else crop
    gain = rng.uniform(0.75, 1.25, (len(pixels), 1, 1, 3)) * rng.uniform(0.8, 1.2)
    return torch.from_numpy(np.clip(out * gain, 0, 255).astype(np.uint8))


def train(
    bank: NDArray[np.uint8], synsets: Sequence[list[int]], nouns: Nouns, args: argparse.Namespace
) -> open_clip.CLIP:
    """The model after args.steps steps; bank has the pictures of synsets[i] in row i."""
    torch.manual_seed(args.seed)
    rng = np.random.default_rng([TRAINING_STREAM, args.seed])
    model = open_clip.CLIP(**MODEL)
    model.visual.to(memory_format=torch.channels_last)
    decayed = [p for n, p in model.named_parameters() if p.ndim > 1 and "embedding" not in n]
    plain = [p for n, p in model.named_parameters() if p.ndim < 2 or "embedding" in n]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_rate, n_steps=args.steps))
    prompter = Prompter()
    every_noun = list(nouns.meaning)
    n_glyphs, n_pictures = bank.shape[:2]
    batches = shuffled(n_glyphs * n_pictures, args.batch_size, rng)
    start, losses = time.monotonic(), []
    for step in range(args.steps):
        glyph, number = np.divmod(next(batches), n_pictures)
        shown = [synsets[i] for i in glyph]
        named = [
            nouns.sample_text(s[rng.integers(len(s))], rng, TEXT_SHARES["noun"]) for s in shown
        ]
        others = [
            pool[rng.integers(len(pool))]
            for is_short in rng.random(args.batch_size // 2) < TEXT_SHARES["short"]
            for pool in [nouns.short if is_short else every_noun]
        ]
        other_synsets = [nouns.meaning[noun.lower()] for noun in others]
        uppers = [nouns.sample_text(s, rng, 0.3) for s in other_synsets]
        words = [*(noun for noun, _ in named), *others, *(noun for noun, _ in uppers)]
        meant = [*(s for _, s in named), *other_synsets]
        embedding = encode_texts(model, prompter(words, rng))
        text, other, upper = embedding.split([len(named), len(others), len(uppers)])
        image = encode_images(model, jittered(bank[glyph, number], rng))
        scale = model.logit_scale.exp()
        # A glyph has one noun or two.
        to_text = nouns.related([s[0] for s in shown], meant)
        to_text |= nouns.related([s[-1] for s in shown], meant)
        to_upper = nouns.related(other_synsets, [s for _, s in uppers])
        loss_image = contrast(image, torch.cat([text, other]), to_text, scale) + contrast(
            text, image, to_text[:, : len(text)].T, scale
        )
        loss_text = contrast(other, upper, to_upper, scale) + contrast(
            upper, other, to_upper.T, scale
        )
        optimizer.zero_grad()
        (loss_image / 2 + TEXT_LOSS_WEIGHT * loss_text / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        losses.append((loss_image.item() / 2, loss_text.item() / 2))
        if (step + 1) % 100 == 0:
            images_loss, texts_loss = np.mean(losses[-100:], axis=0)
            print(
                f"step {step + 1:,} of {args.steps:,}: loss {images_loss:.3f} on pictures, "
                f"{texts_loss:.3f} on nouns; {time.monotonic() - start:.0f} s",
                flush=True,
            )
    return model.eval()


def _rate(step: int, n_steps: int) -> float:
    """Share of the learning rate: up in a line, down in half a cosine."""
    warm = min(1.0, (step + 1) / N_WARM_UP_STEPS)
    return warm * 0.5 * (1 + math.cos(math.pi * step / n_steps))


def save(model: open_clip.CLIP, out: Path) -> None:
    """Write configuration and fp16 weights as open_clip's local-dir: reads them."""
    out.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": MODEL, "preprocess_cfg": PREPROCESS}
    (out / "open_clip_config.json").write_text(json.dumps(config, indent=1) + "\n")
    state = {
        name: tensor.half().contiguous() if tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
    }
    save_file(state, out / "open_clip_model.safetensors", metadata={"format": "pt"})


def main() -> None:
    """Render the training pictures, train, write the encoder and say what was written."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--font", type=Path, default=FONT, help="NotoColorEmoji.ttf")
    parser.add_argument("--out", type=Path, default=DEMO / "encoder", help="folder to write")
    parser.add_argument("--steps", type=int, default=1900)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--pictures", type=int, default=48, help="of each glyph")
    parser.add_argument("--threads", type=int, default=2, help="of torch, and renderers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--list", action="store_true", help="print the glyphs' nouns and stop")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    nouns = Nouns.load()
    glyphs = training_glyphs(nouns, args.font)
    synsets = [[synset_of(noun, nouns) for noun in found.split("/")] for found in glyphs.values()]
    if args.list:
        for character, shown in zip(glyphs, synsets, strict=True):
            print(f"{ord(character):X} {character} {unicodedata.name(character).lower()}")
            for s in shown:
                print("    ", " < ".join(nouns.lemmas[a][0] for a in (s, *nouns.texts_above(s))))
        return
    start = time.monotonic()
    with ProcessPoolExecutor(args.threads) as pool:
        rendered = pool.map(
            partial(render, n_pictures=args.pictures, font=args.font), glyphs, chunksize=16
        )
        bank = np.stack(list(rendered))
    print(f"{len(bank):,} glyphs, {args.pictures} pictures of each: {bank.nbytes:,} bytes")
    print(f"rendered in {time.monotonic() - start:.0f} s", flush=True)
    save(train(bank, synsets, nouns, args), args.out)
    for path in sorted(args.out.iterdir()):
        print(f"{path}: {path.stat().st_size:,} bytes")
    print(f"{time.monotonic() - start:.0f} s in all")


if __name__ == "__main__":
    main()
