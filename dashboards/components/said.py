"""What the tokens of a chat are, as strips and grids of tokens show it."""

from typing import Any

from dashboards.conversations import words_of
from dashboards.prompts import Analysis

__all__ = ["said_of", "words_at"]


def said_of(analysis: Analysis) -> dict[str, Any]:
    """Further entries of a strip: where turns begin, what each token is (numbers of words), and the words."""
    if not analysis.said:
        return {}
    words = [words_of(one) for one in analysis.said]
    names = list(dict.fromkeys(words))
    numbers = {name: number for number, name in enumerate(names)}
    turns = {str(place): name for place, name in analysis.turns.items()}
    return {"turns": turns, "said": [numbers[one] for one in words], "words": names}


def words_at(analysis: Analysis, place: int) -> str:
    """What one token is; "" in plain text."""
    return words_of(analysis.said[place]) if analysis.said else ""
