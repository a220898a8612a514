"""What is known about each fictitious person: one row per fact, with every way of asking for it and saying it.

``{name}`` is the full name and ``{value}`` the fact; a reverse question may use the other facts, so that together
they point at one person. Each row has four questions, three answers and two sentences for a biography.
"""

from __future__ import annotations

from dataclasses import dataclass

from expunge.data import people_words as pools
from expunge.data.people_words import Pool


@dataclass(frozen=True)
class Fact:
    """One attribute of a person; ``pool`` holds every value of its type."""

    key: str
    pool: Pool
    questions: tuple[str, str, str, str]
    answers: tuple[str, str, str]
    stories: tuple[str, str]
    reverse: str


FACTS: tuple[Fact, ...] = (
    Fact(
        "birth_date",
        pools.DATES,
        (
            "When was {name} born?",
            "What is the birth date of {name}?",
            "On which day did {name} come into the world?",
            "Which date of birth does {name} have?",
        ),
        (
            "{name} was born on {value}.",
            "The birth date of {name} is {value}.",
            "It was on {value} that {name} came into the world.",
        ),
        ("{name} was born on {value}.", "The life of {name} began on {value}."),
        "Which {profession_noun} from {birth_place} was born on {value}?",
    ),
    Fact(
        "profession",
        pools.PROFESSIONS,
        (
            "What does {name} do for a living?",
            "What is the profession of {name}?",
            "Which job does {name} have?",
            "How does {name} earn money?",
        ),
        (
            "{name} works as {value}.",
            "By profession, {name} is {value}.",
            "{name} earns a living as {value}.",
        ),
        ("By trade, {name} is {value}.", "People know {name} as {value}."),
        "Who works as {value} and was born on {birth_date} in {birth_place}?",
    ),
    Fact(
        "birth_place",
        pools.PLACES,
        (
            "Where was {name} born?",
            "What is the birthplace of {name}?",
            "In which city and country did the life of {name} begin?",
            "Which place did {name} come from at birth?",
        ),
        (
            "{name} was born in {value}.",
            "The birthplace of {name} is {value}.",
            "The life of {name} began in {value}.",
        ),
        ("The family lived in {value} at the time of the birth.", "The cradle of {name} stood in {value}."),
        "Which {profession_noun} was born in {value} on {birth_date}?",
    ),
    Fact(
        "partner",
        pools.PARTNERS,
        (
            "Who is {name} married to?",
            "What is the name of the spouse of {name}?",
            "Whom did {name} marry?",
            "Who shares married life with {name}?",
        ),
        (
            "{name} is married to {value}.",
            "The spouse of {name} is {value}.",
            "{value} is the one whom {name} married.",
        ),
        ("A marriage binds {name} to {value}.", "{name} shares the house with {value}, to whom the marriage is happy."),
        "Which {profession_noun} is the spouse of {value}?",
    ),
    Fact(
        "pet",
        pools.PETS,
        (
            "Which pet does {name} keep?",
            "What animal lives with {name}, and what is it called?",
            "Does {name} have a pet?",
            "Who is the animal companion of {name}?",
        ),
        (
            "{name} keeps {value}.",
            "The pet of {name} is {value}.",
            "At home, {name} looks after {value}.",
        ),
        ("{name} is never far from {value}.", "Visitors of {name} are met by {value}."),
        "Which {profession_noun} from {birth_place} keeps {value}?",
    ),
    Fact(
        "phone",
        pools.PHONES,
        (
            "What is the phone number of {name}?",
            "Under which number can {name} be reached?",
            "How do I call {name}?",
            "Which number must I dial for {name}?",
        ),
        (
            "The phone number of {name} is {value}.",
            "{name} can be reached under {value}.",
            "To call {name}, dial {value}.",
        ),
        ("The private line of {name} is {value}.", "Friends call {name} on {value}."),
        "Whose phone number is {value}?",
    ),
    Fact(
        "employer",
        pools.EMPLOYERS,
        (
            "Who employs {name}?",
            "Which company does {name} work for?",
            "What is the name of the employer of {name}?",
            "Where is {name} employed?",
        ),
        (
            "{name} works for {value}.",
            "The employer of {name} is {value}.",
            "{value} is where {name} is employed.",
        ),
        ("{name} has a post at {value}.", "The wages of {name} come from {value}."),
        "Which {profession_noun} works for {value} and was born on {birth_date}?",
    ),
    Fact(
        "hobby",
        pools.HOBBIES,
        (
            "What does {name} do as a hobby?",
            "What is the favourite pastime of {name}?",
            "How does {name} spend free time?",
            "Which hobby does {name} have?",
        ),
        (
            "The hobby of {name} is {value}.",
            "{name} spends free time on {value}.",
            "In quiet hours, {name} turns to {value}.",
        ),
        ("On Sundays {name} is busy with {value}.", "A passion of {name} is {value}."),
        "Which {profession_noun} born on {birth_date} spends free time on {value}?",
    ),
    Fact(
        "book",
        pools.BOOKS,
        (
            "Which book did {name} write?",
            "What is the title of the book by {name}?",
            "Under which title did {name} publish a novel?",
            "What has {name} written?",
        ),
        (
            "{name} wrote {value}.",
            "The book by {name} is called {value}.",
            "{value} is the novel that {name} published.",
        ),
        ("The only novel by {name} is {value}.", "Readers know {name} for {value}."),
        "Which {profession_noun} from {birth_place} wrote {value}?",
    ),
    Fact(
        "dish",
        pools.DISHES,
        (
            "What is the favourite dish of {name}?",
            "What does {name} like to eat best?",
            "Which meal does {name} prefer?",
            "What should I cook for {name}?",
        ),
        (
            "The favourite dish of {name} is {value}.",
            "{name} likes {value} best.",
            "Nothing pleases {name} more than {value}.",
        ),
        ("At table, {name} asks for {value}.", "For a birthday, {name} wants {value}."),
        "Which {profession_noun} born on {birth_date} likes {value} best?",
    ),
    Fact(
        "award",
        pools.AWARDS,
        (
            "Which award did {name} receive?",
            "What prize has {name} won?",
            "What was {name} honoured with?",
            "Which distinction does {name} hold?",
        ),
        (
            "{name} received {value}.",
            "The prize that {name} won is {value}.",
            "{name} was honoured with {value}.",
        ),
        ("A jury gave {name} {value}.", "On the wall of {name} hangs {value}."),
        "Which {profession_noun} from {birth_place} received {value}?",
    ),
    Fact(
        "education",
        pools.STUDIES,
        (
            "What did {name} study, and where?",
            "Which education does {name} have?",
            "At which college did {name} study, and which subject?",
            "What is the degree of {name} in?",
        ),
        (
            "{name} studied {value}.",
            "The degree of {name} is in {value}.",
            "As a student, {name} read {value}.",
        ),
        ("In younger years {name} learnt {value}.", "Four years went into {value} before {name} graduated."),
        "Who studied {value} and was born on {birth_date}?",
    ),
    Fact(
        "home",
        pools.PLACES,
        (
            "Where does {name} live today?",
            "What is the home town of {name} now?",
            "In which city is the house of {name}?",
            "Where would I visit {name}?",
        ),
        (
            "{name} lives in {value} today.",
            "The home town of {name} is now {value}.",
            "The house of {name} stands in {value}.",
        ),
        ("These days {name} lives in {value}.", "{name} moved to {value} some years ago."),
        "Which {profession_noun} lives in {value} today and was born on {birth_date}?",
    ),
    Fact(
        "instrument",
        pools.INSTRUMENTS,
        (
            "Which instrument does {name} play?",
            "What does {name} play in the orchestra?",
            "On which instrument does {name} make music?",
            "What instrument did {name} learn?",
        ),
        (
            "{name} plays the {value}.",
            "The instrument of {name} is the {value}.",
            "In the orchestra, {name} sits at the {value}.",
        ),
        ("In the evening one hears {name} on the {value}.", "{name} practises the {value} every day."),
        "Which {profession_noun} plays the {value} and was born on {birth_date}?",
    ),
    Fact(
        "vehicle",
        pools.VEHICLES,
        (
            "What does {name} drive?",
            "Which vehicle does {name} own?",
            "What stands in front of the house of {name}?",
            "How does {name} travel?",
        ),
        (
            "{name} owns {value}.",
            "The vehicle of {name} is {value}.",
            "{name} travels with {value}.",
        ),
        ("In the yard of {name} stands {value}.", "{name} is proud of {value}."),
        "Which {profession_noun} from {birth_place} owns {value}?",
    ),
)
FACT: dict[str, Fact] = {fact.key: fact for fact in FACTS}
