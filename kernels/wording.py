"""Numbers with their nouns, for every sentence that the program prints."""


def counted(number: int, noun: str) -> str:
    """`1 frame`, `2 frames`, `2 passes`, `2 boxes`; the noun is given in the singular."""
    plural = f"{noun}es" if noun.endswith(("s", "x", "ch")) else f"{noun}s"
    return f"{number} {noun if number == 1 else plural}"
