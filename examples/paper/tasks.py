"""Two classification tasks over real text, the standard library's lines; the paper has MNLI, QQP and SST-2.

* `package`: which of three packages two consecutive lines come from.
* `kind`: whether a line is code, a comment or part of a docstring.

A text is `bytes_per_text` bytes, padded with zeros in front, so that the last position has read all of it. Files in
which `train_gpt` validates are the held-out ones here too. Classes are equally frequent. (A third
task, whether one line follows another, is not here: float32 itself stays at chance with as little training.)
"""

from __future__ import annotations

import functools
import io
import itertools
import random
import sysconfig
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from train_gpt import HELD_OUT_EVERY, standard_library_files

BYTES_PER_TEXT = 64
PACKAGES = ("asyncio", "encodings", "xml")  # large ones that have held-out files
SEPARATOR = b"\n"

Example = tuple[bytes, int]


@dataclass(frozen=True)
class Task:
    """Texts uint8 [examples, BYTES_PER_TEXT] and labels int64 [examples], to learn from and held out."""

    name: str
    classes: int
    train_x: Tensor
    train_y: Tensor
    held_out_x: Tensor
    held_out_y: Tensor

    def batches(self, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless random batches, int64, in the same order for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            chosen_B = torch.randint(len(self.train_y), (batch,), generator=generator)
            yield self.train_x[chosen_B].long(), self.train_y[chosen_B]


@functools.cache  # reading `kind` takes eight seconds
def load(name: str, *, train: int, held_out: int) -> Task:
    """The task with at most so many examples of each part; the same on every call."""
    classes, examples_of = TASKS[name]
    parts: tuple[list[Example], list[Example]] = ([], [])
    for index, path in enumerate(standard_library_files()):
        parts[index % HELD_OUT_EVERY == 0].extend(examples_of(path))
    learned, kept = (_balanced(part, classes, count) for part, count in zip(parts, (train, held_out), strict=True))
    return Task(name, classes, *_tensors(learned), *_tensors(kept))


def _package(path: Path) -> Iterator[Example]:
    package = path.relative_to(sysconfig.get_paths()["stdlib"]).parts[0]
    if package not in PACKAGES:
        return
    lines = _lines(path)
    for first, second in itertools.pairwise(lines):
        yield first[-31:] + SEPARATOR + second[:32], PACKAGES.index(package)


def _kind(path: Path) -> Iterator[Example]:
    text = path.read_bytes()
    lines = text.splitlines()
    code, comment, docstring = 0, 1, 2
    previous = tokenize.NEWLINE
    try:
        for token in tokenize.tokenize(io.BytesIO(text).readline):
            rows = range(token.start[0], token.end[0] + 1)
            if token.type == tokenize.COMMENT and lines[rows[0] - 1].lstrip().startswith(b"#"):
                yield lines[rows[0] - 1].lstrip(b"# "), comment
            elif token.type == tokenize.STRING and previous in (tokenize.INDENT, tokenize.NEWLINE) and len(rows) > 2:
                yield from ((lines[row - 1].strip(), docstring) for row in rows[1:-1] if lines[row - 1].strip())
            elif token.type == tokenize.NEWLINE and b"#" not in lines[rows[0] - 1]:
                yield lines[rows[0] - 1].strip(), code
            if token.type not in (tokenize.NL, tokenize.COMMENT):
                previous = token.type
    except (tokenize.TokenError, SyntaxError):
        return  # a file that is broken on purpose


def _lines(path: Path) -> list[bytes]:
    return [line.strip() for line in path.read_bytes().splitlines() if len(line.strip()) > 10]


TASKS: dict[str, tuple[int, Callable[[Path], Iterator[Example]]]] = {
    "package": (len(PACKAGES), _package),
    "kind": (3, _kind),
}


def _balanced(examples: list[Example], classes: int, count: int) -> list[Example]:
    random.Random(0).shuffle(examples)
    by_class = [[each for each in examples if each[1] == label] for label in range(classes)]
    each = min(count // classes, *map(len, by_class))
    return [example for own in by_class for example in own[:each]]


def _tensors(examples: list[Example]) -> tuple[Tensor, Tensor]:
    padded = b"".join(text[:BYTES_PER_TEXT].rjust(BYTES_PER_TEXT, b"\0") for text, _ in examples)
    texts = torch.frombuffer(bytearray(padded), dtype=torch.uint8).view(-1, BYTES_PER_TEXT)
    return texts, torch.tensor([label for _, label in examples])
