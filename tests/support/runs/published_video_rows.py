"""Holds one hand-made row of every video benchmark, as `published_image_rows` does for images."""

LETTER = "\nAnswer with the option's letter from the given choices directly."
CHOICE = {"media_kind": "video", "metric": "multiple_choice"}
JUDGED = {"media_kind": "video", "metric": "judge"}
_SRT = """1
00:00:01,000 --> 00:00:02,500
<font color="white" size=".72c">hello there</font>

2
00:01:00,000 --> 00:01:02,000
<font color="white" size=".72c">bye</font>
"""
_VIDEOMME = {
    "video_id": "001",
    "duration": "short",
    "domain": "Knowledge",
    "sub_category": "Geography",
    "url": "https://www.youtube.com/watch?v=fFjv93ACGo8",
    "videoID": "fFjv93ACGo8",
    "question_id": "001-1",
    "task_type": "Counting Problem",
    "question": "How many?",
    "options": ["A. One.", "B. Two.", "C. Three.", "D. Four."],
    "answer": "C",
}
_VIDEOMME_PROMPT = (
    "Select the best answer to the following multiple-choice question based on the video and the subtitles. Respond "
    "with only the letter (A, B, C, or D) of the correct option.\nHow many?\nA. One.\nB. Two.\nC. Three.\nD. Four.\n"
)
_VIDEOMME_COLUMNS = {
    **CHOICE,
    "question_id": "001-1",
    "uris": ["fFjv93ACGo8"],
    "reference": "C",
    "options": ["One.", "Two.", "Three.", "Four."],
    "category": "Counting Problem",
    "source_duration": "short",
    "source_domain": "Knowledge",
    "source_sub_category": "Geography",
}

VIDEO_ROWS = {
    "egoschema": (
        {
            "question_idx": "9",
            "question": "Why?",
            "video_idx": "abc-1",
            "option": ["A. to eat", "B. to run", "C. to sit", "D. to go", "E. to stay"],
            "answer": "4",
        },
        {
            **CHOICE,
            "question_id": "9",
            "uris": ["abc-1"],
            "prompt": f"Why?\nA. to eat\nB. to run\nC. to sit\nD. to go\nE. to stay{LETTER}",
            "reference": "E",
            "options": ["to eat", "to run", "to sit", "to go", "to stay"],
            "source_video_idx": "abc-1",
        },
    ),
    "mlvu": (
        {
            "video_name": "plot_1.mp4",
            "duration": 480.0,
            "question": "Who?\n(A) he\n(B) she",
            "candidates": ["he", "she"],
            "answer": "A",
            "task_type": "plotQA",
        },
        {
            **CHOICE,
            "question_id": "0",
            "uris": ["plot_1.mp4"],
            "prompt": "Who?\n(A) he\n(B) she\nOnly give the best option.\nBest option: (",
            "reference": "A",
            "category": "plotQA",
        },
    ),
    "nextqa": (
        {
            "video": 4010069381,
            "frame_count": 369,
            "width": 640,
            "height": 480,
            "question": "why is it so ",
            "answer": 3,
            "qid": 6,
            "type": "CW",
            "a0": "a ",
            "a1": "b",
            "a2": "c",
            "a3": "d",
            "a4": "e",
        },
        {
            **CHOICE,
            "question_id": "6",
            "uris": ["4010069381"],
            "prompt": "why is it so\nA. a\nB. b\nC. c\nD. d\nE. e",
            "reference": "D",
            "options": ["a", "b", "c", "d", "e"],
            "category": "CW",
        },
    ),
    "perceptiontest": (
        {
            "video_name": "video_1",
            "question": "Moved?",
            "question_id": "12",
            "options": ["yes", "no", "unsure"],
            "answer_id": "1",
            "area": "physics",
            "reasoning": "predictive",
            "tag": ["motion", "solidity"],
        },
        {
            **CHOICE,
            "question_id": "12",
            "uris": ["video_1"],
            "prompt": f"Moved?\nA. yes\nB. no\nC. unsure{LETTER}",
            "reference": "B",
            "options": ["yes", "no", "unsure"],
            "category": "physics",
            "source_reasoning": "predictive",
        },
    ),
    "videomme": (_VIDEOMME, {**_VIDEOMME_COLUMNS, "prompt": f"{_VIDEOMME_PROMPT}{LETTER}"}),
    "videomme_subtitles": (
        {**_VIDEOMME, "subtitle": _SRT},
        {
            **_VIDEOMME_COLUMNS,
            "prompt": "This video's subtitles are listed below: \nhello there\nbye\n"
            f"{_VIDEOMME_PROMPT}The best answer is:",
        },
    ),
    "activitynetqa": (
        {
            "video_name": "1QIUV7WYKXg",
            "question": "is the man outside",
            "question_id": "v_1_3",
            "answer": "yes",
            "type": "3",
        },
        {
            "question_id": "v_1_3",
            "uris": ["v_1QIUV7WYKXg"],
            "media_kind": "video",
            "prompt": "Is the man outside? Answer the question using a single word or phrase.",
            "reference": "yes",
            "category": "3",
            "metric": "exact_match",
            "source_video_name": "1QIUV7WYKXg",
            "source_question": "is the man outside",
        },
    ),
    "videochatgpt": (
        {
            "video_name": "v_p1",
            "question": "What is happening?",
            "question_1": "None",
            "question_2": "None",
            "answer": "A man sails.",
        },
        {
            **JUDGED,
            "question_id": "0",
            "uris": ["v_p1"],
            "prompt": "What is happening?",
            "reference": "A man sails.",
            "source_video_name": "v_p1",
        },
    ),
    "videochatgpt_consistency": (
        {"video_name": "v_p1", "question": "None", "question_1": "None", "question_2": "Which?", "answer": "Sailing"},
        {
            **JUDGED,
            "question_id": "0",
            "uris": ["v_p1"],
            "prompt": "Which?",
            "reference": "Sailing",
            "source_video_name": "v_p1",
            "source_question_1": "None",
            "source_question_2": "Which?",
        },
    ),
    "videodc": (
        {"video_name": "v_p1", "question_idx": "0", "question": "Please describe.", "answer": "A long text."},
        {
            **JUDGED,
            "question_id": "0",
            "uris": ["v_p1"],
            "prompt": "Please describe.",
            "reference": "A long text.",
            "source_video_name": "v_p1",
            "source_question": "Please describe.",
        },
    ),
}
