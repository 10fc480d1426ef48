"""Where the data comes from and how it becomes samples: the flags of Megatron's group "data and dataloader"."""

import json
import os
from dataclasses import dataclass

from megatron_lite.config_field import Validated, knob
from megatron_lite.datasets.utils import Blend, get_blend_from_list, parse_and_normalize_split
from megatron_lite.errors import ConfigError

DEFAULT_SPLIT = "969, 30, 1"


@dataclass
class DataConfig(Validated):
    """The data of a run."""

    data_path: list[str] | None = knob(
        None,
        "Prefixes (or files) of .bin/.idx pairs, or weights and prefixes in turn, divided by --split.",
        metavar="WORD",
    )
    train_data_path: list[str] | None = knob(
        None, "As --data-path, for the training data alone; without --split.", metavar="WORD"
    )
    valid_data_path: list[str] | None = knob(None, "As --train-data-path, for the validation data.", metavar="WORD")
    test_data_path: list[str] | None = knob(None, "As --train-data-path, for the test data.", metavar="WORD")
    data_args_path: str | None = knob(None, "A file that holds the words of --data-path.", metavar="FILE")
    per_split_data_args_path: str | None = knob(
        None, 'A JSON file with the keys "train", "valid" and "test", each the words of --data-path.', metavar="FILE"
    )
    split: str | None = knob(
        None, f'Shares of train, valid and test in the files of --data-path; by default "{DEFAULT_SPLIT}".'
    )
    mock_data: bool = knob(False, "Train on made-up, reproducible data instead of files.")
    seq_length: int | None = knob(None, "Tokens of a sample.")
    num_workers: int = knob(2, "Processes per rank that prepare batches; 0 prepares them in the training process.")
    dataloader_type: str | None = knob(
        None,
        'Order of the samples: "single" follows the dataset (the default), "cyclic" draws a new order every epoch.',
        choices=("single", "cyclic"),
    )
    data_cache_path: str | None = knob(None, "Folder of the cached sample indices; by default beside the data.")
    mmap_bin_files: bool = knob(True, "Map .bin files into memory instead of reading them with system calls.")
    num_dataset_builder_threads: int = knob(1, "Datasets of a blend whose indices are built at the same time.")
    mid_level_dataset_surplus: float = knob(
        0.005, "Share of samples built beyond what each dataset of a weighted blend is asked for."
    )
    reset_position_ids: bool = knob(False, "Start positions again at 0 after each end-of-document token.")
    reset_attention_mask: bool = knob(
        False, "Keep tokens from attending to documents of their sample that ended before, at an end-of-document token."
    )
    dataloader_inter_document_masking: bool = knob(
        False, "The same and --reset-position-ids, by the documents of the files instead of end-of-document tokens."
    )
    eod_mask_loss: bool = knob(False, "Do not count the prediction made from an end-of-document token.")
    pad_to_multiple: bool = knob(
        False, "Fill up each sample, masked, to the next length that context and sequence parallelism can split."
    )
    allow_ambiguous_pad_tokens: bool = knob(
        False, "Mask each token that has the pad id even if that is also the id of another special token."
    )

    @property
    def positions_depend_on_text(self) -> bool:
        """Whether positions or documents of a sample are found by looking at its tokens."""
        return self.reset_position_ids or self.reset_attention_mask or self.dataloader_inter_document_masking

    def violations(self) -> list[str]:
        """See Validated."""
        found = super().violations()
        found += self._violations_of_sources()
        if self.seq_length is not None and self.seq_length < 1:
            found.append(f"seq_length is {self.seq_length}; it must be at least 1.")
        if self.num_workers < 0:
            found.append(f"num_workers is {self.num_workers}; it must be 0 or more.")
        if self.num_dataset_builder_threads < 1:
            found.append(f"num_dataset_builder_threads is {self.num_dataset_builder_threads}; it must be at least 1.")
        if self.mid_level_dataset_surplus < 0.0:
            found.append(f"mid_level_dataset_surplus is {self.mid_level_dataset_surplus}; it must be 0 or more.")
        return found

    def _violations_of_sources(self) -> list[str]:
        found = []
        for name in ("data_args_path", "per_split_data_args_path"):
            path = getattr(self, name)
            if path is not None and not os.path.isfile(path):
                found.append(f"{name} names {path!r}, which is not a file; write the path of an existing one.")
        sources = {
            "data_path": self.data_path,
            "data_args_path": self.data_args_path,
            "train_data_path, valid_data_path and test_data_path": (
                self.train_data_path or self.valid_data_path or self.test_data_path
            ),
            "per_split_data_args_path": self.per_split_data_args_path,
            "mock_data": self.mock_data,
        }
        given = [name for name, value in sources.items() if value]
        if len(given) > 1:
            found.append(f"The data is named {len(given)} times, by {' and by '.join(given)}; keep one of them.")
        by_split = self.per_split_data_args_path or sources["train_data_path, valid_data_path and test_data_path"]
        if by_split and self.split is not None:
            found.append(f"split is {self.split!r}, but each split has files of its own; drop --split.")
        if self.split is not None:
            try:
                parse_and_normalize_split(self.split)
            except ConfigError as error:
                found.append(str(error))
        return found

    def blends(self) -> tuple[Blend | None, list[Blend | None] | None]:
        """What `blend` and `blend_per_split` of a dataset configuration are to be."""
        if self.mock_data:
            return None, None
        if self.data_args_path is not None:
            with open(self.data_args_path, encoding="utf-8") as file:
                return get_blend_from_list(file.read().split()), None
        if self.data_path is not None:
            return get_blend_from_list(self.data_path), None
        if self.per_split_data_args_path is not None:
            return None, _read_per_split_file(self.per_split_data_args_path)
        per_split = [self.train_data_path, self.valid_data_path, self.test_data_path]
        if any(per_split):
            return None, [get_blend_from_list(words or None) for words in per_split]
        raise ConfigError("No data is named: give --data-path with the prefix of a .bin/.idx pair, or --mock-data.")


def _read_per_split_file(path: str) -> list[Blend | None]:
    try:
        with open(path, encoding="utf-8") as file:
            words_of = json.load(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--per-split-data-args-path {path}: {error}; write a JSON object there.") from error
    if not isinstance(words_of, dict):
        raise ConfigError(f'--per-split-data-args-path {path}: expected an object like {{"train": ["prefix"]}}.')
    blends = []
    for split in ("train", "valid", "test"):
        words = words_of.get(split)
        blends.append(get_blend_from_list(words.split() if isinstance(words, str) else words))
    return blends
