"""What a recipe names by text, loaded: functions by dotted path, datasets with their splits and their preparation."""

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import concatenate_datasets, load_dataset
from datasets.exceptions import DatasetsError
from trl import DatasetMixtureConfig, get_dataset

from .arguments import LambdaGRPOScriptArguments

FILE_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


def import_function(argument: str, name: str, accepted: str = "a dotted path to a function") -> Callable[..., Any]:
    """
    Import a function by its dotted path, from the current directory too.

    Args:
        argument (`str`):
            What named it, to begin an error message with.
        name (`str`):
            The dotted path.
        accepted (`str`):
            What is accepted, to end an error message with.

    Raises:
        ValueError: if `name` is not a dotted path, cannot be imported, or is not callable.
    """
    accepted = f"accepted: {accepted}"
    module_name, _, function_name = name.rpartition(".")
    if not module_name or module_name.startswith("."):
        raise ValueError(f"{argument} {name!r}; {accepted}.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (Exception, SystemExit) as error:  # the module is the user's: its own errors on import are any
        plain = isinstance(error, (ImportError, AttributeError))
        reason = str(error) if plain else f"{type(error).__name__}: {error}"
        raise ValueError(f"{argument} {name!r}, which cannot be imported ({reason}); {accepted}.") from error
    if not callable(function):
        raise ValueError(f"{argument} {name!r}, which is a {type(function).__name__}; {accepted}.")
    return function


def load_splits(
    script_args: LambdaGRPOScriptArguments, mixture: DatasetMixtureConfig, evaluate: bool
) -> tuple[Any, Any]:
    """
    Load the training split and, if `evaluate`, the held-out one (else `None`); a mixture goes before a single name.

    Raises:
        ValueError: if the dataset cannot be loaded, lacks a split, or a split lacks a column that its preparation
            needs or, once prepared, the `prompt` column.
    """
    if not mixture.datasets and not script_args.dataset_name:
        raise ValueError("no dataset: set dataset_name to a hub name or a local folder, or set datasets.")
    config, test_config = script_args.dataset_config, script_args.dataset_test_config
    dataset = load_named(script_args, mixture, config)
    train_dataset = pick_split(script_args, mixture, dataset, "dataset_train_split")
    if not evaluate:
        return train_dataset, None
    if test_config not in (None, config):
        dataset = load_named(script_args, mixture, test_config)
    return train_dataset, pick_split(script_args, mixture, dataset, "dataset_test_split")


def dataset_label(script_args: LambdaGRPOScriptArguments, mixture: DatasetMixtureConfig) -> str:
    """Name the dataset for an error message."""
    return "datasets" if mixture.datasets else f"dataset_name is {script_args.dataset_name!r}"


def load_named(script_args: LambdaGRPOScriptArguments, mixture: DatasetMixtureConfig, config: str | None) -> Any:
    """Load all splits of one configuration of the dataset; a `ValueError` tells why they cannot be loaded."""
    try:
        if mixture.datasets:
            return get_dataset(mixture)
        name, options = str(script_args.dataset_name), {"name": config, "streaming": script_args.dataset_streaming}
        if Path(name).is_file():  # which `datasets` takes by its format only; its one split is "train"
            return load_dataset(file_format(name), data_files=name, **options)
        return load_dataset(name, **options)
    except (OSError, ValueError, DatasetsError) as error:
        raise ValueError(f"{dataset_label(script_args, mixture)}, which cannot be loaded: {error}") from error


def file_format(name: str) -> str:
    """The format of a dataset that is one file, by its ending; a `ValueError` names those accepted."""
    ending = Path(name).suffix.lower()
    if ending not in FILE_FORMATS:
        raise ValueError(f"a file must end in one of {', '.join(FILE_FORMATS)}, not {ending!r}")
    return FILE_FORMATS[ending]


def pick_split(
    script_args: LambdaGRPOScriptArguments, mixture: DatasetMixtureConfig, dataset: Any, argument: str
) -> Any:
    """Take the splits that `argument` names, put them together and prepare them; raises what `load_splits` says."""
    label, wanted = dataset_label(script_args, mixture), getattr(script_args, argument)
    for split in wanted.split("+"):
        if split not in dataset:
            raise ValueError(f"{argument} is {wanted!r}; {label}, which has: {', '.join(map(str, dataset))}.")
    rows = concatenate_datasets([dataset[split] for split in wanted.split("+")])
    label = f"{label}: split {wanted!r}"
    if script_args.dataset_preparation:
        rows = prepare(rows, script_args.dataset_preparation, label)
    columns = rows.column_names  # None for some streamed datasets
    if columns is not None and "prompt" not in columns:
        raise ValueError(f"{label} has no 'prompt' column; it has: {', '.join(columns)}.")
    return rows


def prepare(rows: Any, name: str, label: str) -> Any:
    """
    Replace the columns of a dataset by what a function makes of each row.

    Args:
        rows (`Dataset` or `IterableDataset`):
            The dataset.
        name (`str`):
            Dotted path of the function, whose parameters are the columns that it needs.
        label (`str`):
            What to call the dataset in an error message.

    Returns:
        `Dataset` or `IterableDataset`: with the columns that the function returns.

    Raises:
        ValueError: if the function cannot be imported, lacks a column, or refuses a row.
    """
    function = import_function("dataset_preparation is", name)
    needed = list(inspect.signature(function).parameters)
    columns = rows.column_names
    missing = [column for column in needed if column not in (needed if columns is None else columns)]
    if columns is not None and missing:
        raise ValueError(
            f"{label} has no {missing[0]!r} column, which dataset_preparation {name!r} needs; it has: "
            f"{', '.join(columns)}."
        )
    return rows.map(function, input_columns=needed, remove_columns=columns)
