"""Lists the video benchmarks: where each keeps its media, how it words its prompt, how it scores answers.

Prompts are those of lmms-eval 0.7.3 (EvolvingLMMs-Lab/lmms-eval), default template, read in the files that `source`
names below ``lmms_eval/tasks/``; `dataset` is the published file format whose columns are meant. `note` says what
differs from there or could not be verified. A row is data; nothing here reads files.
"""

from __future__ import annotations

from pipeline.evaluation.benchmarks.base import (
    LETTER,
    Benchmark,
    always,
    asked_twice,
    bare,
    id_in,
    letter_at,
    lettered_question,
    listed,
    nextqa_options,
    question,
    text_of,
    video,
    videomme_prompt,
    videomme_subtitles_prompt,
)
from pipeline.tasks.answers import lettered

_MULTIPLE_CHOICE = always("multiple_choice")

_VIDEO_CHOICE = (
    Benchmark(
        name="egoschema",
        dataset="lmms-eval/egoschema",
        source="egoschema/egoschema.yaml, egoschema/egoschema_subset.yaml, egoschema/utils.py",
        media_kind="video",
        media=video("video_idx"),
        prompt=lambda row: "\n".join([str(row["question"]), *map(str, row["option"])]) + LETTER,
        options=bare("option"),
        reference=letter_at("answer"),
        question_id=lambda row, place: row.get("question_idx", place),
        metric=_MULTIPLE_CHOICE,
        max_new_tokens=16,
        keep=("video_idx",),
        note="Only the Subset carries answers; the full set is scored by its server.",
    ),
    Benchmark(
        name="mlvu",
        dataset="sy1998/MLVU_dev",
        source="mlvu/mlvu_dev.yaml, mlvu/utils.py",
        media_kind="video",
        media=video("video_name"),
        prompt=question("\nOnly give the best option.\nBest option: ("),
        reference=text_of("answer"),
        category=text_of("task_type"),
        metric=_MULTIPLE_CHOICE,
        aggregate="category_mean",
        max_new_tokens=16,
        note="The prompt's last words begin the model's own turn there as here: they stand at the end of the question. "
        "That the options stand in the question is read from the code, not seen in the files.",
    ),
    Benchmark(
        name="nextqa",
        dataset="lmms-eval/NExTQA, MC",
        source="nextqa/nextqa_mc_test.yaml, nextqa/utils.py",
        media_kind="video",
        media=lambda row: [str(row["video"])],
        prompt=lambda row: f"{str(row['question']).strip()}\n{lettered(nextqa_options(row))}",
        options=nextqa_options,
        reference=letter_at("answer"),
        category=text_of("type"),
        question_id=lambda row, place: row.get("qid", place),
        metric=_MULTIPLE_CHOICE,
        max_new_tokens=16,
        note="lmms-eval gives no instruction after the options; max_new_tokens is ours. The open set (WUPS) needs "
        "WordNet and is left out.",
    ),
    Benchmark(
        name="perceptiontest",
        dataset="lmms-eval/PerceptionTest_Val, mc_question_val",
        source="perceptiontest/val/perceptiontest_mc.yaml, perceptiontest/val/utils.py",
        media_kind="video",
        media=video("video_name"),
        prompt=lettered_question(listed("options")),
        options=listed("options"),
        reference=letter_at("answer_id"),
        category=text_of("area"),
        question_id=id_in("question_id"),
        metric=_MULTIPLE_CHOICE,
        max_new_tokens=16,
        keep=("reasoning",),
        note="lmms-eval sets no max_new_tokens; 16 is ours.",
    ),
    *(
        Benchmark(
            name=name,
            dataset=f"lmms-eval/Video-MME{extra}",
            source=f"videomme/{yaml}, videomme/utils.py",
            media_kind="video",
            media=video("videoID"),
            prompt=prompt,
            options=bare("options"),
            reference=text_of("answer"),
            category=text_of("task_type"),
            question_id=id_in("question_id"),
            metric=_MULTIPLE_CHOICE,
            max_new_tokens=16,
            keep=("duration", "domain", "sub_category"),
            note=note,
        )
        for name, extra, yaml, prompt, note in (
            (
                "videomme",
                "",
                "videomme.yaml",
                lambda row: videomme_prompt(row, LETTER),
                "The instruction names subtitles though there are none, as in lmms-eval.",
            ),
            (
                "videomme_subtitles",
                ", with a column subtitle: the .srt file's text, or empty",
                "videomme_w_subtitle.yaml",
                videomme_subtitles_prompt,
                "All subtitles, as lmms-eval's gemini_api variant; its default gives those at 32 frames, which needs "
                "the clip's frame rate before it is opened.",
            ),
        )
    ),
)

_VIDEO_OPEN = (
    Benchmark(
        name="activitynetqa",
        dataset="lmms-eval/ActivityNetQA",
        source="activitynetqa/_default_template_yaml, activitynetqa/utils.py",
        media_kind="video",
        media=lambda row: [f"v_{row['video_name']}"],
        prompt=lambda row: f"{str(row['question']).capitalize()}? Answer the question using a single word or phrase.",
        reference=text_of("answer"),
        category=text_of("type"),
        question_id=id_in("question_id"),
        metric=always("exact_match"),
        max_new_tokens=64,
        keep=("video_name", "question"),
        note="The published number is a GPT's; exact match is ours. `export` writes the file its judge reads.",
    ),
    Benchmark(
        name="videochatgpt",
        dataset="lmms-eval/VideoChatGPT, Generic and Temporal",
        source="videochatgpt/_default_template_yaml, videochatgpt/utils.py",
        media_kind="video",
        media=video("video_name"),
        prompt=question(),
        reference=text_of("answer"),
        metric=always("judge"),
        aggregate="judge",
        max_new_tokens=1024,
        keep=("video_name",),
    ),
    Benchmark(
        name="videochatgpt_consistency",
        dataset="lmms-eval/VideoChatGPT, Consistency",
        source="videochatgpt/videochatgpt_consistency.yaml, videochatgpt/utils.py",
        media_kind="video",
        media=video("video_name"),
        prompt=asked_twice,
        reference=text_of("answer"),
        metric=always("judge"),
        aggregate="judge",
        max_new_tokens=1024,
        keep=("video_name", "question_1", "question_2"),
    ),
    Benchmark(
        name="videodc",
        dataset="lmms-lab/VideoDetailDescription",
        source="video_detail_description/video_detail_description.yaml, video_detail_description/utils.py",
        media_kind="video",
        media=video("video_name"),
        prompt=question(),
        reference=text_of("answer"),
        metric=always("judge"),
        aggregate="judge",
        max_new_tokens=1024,
        keep=("video_name", "question"),
        note="max_new_tokens is ours: lmms-eval leaves it to the model.",
    ),
)

VIDEO_BENCHMARKS = (*_VIDEO_CHOICE, *_VIDEO_OPEN)
