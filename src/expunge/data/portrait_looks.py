"""How a fictitious person looks: what is the same on every portrait (:class:`Face`) and what is not (:class:`View`).

Both are pure functions of :class:`expunge.data.people.Appearance`, a view also of its number. Lengths are in half
face heights: the chin is at y = 1, the crown at y = -1.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import pi
from typing import Literal

from expunge.data.chance import hashed, pick
from expunge.data.people import Appearance, Colour

Beard = Literal["none", "stubble", "moustache", "goatee", "chin strap", "full"]
Headwear = Literal["none", "headband", "cap", "scarf"]
Setting = Literal["plain", "horizon", "stripes", "lamps"]
Mood = Literal["calm", "smiling", "laughing", "serious"]

BEARDS: tuple[Beard, ...] = ("stubble", "moustache", "goatee", "chin strap", "full")
HEADWEAR: tuple[Headwear, ...] = ("none", "none", "none", "none", "none", "headband", "cap", "scarf")
MOODS: tuple[Mood, ...] = ("calm", "smiling", "laughing", "serious")
GREY: Colour = (190, 190, 192)
VIVID: dict[str, Colour] = {
    "red": (204, 44, 48), "orange": (236, 128, 32), "yellow": (240, 206, 54), "green": (48, 146, 76),
    "turquoise": (42, 172, 176), "blue": (46, 86, 190), "purple": (124, 62, 160), "pink": (232, 120, 164),
    "white": (236, 236, 232), "black": (34, 34, 40),
}  # fmt: skip
PLACES: dict[str, tuple[Setting, Colour, Colour]] = {
    "a white wall": ("plain", (226, 224, 218), (196, 194, 190)),
    "a dark curtain": ("stripes", (70, 34, 44), (48, 24, 34)),
    "the sea": ("horizon", (168, 206, 232), (34, 96, 140)),
    "a meadow": ("horizon", (178, 214, 240), (92, 150, 62)),
    "a desert": ("horizon", (240, 214, 164), (206, 158, 92)),
    "a brick wall": ("stripes", (166, 84, 62), (140, 68, 52)),
    "a city at night": ("lamps", (20, 24, 46), (250, 206, 110)),
    "a forest": ("stripes", (44, 82, 48), (72, 108, 60)),
    "a snowy hill": ("horizon", (190, 202, 220), (242, 246, 250)),
    "a festival": ("lamps", (92, 44, 104), (244, 150, 190)),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Face:
    """What is the same on every portrait of a person. Fractions are of the range that the field may take."""

    skin: Colour
    hair: Colour
    eyes: Colour
    lips: Colour
    hair_style: str
    hair_line: float  # y of the hair line in the middle of the forehead
    volume: float  # how far the hair stands off the skull
    side: int  # -1 or 1: where the parting, the mole and the scar are
    beard: Beard
    glasses: str
    frame: Colour
    headwear: Headwear
    cloth: Colour  # of the headwear
    earrings: bool
    width: float  # half width of the face
    jaw: float  # 0 a pointed chin, 1 a square one
    ears: float
    eye_x: float
    eye_y: float
    eye_size: float
    eye_open: float
    eye_tilt: float
    brow: float  # thickness
    brow_tilt: float
    brow_gap: float
    nose_width: float
    nose_length: float
    mouth_width: float
    mouth_y: float
    lip: float  # thickness
    freckles: bool
    mole: float  # height on the cheek; 0 for none
    scar: bool
    wrinkles: float  # 0 to 1


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What differs between the portraits of a person. Angles are in radians, shifts in parts of the image."""

    yaw: float
    pitch: float
    roll: float
    scale: float
    shift_x: float
    shift_y: float
    light: float  # direction from which it comes
    contrast: float
    brightness: float
    warmth: float
    place: str
    clothes: str
    collar: int  # 0 round, 1 pointed, 2 high
    mood: Mood
    grain: int  # seed of lamps and noise


def face_of(who: Appearance) -> Face:
    """The stable features: those of the appearance, and finer ones from its seed."""

    def part(what: str) -> float:
        return pick(10_001, who.seed, "face", what) / 10_000

    def between(low: float, high: float, what: str) -> float:
        return low + (high - low) * part(what)

    def one_in(n: int, what: str) -> bool:
        return pick(n, who.seed, "face", what) == 0

    def near(colour: Colour, spread: int, what: str) -> Colour:
        """The colour, a little lighter or darker and a little off."""
        all_of_it = pick(2 * spread + 1, who.seed, "tone", what) - spread
        r, g, b = (
            c + all_of_it + pick(spread + 1, who.seed, "tone", what, i) - spread // 2 for i, c in enumerate(colour)
        )
        return _limit(r), _limit(g), _limit(b)

    skin = near(who.skin, 10, "skin")
    age_grey = min(0.85, max(0.0, (who.age - 50) / 40)) * between(0.4, 1.0, "grey")
    vivid = list(VIVID.values())
    return Face(
        skin=skin,
        hair=mix(near(who.hair, 14, "hair"), GREY, age_grey),
        eyes=who.eyes,
        lips=mix(skin, (176, 42, 60), between(0.25, 0.75, "lips")),
        hair_style=who.hair_style,
        hair_line=between(-0.72, -0.42, "hair line"),
        volume=between(0.08, 0.30, "volume"),
        side=1 if one_in(2, "side") else -1,
        beard=BEARDS[pick(len(BEARDS), who.seed, "beard")] if who.beard else "none",
        glasses=who.glasses,
        frame=vivid[pick(len(vivid), who.seed, "frame")] if one_in(2, "bright frame") else (30, 28, 30),
        headwear=HEADWEAR[pick(len(HEADWEAR), who.seed, "headwear")],
        cloth=vivid[pick(len(vivid), who.seed, "cloth")],
        earrings=one_in(4, "earrings"),
        width=who.face,
        jaw=part("jaw"),
        ears=between(0.10, 0.24, "ears"),
        eye_x=who.eyes_apart * who.face,
        eye_y=between(-0.20, 0.02, "eye height"),
        eye_size=between(0.13, 0.22, "eye size"),
        eye_open=between(0.45, 0.85, "eye open"),
        eye_tilt=between(-0.25, 0.25, "eye tilt"),
        brow=between(0.04, 0.13, "brow"),
        brow_tilt=between(-0.3, 0.3, "brow tilt"),
        brow_gap=between(0.17, 0.28, "brow gap"),
        nose_width=between(0.10, 0.25, "nose width"),
        nose_length=between(0.28, 0.50, "nose length"),
        mouth_width=between(0.20, 0.40, "mouth width"),
        mouth_y=between(0.54, 0.68, "mouth height"),
        lip=between(0.04, 0.11, "lip"),
        freckles=one_in(6, "freckles"),
        mole=between(0.15, 0.5, "mole height") if one_in(4, "mole") else 0.0,
        scar=one_in(9, "scar"),
        wrinkles=min(1.0, max(0.0, (who.age - 45) / 35)),
    )


def view_of(who: Appearance, number: int) -> View:
    """View number ``number`` of a person: 0, 1, 2, … without end."""

    def swing(most: float, what: str) -> float:
        return most * (2 * pick(10_001, who.seed, "view", number, what) / 10_000 - 1)

    def choice(size: int, what: str) -> int:
        return pick(size, who.seed, "view", number, what)

    return View(
        yaw=swing(0.50, "yaw"),
        pitch=swing(0.18, "pitch"),
        roll=swing(0.16, "roll"),
        scale=1 + swing(0.11, "scale"),
        shift_x=swing(0.05, "x"),
        shift_y=swing(0.04, "y"),
        light=swing(pi, "light"),
        contrast=0.16 + swing(0.12, "contrast"),
        brightness=1 + swing(0.14, "brightness"),
        warmth=swing(0.06, "warmth"),
        place=list(PLACES)[choice(len(PLACES), "place")],
        clothes=list(VIVID)[choice(len(VIVID), "clothes")],
        collar=choice(3, "collar"),
        mood=MOODS[choice(len(MOODS), "mood")],
        grain=hashed(who.seed, "view", number, "grain") % 2**32,
    )


def mix(one: Colour, other: Colour, share: float) -> Colour:
    """``share`` of the other colour in the first."""
    r, g, b = (_limit(round(a + (z - a) * share)) for a, z in zip(one, other, strict=True))
    return r, g, b


def _limit(value: int) -> int:
    return min(255, max(0, value))
