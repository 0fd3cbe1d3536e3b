"""Word lists of the generated tasks. A tokenizer that splits a word drops it."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


MALE = _words(
    "John James Robert Michael David William Richard Thomas Charles Daniel Matthew Mark Paul George Andrew Peter "
    "Brian Kevin Jason Eric Stephen Scott Frank Adam Henry Jack Simon Martin Tom Steve Joe Luke Ben Harry Oliver "
    "Arthur Fred Walter Patrick Edward"
)
FEMALE = _words(
    "Mary Linda Susan Sarah Karen Lisa Nancy Anna Emily Amy Laura Rachel Maria Anne Alice Julia Emma Helen Kate "
    "Jane Elizabeth Jennifer Jessica Margaret Ruth Rose Lucy Diana Michelle Amanda Rebecca Claire Sophie Barbara "
    "Sally Martha"
)
NAMES = MALE + FEMALE

PLACES = _words(
    "shop school park beach garden office station hospital library museum market house restaurant farm church "
    "kitchen theater airport hotel bank castle lake village"
)
THINGS = _words(
    "book ring drink key letter ball cup pen coat hat card bag box map knife flower picture lamp coin cake gift "
    "phone ticket basket"
)

SPANS = _words(
    "war siege trial reign festival drought conflict dispute project crisis empire strike campaign famine plague "
    "revolt journey voyage debate peace tour search study mission"
)
"""Things that last for years."""

ARGUMENTS = _words(
    "size path name value key index model data file user text color width height depth order label source target "
    "mode level limit offset count start end table field node parent child version format token state event session "
    "client server port host image block group list result message address date time number page line column row "
    "code command option filter status note title url test rate step base cost"
)
NOUNS = _words(
    "river paper window winter bread music silver summer bridge horse garden stone island fruit glass engine road "
    "shoulder market theory story mountain kitchen pepper sugar cotton village ocean forest weather leather circle "
    "spring morning evening finger metal cloud doctor captain army queen desert coffee copper dinner animal flower"
)
FUNCTIONS = _words("run get load send make build check read find move open call update process apply create")

COUNTRIES = {
    "France": "Paris",
    "Germany": "Berlin",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Russia": "Moscow",
    "Japan": "Tokyo",
    "China": "Beijing",
    "England": "London",
    "Greece": "Athens",
    "Egypt": "Cairo",
    "Austria": "Vienna",
    "Poland": "Warsaw",
    "Portugal": "Lisbon",
    "Ireland": "Dublin",
    "Iraq": "Baghdad",
    "Iran": "Tehran",
    "Turkey": "Ankara",
    "Cuba": "Havana",
    "Hungary": "Budapest",
    "Sweden": "Stockholm",
    "Norway": "Oslo",
    "Denmark": "Copenhagen",
    "Finland": "Helsinki",
    "Belgium": "Brussels",
    "Canada": "Ottawa",
    "Australia": "Canberra",
    "Kenya": "Nairobi",
    "Peru": "Lima",
    "Thailand": "Bangkok",
    "Syria": "Damascus",
    "Ukraine": "Kiev",
    "Lebanon": "Beirut",
    "Vietnam": "Hanoi",
    "Taiwan": "Taipei",
    "Afghanistan": "Kabul",
    "Scotland": "Edinburgh",
    "Chile": "Santiago",
    "Indonesia": "Jakarta",
}

# Singular and plural of people and things, which is all the agreement task tells them apart by.
NUMBERS = {
    word: plural or f"{word}s"
    for word, _, plural in (
        pair.partition("/")
        for pair in _words(
            "key car book boy girl dog cat teacher doctor student farmer table picture letter house door friend "
            "brother sister window bird king author player pilot tree flower song river road chair machine "
            "child/children woman/women man/men city/cities story/stories worker driver lawyer guard"
        )
    )
}
