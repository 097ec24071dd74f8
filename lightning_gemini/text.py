"""Documents and tokenizers: where `data.TextData` gets its text from and how it becomes token ids."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

BPE_SEPARATOR = "<|endoftext|>"


class Tokenizer(Protocol):
    """Text to token ids and back; `separator` is what stands after every document.

    `as_transformers` is the same as a tokenizer of transformers, `None` where there is none.
    """

    vocab_size: int
    separator: list[int]

    @property
    def as_transformers(self) -> Any: ...

    def encode(self, text: str) -> Sequence[int] | np.ndarray: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class ByteTokenizer:
    """One token per UTF-8 byte. NUL separates documents: text that contains NUL counts as binary anyway."""

    vocab_size = 256
    separator = [0]
    as_transformers = None

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8)

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")


class BPETokenizer:
    """The byte-level BPE that `train` wrote to `file`."""

    def __init__(self, file: Path, vocab_size: int) -> None:
        from tokenizers import Tokenizer as FastTokenizer

        self._tokenizer = FastTokenizer.from_file(str(file))
        # What was asked for, not what a small text filled: the model's size is then known before training.
        self.vocab_size = vocab_size
        self.separator = [self._tokenizer.token_to_id(BPE_SEPARATOR)]

    @staticmethod
    def train(texts: Iterator[str], file: Path, vocab_size: int) -> None:
        from tokenizers import Tokenizer as FastTokenizer
        from tokenizers import decoders, models, pre_tokenizers, trainers

        tokenizer = FastTokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[BPE_SEPARATOR],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        tokenizer.save(str(file))

    @cached_property
    def as_transformers(self) -> Any:
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast(tokenizer_object=self._tokenizer, eos_token=BPE_SEPARATOR)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)


class PretrainedTokenizer:
    """A Hugging Face tokenizer by name or path; its end-of-text token (else a blank line) ends documents."""

    def __init__(self, name: str) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(name)
        except Exception as error:
            raise ValueError(
                f"tokenizer={name!r} is neither 'bytes' nor 'bpe', and transformers cannot load it as a "
                f"pretrained tokenizer ({error}). Check the spelling, or give the path of a saved tokenizer."
            ) from error
        self.vocab_size = len(self._tokenizer)
        end = self._tokenizer.eos_token_id
        end = self._tokenizer.sep_token_id if end is None else end
        self.separator = self.encode("\n\n") if end is None else [end]

    @property
    def as_transformers(self) -> Any:
        return self._tokenizer

    def encode(self, text: str) -> list[int]:
        # verbose: no warning that a whole document is longer than the model's window
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids))


class TextFiles:
    """Text files under the given roots, hidden ones left out, ordered by path."""

    def __init__(self, roots: Sequence[str], suffix: str = "", skipped: frozenset[str] = frozenset()) -> None:
        self.description = ", ".join(roots)
        self._files: list[Path] = []
        for root in (Path(name).resolve() for name in roots):
            found = [root] if root.is_file() else _walk(root, skipped)
            self._files += sorted(file for file in found if file.name.endswith(suffix))

    def identity(self) -> list[list[Any]]:
        """What tells two states of the files apart: path, bytes and modification time of each."""
        stats = [(file, file.stat()) for file in self._files]
        return [[str(file), stat.st_size, stat.st_mtime_ns] for file, stat in stats]

    def texts(self) -> Iterator[str]:
        for file in self._files:
            content = file.read_bytes()
            if b"\0" in content:
                continue  # binary
            try:
                text = content.decode()
            except UnicodeDecodeError:
                continue  # binary, or text in an encoding nobody declared
            if text.strip():
                yield text


class DatasetRows:
    """One text column of a Hugging Face dataset, a document per row."""

    def __init__(self, name: str, config: str | None, split: str, text_field: str) -> None:
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise ModuleNotFoundError(
                f"dataset={name!r} needs the `datasets` package, which is not installed. "
                "Install it with: pip install 'lightning-gemini[data]'"
            ) from error
        self.description = f"dataset {name} ({split})"
        self._dataset = load_dataset(name, config, split=split)
        if text_field not in self._dataset.column_names:
            raise ValueError(
                f"{self.description} has no column {text_field!r}; its columns are "
                f"{', '.join(self._dataset.column_names)}. Name the one that holds the text with text_field."
            )
        kind = getattr(self._dataset.features[text_field], "dtype", "nested data")
        if kind not in ("string", "large_string"):
            raise ValueError(f"{self.description}: column {text_field!r} holds {kind}; expected strings.")
        self._text_field = text_field

    def identity(self) -> list[Any]:
        """What tells two states of the dataset apart; its fingerprint follows the files it was made from."""
        return [self._dataset._fingerprint, len(self._dataset), self._text_field]

    def texts(self) -> Iterator[str]:
        for batch in self._dataset.select_columns([self._text_field]).iter(batch_size=1000):
            yield from (text for text in batch[self._text_field] if text and text.strip() and "\0" not in text)


def _walk(root: Path, skipped: frozenset[str]) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in skipped and not name.startswith(".")]
        visible = (Path(folder, name) for name in files if not name.startswith("."))
        yield from (file for file in visible if file.is_file())  # no broken links, no pipes
