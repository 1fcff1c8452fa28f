"""Excerpt of lmms-eval 0.7.3 (EvolvingLMMs-Lab/lmms-eval; MIT, Apache-2.0): ``lmms_eval/api/model.py``."""

import abc


class lmms(abc.ABC):
    is_simple: bool = True

    def __init__(self) -> None:
        self._rank = 0
        self._world_size = 1
        self.task_dict: dict = {}

    @abc.abstractmethod
    def loglikelihood(self, requests): ...

    @abc.abstractmethod
    def generate_until(self, requests): ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests): ...

    @classmethod
    def create_from_arg_string(cls, args: dict, additional_config: dict | None = None):
        # There a text is parsed first; here the keys and values come as the parser gives them.
        return cls(**args, **{k: v for k, v in (additional_config or {}).items() if v is not None})

    def clean(self) -> None:
        self.task_dict = {}
