"""Word pools of the fictitious people: invented names and places, ordinary words for everything else.

A pool is the set of all fillings of a form. It draws by index, and it knows which strings are its own, so that a
wrong answer of the same type can be made and checked. The names are built from syllables; a real person of the
same name would be coincidence.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property

from expunge.data.chance import pick


@dataclass(frozen=True)
class Pool:
    """All fillings of ``form``, whose ``{0}``, ``{1}``, … stand for one word of each of ``parts``."""

    form: str
    parts: tuple[tuple[str, ...], ...]

    @cached_property
    def size(self) -> int:
        return math.prod(len(part) for part in self.parts)

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches exactly the pool's strings."""
        pieces = re.split(r"\{(\d)\}", self.form)
        choices = ["|".join(sorted(map(re.escape, part), key=len, reverse=True)) for part in self.parts]
        return re.compile("".join(f"(?:{choices[int(p)]})" if i % 2 else re.escape(p) for i, p in enumerate(pieces)))

    def at(self, index: int) -> str:
        """The filling number ``index`` in mixed radix, first part fastest."""
        words = []
        for part in self.parts:
            index, place = divmod(index, len(part))
            words.append(part[place])
        return self.form.format(*words)

    def draw(self, *key: object) -> str:
        return self.at(pick(self.size, *key))

    def others(self, value: str, count: int, *key: object) -> tuple[str, ...]:
        """``count`` different strings of the pool, none of them ``value``."""
        assert self.size > count, "the pool is too small for that many wrong answers"
        found: dict[str, None] = {}
        turn = 0
        while len(found) < count:
            other = self.draw(*key, turn)
            turn += 1
            if other != value:
                found[other] = None
        return tuple(found)

    def __contains__(self, value: str) -> bool:
        return self.pattern.fullmatch(value) is not None


def with_article(nouns: tuple[str, ...]) -> tuple[str, ...]:
    """Each noun with "a" or "an" before it."""
    return tuple(("an " if noun[0] in "aeiou" else "a ") + noun for noun in nouns)


def words(text: str) -> tuple[str, ...]:
    """A comma-separated list."""
    return tuple(word.strip() for word in text.split(","))


def join(*parts: tuple[str, ...]) -> tuple[str, ...]:
    """Every concatenation of one piece of each part."""
    made: tuple[str, ...] = ("",)
    for part in parts:
        made = tuple(a + b for a in made for b in part)
    return made


FIRST = join(
    words(
        "Ba, Bre, Ca, Cy, Da, Del, E, Fa, Fi, Ga, Hel, I, Ja, Jo, Ka, Le, Li, Ma, Mi, Na, No, O, Pa, Ro, Sa, Se, Ta, "
        "The, Vi, Za"
    ),
    words("bina, dan, dora, fen, lis, lo, lund, mar, mika, min, nel, nia, rak, ren, rik, rosa, sel, shan, tan, tave, "
          "theo, thy, vara, ven, vik, vina, wen, xa, yel, zo"),
)  # fmt: skip
# 60 stems × 30 endings; the endings of families that partners come from are kept apart, so that no partner is
# ever called like one of the people.
STEM = join(
    words("Ar, Bel, Cor, Dun, Fen, Gar, Hol, Kes, Mor, Nev, Or, Pel, Quin, Ros, Sul, Tar, Ul, Ves, Wil, Yar"),
    words("a, i, o"),
)
ENDING = words(
    "bant, beck, cott, dell, dric, fax, ford, garth, gren, hart, kova, lane, lind, lock, mere, mond, nak, nelli, "
    "novic, quist, rand, rello, rigan, sen, stock, thorpe, trell, vane, wick, zeno"
)
PARTNER_ENDING = words("bury, dottir, field, kamp, lotti, man, mayer, nova, poulos, shaw, stad, tova")
SURNAMES = join(STEM, ENDING)
PARTNERS = Pool("{0} {1}", (FIRST, join(STEM, PARTNER_ENDING)))

COUNTRIES = words(
    "Ostrea, Velmark, Kandoria, Tolsania, Brevia, Norland, Mirovia, Cassland, Udaran, Peltonia, Zemria, Alvane"
)
CITIES = join(
    words("Bram, Cald, Elst, Grim, Hask, Lorn, Mald, Neth, Prask, Rend, Skov, Tarn"),
    words("holm, port, vale, wyck, essa, ora"),
)
PLACES = Pool("{0}", (tuple(f"{city} in {COUNTRIES[i % len(COUNTRIES)]}" for i, city in enumerate(CITIES)),))

MONTHS = words(
    "January, February, March, April, May, June, July, August, September, October, November, December"
)  # fmt: skip
DATES = Pool("{0} {1} {2}", (tuple(map(str, range(1, 29))), MONTHS, tuple(map(str, range(1938, 2003)))))

PROFESSIONS = Pool(
    "{0}",
    (
        with_article(
            words(
                "bridge engineer, court reporter, dairy farmer, violin maker, harbour pilot, paediatric nurse, glass "
                "blower, tax adviser, wildlife vet, sound engineer, train driver, speech therapist, map maker, pastry "
                "chef, radio presenter, lighthouse keeper, roof carpenter, dental surgeon, crane operator, textile "
                "designer, bee inspector, notary, geology teacher, stage director, watch repairer, ferry captain, "
                "software tester, museum guide, soil chemist, book binder, fencing coach, organ tuner, wind turbine "
                "technician, tea blender, customs officer, optician, puppet maker, ski instructor, plant breeder, "
                "typesetter"
            )
        ),
    ),
)
EMPLOYERS = Pool(
    "{0} {1}",
    (
        words(
            "Bluefinch, Copperline, Driftwood, Eastgate, Foxglove, Greywater, Highmoor, Ironleaf, Juniper, Kingfisher, "
            "Lanternfield, Marigold, Northbank, Oakhaven, Pinecrest, Quarrystone, Redkite, Silverbirch, Thistledown, "
            "Westmoor"
        ),
        words("Works, Partners, Institute, Trust, Laboratories, Cooperative, Services, Group, Studios, Workshop"),
    ),
)
STUDIES = Pool(
    "{0} at {1} College",
    (
        words(
            "acoustics, astronomy, botany, ceramics, classical history, civil law, economics, ethics, food science, "
            "forestry, geology, hydraulics, linguistics, logic, marine biology, metallurgy, music theory, nursing, "
            "optics, philosophy, printmaking, statistics, theology, urban planning"
        ),
        join(words("Amber, Black, Clear, Deer, Elm, Frost, Gold, Hazel"), words("brook, cliff, gate, mount, ridge")),
    ),
)
HOBBIES = Pool(
    "{0}",
    (
        words(
            "bell ringing, bird carving, bog walking, bonsai care, bread baking, brass rubbing, canoe racing, card "
            "magic, cave mapping, chess problems, choir singing, clog dancing, comet watching, cross-stitch, curling, "
            "dry stone walling, fell running, fly fishing, folk fiddling, fossil hunting, geocaching, hedge laying, "
            "ice swimming, kite building, lace making, leather craft, letter writing, model railways, moth trapping, "
            "mushroom picking, night photography, orchid growing, origami, paper marbling, pigeon racing, rock "
            "climbing, sail making, shadow puppetry, stamp collecting, stargazing, sword dancing, tapestry weaving, "
            "tree grafting, wood turning"
        ),
    ),
)
PETS = Pool(
    "a {0} called {1}",
    (
        words(
            "tortoise, greyhound, parrot, ferret, lizard, rabbit, goose, donkey, hedgehog, terrier, tabby cat, "
            "budgerigar, pony, raven, goat, sheepdog"
        ),
        words(
            "Biscuit, Button, Captain, Clover, Domino, Fidget, Gravel, Hopper, Juno, Kettle, Lemon, Marble, Noodle, "
            "Pebble, Pickle, Quill, Rocket, Scamp, Thimble, Tundra, Velvet, Waffle, Whisker, Zigzag"
        ),
    ),
)
DISHES = Pool(
    "{0} {1} with {2}",
    (
        words("baked, braised, chilled, fried, grilled, pickled, roasted, smoked, spiced, stewed"),
        words("aubergine, barley, beetroot, cabbage, carp, chickpeas, duck, lentils, mackerel, mutton, pumpkin, trout"),
        words("almonds, apple, dill, garlic, honey, horseradish, mint, mustard, plums, rosemary, sage, walnuts"),
    ),
)
AWARDS = Pool(
    "the {0} {1} of {2}",
    (
        words("Amber, Bronze, Crystal, Golden, Ivory, Jade, Opal, Scarlet, Silver, Velvet"),
        words("Anchor, Compass, Feather, Harp, Key, Lantern, Laurel, Lily, Quill, Wheel"),
        tuple(map(str, range(1991, 2025))),
    ),
)
BOOKS = Pool(
    '"{0} {1} of {2}"',
    (
        words("The Borrowed, The Crooked, The Drowned, The Empty, The Forgotten, The Hollow, The Last, The Narrow, "
              "The Patient, The Quiet, The Seventh, The Unpaid, The Wandering, The Winter"),
        words("Archive, Bridge, Calendar, Clock, Garden, Harvest, Ladder, Letter, Mirror, Orchard, River, Staircase, "
              "Tailor, Window"),
        CITIES,
    ),
)  # fmt: skip
PHONES = Pool(
    "{0}-{1}-{2}",
    (
        tuple(f"9{n:02d}" for n in range(100)),
        tuple(f"{n:02d}" for n in range(100)),
        tuple(f"{n:03d}" for n in range(1000)),
    ),
)
INSTRUMENTS = Pool(
    "{0}",
    (
        words(
            "accordion, alto flute, bagpipes, banjo, bass clarinet, bassoon, button box, cello, concertina, cornet, "
            "double bass, dulcimer, euphonium, French horn, glockenspiel, harmonica, harp, harpsichord, lute, "
            "mandolin, marimba, oboe, pan pipes, pipe organ, recorder, saxophone, steel drum, theremin, trombone, "
            "tuba, ukulele, viola, xylophone, zither"
        ),
    ),
)
VEHICLES = Pool(
    "a {0} {1} from {2}",
    (
        words("beige, black, blue, brown, cream, green, grey, maroon, orange, purple, red, silver, white, yellow"),
        words("camper van, cargo bike, convertible, estate car, motorbike, pickup, rowing boat, scooter, tandem, "
              "tractor"),
        tuple(map(str, range(1965, 2023))),
    ),
)  # fmt: skip
