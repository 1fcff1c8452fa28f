"""Finds reducers of other installed packages: entry points of the group ``illava.reducers``, named by their kind.

A package is loaded when a plan names its kind, not before.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points

from illava.errors import PlanError
from illava.reducers.base import Reducer

GROUP = "illava.reducers"


def out_of_tree_kinds() -> Mapping[str, EntryPoint]:
    """The kinds that installed packages add, by name.

    Raises:
        PlanError: two packages add one kind.
    """
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=GROUP):
        other = found.setdefault(entry.name, entry)
        if other.value != entry.value:
            raise PlanError(
                f"two packages add a reducer of kind {entry.name!r}: {_package(other)} and {_package(entry)}; "
                "uninstall one of them"
            )
    return found


def load_reducer(entry: EntryPoint) -> type[Reducer]:
    """Load the class that an entry point names.

    Raises:
        PlanError: it cannot be imported, or is no reducer of this kind.
    """
    where = f"reducer {entry.name!r} of {_package(entry)} ({entry.value})"
    try:
        loaded = entry.load()
    except Exception as error:  # a package's own code may raise anything
        raise PlanError(f"{where} cannot be imported: {type(error).__name__}: {error}") from error
    if not (isinstance(loaded, type) and issubclass(loaded, Reducer)):
        raise PlanError(f"{where} is no class over illava.reducers.base.Reducer")
    kind = loaded.model_fields["kind"].default
    if kind != entry.name:
        raise PlanError(f"{where} has the kind {kind!r}: its entry point must have the same name")
    return loaded


def package_of(reducer: Reducer) -> tuple[str, str] | None:
    """The package of a reducer, and its version; None for this project's own.

    Raises:
        PlanError: as `out_of_tree_kinds`.
    """
    if type(reducer).__module__.startswith("illava.reducers."):
        return None
    entry = out_of_tree_kinds().get(reducer.kind)
    return None if entry is None or entry.dist is None else (entry.dist.name, entry.dist.version)


def _package(entry: EntryPoint) -> str:
    return "an unknown package" if entry.dist is None else f"{entry.dist.name} {entry.dist.version}"
