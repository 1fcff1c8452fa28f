from pipeline.config.schema import CaptionConfig
from pipeline.records import MediaItem
from pipeline.tasks.base import ParsedAnswer
from pipeline.tasks.build import build_task

ITEM = MediaItem("a", ("a.mp4",), "video", (1,), ("",))


def test_a_caption_asks_the_jobs_prompt_after_the_media() -> None:
    task = build_task(CaptionConfig(prompt="What happens?"))
    media = (object(), object())
    assert task.content(ITEM, media) == (*media, "What happens?")
    assert task.parse(ITEM, "A dog runs.") == ParsedAnswer(answer=None, score=None)


def test_a_manifests_prompt_overrides_the_jobs() -> None:
    item = MediaItem("a", ("a.mp4",), "video", (1,), ("",), prompt="Which colour?")
    assert build_task(CaptionConfig(prompt="What happens?")).prompt(item) == "Which colour?"
