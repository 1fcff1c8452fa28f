"""Lists the words of the generated samples: colours, shapes, places, glyphs, and prompts.

Every list is ordered: its order is part of what a seed means.
"""

from __future__ import annotations

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (40, 80, 220),
    "yellow": (235, 215, 50),
    "purple": (140, 60, 180),
    "orange": (245, 140, 30),
    "cyan": (60, 210, 215),
    "pink": (245, 130, 190),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
LETTERS = "ACEFHKLNPTUX"
DIGITS = "0123456789"
GLYPHS = DIGITS + LETTERS
OPTION_NAMES = ("A", "B", "C", "D")

# Dense labels: index into these lists; 0 is background.
COLOUR_LABELS = ("none", *COLOURS)
KIND_LABELS = ("none", *SHAPES, "dot", "bar", *GLYPHS)
IGNORE = -100
# Keywords of open questions: the last of them in a question decides what it asks.
KEYWORDS = (*COLOURS, *SHAPES, "dot", *GLYPHS, "top", "bottom", "center", *DIRECTIONS, "first", "second", "third")
# The word a patch is linked to: the way its shape moves, the next glyph, the key of its row, the value of its bar.
LINKED_WORDS = (*DIRECTIONS, *GLYPHS)

IMAGE_CAPTION_PROMPTS = (
    "Describe the image.",
    "Describe the image in one sentence.",
    "Describe the image in two sentences.",
    "Describe this image in detail.",
    "What is in the image?",
)
VIDEO_CAPTION_PROMPTS = (
    "Describe the video.",
    "Describe the video in one sentence.",
    "Describe the video in two sentences.",
    "Describe this video in detail.",
    "What happens in the video?",
)


def article(name: str) -> str:
    """The name behind its indefinite article, capitalised."""
    return f"{'An' if name[0] in 'aeiou' else 'A'} {name}"
