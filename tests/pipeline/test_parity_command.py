"""`illava parity`: a tiny model of each kind of tower beside stock, on a real clip, picture and PDF. About 8 s."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from PIL import Image

from illava.analysis import stock_parity
from illava.errors import ModelLoadError
from pipeline.__main__ import main
from tests.support.media.clips import write_barcode_video
from tests.support.media.pdf_files import page, write_pdf
from tests.support.models.families import make_folder
from tests.support.models.published_llava import edit

pytestmark = pytest.mark.numeric


@pytest.fixture(scope="module", params=["llava_onevision", pytest.param("qwen2_5_vl", marks=pytest.mark.long)])
def folder(request, tmp_path_factory):
    return str(make_folder(request.param, tmp_path_factory.mktemp(request.param)))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    own = tmp_path_factory.mktemp("own")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)).save(own / "a.png")
    clip = write_barcode_video(own / "clip.mp4", value=3, num_frames=12)
    return [str(clip), str(own / "a.png"), str(write_pdf(own / "two.pdf", [page(0), page(1)]))]


def run(folder, *words, capsys):
    code = main(["parity", folder, *words, "--num-frames", "4", "--max-new-tokens", "4", "--device", "cpu"])
    captured = capsys.readouterr()
    return code, captured.out.splitlines(), captured.err


def test_three_lines_say_that_own_files_are_read_as_stock_reads_them(folder, files, capsys):
    code, (logits, answers, tokens), _ = run(folder, *files, capsys=capsys)
    assert code == 0, "answers part at near ties alone, if at all"
    assert float(re.search(r"differ by (\S+) of their scale", logits)[1]) <= 1e-5
    assert re.match(r"answers  \d of 4 the same, token for token \(\d+ of 16 tokens\)", answers)
    visual, prompt = (int(n.replace(",", "")) for n in re.findall(r"(\S+) (?:visual|of prompts)", tokens))
    assert 0 < visual < prompt
    assert tokens.endswith("stock makes as many in 4 of 4")


def test_another_stock_model_and_another_count_of_tokens_are_told(folder, files, capsys, monkeypatch):
    load = stock_parity.load_weights

    def other(*given, **options):
        model = load(*given, **options)
        with torch.no_grad():
            model.lm_head.weight.copy_(-model.lm_head.weight)
        return model

    monkeypatch.setattr(stock_parity, "load_weights", other)
    code, (logits, answers, _, first), _ = run(folder, files[1], capsys=capsys)
    assert code == 4
    assert float(re.search(r"differ by (\S+) of their scale", logits)[1]) > 0.5
    assert answers.startswith("answers  0 of 1 the same, token for token (0 of 4 tokens)")
    assert re.match(r"  .*a\.png: parts behind 0 of 4 tokens; ours '.*', stock '.*'", first)
    monkeypatch.undo()

    processor = stock_parity._image_processor

    def smaller(*given):
        made = processor(*given)
        return lambda images, **options: made([one[:8, :8] for one in images], **options)

    monkeypatch.setattr(stock_parity, "_image_processor", smaller)
    code, (*_, tokens, told), _ = run(folder, files[1], capsys=capsys)
    assert code == 4
    assert tokens.endswith("stock makes as many in 0 of 1")
    assert "a.png: stock refuses it: " in told


def test_what_cannot_be_compared_is_refused_before_weights_are_loaded(folder, files, tmp_path, capsys):
    code, _, err = run(folder, "nowhere.png", capsys=capsys)
    assert (code, "there is no such file" in err) != (0, False)
    copy = make_folder("qwen2_vl", tmp_path / "model")
    edit(copy / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [8, 8]})
    with pytest.raises(ModelLoadError, match="parity compares plain weights"):
        stock_parity.measure_parity(str(copy), [])
