"""Answers that repeat themselves are seen at once, and those that only look like it never: 0.2 s."""

from __future__ import annotations

import random
import re

import pytest

from illava.engine.loop_detector import MAX_PERIOD, LoopDetector

LOOP_TOKENS = 256


def tokens_of(text: str) -> list[int]:
    """Words, single digits, blanks and signs, as tokenizers of today cut text, numbered as they appear."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(word, len(numbers)) for word in re.findall(r"[A-Za-z]+|\s|.", text)]


def seen_at(token_ids: list[int], loop_tokens: int = LOOP_TOKENS) -> tuple[int, int] | None:
    """The number of tokens at which a loop is seen, and of those up to the end of its first period."""
    detector = LoopDetector(loop_tokens)
    for number, token_id in enumerate(token_ids, 1):
        detector.add(token_id)
        if (num_unique := detector.num_unique) is not None:
            return number, num_unique
    return None


# What stands before the loop, and the period.
LOOPS = {
    "one word": ("A man is ", "very "),
    "one sign": ("Total: ", "."),
    "one character of Chinese": ("这是", "的"),
    "a blank": ("The end", " "),
    "line breaks": ("The end", "\n"),
    "two words": ("He says ", "and then "),
    "a sentence": ("A dog runs. ", "The dog is running in the park. "),
    "a sentence of Chinese": ("图中", "有一个人在走路。"),
    "a sentence from the first token on": ("", "The video shows a street. "),
    "two sentences": ("Well. ", "The man walks. The woman waits. "),
    "a paragraph": ("# A\n", "In the image there is a cat on a mat.\n\nThe cat looks at us.\n\n"),
    "a question to itself": ("Let me think. ", "Wait, is that right? Let me check again. "),
    "a table's row": ("| a | b |\n|---|---|\n", "| 1 | 2 |\n"),
    "a table's empty row": ("| a | b |\n|---|---|\n", "| | |\n"),
    "a table's row without end": ("| a | b |\n|---|---|\n", "| "),
    "a table's rule without end": ("| a | b |\n", "---|"),
    "a cell of a row without end": ("<tr>", "<td>0</td>"),
    "an item of a list": ("Objects:\n", "- chair\n"),
    "two items of a list": ("Objects:\n", "- chair\n- table\n"),
    "an item of JSON": ('{"labels": [', '"car", '),
    "an object of JSON": ("[", '{"bbox": [0, 0, 1, 1], "label": "car"}, '),
    "brackets of JSON": ('{"a": ', "["),
    "a line of code": ("def f():\n", "    x = x + 1\n"),
    "two lines of code": ("def f():\n", "    if x:\n        return y\n"),
    "an element of HTML": ("<div>\n", '<span class="a">b</span>\n'),
    "a formula": ("$$", "x_1 + "),
    "a digit": ("3.", "3"),
    "digits of a period": ("1/7 = 0.", "142857"),
    "a time": ("Subtitles:\n", "[00:01] (music)\n"),
    "a dotted line": ("Name", "_"),
    "laughter": ("He laughs: ", "ha "),
    "a heading": ("", "## Summary\n"),
    "a link": ("See ", "https://example.org/a/b?c=d "),
    "a chain of thoughts": ("So ", "the answer is A. But it may be B. No, "),
}
PERIODS = {"of one token": 1, "of sixty-three tokens": MAX_PERIOD - 1, "of the longest period": MAX_PERIOD}


def lines(number: int, line: str, *changing: str) -> str:
    """Lines that differ by their number, or by the word whose turn it is."""
    words = changing or ("",)
    return "\n".join(line.format(n=n, word=words[n * n * 7 % 11 % len(words)], square=n * n) for n in range(number))


NOT_LOOPS = {
    "a table of numbers": lines(90, "| {n} | {square} |"),
    "a table whose cells differ in one sign": lines(200, "| yes | {n} |"),
    "a table of equal cells but for one": lines(90, "| 0 | 0 | 0 | {n} | 0 | 0 |"),
    "a table whose last cell differs": lines(90, "| paid | EUR | 19 % | 0.00 | {square} |"),
    "a table of empty cells but for the first": lines(90, "| {n} | | | | | | |"),
    "a wide table's rule": "| a |\n" + "|" + "---|" * 50 + "\n" + lines(60, "| {n} | b |"),
    "empty rows, fewer than count": "| a | b |\n" + "| | |\n" * 30 + "| end |\n" + "| | |\n" * 30 + "| end |",
    "a table of HTML": lines(60, "<tr><td>{n}</td><td>a</td></tr>"),
    "a table of LaTeX": lines(90, "{n} & 0 & 0 \\\\ \\hline"),
    "CSV": lines(120, "2024-01-01,{n},0,0,0"),
    "a numbered list": lines(120, "{n}. The same."),
    "a list with a differing word": lines(
        60, "- a {word} chair", *["red", "blue", "green", "grey", "old", "new", "big", "small", "tall", "wide", "odd"]
    )
    + lines(60, "- the {n} of it"),
    "a table of contents": lines(30, "Chapter {n} " + "." * 60 + " {square}"),
    "subtitles": lines(120, "[00:00:{n}] (music)"),
    "JSON objects": "[" + lines(60, '{{"id": {n}, "label": "car", "ok": true}},') + "]",
    "boxes": lines(60, '{{"bbox": [0, 0, {n}, 1], "label": "car"}},'),
    "JSON keys": "{" + lines(120, '"key_{n}": null,') + "}",
    "code: assignments": lines(90, "    self.x{n} = x{n}"),
    "code: an enumeration": lines(120, "    KIND_{n} = auto()"),
    "code: tests": lines(40, "def test_{n}():\n    assert f({n}) == {square}\n"),
    "code: a switch": lines(60, "case {n}:\n    return 0;"),
    "code: deep blanks": "\n".join(" " * n + "if x:" for n in range(0, 60, 2)),
    "SQL": lines(60, "INSERT INTO t VALUES ({n}, 0, 0);"),
    "a dump": lines(60, "{n}0: 00 00 00 00 00 00 00 00"),
    "numbers": " ".join(map(str, range(300))),
    "squares": " ".join(str(n * n) for n in range(200)),
    "links": lines(60, "https://example.org/page/{n}"),
    "a multiplication table": "\n".join(f"{a} x {b} = {a * b}" for a in range(1, 11) for b in range(1, 11)),
    "a song with a refrain": "\n".join(f"Verse {n} of it\nOh, la la la\nOh, la la la\n" for n in range(60)),
    "laughter that ends": "He laughs: " + "ha " * 100 + "and stops. " + "ha " * 100,
    "an answer twice": ("One two three four five six seven eight nine ten. " * 9 + "So. ") * 2,
    "a dotted line that ends": "Name" + "_" * 200 + "Date" + "_" * 200 + "Place",
    "a signature of equal signs": "=" * 250 + "\nTitle\n" + "=" * 250,
    "frames": lines(60, "Frame {n}: a man walks on the street."),
    "a word without cubes": "".join("ab"[bin(n).count("1") % 2] + " " for n in range(600)),
    "a period longer than counts": lines(1, " ".join(f"w{'x' * n}" for n in range(MAX_PERIOD))) * 20,
}


def test_there_are_thirty_of_each() -> None:
    assert len(LOOPS) + len(PERIODS) >= 30
    assert len(NOT_LOOPS) >= 30


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_is_seen_at_its_length_and_cut_behind_its_first_period(name) -> None:
    head, period = LOOPS[name]
    length, in_head = len(tokens_of(period)), len(tokens_of(head))
    token_ids = tokens_of(head + period * LOOP_TOKENS)
    found = seen_at(token_ids)
    assert found is not None
    seen, num_unique = found
    # What ends the head as a period ends belongs to the loop.
    assert in_head + LOOP_TOKENS - length < seen <= in_head + LOOP_TOKENS
    assert seen - LOOP_TOKENS < num_unique <= in_head + length


@pytest.mark.parametrize("name", PERIODS)
def test_a_period_of_any_length_up_to_the_longest_counts(name) -> None:
    period = list(range(PERIODS[name]))
    assert seen_at([900, 901, *period * LOOP_TOKENS]) == (2 + LOOP_TOKENS, 2 + len(period))


@pytest.mark.parametrize("name", NOT_LOOPS)
def test_what_differs_in_a_token_or_ends_in_time_is_no_loop(name) -> None:
    token_ids = tokens_of(NOT_LOOPS[name])
    assert len(token_ids) > LOOP_TOKENS, "long enough to be one"
    assert seen_at(token_ids) is None


@pytest.mark.parametrize("seed", range(60))
def test_the_detector_says_what_the_definition_says(seed) -> None:
    """Against every suffix and period, one by one. The alphabet is small, so that loops occur by chance."""
    draws = random.Random(seed)
    loop_tokens = draws.choice((8, 9, 12, 20))
    token_ids: list[int] = []
    detector = LoopDetector(loop_tokens)
    for _ in range(150):
        again = token_ids and draws.random() < 0.85
        token_ids.append(token_ids[-min(len(token_ids), 1 + seed % 4)] if again else draws.randrange(3))
        detector.add(token_ids[-1])
        suffix = token_ids[-loop_tokens:]
        periods = [p for p in range(1, min(MAX_PERIOD, loop_tokens // 4) + 1) if suffix[p:] == suffix[:-p]]
        expected = None
        if len(suffix) == loop_tokens and periods:
            start = len(token_ids) - loop_tokens
            while start and token_ids[start - 1] == token_ids[start - 1 + periods[0]]:
                start -= 1
            expected = start + periods[0]
        assert detector.num_unique == expected
