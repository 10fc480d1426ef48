"""A check that the data of a run last to its end: blends without weights are read once."""

from collections.abc import Iterator, Sequence, Sized

from megatron_lite.arguments import RunConfig
from megatron_lite.datasets.blended_dataset import BlendedDataset
from megatron_lite.datasets.utils import Split
from megatron_lite.errors import ConfigError
from megatron_lite.num_microbatches_calculator import NumMicroBatchesCalculator


def check_supply(
    config: RunConfig, calculator: NumMicroBatchesCalculator, datasets: Sequence[Sized | None], wanted: Sequence[int]
) -> None:
    """Say before the first step if a split has fewer samples than the run will read.

    Args:
        config: of the run.
        calculator: of its batches.
        datasets: train, valid and test; None for a split that is empty, which is another matter.
        wanted: samples that the whole run reads of each.

    Raises:
        ConfigError: with weights that repeat the data, and the length that does without.
    """
    if config.data.dataloader_type == "cyclic":
        return
    found = []
    for split, dataset, number in zip(Split, datasets, wanted, strict=True):
        if dataset is None or not 0 < len(dataset) < number or (split is Split.train and config.validation.skip_train):
            continue
        shared = datasets[0] if config.data.data_path or config.data.data_args_path else None
        remedies = [
            *_weights(config, split, shared or dataset),
            *_length(config, calculator, split, len(dataset), number),
        ]
        found.append(
            f"the {split.name} split has {len(dataset):,} samples, but the run reads {number:,}, and a blend without "
            f"weights is read once: {', or '.join(remedies)}."
        )
    if found:
        raise ConfigError.from_violations(found)


def _weights(config: RunConfig, split: Split, dataset: Sized) -> Iterator[str]:
    """The blend with the numbers of samples as weights: the same mixture, repeated as often as needed."""
    if not isinstance(dataset, BlendedDataset):
        return
    words = " ".join(f"{len(part)} {part.dataset_path}" for part in dataset.datasets)
    data = config.data
    if data.data_path:
        yield f"repeat it with weights, --data-path {words}"
    elif data.data_args_path:
        yield f"repeat it with weights, which {data.data_args_path} then holds: {words}"
    elif data.per_split_data_args_path:
        yield f"repeat it with weights, which {data.per_split_data_args_path} then holds for {split.name}: {words}"
    else:
        yield f"repeat it with weights, --{split.name}-data-path {words}"


def _length(
    config: RunConfig, calculator: NumMicroBatchesCalculator, split: Split, available: int, wanted: int
) -> Iterator[str]:
    """The longest run, or the most batches of an evaluation, for which the samples are enough."""
    if split is Split.train:
        iterations = calculator.iterations(available)
        if iterations and config.training.train_samples is None:
            yield f"end after one epoch, --train-iters {iterations}"
        elif iterations:
            yield f"end after one epoch, --train-samples {calculator.samples(iterations)}"
        return
    batches = config.validation.eval_iters * available // wanted
    yield f"evaluate on fewer batches, --eval-iters {batches}"
