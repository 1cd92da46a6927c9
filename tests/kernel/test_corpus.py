"""The fuzzer's corpus, replayed: layers that once were interesting stay harmless."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from images import archive

from fuzz.layer import Arena, with_checksums
from tests.kernel.test_unpack import HOSTILE

CORPUS = sorted((Path(__file__).parents[1] / "corpus").iterdir())


@pytest.mark.parametrize("path", CORPUS, ids=[path.name for path in CORPUS])
def test_a_layer_of_the_corpus_is_harmless(tmp_path: Path, path: Path) -> None:
    arena = Arena(str(tmp_path))
    try:
        accepted = arena.try_layer(path.read_bytes())
    finally:
        arena.close()
    assert accepted == path.name.startswith("good-")


def test_mutations_of_hostile_layers_are_harmless(tmp_path: Path, seed: int) -> None:
    """What the fuzzer does, without its guidance: bytes changed, blocks moved, checksums put right."""
    arena, chance = Arena(str(tmp_path)), random.Random(seed)
    sources = [archive(nodes) for nodes in HOSTILE.values()] + [path.read_bytes() for path in CORPUS]
    accepted = 0
    for _ in range(300):
        data = bytearray(chance.choice(sources))
        for _ in range(chance.randrange(1, 6)):
            block = 512 * chance.randrange(len(data) // 512)
            if chance.random() < 0.7:
                data[block + chance.randrange(512)] = chance.choice(b"\0\xff./0127xgLKS5")
            else:
                other = 512 * chance.randrange(len(data) // 512)
                data[block : block + 512] = data[other : other + 512]
        accepted += arena.try_layer(with_checksums(bytes(data)))
    arena.close()
    print(f"{accepted} of 300 accepted")
