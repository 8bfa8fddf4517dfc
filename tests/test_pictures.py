"""Pictures of a selection: the numbers that are drawn, and that every history can be drawn."""

from __future__ import annotations

import io
import math

import matplotlib.image
import numpy as np
import pytest

from agsel.monitor import pictures
from agsel.monitor.history import SelectionHistory


def history_of(blocks: int, steps: int) -> SelectionHistory:
    """A step trains the block of its number, and measures it and the next."""
    names = [f"layers.{index}" for index in range(blocks)]
    history = SelectionHistory(tuple(names))
    for step in range(1, steps + 1):
        own, other = names[step % blocks], names[(step + 1) % blocks]
        history.add(step, "exploit", [own], {own: 10.0, other: 0.1})
    return history


def test_a_map_of_a_short_run_has_a_column_a_step() -> None:
    history = history_of(4, 6)
    assert np.array_equal(pictures.trained_share(history), history.trained())
    drawn = pictures.selection_map(history).axes[0].images[0]
    assert np.array_equal(drawn.get_array(), history.trained())
    assert drawn.get_extent() == [0.5, 6.5, -0.5, 3.5]
    np.testing.assert_allclose(pictures.norm_levels(history), history.measured(), rtol=1e-6)


def test_a_map_of_a_long_run_has_shares_and_geometric_means() -> None:
    history = history_of(2, 2 * pictures.COLUMNS)
    shares, norms = pictures.trained_share(history), pictures.norm_levels(history)
    assert shares.shape == norms.shape == (2, pictures.COLUMNS)
    assert np.all(shares == 0.5)
    np.testing.assert_allclose(norms, 1.0, rtol=1e-5)  # of 10 and 0.1


def test_norms_that_were_not_measured_stay_empty() -> None:
    history = SelectionHistory(("a", "b"))
    history.add(1, "exploit", ["a"], {"a": 0.0})
    history.add(2, "exploit", ["a"], {"a": 2.0, "b": math.inf})
    levels = pictures.norm_levels(history)
    assert np.isfinite(levels).tolist() == [[False, True], [False, False]]
    assert levels[0, 1] == pytest.approx(2)


def test_bars_are_counts_by_depth() -> None:
    axes = pictures.count_bars(history_of(3, 7)).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [2, 3, 2]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["layer 0", "layer 1", "layer 2"]


@pytest.mark.parametrize("paper", [pictures.LIGHT, pictures.DARK])
@pytest.mark.parametrize("history", [SelectionHistory(("a",)), history_of(1, 1), history_of(80, 5)])
def test_every_history_can_be_drawn(history: SelectionHistory, paper: pictures.Paper) -> None:
    for picture in (pictures.selection_map, pictures.norm_map, pictures.count_bars):
        figure = picture(history, paper)
        image = matplotlib.image.imread(io.BytesIO(pictures.png(figure)))
        red, green, blue = (int(paper.ground[at : at + 2], 16) / 255 for at in (1, 3, 5))
        np.testing.assert_allclose(image[0, 0, :3], (red, green, blue), atol=0.01)
        assert all(axes.get_xlabel() or axes.get_ylabel() for axes in figure.axes)
