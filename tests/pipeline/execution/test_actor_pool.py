"""How many actors are asked for: one of each kind first, the rest when both have a place."""

from __future__ import annotations

import pytest

from pipeline.errors import ClusterError
from pipeline.execution.ray.actor_pool import GIVE_UP_AFTER_S, START_TIMEOUT_S, Change, Kind, Patience, change


@pytest.mark.parametrize(
    ("mine", "other", "lacking_s", "wanted"),
    [
        (Kind(0, 0, 8), Kind(0, 0, 2), 0, Change(ask=1)),
        (Kind(0, 1, 8), Kind(0, 1, 2), 0, Change()),
        (Kind(1, 0, 8), Kind(0, 1, 2), 0, Change()),
        (Kind(1, 0, 8), Kind(1, 0, 2), 0, Change(ask=7)),
        (Kind(2, 6, 8), Kind(2, 0, 2), 0, Change()),
        (Kind(1, 6, 8), Kind(2, 0, 2), 0, Change(ask=1)),  # one died
        (Kind(3, 5, 8), Kind(0, 0, 2), 0, Change(withdraw=5)),  # or they would take the place of the only reader
        (Kind(0, 3, 8), Kind(1, 0, 2), 0, Change(withdraw=2)),
        (Kind(3, 0, 8), Kind(0, 1, 2), GIVE_UP_AFTER_S, Change(give_up=True)),
        (Kind(1, 0, 8), Kind(0, 1, 2), GIVE_UP_AFTER_S, Change()),
    ],
)
def test_what_is_asked_for(mine, other, lacking_s, wanted) -> None:
    assert change(mine, other, lacking_s=lacking_s) == wanted


@pytest.mark.parametrize("places", range(2, 8))
@pytest.mark.parametrize("greedy_first", [0, 1])
def test_work_starts_on_any_cluster_with_two_places_whoever_is_placed_first(places, greedy_first) -> None:
    """A cluster that gives every free place to one kind: the other still gets its first."""
    kinds = [Kind(0, 0, 5), Kind(0, 0, 4)]
    for _ in range(10):
        steps = [change(kinds[n], kinds[1 - n], lacking_s=0) for n in (0, 1)]
        for n, step in enumerate(steps):
            kinds[n] = Kind(kinds[n].num_placed, kinds[n].num_waiting + step.ask - step.withdraw, kinds[n].most)
        for n in (greedy_first, 1 - greedy_first):
            free = places - sum(kind.num_placed for kind in kinds)
            taken = min(free, kinds[n].num_waiting)
            kinds[n] = Kind(kinds[n].num_placed + taken, kinds[n].num_waiting - taken, kinds[n].most)
    assert all(kind.num_placed for kind in kinds)
    assert sum(kind.num_placed for kind in kinds) == places


def test_too_few_actors_are_said_now_and_then_and_end_the_job_when_it_lasts() -> None:
    patience = Patience(2, now_s=0.0)
    said = [patience.check(1, 1, resources=lambda: "2 CPU", now_s=float(now_s)) for now_s in range(100)]
    assert [now_s for now_s, line in enumerate(said) if line] == [30, 60, 90]
    assert "1 VLM actors of at least 2" in said[30]
    assert patience.check(2, 1, resources=lambda: "4 CPU", now_s=START_TIMEOUT_S) == ""
    with pytest.raises(ClusterError, match=r"num_vlm_actors\.min"):
        patience.check(1, 1, resources=lambda: "2 CPU", now_s=2 * START_TIMEOUT_S)
