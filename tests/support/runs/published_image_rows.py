"""Holds one hand-made row of every image benchmark, with all published columns, and the manifest row it must become.

The columns are those of the data sets that `Benchmark.dataset` names. The test itself checks ``item_id`` and
``benchmark`` of the expected row. Prompts and letters are as lmms-eval 0.7.3 words them; `test_lmms_eval_tasks.py` asks
its own functions.
"""

PNG = {"bytes": b"\x89PNG first", "path": None}
JPG = {"bytes": b"\xff\xd8\xff second", "path": "x.jpg"}
# The first 24 digits of what `sha256sum` says of these bytes.
PNG_NAME, JPG_NAME = "567db07ebab63101e4d55c39.png", "08a86e2f0662cc7bc0a56c73.jpg"
LETTER = "\nAnswer with the option's letter from the given choices directly."
PHRASE = "\nAnswer the question using a single word or phrase."
CHOICE = {"uris": [PNG_NAME], "media_kind": "image", "metric": "multiple_choice"}
OPEN = {"uris": [PNG_NAME], "media_kind": "image"}

_SEED = {
    "question": "How many?",
    "choice_a": "one",
    "choice_b": "two",
    "choice_c": "three",
    "choice_d": "four",
    "data_id": "1454426_2591111986",
    "question_type_id": 5,
    "segment": None,
}
_SEED_COLUMNS = {
    "prompt": f"How many?\nA. one\nB. two\nC. three\nD. four{LETTER}",
    "options": ["one", "two", "three", "four"],
    "category": "5",
    "metric": "multiple_choice",
}
_CAPTION = "Provide a one-sentence caption for the provided image."

# name: (published row, manifest columns that must come out)
IMAGE_ROWS = {
    "ai2d": (
        {"question": "Which is the top?", "options": ["sun", "grass", "fox"], "answer": "2", "image": PNG},
        {
            **CHOICE,
            "question_id": "0",
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
            "answer": "B",
            "A": "cat",
            "B": "dog",
            "C": "nan",
            "D": None,
            "category": "object",
            "image": PNG,
            "source": "scienceqa",
            "L2-category": "perception",
            "comment": "nan",
            "split": "dev",
        },
        {
            **CHOICE,
            "question_id": "1000042",
            "prompt": f"Look closely. What is it? There are several options:\nA. cat\nB. dog\n{LETTER}",
            "reference": "B",
            "options": ["cat", "dog"],
            "category": "object",
            "source_index": "1000042",
            "source_L2-category": "perception",
            "source_split": "dev",
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
            "meta_info": {"source": "MathVista", "split": "testmini", "image_path": "images/7.jpg"},
        },
        {
            **CHOICE,
            "question_id": "7",
            "prompt": "What? \nOptions: A: a, B: b\nAnswer with the option's letter from the given choices directly",
            "reference": "C",
            "category": "geometry",
        },
    ),
    "seedbench_image": (
        {**_SEED, "image": [PNG], "answer": "A", "data_type": "image", "question_id": "101669"},
        {**_SEED_COLUMNS, "question_id": "101669", "reference": "A", "uris": [PNG_NAME], "media_kind": "image"},
    ),
    "seedbench_video": (
        {**_SEED, "image": [PNG, JPG], "answer": "D", "data_type": "video", "question_id": "v1", "segment": [0, 8]},
        {**_SEED_COLUMNS, "question_id": "v1", "reference": "D", "uris": [PNG_NAME, JPG_NAME], "media_kind": "images"},
    ),
    "muirbench": (
        {
            "idx": "3",
            "task": "Counting",
            "image_relation": "Ordered_Pages",
            "image_type": "Slides",
            "question": "<image><image> Same?",
            "options": ["yes", "no"],
            "answer": "B",
            "image_list": [PNG, JPG],
            "counterpart_idx": "4",
        },
        {
            "question_id": "3",
            "uris": [PNG_NAME, JPG_NAME],
            "media_kind": "images",
            "prompt": f"<image><image> Same?\nA. yes\nB. no{LETTER}",
            "reference": "B",
            "options": ["yes", "no"],
            "category": "Counting",
            "metric": "multiple_choice",
            "source_image_relation": "Ordered_Pages",
            "source_image_type": "Slides",
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
            "question_type": 0,
            "question_concern": 2,
            "correct_choice": "B",
        },
        {
            **CHOICE,
            "question_id": "5",
            "prompt": f"Is it sharp?\nA. Yes\nB. No{LETTER}\n",
            "reference": "B",
            "options": ["Yes", "No"],
            "category": "Local Distortion",
            "source_question_type": "0",
        },
    ),
    "mmmu": (
        {
            "id": "validation_Art_Theory_3",
            "question": "In <image 2> and <image 1>, who?",
            "options": "['Monet', '<image 3>']",
            "explanation": "",
            "image_1": PNG,
            "image_2": JPG,
            "image_3": PNG,
            **dict.fromkeys(("image_4", "image_5", "image_6", "image_7")),
            "img_type": "['Paintings']",
            "answer": "B",
            "topic_difficulty": "Easy",
            "question_type": "multiple-choice",
            "subfield": "Art Theory",
        },
        {
            "question_id": "validation_Art_Theory_3",
            "uris": [PNG_NAME, JPG_NAME, PNG_NAME],
            "media_kind": "images",
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
        {
            **OPEN,
            "question_id": "color/1.png",
            "prompt": f"Is it red?{PHRASE}",
            "reference": "yes",
            "category": "color",
            "metric": "mme",
        },
    ),
    "mmvet": (
        {
            "question_id": "v1_0",
            "image": PNG,
            "question": "What?",
            "answer": "-1<AND>-5",
            "image_source": "https://example.org/1",
            "capability": "ocr,math",
        },
        {
            **OPEN,
            "question_id": "v1_0",
            "prompt": "First please perform reasoning, and think step by step to provide best answer to the following "
            "question: \n\nWhat?",
            "reference": "-1<AND>-5",
            "category": "ocr,math",
            "metric": "judge",
        },
    ),
    "docvqa": (
        {
            "questionId": "49153",
            "question": "What is the date?",
            "question_types": ["handwritten", "form"],
            "image": PNG,
            "docId": 14465,
            "ucsf_document_id": "pybv0228",
            "ucsf_document_page_no": "81",
            "answers": ["1/8/93", "Jan 8"],
            "data_split": "val",
        },
        {
            **OPEN,
            "question_id": "49153",
            "prompt": f"What is the date?{PHRASE}",
            "reference": '["1/8/93", "Jan 8"]',
            "metric": "anls",
        },
    ),
    "infovqa": (
        {
            "questionId": "98313",
            "question": "How many?",
            "answers": ["82%"],
            "answer_type": ["single span"],
            "image": PNG,
            "image_url": "https://example.org/1.png",
            "operation/reasoning": [],
            "ocr": "[]",
            "data_split": "val",
        },
        {**OPEN, "question_id": "98313", "prompt": f"How many?{PHRASE}", "reference": '["82%"]', "metric": "anls"},
    ),
    "chartqa": (
        {"type": "human_test", "question": "What is the peak?", "answer": "14", "image": PNG},
        {
            **OPEN,
            "question_id": "0",
            "prompt": "What is the peak?\nAnswer the question with a single word.",
            "reference": "14",
            "category": "human_test",
            "metric": "relaxed_accuracy",
        },
    ),
    "nocaps": (
        {
            "image": PNG,
            "image_coco_url": "https://example.org/0.jpg",
            "image_date_captured": "2018-11-06 11:04:33",
            "image_file_name": "0013ea2087020901.jpg",
            "image_height": 1024,
            "image_width": 732,
            "image_id": 0,
            "image_license": 0,
            "image_open_images_id": "0013ea2087020901",
            "annotations_ids": [0, 1],
            "annotations_captions": ["a baby", "a small baby"],
        },
        {
            **OPEN,
            "question_id": "0",
            "prompt": _CAPTION,
            "reference": '["a baby", "a small baby"]',
            "metric": "caption",
        },
    ),
    "flickr30k": (
        {
            "image": JPG,
            "caption": ["two dogs", "dogs play"],
            "sentids": ["0", "1"],
            "img_id": "67",
            "filename": "1000092795.jpg",
        },
        {
            "question_id": "67",
            "uris": [JPG_NAME],
            "media_kind": "image",
            "prompt": _CAPTION,
            "reference": '["two dogs", "dogs play"]',
            "metric": "caption",
        },
    ),
}
