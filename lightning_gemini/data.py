"""Causal-language-model data from plain text: tokenized once, cached, memory-mapped, cut into windows.

A cache entry is a directory named after a fingerprint of everything that shaped it. It is built in a scratch
directory beside it and renamed into place, so whoever finds an entry finds all of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_gemini.text import (
    BPETokenizer,
    ByteTokenizer,
    DatasetRows,
    PretrainedTokenizer,
    TextFiles,
    Tokenizer,
)

FORMAT_VERSION = 1
# Tests are most of the library and unlike the rest; the others are tables and generated text.
STDLIB_SKIPPED = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "encodings", "pydoc_data"}
)


def split_documents(
    lengths: Sequence[int], fraction: float, seed: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Divide documents that lie one after the other, `lengths` tokens each, into training and validation.

    Whole documents go to validation, in an order shuffled by `seed`, as long as they fit into `fraction` of
    all tokens. Where they fill less than half of that (one long file, say), the tail of the longest other
    document makes up the rest.

    Returns:
        The (start, stop) token ranges of training and of validation: disjoint, ascending, together all.
    """
    wanted = int(sum(lengths) * fraction)
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)
    validation_documents: set[int] = set()
    missing = wanted
    for document in order:
        if lengths[document] <= missing:
            validation_documents.add(document)
            missing -= lengths[document]
    others = [document for document in range(len(lengths)) if document not in validation_documents]
    to_cut = max(others, key=lengths.__getitem__) if 2 * missing > wanted else None

    train, validation = [], []
    start = 0
    for document, length in enumerate(lengths):
        stop = start + length
        if document in validation_documents:
            validation.append((start, stop))
        elif document == to_cut:
            train.append((start, stop - missing))
            validation.append((stop - missing, stop))
        else:
            train.append((start, stop))
        start = stop
    return train, validation


class TokenWindows(Dataset):
    """Non-overlapping windows of a memory-mapped token file.

    Item `i` holds `input_ids` and `labels`, the same int64 tensor of [sequence_length] tokens: Hugging Face
    models shift the labels themselves. Tokens after the last whole window are left out.
    """

    def __init__(self, file: Path, dtype: str, sequence_length: int) -> None:
        self._arguments = (file, dtype, sequence_length)
        # numpy refuses to map an empty file, which is what a validation fraction of 0 leaves
        self.tokens = np.memmap(file, dtype, mode="r") if file.stat().st_size else np.empty(0, dtype)
        self._sequence_length = sequence_length

    def __reduce__(self) -> tuple[type[TokenWindows], tuple[Path, str, int]]:
        # A pickled memory map would carry its whole content to every spawned worker.
        return TokenWindows, self._arguments

    def __len__(self) -> int:
        return len(self.tokens) // self._sequence_length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = index * self._sequence_length
        window = torch.from_numpy(self.tokens[start : start + self._sequence_length].astype(np.int64))
        return {"input_ids": window, "labels": window}


class TextData(L.LightningDataModule):
    """Plain text for causal language models: files, a Hugging Face dataset, or Python's own library.

    Without `path` and `dataset` the text is the source of the running Python's standard library: about 10 MB
    that are there on every machine. `test` and `predict` use the validation windows.

    Args:
        path: Text files, or folders of text files (searched recursively; hidden files and files that are not
            UTF-8 text are left out). One document per file.
        dataset: A Hugging Face dataset instead: its name on the hub, or a local folder of jsonl, parquet or
            text files. One document per row.
        dataset_config: The dataset's configuration, where it has several.
        dataset_split: The dataset's split to read; training and validation are both taken from it.
        text_field: The dataset's column that holds the text.
        tokenizer: `bytes` (one token per UTF-8 byte, 256 in all, NUL between documents), `bpe` (a byte-level
            BPE trained on the text), or the name or path of a pretrained Hugging Face tokenizer.
        vocab_size: Tokens of the `bpe` vocabulary, at least 257; the other tokenizers have their own.
        sequence_length: Tokens per window.
        batch_size: Windows per batch and process.
        validation_fraction: Share of the tokens kept for validation, 0 for none. Whole documents where they
            are short enough, otherwise the tail of the longest one.
        split_seed: Chooses the documents kept for validation.
        num_workers: Worker processes per data loader; windows are cheap, so 0 is rarely too slow.
        cache_dir: Where tokenized text is kept. By default `lightning_gemini` in XDG_CACHE_HOME or ~/.cache.
    """

    def __init__(
        self,
        path: str | list[str] | None = None,
        dataset: str | None = None,
        dataset_config: str | None = None,
        dataset_split: str = "train",
        text_field: str = "text",
        tokenizer: str = "bytes",
        vocab_size: int = 4096,
        sequence_length: int = 128,
        batch_size: int = 32,
        validation_fraction: float = 0.05,
        split_seed: int = 0,
        num_workers: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        if path is not None and dataset is not None:
            raise ValueError(f"Give either path or dataset, not both; got path={path!r} and dataset={dataset!r}.")
        self._paths = [path] if isinstance(path, str) else path
        for name in self._paths or []:
            if not Path(name).exists():
                raise FileNotFoundError(f"path {name!r} does not exist (looked in {Path.cwd()}).")
        if sequence_length < 2:
            raise ValueError(f"sequence_length must be at least 2 to predict a token, got {sequence_length}.")
        if not 0 <= validation_fraction < 1:
            raise ValueError(f"validation_fraction must be at least 0 and below 1, got {validation_fraction}.")
        if tokenizer == "bpe" and vocab_size < 257:
            raise ValueError(f"vocab_size must be at least 257 (256 bytes and a separator), got {vocab_size}.")
        self._rows = dataset and (dataset, dataset_config, dataset_split, text_field)
        self._tokenizer_name = tokenizer
        self._bpe_vocab_size = vocab_size
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.validation_fraction = validation_fraction
        self.split_seed = split_seed
        self.num_workers = num_workers
        cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.cache_dir = Path(cache_dir or cache_home / "lightning_gemini").expanduser()
        self._tokenizer: Tokenizer | None = None

    @property
    def vocab_size(self) -> int:
        """Number of token ids; every id in a batch is below it."""
        return self._bpe_vocab_size if self._tokenizer_name == "bpe" else self._get_tokenizer().vocab_size

    @property
    def tokenizer(self) -> Any:
        """The tokenizer as one of transformers, which goes with an exported model; `None` for bytes."""
        return self._get_tokenizer().as_transformers

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes a token stands for on average in this text; a separator counts as one byte."""
        if self._tokenizer_name == "bytes":
            return 1.0
        return self._read_entry()[1]["bytes_per_token"]

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without a separator."""
        return [int(token) for token in self._get_tokenizer().encode(text)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; what is not valid UTF-8 becomes U+FFFD."""
        return self._get_tokenizer().decode(ids)

    @property
    def validation_tokens(self) -> np.ndarray:
        """The validation split as one flat array of unsigned integers, memory-mapped; needs `setup`."""
        return self._validation.tokens

    def prepare_data(self) -> None:
        """Tokenize into the cache, unless that is done already. Lightning calls it on one process per node.

        Raises:
            ValueError: there is no text, the tokenizer is unknown, or the dataset lacks its text column.
        """
        source = self._get_source()
        entry = self._entry(source)
        if _read_meta(entry) is not None:
            return
        self.cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".building-", dir=self.cache_dir) as scratch:
            built = Path(scratch, entry.name)
            built.mkdir()
            self._build(source, built)
            _publish(built, entry)

    def setup(self, stage: str) -> None:
        """Map the cached tokens.

        Raises:
            ValueError: the text is too short for one training batch on every process, or for one validation
                window.
        """
        entry, meta = self._read_entry()
        self._train = TokenWindows(entry / "train.bin", meta["dtype"], self.sequence_length)
        self._validation = TokenWindows(entry / "validation.bin", meta["dtype"], self.sequence_length)
        replicas = data_replicas(self.trainer) if self.trainer else 1
        if stage == "fit" and len(self._train) < self.batch_size * replicas:
            raise ValueError(
                f"The text is too short: its {meta['train']} training tokens make {len(self._train)} windows "
                f"of sequence_length={self.sequence_length}, but one batch needs "
                f"batch_size={self.batch_size} on each of {replicas} process(es). Give more text, or lower "
                "sequence_length or batch_size."
            )
        if self.validation_fraction and not len(self._validation):
            raise ValueError(
                f"The text is too short: its {meta['validation']} validation tokens make no window of "
                f"sequence_length={self.sequence_length}. Give more text, raise "
                f"validation_fraction={self.validation_fraction}, or set it to 0 to train without validation."
            )

    def train_dataloader(self) -> DataLoader:
        return self._loader(self._train, training=True)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        return self._loader(self._validation, training=False) if len(self._validation) else []

    def test_dataloader(self) -> DataLoader | list[DataLoader]:
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader | list[DataLoader]:
        return self.val_dataloader()

    def _loader(self, windows: TokenWindows, training: bool) -> DataLoader:
        return DataLoader(
            windows,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            shuffle=training,
            drop_last=training,
        )

    def _get_source(self) -> TextFiles | DatasetRows:
        if self._rows:
            return DatasetRows(*self._rows)
        if self._paths is not None:
            return TextFiles(self._paths)
        return TextFiles([sysconfig.get_paths()["stdlib"]], suffix=".py", skipped=STDLIB_SKIPPED)

    def _get_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            if self._tokenizer_name == "bytes":
                self._tokenizer = ByteTokenizer()
            elif self._tokenizer_name == "bpe":
                self._tokenizer = BPETokenizer(self._read_entry()[0] / "tokenizer.json", self.vocab_size)
            else:
                self._tokenizer = PretrainedTokenizer(self._tokenizer_name)
        return self._tokenizer

    def _entry(self, source: TextFiles | DatasetRows) -> Path:
        saved_tokenizer = Path(self._tokenizer_name)
        shaped_by = {
            "version": FORMAT_VERSION,
            "text": source.identity(),
            "tokenizer": self._tokenizer_name,
            "tokenizer_files": TextFiles([self._tokenizer_name]).identity() if saved_tokenizer.exists() else None,
            "vocab_size": self._bpe_vocab_size if self._tokenizer_name == "bpe" else None,
            "validation_fraction": self.validation_fraction,
            "split_seed": self.split_seed,
        }
        return self.cache_dir / hashlib.sha256(json.dumps(shaped_by).encode()).hexdigest()[:24]

    def _read_entry(self) -> tuple[Path, dict[str, Any]]:
        entry = self._entry(self._get_source())
        meta = _read_meta(entry)
        if meta is None:
            raise RuntimeError(
                f"There is no tokenized text at {entry}: call prepare_data() first (the Trainer does), on "
                "every machine that does not share cache_dir, and leave the text unchanged until then."
            )
        return entry, meta

    def _build(self, source: TextFiles | DatasetRows, folder: Path) -> None:
        """Fill `folder` with a whole cache entry."""
        if self._tokenizer_name == "bpe":
            BPETokenizer.train(source.texts(), folder / "tokenizer.json", self.vocab_size)
            tokenizer: Tokenizer = BPETokenizer(folder / "tokenizer.json", self.vocab_size)
        else:
            tokenizer = self._get_tokenizer()
        dtype = np.min_scalar_type(tokenizer.vocab_size - 1)  # uint8, uint16 or uint32
        lengths, text_bytes = [], 0
        with (folder / "all.bin").open("wb") as file:
            for text in source.texts():
                tokens = np.concatenate([tokenizer.encode(text), tokenizer.separator]).astype(dtype)
                tokens.tofile(file)
                lengths.append(len(tokens))
                text_bytes += len(text.encode()) + 1
        if not lengths:
            raise ValueError(
                f"No text found in {source.description}: expected UTF-8 text without NUL bytes. Check "
                "path or dataset, and convert text in other encodings to UTF-8."
            )
        everything = np.memmap(folder / "all.bin", dtype, mode="r")
        train, validation = split_documents(lengths, self.validation_fraction, self.split_seed)
        for name, ranges in (("train", train), ("validation", validation)):
            with (folder / f"{name}.bin").open("wb") as file:
                for start, stop in ranges:
                    everything[start:stop].tofile(file)
        (folder / "all.bin").unlink()
        meta = {
            "dtype": dtype.name,
            "train": sum(stop - start for start, stop in train),
            "validation": sum(stop - start for start, stop in validation),
            "bytes_per_token": text_bytes / sum(lengths),
        }
        (folder / "meta.json").write_text(json.dumps(meta))


def data_replicas(trainer: L.Trainer) -> int:
    """How many ranks get batches of their own: fewer than all where ranks share a model's layers."""
    sampler = trainer.distributed_sampler_kwargs
    return sampler["num_replicas"] if sampler else 1


def _read_meta(entry: Path) -> dict[str, Any] | None:
    """The entry's description, or None if there is no whole entry."""
    try:
        meta = json.loads((entry / "meta.json").read_text())
        size = np.dtype(meta["dtype"]).itemsize
        whole = all((entry / f"{name}.bin").stat().st_size == meta[name] * size for name in ("train", "validation"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return meta if whole else None


def _publish(built: Path, entry: Path) -> None:
    """Rename a built entry into place; one that another run published meanwhile is as good and stays."""
    for file in built.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())  # or a power failure could leave a published entry of empty files
    if entry.exists() and _read_meta(entry) is None:
        shutil.rmtree(entry)
    try:
        built.rename(entry)
    except OSError:
        if _read_meta(entry) is None:
            raise
