"""Which tokens can be drawn, and how often."""

import pytest
import torch

from megatron_lite.errors import ConfigError
from megatron_lite.inference.sampling import SamplingConfig, sample

LOGITS = torch.tensor([[0.5, 0.3, 0.1, 0.06, 0.04]]).log()


def frequencies(config: SamplingConfig, draws: int = 20_000) -> list[float]:
    generator = torch.Generator().manual_seed(1)
    tokens = sample(LOGITS.expand(draws, -1), config, generator)
    return (torch.bincount(tokens, minlength=5) / draws).tolist()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (SamplingConfig(), [0.5, 0.3, 0.1, 0.06, 0.04]),
        (SamplingConfig(temperature=0.0), [1, 0, 0, 0, 0]),
        (SamplingConfig(top_k=1), [1, 0, 0, 0, 0]),
        (SamplingConfig(top_k=2), [0.625, 0.375, 0, 0, 0]),
        (SamplingConfig(top_k=99), [0.5, 0.3, 0.1, 0.06, 0.04]),
        (SamplingConfig(temperature=0.5), [0.7038, 0.2534, 0.0282, 0.0101, 0.0045]),
        (SamplingConfig(top_p=0.4), [1, 0, 0, 0, 0]),
        (SamplingConfig(top_p=0.7), [0.625, 0.375, 0, 0, 0]),
        (SamplingConfig(top_p=0.85), [0.5 / 0.9, 0.3 / 0.9, 0.1 / 0.9, 0, 0]),
        (SamplingConfig(top_p=1.0), [0.5, 0.3, 0.1, 0.06, 0.04]),
        (SamplingConfig(top_k=3, top_p=0.5), [1, 0, 0, 0, 0]),
    ],
)  # fmt: skip
def test_frequencies(config: SamplingConfig, expected: list[float]) -> None:
    found = frequencies(config)
    assert found == pytest.approx(expected, abs=0.015)
    assert all(share == 0 for share, wanted in zip(found, expected, strict=True) if wanted == 0)


def test_the_seed_decides() -> None:
    def draw(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return [int(sample(LOGITS, SamplingConfig(), generator)) for _ in range(30)]

    assert draw(1) == draw(1) != draw(2)


def test_padded_columns_are_never_drawn() -> None:
    logits = torch.tensor([[0.0, 0.0, -torch.inf, -torch.inf]]).expand(500, -1)
    assert sample(logits, SamplingConfig(top_k=3), torch.Generator().manual_seed(1)).max() == 1


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"temperature is -1[\s\S]*top_k is -2[\s\S]*top_p is 1\.5"):
        SamplingConfig(temperature=-1.0, top_k=-2, top_p=1.5).validate()
