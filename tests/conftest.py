"""What the tests of whole runs share: one tiny model and one text, read and never written."""

from __future__ import annotations

import random

import pytest
import torch
from families import save_tiny

WORDS = ("the", "of", "a", "river", "stone", "light", "moves", "under", "every", "house", "she")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A llama of 3 layers, each with 96 FFN channels and 4 KV groups."""
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """Some 6,000 tokens, one a byte."""
    draw = random.Random(0)
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text(" ".join(draw.choice(WORDS) for _ in range(1200)))
    return file


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """More only get into each other's way on matrices this small."""
    torch.set_num_threads(1)
