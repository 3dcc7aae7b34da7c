"""A stand-in for reasoning-gym, which the tests do without."""

import random
import sys
from dataclasses import dataclass
from types import ModuleType


@dataclass
class ProductsConfig:
    min_digits: int = 1
    max_digits: int = 1
    seed: int | None = None
    size: int = 500


class Products:
    """Item i depends on seed + i, and the scorer gives part marks, like the library's."""

    def __init__(self, config):
        assert config.max_digits > 0, "max_digits must be positive"
        self.config = config

    def __getitem__(self, index):
        if index >= self.config.size:
            raise IndexError
        numbers = random.Random(self.config.seed + index)
        a, b = (numbers.randrange(10**self.config.max_digits) for _ in range(2))
        return {"question": f"What is {a} * {b}", "answer": str(a * b), "metadata": {"terms": [a, b]}}

    def score_answer(self, answer, entry):
        if answer is None:
            return 0.0
        assert entry["metadata"]["terms"], "the scorer sees the metadata"
        if answer == entry["answer"]:
            return 1.0
        return len(entry["answer"]) / len(answer) if entry["answer"] in answer else 0.0


class Shapes(Products):
    """Its scorer compares tuples, which JSON makes lists."""

    def __getitem__(self, index):
        return {"question": f"Shape {index}", "answer": "1", "metadata": {"shape": (1, 2)}}

    def score_answer(self, answer, entry):
        return float(entry["metadata"]["shape"] == (1, 2))


class Fragile(Products):
    """Its scorer raises on a reply that it cannot parse."""

    def score_answer(self, answer, entry):
        return float(int(answer) == int(entry["answer"]))


class LastDigits(Products):
    def score_answer(self, answer, entry):
        return float(answer[-self.config.max_digits :] == entry["answer"][-self.config.max_digits :])


def install_gym(monkeypatch) -> ModuleType:
    library, factory = ModuleType("reasoning_gym"), ModuleType("reasoning_gym.factory")
    kinds = {"products": Products, "shapes": Shapes, "fragile": Fragile, "last_digits": LastDigits}
    factory.DATASETS = {name: (kind, ProductsConfig) for name, kind in kinds.items()}
    library.factory = factory
    library.create_dataset = lambda name, **kwargs: kinds[name](ProductsConfig(**kwargs))
    monkeypatch.setitem(sys.modules, "reasoning_gym", library)
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", factory)
    return library
