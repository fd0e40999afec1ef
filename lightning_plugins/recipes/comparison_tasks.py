"""The two small tasks on which optimizers are compared: made here, the same bits for the same seed, in plain PyTorch.

``deep_autoencoder``: images of 8 x 8 pixels with one round bump each (its place, width and height are random) through a tanh
network 64-100-50-25-6-25-50-100-64, squared error summed over an image. It is the classic test of second-order methods (Hinton
and Salakhutdinov, 2006; Martens, 2010) at a size for a CPU.

``character_transformer``: sentences of a small grammar whose verbs agree with their subjects over relative clauses, letter by
letter through a transformer of two layers, width 64, cross-entropy of the next letter.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
import torch
from numpy.random import Generator, default_rng
from torch import Tensor, nn
from torch.nn import functional

Batch = tuple[Tensor, Tensor]  # inputs, targets

# What random numbers are drawn for; the evaluation set is the same for all seeds.
_TRAINING, _EVALUATION, _TEXT = 0, 1, 2


@dataclass(frozen=True)
class Task:
    """Something to train.

    Attributes:
        make_module: returns a new network with the seed's weights.
        batch: the training batch of a step, from 0 on, without end.
        evaluation: a batch that is never trained on, the same for all seeds.
        loss: mean over the terms, of a prediction and its targets.
        steps: that AdamW needs to come close to its best.
    """

    make_module: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    evaluation: Batch
    loss: Callable[[Tensor, Tensor], Tensor]
    steps: int

    def batches(self) -> Iterator[Batch]:
        """Yield the batches of steps 0, 1, 2, ..."""
        step = 0
        while True:
            yield self.batch(step)
            step += 1


def deep_autoencoder(seed: int) -> Task:
    """Return the autoencoder of bump images; batches are ``(512, 64)``.

    Args:
        seed: of weights and batches.
    """

    def batch(step: int) -> Batch:
        images = _bumps(default_rng((_TRAINING, seed, step)), 512)
        return images, images

    evaluated = _bumps(default_rng(_EVALUATION), 1024)

    def loss(images: Tensor, targets: Tensor) -> Tensor:
        return functional.mse_loss(images, targets, reduction="sum") / len(images)

    return Task(lambda: _seeded(_autoencoder, seed), batch, (evaluated, evaluated), loss, steps=400)


def character_transformer(seed: int) -> Task:
    """Return the language model of letters; batches are ``(64, 32)`` numbers of letters, and those that follow.

    Args:
        seed: of weights and batches.
    """
    text = _text(_TRAINING, 300_000)

    def batch(step: int) -> Batch:
        return _windows(text, default_rng((_TRAINING, seed, step)), 64)

    evaluated = _windows(_text(_EVALUATION, 100_000), default_rng(_EVALUATION), 128)

    def loss(logits: Tensor, letters: Tensor) -> Tensor:
        return functional.cross_entropy(logits.flatten(0, 1), letters.flatten())

    return Task(lambda: _seeded(CharacterTransformer, seed), batch, evaluated, loss, steps=300)


TASKS: dict[str, Callable[[int], Task]] = {
    "deep_autoencoder": deep_autoencoder,
    "character_transformer": character_transformer,
}


def _seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def _autoencoder() -> nn.Module:
    widths = (64, 100, 50, 25, 6, 25, 50, 100, 64)
    layers = [part for i, o in pairwise(widths) for part in (nn.Linear(i, o), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def _bumps(rng: Generator, count: int) -> Tensor:
    """Return ``(count, 64)`` images of 8 x 8 pixels."""
    centres = rng.uniform(1.0, 6.0, (count, 2, 1))
    widths = rng.uniform(0.8, 2.0, (count, 1))
    heights = rng.uniform(0.5, 1.0, (count, 1))
    rows, columns = np.divmod(np.arange(64), 8)
    squares = (rows - centres[:, 0]) ** 2 + (columns - centres[:, 1]) ** 2
    return torch.from_numpy((heights * np.exp(-squares / (2 * widths**2))).astype(np.float32))


# Nouns and verbs as singular and plural; verbs agree with their subject.
_NOUNS = [("cat", "cats"), ("dog", "dogs"), ("child", "children"), ("mouse", "mice"), ("teacher", "teachers"), ("bird", "birds")]
_ALONE = [("sleeps", "sleep"), ("runs", "run"), ("sings", "sing"), ("waits", "wait")]
_WITH_OBJECT = [("sees", "see"), ("follows", "follow"), ("likes", "like"), ("carries", "carry"), ("finds", "find")]
_ADJECTIVES = ["small", "old", "quick", "quiet", "green", "tired"]
_DETERMINERS = [("a", "some"), ("the", "the"), ("this", "these"), ("every", "all")]
LETTERS = " .abcdefghijklmnopqrstuvwxyz"


def _noun_phrase(rng: Generator, plural: int, depth: int) -> list[str]:
    words = [_DETERMINERS[rng.integers(len(_DETERMINERS))][plural]]
    if rng.random() < 0.4:
        words.append(_ADJECTIVES[rng.integers(len(_ADJECTIVES))])
    words.append(_NOUNS[rng.integers(len(_NOUNS))][plural])
    if depth and rng.random() < 0.3:
        words += ["that", *_verb_phrase(rng, plural, depth - 1)]
    return words


def _verb_phrase(rng: Generator, plural: int, depth: int) -> list[str]:
    if rng.random() < 0.4:
        return [_ALONE[rng.integers(len(_ALONE))][plural]]
    verb = _WITH_OBJECT[rng.integers(len(_WITH_OBJECT))][plural]
    return [verb, *_noun_phrase(rng, int(rng.integers(2)), depth)]


@cache
def _text(part: int, count: int) -> Tensor:
    """Return ``count`` letters of sentences, as their numbers in ``LETTERS``."""
    rng = default_rng((_TEXT, part))
    numbers: list[int] = []
    while len(numbers) < count:
        plural = int(rng.integers(2))
        words = [*_noun_phrase(rng, plural, 2), *_verb_phrase(rng, plural, 1)]
        numbers += [LETTERS.index(letter) for letter in " ".join(words) + ". "]
    return torch.tensor(numbers[:count])


def _windows(text: Tensor, rng: Generator, count: int) -> Batch:
    starts = torch.from_numpy(rng.integers(len(text) - CharacterTransformer.context, size=count))
    letters = text[starts[:, None] + torch.arange(CharacterTransformer.context + 1)]
    return letters[:, :-1].contiguous(), letters[:, 1:].contiguous()


class CharacterTransformer(nn.Module):
    """Predicts every next letter: ``(N, T)`` numbers of letters to logits ``(N, T, letters)``."""

    context = 32
    width = 64

    def __init__(self) -> None:
        super().__init__()
        self.letters = nn.Embedding(len(LETTERS), self.width)
        self.places = nn.Embedding(self.context, self.width)
        self.blocks = nn.Sequential(*(_Block(self.width, heads=4) for _ in range(2)))
        self.norm = nn.LayerNorm(self.width)
        self.head = nn.Linear(self.width, len(LETTERS))

    def forward(self, letters_NT: Tensor) -> Tensor:
        # Places for every example: methods that tell examples apart look for them on the first axis.
        places_NT = torch.arange(letters_NT.shape[1], device=letters_NT.device).expand_as(letters_NT)
        return self.head(self.norm(self.blocks(self.letters(letters_NT) + self.places(places_NT))))


class _Block(nn.Module):
    """Causal self-attention and two layers of perceptrons, each on the normalized input and added to it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention_in, self.attention_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_NTW: Tensor) -> Tensor:
        parts = self.attention_in(self.attention_norm(x_NTW)).unflatten(-1, (3 * self.heads, -1)).transpose(1, 2)
        queries, keys, values = parts.chunk(3, dim=1)
        attended = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x_NTW = x_NTW + self.attention_out(attended.transpose(1, 2).flatten(2))
        return x_NTW + self.down(functional.gelu(self.up(self.norm(x_NTW))))
