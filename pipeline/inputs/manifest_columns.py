"""Takes the columns of a user's manifest one by one, checks each, and refuses rows by their lines."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, NoReturn, get_args

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import InputError
from pipeline.inputs.column_names import ALIASES, meant_as_address, near_misses
from pipeline.inputs.columns import as_json, as_lists, hash_ids, kinds_of, row_kinds
from pipeline.inputs.manifest_file import UserTable, text_or_null, texts_column
from pipeline.records import MediaKind
from pipeline.storage.uris import printable
from pipeline.tasks.base import TEMPLATE_COLUMNS
from pipeline.tasks.question import question_problem

PASSWORD_COLUMN = "password"
_MAX_PROBLEMS = 5  # named in one refusal
_FOR_LISTS = {"uri": "name it `uris`, or give one address a row"}


class ManifestColumns:
    """Takes the user's columns one by one; columns that nobody takes become the items' `fields`."""

    def __init__(self, uri: str, user: UserTable) -> None:
        self._uri, self._user, self._left = uri, user, dict(user.columns)

    def notes(self) -> list[str]:
        """Say which columns are nearly called as one that is read; each is kept as a field of its items."""
        return [
            f"manifest {self._uri}: column {printable(name)!r} is only kept in the rows' `fields`; "
            f"did you mean {meant!r}?"
            for name, meant in near_misses(self._user.columns).items()
        ]

    def refuse(self, rows: list[int], problem: str) -> NoReturn:
        """Raise with the lines of these rows."""
        raise InputError(f"manifest {self._uri}, {self._user.where(rows)}: {problem}")

    def _refuse_each(self, rows_of: dict[str, list[int]]) -> NoReturn:
        """Raise with the lines of each problem; of many problems the last are only counted."""
        (first, rows), *others = rows_of.items()
        said = [f"; {self._user.where(own)}: {problem}" for problem, own in others[: _MAX_PROBLEMS - 1]]
        if left := sum(len(own) for _, own in others[_MAX_PROBLEMS - 1 :]):
            said.append(f"; and {left:,} more with other problems")
        self.refuse(rows, first + "".join(said))

    def take(self, name: str) -> pa.ChunkedArray | None:
        """Take a column, or its alias, out of the remaining ones; None where there is neither."""
        used = self._name_of(name)
        return None if used is None else self._left.pop(used)

    def _name_of(self, name: str) -> str | None:
        """The user's name of a column: the name itself, or its alias."""
        alias = ALIASES.get(name)
        if name == "prompt" and name in self._left and alias in self._left:
            raise InputError(
                f"manifest {self._uri}: both columns `prompt` and `question`; they mean the same, keep one"
            )
        return next((used for used in (name, alias) if used in self._left), None)

    def take_passwords(self) -> pa.ChunkedArray | None:
        """Take the passwords of encrypted PDFs, so that they become nobody's `fields`; None where there are none.

        Raises:
            InputError: a column is nearly called so; as a field its values would stand in every row.
        """
        for name, meant in near_misses(self._user.columns).items():
            if meant == PASSWORD_COLUMN:
                raise InputError(
                    f"manifest {self._uri}: column {printable(name)!r} would be written into the rows; call it "
                    f"`{PASSWORD_COLUMN}` if it holds the passwords of PDFs, and by a name unlike it if not"
                )
        return self.take_text(PASSWORD_COLUMN)

    def take_text(self, name: str) -> pa.ChunkedArray | None:
        """Take a column of one text per row, or its alias."""
        self._require_text(name)
        return self.take(name)

    def _require_text(self, name: str) -> None:
        used = self._name_of(name)
        if used is None:
            return
        remedy = _FOR_LISTS.get(name, "give one text a row")
        column = self._left[used]
        if not pa.types.is_string(column.type):
            self.refuse(_rows_with_values(column), f"column `{used}` holds lists; {remedy}")
        if rows := self._user.structured.get(used):
            self.refuse(list(rows), f"column `{used}` holds lists or objects; {remedy}")

    def take_reference(self) -> pa.ChunkedArray | None:
        """Take the reference answers: one text a row, or several as a list, which becomes a JSON array."""
        column, structured = self.take("reference"), set(self._user.structured.get("reference", ()))
        if column is None or (pa.types.is_string(column.type) and not structured):
            return column
        single = pa.nulls(len(column), pa.string())
        if pa.types.is_string(column.type):
            texts = column.to_pylist()
            single = pa.array([None if row in structured else text for row, text in enumerate(texts)], pa.string())
            kept = [text if row in structured else None for row, text in enumerate(texts)]
            column = pa.chunked_array([pa.array(kept, pa.string())])
        lists = self._as_texts("reference", column)
        several = pc.if_else(pc.equal(pc.list_value_length(lists), 0), pa.scalar(None, pa.string()), as_json(lists))
        return pc.coalesce(several, single)

    def take_texts(self, name: str) -> pa.ChunkedArray | None:
        """Take a column of lists of text."""
        column = self.take(name)
        return None if column is None else self._as_texts(name, column)

    def _as_texts(self, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
        try:
            return texts_column(column)
        except ValueError as error:
            self.refuse([error.args[0]], f"column `{name}`: {error.args[1]}")

    def uris(self) -> tuple[pa.ChunkedArray, list[int]]:
        """Return all URIs in one column, and the number of URIs in each row."""
        single, several = self.take_text("uri"), self.take_texts("uris")
        if single is not None and several is None:
            empty = pc.fill_null(pc.equal(single, ""), True)
            counts, flat = [1] * len(single), single
        elif single is not None or several is None:
            meant = meant_as_address(self._user.columns) if single is None else None
            hint = f"; did you mean {printable(meant)!r}? rename it" if meant is not None else ""
            have = printable(", ".join(self._user.columns))
            raise InputError(
                f"manifest {self._uri}: give one column, `uri` or `uris` (a list); the columns are: {have}{hint}"
            )
        else:
            counts = pc.fill_null(pc.list_value_length(several), 0).to_pylist()
            flat = pa.chunked_array([chunk.flatten() for chunk in several.chunks], pa.string())
            empty = pc.equal(pa.chunked_array([pa.array(counts)]), 0)
        if pc.any(empty).as_py():
            self.refuse([n for n, x in enumerate(empty.to_pylist()) if x], "no URI")
        return flat, counts

    def kinds(self, flat: pa.ChunkedArray, counts: list[int]) -> pa.Array:
        """Return the media kind of each row: the given one, else that of the extension."""
        guessed = kinds_of(flat).to_pylist()
        if len(guessed) != len(counts):
            guessed = row_kinds(guessed, counts)
        given = self.take_text("media_kind")
        if given is not None:
            guessed = [x or y for x, y in zip(text_or_null(given).to_pylist(), guessed, strict=True)]
        unknown = [row for row, kind in enumerate(guessed) if kind not in get_args(MediaKind)]
        if unknown:
            self.refuse(unknown, f"unknown media kind; add a column `media_kind` with {', '.join(get_args(MediaKind))}")
        wrong = [n for n, kind in enumerate(guessed) if kind != "images" and counts[n] > 1]
        if wrong:
            self.refuse(wrong, "several URIs are an image set: all must be images (media_kind images)")
        return pa.chunked_array([pa.array(guessed, pa.string())])

    def objects(self, counts: list[int]) -> dict[str, pa.ChunkedArray]:
        """Return sizes and entity tags: those of the columns `size` and `etag` beside a column `uri`, else unknown."""
        given = {"size": None, "etag": None}
        if "uri" in self._user.columns:
            given = {name: self.take_text(name) for name in given}
        total = sum(counts)
        sizes: pa.ChunkedArray = pa.chunked_array([pa.array([-1] * total, pa.int64())])
        etags: pa.ChunkedArray = pa.chunked_array([pa.array([""] * total, pa.string())])
        if given["size"] is not None:
            text = pc.fill_null(text_or_null(given["size"]), "-1")
            bad = [n for n, ok in enumerate(pc.match_substring_regex(text, r"^(-1|\d{1,18})$").to_pylist()) if not ok]
            if bad:
                self.refuse(bad, "column `size`: not a number of bytes")
            sizes = text.cast(pa.int64())
        if given["etag"] is not None:
            etags = pc.utf8_trim(pc.fill_null(given["etag"], ""), '"')
        return {"sizes": as_lists(sizes, counts), "etags": as_lists(etags, counts)}

    def check_questions(self, metric: str, columns: dict[str, Any]) -> None:
        """Refuse rows that cannot be asked or scored."""
        self._require_text("metric")
        given = (*(columns.get(name) for name in ("prompt", "options", "reference")), self._left.get("metric"))
        none = [None] * len(self._user.lines)
        lists = [none if column is None else column.to_pylist() for column in given]
        bad: dict[str, list[int]] = {}
        for row, (prompt, options, reference, of_row) in enumerate(zip(*lists, strict=True)):
            problem = question_problem(metric, prompt=prompt, options=options, reference=reference, metric=of_row)
            if problem:
                bad.setdefault(problem, []).append(row)
        if bad:
            self._refuse_each(bad)

    def template_values(self, names: Sequence[str], columns: dict[str, Any]) -> list[list[Any]]:
        """Return the values of the columns that a prompt template names, but for ids.

        Raises:
            InputError: there is no such column, a row has no value in it, or the template leaves out the prompts.
        """
        if columns.get("prompt") is not None and "prompt" not in map(TEMPLATE_COLUMNS.get, names):
            used = next(name for name in ("prompt", "question") if name in self._user.columns)
            raise InputError(
                f"manifest {self._uri}: task.prompt_template leaves out the column `{used}`; put {{{used}}} into it, "
                "or rename the column"
            )
        given = {"uri": columns["uris"], "options": columns.get("options"), **self._left}
        given |= {name: columns.get(own) for name, own in TEMPLATE_COLUMNS.items() if own != "item_id"}
        values = []
        for name in names:
            if TEMPLATE_COLUMNS.get(name) == "item_id":
                continue
            column = given.get(name)
            if column is None:
                near = difflib.get_close_matches(name, self._user.columns, 1)
                hint = f", did you mean {printable(near[0])!r}?" if near else "."
                raise InputError(
                    f"manifest {self._uri} has no column {printable(name)!r}, which task.prompt_template names{hint} "
                    f"Its columns are: {printable(', '.join(self._user.columns))}"
                )
            if empty := [row for row, ok in enumerate(pc.is_null(column).to_pylist()) if ok]:
                self.refuse(empty, f"no value in column `{printable(name)}`, which task.prompt_template needs")
            values.append(column.to_pylist())
        return values

    def item_ids(self, columns: dict[str, Any], asked: Sequence[list[Any]] = ()) -> pa.ChunkedArray:
        """Return the user's ids, or hashes of URIs, sizes, etags and question; ``asked`` are a template's values."""
        given = self.take_text("item_id")
        if given is not None:
            empty = [n for n, x in enumerate(pc.fill_null(pc.equal(given, ""), True).to_pylist()) if x]
            if empty:
                self.refuse(empty, "an empty item id")
            return given
        none = [None] * len(self._user.lines)
        prompts, questions = (
            none if columns.get(n) is None else columns[n].to_pylist() for n in ("prompt", "question_id")
        )
        texts = (f"{p or ''}\x1f{q or ''}" if p or q else "" for p, q in zip(prompts, questions, strict=True))
        if asked:
            texts = ("\x1f".join(map(str, (text, *own))) for text, *own in zip(texts, *asked, strict=True))
        return hash_ids(columns["uris"].to_pylist(), columns["sizes"].to_pylist(), columns["etags"].to_pylist(), texts)

    def rest(self) -> dict[str, pa.ChunkedArray]:
        """Return the remaining columns as text."""
        return {
            name: column if pa.types.is_string(column.type) else as_json(column) for name, column in self._left.items()
        }

    def typed_rest(self) -> dict[str, pa.ChunkedArray]:
        """Return those of the remaining columns that are no text, with their own types."""
        return {name: self._user.typed[name] for name in self._left if name in self._user.typed}


def _rows_with_values(column: pa.ChunkedArray) -> list[int]:
    return [row for row, ok in enumerate(pc.is_valid(column).to_pylist()) if ok]
