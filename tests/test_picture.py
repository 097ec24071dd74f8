"""The picture of a step shows the numbers of its timeline; these tests read them back from the figure."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.patches import StepPatch

from lightning_gemini.core.errors import ConfigurationError
from lightning_gemini.core.timeline import Place, Timeline, TimelineChunk
from lightning_gemini.picture import draw, figure
from tests.timelines import MIB, small, sweep


def layers(ax: Axes) -> dict[str, list[float]]:
    """Each area of the memory panel, in MiB."""
    steps = [patch for patch in ax.patches if isinstance(patch, StepPatch) and patch.get_fill()]
    found = {}
    for step in steps:
        top, edges, bottom = step.get_data()
        assert list(edges) == [i - 0.5 for i in range(len(top) + 1)]
        found[step.get_label()] = list((top - bottom) / MIB)
    return found


def legend(ax: Axes) -> list[str]:
    shown = ax.get_legend()
    return [text.get_text() for text in shown.get_texts()] if shown else []


def texts(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


def memory(timeline: Timeline) -> Axes:
    return figure(timeline).axes[0]


# Device memory


def test_memory_is_stacked_by_what_it_is_used_for() -> None:
    assert layers(memory(small())) == {
        "homes on the device": [9, 9, 9, 9],
        "unsharded, in use": [10, 10, 20, 10],
        "unsharded, idle": [0, 10, 10, 0],
        "coming": [10, 10, 0, 0],
        "gradients, activations": [1, 1, 2, 6],
    }


def test_what_there_is_none_of_is_not_in_the_legend() -> None:
    timeline = small()
    bare = replace(timeline, capacity=None, moments=(replace(timeline.moments[0], other=0),))
    assert legend(memory(bare)) == ["coming", "unsharded, in use", "homes on the device"]


def test_the_peak_is_marked() -> None:
    ax = memory(small())
    (mark,) = [text for text in ax.texts if text.get_text().startswith("peak")]
    assert mark.get_text() == "peak 41.00 MiB at moment 2 (layers.2)"
    assert mark.xy == (2, 41 * MIB)
    assert ax.get_ylabel() == "device memory (MiB)"
    ticks = [int(label.get_text()) for label in ax.get_yticklabels()]
    assert [tick * MIB for tick in ticks] == list(ax.get_yticks())


def test_the_budget_is_a_line_where_it_fits_the_scale() -> None:
    ax = memory(small())
    assert "budget 50.00 MiB" in legend(ax)
    (line,) = [line for line in ax.lines if line.get_label().startswith("budget")]
    assert set(line.get_ydata()) == {50 * MIB}
    assert ax.get_ylim()[1] > 50 * MIB

    ax = memory(replace(small(), capacity=80 * 2**30))
    assert "budget 80.00 GiB,\nabove this scale" in legend(ax)
    assert ax.get_ylim()[1] < 60 * MIB, "the areas would not be seen"

    assert not [label for label in legend(memory(replace(small(), capacity=None))) if "budget" in label]


def test_forward_and_backward_are_named_where_there_is_room() -> None:
    assert [text for text in texts(memory(small())) if "ward" in text] == ["forward", "backward"]
    timeline = sweep(10, 100)
    moments = [replace(moment, backward=index in (50, 51)) for index, moment in enumerate(timeline.moments)]
    result = figure(replace(timeline, moments=tuple(moments)))
    assert [text for text in texts(result.axes[0]) if "ward" in text] == ["forward", "forward"]
    for ax in (result.axes[0], result.axes[2], result.axes[3]):
        shades = [patch for patch in ax.patches if matplotlib.colors.to_hex(patch.get_facecolor()) == "#f2f2f2"]
        assert [tuple(patch.get_extents().transformed(ax.transData.inverted()).intervalx) for patch in shades] == [
            pytest.approx((49.5, 51.5))
        ]


# The chunk map


def colours(ax: Axes) -> np.ndarray:
    """Values of places, chunk by moment, with the colours checked."""
    (image,) = ax.images
    return np.asarray(image.get_array())


def test_the_map_has_a_row_for_each_chunk_and_a_column_for_each_moment() -> None:
    timeline = small()
    ax = figure(timeline).axes[1]
    assert colours(ax).tolist() == [
        [timeline.place(chunk, moment).value for moment in range(4)] for chunk in range(4)
    ]  # fmt: skip
    assert ax.images[0].get_extent() == [-0.5, 3.5, 3.5, -0.5]
    assert len({tuple(ax.images[0].to_rgba(np.array([[v]]))[0, 0]) for v in range(5)}) == 5


def test_colours_of_the_map_are_those_of_its_legend() -> None:
    ax = figure(small()).axes[1]
    handles = ax.get_legend().get_patches()
    present = [place.value for place in Place if place is not Place.UPDATING]
    expected = ["in host memory", "home on the device", "coming", "unsharded, idle", "unsharded, in use"]
    assert legend(ax) == expected
    for value, handle in zip(present, handles, strict=True):
        assert tuple(ax.images[0].to_rgba(np.array([[value]]))[0, 0]) == pytest.approx(handle.get_facecolor())


def test_chunks_are_named_without_what_all_have_in_common() -> None:
    labels = [label.get_text() for label in figure(small()).axes[1].get_yticklabels()]
    assert labels == ["layers.0.weight  0", "layers.1.weight  1", "layers.2.weight, frozen  2", "head.weight  3"]


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["a.weight"], ["a.weight"]),
        (["h.0.weight", "h.1.weight"], ["h.0.weight", "h.1.weight"]),
        (["0.weight", "0.bias", "1.weight"], ["0.weight", "0.bias", "1.weight"]),
        (["m.a.w", "m.a"], ["a.w", "a"]),
        (["m.w", "m.w"], ["m.w", "m.w"]),
        (["m.w", f"m.layers.3.{'x' * 20}.proj.weight"], ["w", "layers.3...proj.weight"]),
        (["$a_b$", "y" * 40], ["$a_b$", "..." + "y" * 27]),
    ],
)
def test_names_are_shortened_in_the_middle(names: list[str], labels: list[str]) -> None:
    chunks = tuple(TimelineChunk(index, MIB, False, name, True) for index, name in enumerate(names))
    timeline = small()
    moment = replace(timeline.moments[0], chunk=0, resident=(), pinned=(), coming=(), updating=())
    ax = figure(replace(timeline, chunks=chunks, moments=(moment,))).axes[1]
    assert [label.get_text() for label in ax.get_yticklabels()] == [f"{name}  {i}" for i, name in enumerate(labels)]


def test_many_chunks_have_a_label_now_and_then() -> None:
    ax = figure(sweep(300, 30)).axes[1]
    assert list(ax.get_yticks()) == list(range(0, 300, 20))
    assert ax.get_yticklabels()[3].get_text() == "layers.60.weight  60"


def test_of_more_cells_than_dots_none_that_is_used_is_lost() -> None:
    timeline = sweep(1000, 2500)
    shown = colours(figure(timeline).axes[1])
    assert shown.shape == (800, 1200)
    # on the diagonal: each chunk is in use at some moment, and each moment has one in use
    assert (shown.max(axis=0) == Place.IN_USE.value).all()
    assert (shown.max(axis=1) == Place.IN_USE.value).all()
    assert Counter(shown[:, 0].tolist())[Place.IN_USE.value] == 1


# Copies and waits


def bars(ax: Axes) -> dict[str, dict[float, float]]:
    return {
        container.get_label(): {round(bar.get_x() + bar.get_width() / 2, 6): bar.get_height() for bar in container}
        for container in ax.containers
    }


def test_copies_go_up_from_the_host_and_down_to_it() -> None:
    ax = figure(small()).axes[2]
    assert bars(ax) == {
        "fetched": {0: 5 * MIB, 1: 5 * MIB},
        "offloaded": {3: -5 * MIB},
    }
    assert ax.get_ylabel() == "copied (MiB)"
    assert "-" not in "".join(label.get_text() for label in ax.get_yticklabels())


def test_waits_are_marks() -> None:
    ax = figure(small()).axes[3]
    (line,) = ax.lines
    assert line.get_xydata().tolist() == [[0, 0.002]]
    assert ax.get_ylabel() == "waited (ms)"


def test_a_step_in_which_all_is_kept_says_so() -> None:
    timeline = small()
    calm = [replace(moment, waited=0.0, fetched=0, offloaded=0) for moment in timeline.moments]
    axes = figure(replace(timeline, moments=tuple(calm))).axes
    assert texts(axes[2]) == ["no bytes fetched or offloaded"]
    assert texts(axes[3]) == ["no unit waited for its chunk"]


# The whole


def title(result: Figure) -> list[str]:
    return result.get_suptitle().splitlines()


def test_the_title_says_what_and_how_much() -> None:
    assert title(figure(small())) == [
        "training step: rank 0 of 2, 4 chunks",
        "10.00 MiB fetched from the host, 5.00 MiB offloaded; 500.0 ms, of which 2.0 ms waiting for chunks",
        "200.0 ms of updates in host memory, 75% hidden behind other work",
    ]
    predicted = title(figure(replace(small(), predicted=0.4)))[1]
    assert "; 500.0 ms (400.0 ms predicted up to the next step), of which 2.0 ms waiting for chunks" in predicted
    one = replace(sweep(1, 1), seconds=2.5)
    one = replace(one, moments=(replace(one.moments[0], waited=0.0),))
    assert title(figure(one)) == [
        "training step: rank 0 of 1, 1 chunk",
        "0 B fetched from the host, 0 B offloaded; 2.50 s, none of it waiting for chunks",
    ]


def test_panels_are_aligned() -> None:
    result = figure(sweep(5, 40))
    result.draw_without_rendering()
    places = [ax.get_position() for ax in result.axes]
    assert len({(round(place.x0, 6), round(place.x1, 6)) for place in places}) == 1
    assert {ax.get_xlim() for ax in result.axes} == {(-0.5, 39.5)}


@pytest.mark.parametrize(
    "timeline", [small(), sweep(1, 1), sweep(10, 30), sweep(300, 3000)], ids=["small", "one", "10x30", "300x3000"]
)
def test_a_png_of_sane_size(timeline: Timeline, tmp_path: Path) -> None:
    path = tmp_path / "step.png"
    draw(timeline, path)
    height, width, _ = imread(path).shape
    assert width == 2000
    assert 1000 < height <= 2100
    assert imread(path)[:, :, :3].std() > 0.05, "an empty page"


@pytest.mark.parametrize(("suffix", "start"), [("pdf", b"%PDF"), ("svg", b"<?xml"), ("PNG", b"\x89PNG")])
def test_other_formats(suffix: str, start: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"step.{suffix}"
    draw(small(), path)
    assert path.read_bytes().startswith(start)


def test_the_users_own_style_does_not_matter(tmp_path: Path) -> None:
    draw(small(), tmp_path / "plain.png")
    with matplotlib.rc_context({"font.size": 30, "savefig.bbox": "tight", "axes.facecolor": "black"}):
        draw(small(), tmp_path / "styled.png")
        assert matplotlib.rcParams["font.size"] == 30
    assert np.array_equal(imread(tmp_path / "plain.png"), imread(tmp_path / "styled.png"))


def test_what_cannot_be_drawn_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match=r"must end in \.png, \.pdf, \.svg, got 'step\.txt'"):
        draw(small(), tmp_path / "step.txt")
    with pytest.raises(ConfigurationError, match="nothing to draw: the timeline has no moments"):
        draw(replace(small(), moments=()), tmp_path / "step.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigurationError, match=r"needs matplotlib: pip install 'lightning-gemini\[report\]'"):
        draw(small(), tmp_path / "step.png")
    assert not list(tmp_path.iterdir())
