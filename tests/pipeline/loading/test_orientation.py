"""Tests display matrices: every rotation and mirror by where a picture's corners go; anything else is refused."""

import numpy as np
import pytest

from pipeline.errors import ItemError
from pipeline.loading.video_index.orientation import Orientation, orientation_of

ONE = 1 << 16
PICTURE = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
EIGHT = {
    (1, 0, 0, 1): PICTURE,
    (-1, 0, 0, 1): PICTURE[:, ::-1],
    (1, 0, 0, -1): PICTURE[::-1],
    (-1, 0, 0, -1): np.rot90(PICTURE, 2),
    (0, 1, -1, 0): np.rot90(PICTURE, -1),
    (0, -1, 1, 0): np.rot90(PICTURE, 1),
    (0, 1, 1, 0): PICTURE.swapaxes(0, 1),
    (0, -1, -1, 0): np.rot90(PICTURE.swapaxes(0, 1), 2),
}


def matrix(a, b, c, d):
    return (round(a * ONE), round(b * ONE), 0, round(c * ONE), round(d * ONE), 0, 0, 0, 1 << 30)


@pytest.mark.parametrize(("signs", "shown"), EIGHT.items())
def test_the_eight_orientations(signs, shown):
    orientation = orientation_of(matrix(*signs))
    np.testing.assert_array_equal(orientation.apply(PICTURE), shown)
    assert orientation.is_mirrored == (signs[0] * signs[3] - signs[1] * signs[2] < 0)
    assert orientation_of(matrix(*(0.5 * sign for sign in signs))) == orientation
    assert orientation_of(matrix(*(sign or 0.004 for sign in signs))) == orientation


def test_zeros_turn_nothing():
    assert orientation_of((0,) * 9) == Orientation()


@pytest.mark.parametrize("skewed", [(0.7, 0.7, -0.7, 0.7), (1, 0.2, 0, 1), (1, 0, 0, 0), (1, 1, 1, 1), (0, 1, 0, 1)])
def test_what_is_no_quarter_turn_is_refused(skewed):
    with pytest.raises(ItemError, match="skewed") as caught:
        orientation_of(matrix(*skewed))
    assert caught.value.error_type == "unsupported_media"
