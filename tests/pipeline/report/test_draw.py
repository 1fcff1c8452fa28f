"""Pictures of kept tokens: the drawn cells partition the patch grid, for every family, modality and kind of method."""

from __future__ import annotations

import base64
import io
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.tables.family_matrix import SETTINGS, plan_of
from illava import VLM, Request, SamplingParams, load_preprocessor
from illava.analysis.attention_maps import attention_maps
from illava.families.qwen.blocks import NativeTower
from illava.plan import ReductionPlan
from pipeline.config.schema import JobConfig
from pipeline.errors import ConfigError
from pipeline.report.draw import draw_job, draw_request
from pipeline.report.draw_page import Section, render_page
from pipeline.report.picture import Picture, Tile
from pipeline.report.plan_text import plan_lines
from pipeline.report.raster import Sheet, draw_cells, draw_heat, png, sheets_of, shrink
from pipeline.report.token_maps import GONE, PatchCells, cells_of, representatives
from tests.support.models.cells import family_params
from tests.support.models.families import make_folder

ROOT = Path(__file__).resolve().parents[3]
METHODS = ("illava", "tome", "attention_pruning", "illava_2026")


@pytest.fixture(scope="module", params=family_params())
def tiny(request, tmp_path_factory) -> tuple[VLM, dict[str, Request]]:
    folder = str(make_folder(request.param, tmp_path_factory.mktemp(request.param)))
    preprocessor, rng = load_preprocessor(folder), np.random.default_rng(5)
    pictures = [rng.integers(0, 256, size, dtype=np.uint8) for size in ((64, 48, 3), (40, 56, 3), (56, 40, 3))]
    alone, first, second = (preprocessor.images([picture])[0] for picture in pictures)
    content = {"image": (alone, "What?"), "images": ("A:", first, "then B:", second, "Compare.")}
    if request.param != "llava_next":
        clip = [rng.integers(0, 256, (40, 40, 3), dtype=np.uint8) for _ in range(5)]
        content["video"] = ("See", preprocessor.video(clip), "what <happens>?")
    params = SamplingParams(max_new_tokens=2)
    requests = {name: Request(name, parts, params, trace=True) for name, parts in content.items()}
    return VLM.from_pretrained(folder, kv_cache_bytes=8 << 20), requests


def plan_for(vlm: VLM, method: str) -> ReductionPlan:
    (in_tower,) = plan_of(vlm.family, SETTINGS[method], "vision_block").steps
    (in_decoder,) = plan_of(vlm.family, SETTINGS[method], "decoder_layer").steps
    return ReductionPlan(steps=(in_tower, in_decoder))


def sheets_for(request: Request, trace) -> list[Sheet]:
    return sheets_of(trace.patch_coords.numpy(), [part.tiles for part in request.content if not isinstance(part, str)])


@pytest.mark.parametrize("method", METHODS)
def test_drawn_cells_partition_the_patch_grid(tiny, method) -> None:
    vlm, requests = tiny
    for name, request in requests.items():
        (done,) = vlm.generate([request], plan=plan_for(vlm, method))
        assert done.error is None, (method, name)
        num_patches = done.usage.num_patches
        drawn = np.concatenate([sheet.patch_RC.ravel() for sheet in sheets_for(request, done.trace)])
        assert np.array_equal(np.sort(drawn), np.arange(num_patches)), "every patch is drawn once"
        numbers = [sheet.number for sheet in sheets_for(request, done.trace)]
        assert numbers[0] == ("1.1" if name == "images" else "1")
        assert len(set(numbers)) == len(numbers)
        steps = cells_of(done.trace)
        assert steps[0].title == "input"
        for upto, cells in enumerate(steps):
            matrix = done.trace.matrix(upto).to_dense().abs().numpy()
            assert cells.num_tokens == matrix.shape[0]
            groups = [np.flatnonzero(cells.representative_P == token) for token in range(-1, cells.num_tokens)]
            assert np.array_equal(np.sort(np.concatenate(groups)), np.arange(num_patches)), "disjoint, and all of them"
            for patch, representative in enumerate(cells.representative_P):
                column = matrix[:, patch]
                assert representative == (GONE if not column.any() else int(column.argmax())), (
                    method,
                    name,
                    cells.title,
                )
            shared = sum(matrix[token].any() and not len(groups[token + 1]) for token in range(cells.num_tokens))
            assert (cells.num_shared, cells.num_separators) == (shared, int((~matrix.any(1)).sum()))
        assert steps[-1].num_tokens == done.usage.num_decoder_tokens_kept
        in_tower = steps[1]
        if method in ("illava", "tome"):
            assert not (in_tower.representative_P == GONE).any(), "merging loses no patch"
            assert np.bincount(in_tower.representative_P).max() > 1
        if method == "attention_pruning":
            assert (in_tower.representative_P == GONE).sum() == num_patches - in_tower.num_tokens


def test_attention_maps_are_the_models_own(tiny) -> None:
    """Received attention sums to one in a tile without CLS; a plan that is scored by it keeps the patches it marks."""
    vlm, requests = tiny
    for request in requests.values():
        trace, maps = attention_maps(vlm, request)
        tower = [one for one in maps if one.stage == "vision_block"]
        decoder = [one for one in maps if one.stage == "decoder_layer"]
        assert [one.layer for one in decoder] == list(vlm.family.decoder.kv_layers[:-1])
        assert tower
        for one in tower:
            for sheet in sheets_for(request, trace):
                total = float(one.value_P.numpy()[sheet.patch_RC].sum())
                has_cls = getattr(vlm.family.tower, "has_cls", False)
                assert total < 1.0 if has_cls else total == pytest.approx(1.0, abs=1e-4)
        assert all(0 <= float(one.value_P.max()) <= 1 for one in decoder)
    (step,) = plan_of(vlm.family, SETTINGS["attention_pruning"], "vision_block").steps
    (done,) = vlm.generate([requests["image"]], plan=ReductionPlan(steps=(step,)))
    trace, maps = attention_maps(vlm, requests["image"])
    (value_P,) = (one.value_P for one in maps if (one.stage, one.layer) == ("vision_block", step.layers[0]))
    kept_P = cells_of(done.trace)[1].representative_P != GONE
    if not isinstance(vlm.family.tower, NativeTower):  # there groups are ranked
        for sheet in sheets_for(requests["image"], trace):
            here = sheet.patch_RC.ravel()
            assert value_P[here][kept_P[here]].min() >= value_P[here][~kept_P[here]].max() - 1e-7


def test_a_request_becomes_a_page_and_pictures(tiny) -> None:
    vlm, requests = tiny
    request = list(requests.values())[-1]
    config = JobConfig.model_validate(
        {
            "input": {"uri": "in/"},
            "model": {"model_id": "m"},
            "reduction": plan_for(vlm, "illava").model_dump(),
            "output": {"uri": "out/"},
        }
    )
    section = draw_request(vlm, config, replace(request, trace=True), title="<b>clip</b>.mp4")
    captions = [picture.caption for picture in section.pictures]
    assert captions[0].startswith("input: ")
    assert any(caption.startswith("language model, before layer") for caption in captions)
    assert sum("attention in the" in caption for caption in captions) == 2
    page = render_page("kept & drawn", [section])
    check_page(page, num_pictures=sum(len(picture.tiles) for picture in section.pictures))
    assert "&lt;b&gt;clip&lt;/b&gt;.mp4" in page
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    for said in ("shows itself", "their mean colour, outlined", "one token for most of", "no token holds it", "redder"):
        assert said in page.partition("<h2>")[0], "the legend stands before the first item"


def check_page(page: str, *, num_pictures: int) -> None:
    """Nothing runs, nothing is fetched, all pictures are within."""

    class Reader(HTMLParser):
        tags: list[tuple[str, dict]] = []

        def handle_starttag(self, tag, attrs) -> None:
            self.tags.append((tag, dict(attrs)))

    reader = Reader()
    reader.tags = []
    reader.feed(page)
    names = {tag for tag, _ in reader.tags}
    assert not names & {"script", "iframe", "object", "embed", "base", "form", "b"}
    assert [one["href"] for tag, one in reader.tags if tag == "link"] == ["data:,"], "no icon is asked for"
    (policy,) = (one["content"] for tag, one in reader.tags if one.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    sources = [one["src"] for tag, one in reader.tags if tag == "img"]
    assert len(sources) == num_pictures
    for source in sources:
        kind, data = source.split(",", 1)
        assert kind == "data:image/png;base64"
        Image.open(io.BytesIO(base64.b64decode(data))).verify()
    assert "http" not in re.sub(r'src="[^"]*"|http-equiv', "", page)


def test_what_comes_from_outside_is_escaped() -> None:
    evil = '"><script>alert(1)</script><img src=http://x/>'
    picture = Picture(evil, [Tile(evil, np.zeros((2, 3, 3), np.uint8))])
    check_page(render_page(evil, [Section(evil, ((evil, evil),), (picture,))]).replace("http:", ""), num_pictures=1)


def test_texts_of_any_length_are_shown_whole_without_secrets_or_control_characters(monkeypatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "sk-0123456789")
    section = Section(
        "t", (("answer", "line one\nline two " + "word " * 2000 + "\x1b[31m sk-0123456789 {{ 7 * 7 }}"),), ()
    )
    page = render_page("t", [section])
    assert "line one\nline two" in page
    assert page.count("word ") == 2000
    assert "\\x1b[31m *** {{ 7 * 7 }}" in page
    assert "\x1b" not in page


def checked(size: int, shades: list[int]) -> Sheet:
    """A square sheet whose patches have one shade each, except for a darker pixel in the corner of each."""
    pixels = np.array(shades, np.uint8).reshape(size, size).repeat(16, 0).repeat(16, 1)
    pixels[::16, ::16] //= 2
    return Sheet(np.stack([pixels] * 3, -1), np.arange(size * size).reshape(size, size))


def test_a_group_shows_its_mean_colour_with_a_thin_outline() -> None:
    shades = [200, 100, 140, 200, 200, 180, 200, 200, 200]
    representative_P = np.array([0, 1, 1, 2, GONE, 1, 3, 4, 5])
    (image,) = draw_cells([checked(3, shades)], representative_P)
    side = image.shape[0] // 3
    middle = image[side // 2 :: side, side // 2 :: side].reshape(9, 3)
    assert (middle[[0, 3, 6, 7, 8]] == 200).all(), "a patch alone is shown as it is"
    assert (middle[4] == 36).all(), "what is gone is dark"
    mean = np.mean([shade - (shade - shade // 2) / 256 for shade in (100, 140, 180)])
    assert (middle[[1, 2, 5]] == round(mean)).all(), "a group is its patches' mean"
    assert (image[2, side + 3 : 2 * side - 2] == round(mean)).all(), "flat: its pixels are gone"
    assert (image[1 : side - 1, side] == round(mean / 2)).all(), "its outline is one pixel, half as bright"
    assert (image[1 : side - 1, side + 1] == round(mean)).all()
    assert (image[1 : side - 1, 2 * side] == round(mean)).all(), "no line within a group"
    assert (image[2 * side + 8 : 3 * side - 1, side] == 200).all(), "none between two patches alone"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png(image)))), image)


def test_a_token_that_stands_for_most_of_a_frame_is_hatched_on_every_frame() -> None:
    first, second = checked(3, [120] * 9), checked(3, [60] * 9)
    second = replace(second, patch_RC=second.patch_RC + 9)
    most = np.array([0] * 5 + [1] * 4 + [0] + [2] * 4 + [3] * 4)
    images = draw_cells([first, second], most)
    side = images[0].shape[0] // 3
    shades = [{*image[2 : side - 1, 2 : side - 1].ravel().tolist()} for image in images]
    assert shades[0] == shades[1], "one colour, the mean over both frames, and one of the lines"
    assert len(shades[0]) == 2
    others = (images[0][-side + 2 :, -side + 2 :], images[1][-side + 2 :, -side + 2 :])
    assert [len({*other.ravel().tolist()}) for other in others] == [1, 1], "four of nine are no background"
    half = np.array([0] * 8 + [1] + [2] * 9)
    assert len({*draw_cells([first, second], half)[1][2 : side - 1, 2 : side - 1].ravel().tolist()}) == 2, (
        "a whole frame"
    )


def test_a_map_is_the_redder_the_more() -> None:
    values = np.array([0.0, 0.5, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, np.nan])
    heat = draw_heat(checked(3, [200] * 9), values, 1.0)
    side = heat.shape[0] // 3
    none, half, full = (heat[side // 2, (2 * n + 1) * side // 2].tolist() for n in range(3))
    assert none[0] == none[1] == none[2]
    assert full[0] - full[2] > half[0] - half[2] > 0
    assert heat[-side // 2, -side // 2].tolist() == [36, 36, 36], "of no token"


@pytest.mark.parametrize(
    ("shape", "size"), [(None, (20, 20)), ((300, 100), (20, 7)), ((1, 4000), (1, 20)), ((9, 9), (9, 9))]
)
def test_a_picture_shrinks_into_its_own_shape(shape, size) -> None:
    assert shrink(np.zeros((40, 40, 3), np.uint8), 20, shape=shape).shape == (*size, 3)


def test_a_plan_is_told_in_the_words_of_its_yaml() -> None:
    assert plan_lines(ReductionPlan()) == ["none"]
    step = {"stage": "vision_block", "layers": [1, 2], "reducer": {"kind": "tome", "num_merged": 2}}
    plan = ReductionPlan.model_validate({"steps": [step], "unmerge": {}, "size_bias": True})
    assert plan_lines(plan) == [
        "vision_block 1, 2: tome, per medium, num_merged 2",
        "unmerge kind knn_delta, num_neighbours 4",
        "size_bias true",
    ]


def test_of_equal_weights_the_first_token_holds_a_patch() -> None:
    matrix = torch.tensor([[0.5, 0.0, 0.2], [0.5, 0.0, -0.7], [0.0, 0.0, 0.1]]).to_sparse_coo()
    assert representatives(matrix).tolist() == [0, GONE, 1]
    assert PatchCells("x", representatives(matrix), 3, 0).num_shared == 1


def test_patches_that_are_no_grid_are_refused() -> None:
    place = np.array([[0, 0, 0, 0], [0, 0, 1, 1]])
    with pytest.raises(ValueError, match="no full grid"):
        sheets_of(place, [np.zeros((1, 8, 8, 3), np.uint8)])


def test_a_plan_that_makes_other_pictures_cannot_be_drawn() -> None:
    step = {"stage": "media", "reducer": {"kind": "fewer_frames", "keep_ratio": 0.5}}
    sections = {"input": {"uri": "in/"}, "model": {"model_id": "m"}, "output": {"uri": "out/"}}
    with pytest.raises(ConfigError, match="no grid to draw"):
        draw_job(JobConfig.model_validate(sections | {"reduction": {"steps": [step]}}))


@pytest.mark.long
def test_the_job_draws_the_demo(tmp_path) -> None:
    command = [sys.executable, "jobs/draw_kept_tokens.py", "--config", "configs/draw_demo.yaml", "--limit", "1"]
    done = subprocess.run(
        [*command, "--set", f"output.uri={tmp_path}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    written = done.stdout.splitlines()
    assert [Path(path).exists() for path in written] == [True] * len(written)
    pictures = [path for path in written if path.endswith(".png")]
    assert len(pictures) == 7, "input, two blocks, layout, before the language model, attention in both"
    check_page((tmp_path / "kept_tokens.html").read_text(), num_pictures=5 * 8 + 10 + 5)
