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
    "kitchen theater airport hotel bank castle lake forest village"
)
THINGS = _words(
    "book ring drink key letter ball cup pen coat hat card bag box map knife flower picture lamp coin cake gift "
    "phone ticket basket"
)
