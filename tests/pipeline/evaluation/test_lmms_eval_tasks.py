"""The installed lmms-eval as the reference: its own wording of each benchmark's row; its own command with our model."""

import copy
import importlib
import json
import os
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from benchmarks.accuracy import lmms_eval_check
from pipeline.evaluation.benchmarks.registry import BENCHMARKS
from tests.support.runs.published_image_rows import IMAGE_ROWS
from tests.support.runs.published_video_rows import VIDEO_ROWS

pytestmark = pytest.mark.long
# Of each benchmark's folder below lmms_eval/tasks/.
TASKS = {
    "ai2d": "ai2d/ai2d",
    "mmbench": "mmbench/mmbench_en_dev",
    "mmstar": "mmstar/mmstar",
    "seedbench_image": "seedbench/seedbench",
    "seedbench_video": "seedbench/seedbench",
    "muirbench": "muirbench/muirbench",
    "qbench": "qbench/qbench_dev",
    "mmmu": "mmmu/mmmu_val",
    "mme": "mme/mme",
    "mmvet": "mmvet/mmvet",
    "docvqa": "docvqa/docvqa_val",
    "infovqa": "infovqa/infovqa_val",
    "chartqa": "chartqa/chartqa",
    "nocaps": "nocaps/nocaps_val",
    "flickr30k": "flickr30k/flickr30k_test",
    "egoschema": "egoschema/egoschema_subset",
    "mlvu": "mlvu/mlvu_dev",
    "nextqa": "nextqa/nextqa_mc_test",
    "perceptiontest": "perceptiontest/val/perceptiontest_mc",
    "videomme": "videomme/videomme",
    "videomme_subtitles": "videomme/videomme_w_subtitle",
    "activitynetqa": "activitynetqa/activitynetqa_generation",
    "videochatgpt": "videochatgpt/videochatgpt_generic",
    "videochatgpt_consistency": "videochatgpt/videochatgpt_consistency",
    "videodc": "video_detail_description/video_detail_description",
}
# What task modules import for scoring or decoding; wording a prompt needs none of it.
UNUSED = (
    *("cv2", "pycocotools", "pycocotools.coco", "nltk", "nltk.corpus", "nltk.tokenize", "pywsd", "pywsd.utils"),
    *("pycocoevalcap", "pycocoevalcap.eval", "pycocoevalcap.tokenizer", "pycocoevalcap.tokenizer.ptbtokenizer"),
)


@pytest.fixture(scope="module")
def task_of(tmp_path_factory):
    """A benchmark's name -> the harness's task, with its functions."""
    home = tmp_path_factory.mktemp("hf")
    # Video-MME's subtitles lie in the data set's cache, by the video's name.
    subtitles = home / "videomme" / "subtitle"
    subtitles.mkdir(parents=True)
    row, _ = VIDEO_ROWS["videomme_subtitles"]
    (subtitles / f"{row['videoID']}.srt").write_text(row["subtitle"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "HF_HOME", str(home))
        patch.setitem(os.environ, "OPENAI_API_KEY", "none")  # MM-Vet makes its judge's client as it is imported
        for name in UNUSED:
            patch.setitem(sys.modules, name, MagicMock())
        harness = importlib.import_module("lmms_eval.utils")
        folder = Path(harness.__file__).parent / "tasks"
        yield lambda name: harness.load_yaml_config(str(folder / f"{TASKS[name]}.yaml"))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_lmms_eval_words_the_row_as_the_manifest_does(task_of, name):
    row, expected = (IMAGE_ROWS | VIDEO_ROWS)[name]
    task = task_of(name)
    options = (task.get("lmms_eval_specific_kwargs") or {}).get("default") or {}
    if name == "videomme_subtitles":
        options = {**options, **task["lmms_eval_specific_kwargs"]["gemini_api"]}
    # As ConfigurableTask.doc_to_text calls it.
    assert task["doc_to_text"](copy.deepcopy(row), *([options] if options else [])) == expected["prompt"]
    most = (task.get("generation_kwargs") or {}).get("max_new_tokens", BENCHMARKS[name].max_new_tokens)
    assert BENCHMARKS[name].max_new_tokens == most
    assert task["dataset_path"] in BENCHMARKS[name].dataset


def test_the_harness_answers_as_the_job_does(tmp_path):
    target = tmp_path / "answers.json"
    assert lmms_eval_check.main(["--folder", str(tmp_path / "check"), "--count", "3", "--json", str(target)]) == 0
    found = json.loads(target.read_text())
    assert found["num_questions"] == found["num_same"] == 3
    assert all(one["harness"] for one in found["answers"])
