"""One hand-made row of every benchmark in its published columns, and what must become of it.

The prompts below are what lmms-eval 0.7.3's own functions gave for these rows.
"""

PNG = {"bytes": b"\x89PNG first", "path": None}
JPG = {"bytes": b"\xff\xd8\xff second", "path": "x.jpg"}
LETTER = "\nAnswer with the option's letter from the given choices directly."
PHRASE = "\nAnswer the question using a single word or phrase."
_SRT = """1
00:00:01,000 --> 00:00:02,500
<font color="white" size=".72c">hello there</font>

2
00:01:00,000 --> 00:01:02,000
<font color="white" size=".72c">bye</font>
"""
_SEED = {"question": "How many?", "choice_a": "one", "choice_b": "two", "choice_c": "three", "choice_d": "four"}
_SEED_PROMPT = f"How many?\nA. one\nB. two\nC. three\nD. four{LETTER}"
_VIDEOMME = {
    "video_id": "001",
    "duration": "short",
    "domain": "Knowledge",
    "sub_category": "Geography",
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

# name: (published row, manifest columns that must come out)
PUBLISHED = {
    "ai2d": (
        {"question": "Which is the top?", "options": ["sun", "grass", "fox"], "answer": "2", "image": PNG},
        {
            "prompt": f"Which is the top?\nA. sun\nB. grass\nC. fox{LETTER}",
            "reference": "C",
            "options": ["sun", "grass", "fox"],
        },
    ),
    "mmbench": (
        {
            "index": 1000042,
            "question": "What is it?",
            "hint": "Look closely.",
            "A": "cat",
            "B": "dog",
            "C": "nan",
            "D": None,
            "answer": "B",
            "category": "object",
            "image": PNG,
            "L2-category": "perception",
            "split": "dev",
        },
        {
            "prompt": f"Look closely. What is it? There are several options:\nA. cat\nB. dog\n{LETTER}",
            "reference": "B",
            "options": ["cat", "dog"],
            "category": "object",
            "question_id": "1000042",
            "source_index": "1000042",
        },
    ),
    "mmstar": (
        {
            "index": 7,
            "question": "What? \nOptions: A: a, B: b ",
            "image": PNG,
            "answer": "C",
            "category": "math",
            "l2_category": "geometry",
        },
        {
            "prompt": f"What? \nOptions: A: a, B: b{LETTER[:-1]}",
            "reference": "C",
            "category": "geometry",
        },
    ),
    "seedbench_image": (
        {**_SEED, "image": [PNG], "answer": "A", "data_type": "image", "question_id": "101669"},
        {
            "prompt": _SEED_PROMPT,
            "reference": "A",
            "options": ["one", "two", "three", "four"],
            "media_kind": "image",
        },
    ),
    "seedbench_video": (
        {**_SEED, "image": [PNG, JPG], "answer": "D", "data_type": "video", "question_id": "v1"},
        {"prompt": _SEED_PROMPT, "reference": "D", "media_kind": "images"},
    ),
    "muirbench": (
        {
            "idx": "3",
            "task": "Counting",
            "question": "<image><image> Same?",
            "options": ["yes", "no"],
            "answer": "B",
            "image_list": [PNG, JPG],
        },
        {
            "prompt": f"<image><image> Same?\nA. yes\nB. no{LETTER}",
            "reference": "B",
            "category": "Counting",
            "media_kind": "images",
        },
    ),
    "qbench": (
        {
            "id": 5,
            "image": PNG,
            "question": "Is it sharp?",
            "option0": "Yes",
            "option1": "No",
            "option2": "N/A",
            "option3": "N/A",
            "correct_choice": "B",
            "question_concern": 2,
            "question_type": 0,
        },
        {
            "prompt": f"Is it sharp?\nA. Yes\nB. No{LETTER}\n",
            "reference": "B",
            "options": ["Yes", "No"],
            "category": "Local Distortion",
        },
    ),
    "mmmu": (
        {
            "id": "validation_Art_Theory_3",
            "question": "In <image 2> and <image 1>, who?",
            "options": "['Monet', '<image 3>']",
            "question_type": "multiple-choice",
            "answer": "B",
            "image_1": PNG,
            "image_2": JPG,
            "image_3": PNG,
            "image_4": None,
        },
        {
            "prompt": f"In <image 2> and <image 1>, who?\nA. Monet\nB. <image 3>\n{LETTER}",
            "reference": "B",
            "options": ["Monet", "<image 3>"],
            "category": "Art_Theory",
            "metric": "multiple_choice",
        },
    ),
    "mme": (
        {
            "question_id": "color/1.png",
            "image": PNG,
            "question": "Is it red? Please answer yes or no.",
            "answer": "Yes",
            "category": "color",
        },
        {"prompt": f"Is it red?{PHRASE}", "reference": "yes", "category": "color", "metric": "yes_no"},
    ),
    "mmvet": (
        {"question_id": "v1_0", "image": PNG, "question": "What?", "answer": "-1<AND>-5", "capability": "ocr,math"},
        {
            "prompt": "First please perform reasoning, and think step by step to provide best answer to the following "
            "question: \n\nWhat?",
            "reference": "-1<AND>-5",
            "category": "ocr,math",
            "question_id": "v1_0",
            "metric": "judge",
        },
    ),
    "docvqa": (
        {"questionId": "49153", "question": "What is the date?", "answers": ["1/8/93", "Jan 8"], "image": PNG},
        {"prompt": f"What is the date?{PHRASE}", "reference": '["1/8/93", "Jan 8"]', "metric": "anls"},
    ),
    "infovqa": (
        {"questionId": "98313", "question": "How many?", "answers": ["82%"], "image": PNG},
        {"prompt": f"How many?{PHRASE}", "reference": '["82%"]', "metric": "anls", "question_id": "98313"},
    ),
    "chartqa": (
        {"type": "human_test", "question": "What is the peak?", "answer": "14", "image": PNG},
        {
            "prompt": "What is the peak?\nAnswer the question with a single word.",
            "reference": "14",
            "category": "human_test",
            "metric": "relaxed_accuracy",
        },
    ),
    "nocaps": (
        {"image": PNG, "image_id": 0, "annotations_captions": ["a baby", "a small baby"]},
        {
            "prompt": "Provide a one-sentence caption for the provided image.",
            "reference": '["a baby", "a small baby"]',
            "metric": "caption",
        },
    ),
    "flickr30k": (
        {"image": JPG, "img_id": "67", "caption": ["two dogs", "dogs play"]},
        {
            "prompt": "Provide a one-sentence caption for the provided image.",
            "reference": '["two dogs", "dogs play"]',
            "question_id": "67",
        },
    ),
    "egoschema": (
        {
            "question_idx": "9",
            "video_idx": "abc-1",
            "question": "Why?",
            "option": ["A. to eat", "B. to run", "C. to sit", "D. to go", "E. to stay"],
            "answer": "4",
        },
        {
            "prompt": f"Why?\nA. to eat\nB. to run\nC. to sit\nD. to go\nE. to stay{LETTER}",
            "reference": "E",
            "options": ["to eat", "to run", "to sit", "to go", "to stay"],
            "uris": ["abc-1"],
        },
    ),
    "mlvu": (
        {"video_name": "plot_1.mp4", "question": "Who?\n(A) he\n(B) she", "answer": "A", "task_type": "plotQA"},
        {
            "prompt": "Who?\n(A) he\n(B) she\nOnly give the best option.\nBest option: (",
            "reference": "A",
            "category": "plotQA",
            "uris": ["plot_1.mp4"],
        },
    ),
    "nextqa": (
        {
            "video": 4010069381,
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
            "prompt": "why is it so\nA. a\nB. b\nC. c\nD. d\nE. e",
            "reference": "D",
            "options": ["a", "b", "c", "d", "e"],
            "category": "CW",
            "uris": ["4010069381"],
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
        },
        {
            "prompt": f"Moved?\nA. yes\nB. no\nC. unsure{LETTER}",
            "reference": "B",
            "category": "physics",
            "source_reasoning": "predictive",
        },
    ),
    "videomme": (
        _VIDEOMME,
        {
            "prompt": f"{_VIDEOMME_PROMPT}{LETTER}",
            "reference": "C",
            "options": ["One.", "Two.", "Three.", "Four."],
            "category": "Counting Problem",
            "uris": ["fFjv93ACGo8"],
            "source_duration": "short",
        },
    ),
    "videomme_subtitles": (
        {**_VIDEOMME, "subtitle": _SRT},
        {
            "prompt": "This video's subtitles are listed below: \nhello there\nbye\n"
            f"{_VIDEOMME_PROMPT}The best answer is:",
            "reference": "C",
        },
    ),
    "activitynetqa": (
        {
            "video_name": "1QIUV7WYKXg",
            "question_id": "v_1_3",
            "question": "is the man outside",
            "answer": "yes",
            "type": "3",
        },
        {
            "prompt": "Is the man outside? Answer the question using a single word or phrase.",
            "reference": "yes",
            "category": "3",
            "uris": ["v_1QIUV7WYKXg"],
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
        {"prompt": "What is happening?", "reference": "A man sails.", "source_video_name": "v_p1"},
    ),
    "videochatgpt_consistency": (
        {"video_name": "v_p1", "question": "None", "question_1": "None", "question_2": "Which?", "answer": "Sailing"},
        {"prompt": "Which?", "reference": "Sailing", "metric": "judge"},
    ),
    "videodc": (
        {"video_name": "v_p1", "question": "Please describe.", "answer": "A long text."},
        {"prompt": "Please describe.", "reference": "A long text.", "metric": "judge", "source_video_name": "v_p1"},
    ),
}
