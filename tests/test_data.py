"""TextData: what it reads, how it splits and caches, and what it says when it cannot."""

import builtins
import json
import os
import pickle
import sysconfig
from pathlib import Path

import datasets
import huggingface_hub.constants
import numpy as np
import pandas
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

import lightning_gemini.data
from lightning_gemini.data import TextData, split_documents
from lightning_gemini.text import BPETokenizer


@pytest.fixture(autouse=True)
def _own_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def texts(tmp_path):
    """Twenty files of 100 bytes; file `i` repeats the letter `a + i`."""
    folder = tmp_path / "texts" / "deeper"
    folder.mkdir(parents=True)
    for i in range(20):
        (folder / f"{i:02}.txt").write_text(chr(ord("a") + i) * 100)
    return folder.parent


def prepared(**arguments):
    data = TextData(**{"sequence_length": 10, "batch_size": 2, "validation_fraction": 0.2} | arguments)
    data.prepare_data()
    data.setup("fit")
    return data


def tokens(loader):
    return torch.cat([batch["input_ids"].flatten() for batch in loader]).tolist()


def entries(data):
    return [path for path in data.cache_dir.iterdir() if not path.name.startswith(".")]


# What comes out


def test_batches_are_windows_whose_labels_are_the_inputs(texts):
    data = prepared(path=str(texts))
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].shape == (2, 10)
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert torch.equal(batch["input_ids"], batch["labels"])
    assert data.vocab_size == 256
    assert data.bytes_per_token == 1.0


def test_windows_follow_each_other_without_overlap(texts):
    data = prepared(path=str(texts))
    seen = tokens(data.val_dataloader())
    assert seen == data.validation_tokens[: len(seen)].tolist()
    assert 0 <= len(data.validation_tokens) - len(seen) < 10


def test_training_is_shuffled_and_drops_the_partial_batch(texts):
    data = prepared(path=str(texts), batch_size=7)
    assert all(len(batch["labels"]) == 7 for batch in data.train_dataloader())
    torch.manual_seed(0)
    assert tokens(data.train_dataloader()) != tokens(data.train_dataloader())


def test_train_and_validation_share_no_document(texts):
    data = prepared(path=str(texts))
    train, validation = set(tokens(data.train_dataloader())) - {0}, set(tokens(data.val_dataloader())) - {0}
    assert len(validation) == 4  # a fifth of twenty
    assert not train & validation
    assert validation == set(tokens(prepared(path=str(texts)).val_dataloader())) - {0}
    assert validation != set(tokens(prepared(path=str(texts), split_seed=1).val_dataloader())) - {0}


def test_documents_end_with_nul(texts):
    everything = prepared(path=str(texts), validation_fraction=0)._train.tokens
    assert len(everything) == 20 * 101
    assert not everything[100::101].any()


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.3, 0.9])
@pytest.mark.parametrize("lengths", [[1000], [10] * 100, [1, 900, 1, 50, 900], [3, 5000]])
def test_split_covers_every_token_once(lengths, fraction):
    train, validation = split_documents(lengths, fraction, seed=3)
    count = np.zeros(sum(lengths), int)
    for start, stop in train + validation:
        count[start:stop] += 1
    assert (count == 1).all()
    wanted = int(sum(lengths) * fraction)
    assert wanted / 2 <= sum(stop - start for start, stop in validation) <= wanted


def test_one_long_document_gives_its_tail(tmp_path):
    file = tmp_path / "one.txt"
    file.write_text("x" * 900 + "y" * 99)
    assert bytes(prepared(path=str(file), validation_fraction=0.1).validation_tokens) == b"y" * 99 + b"\0"


def test_no_validation(texts):
    assert prepared(path=str(texts), validation_fraction=0).val_dataloader() == []


def test_binary_hidden_and_empty_files_are_left_out(texts):
    for name, content in {"nul": b"a\0b", "latin": b"caf\xe9", ".hidden": b"secret", "blank": b" \n"}.items():
        (texts / name).write_bytes(content)
    (texts / "gone").symlink_to(texts / "nowhere")
    assert len(prepared(path=str(texts), validation_fraction=0)._train.tokens) == 20 * 101


def test_several_paths(texts):
    files = [str(texts / "deeper" / name) for name in ("00.txt", "05.txt")]
    assert set(prepared(path=files, validation_fraction=0)._train.tokens) == {0, ord("a"), ord("f")}


def test_default_is_the_standard_library_without_tests(tmp_path):
    data = prepared(validation_fraction=0.05)
    text = data.decode(data._train.tokens)
    assert 5e6 < len(text) < 2e7
    assert "class TestCase" in text  # unittest itself
    root = Path(sysconfig.get_paths()["stdlib"]).resolve()
    folders = {folder for file in data._get_source()._files for folder in file.relative_to(root).parts}
    assert "unittest" in folders
    assert not folders & {"site-packages", "test", "tests"}


def test_workers_map_the_file_instead_of_copying_it(texts):
    windows = prepared(path=str(texts))._train
    assert len(pickle.dumps(windows)) < 1000
    copied = next(iter(DataLoader(pickle.loads(pickle.dumps(windows)), batch_size=2)))
    assert torch.equal(copied["labels"][1], windows[1]["labels"])


# Tokenizers


def test_bytes_round_trip():
    data = TextData()
    assert data.encode("aé") == [97, 195, 169]
    assert data.decode(data.encode("aé €")) == "aé €"
    assert data.decode([195]) == "\ufffd"


def test_bpe_is_trained_once_and_cached(texts, monkeypatch):
    (texts / "words.txt").write_text("the cat and the hat and the cat\n" * 50)
    data = prepared(path=str(texts), tokenizer="bpe", vocab_size=300)
    monkeypatch.setattr(BPETokenizer, "train", lambda *_: pytest.fail("trained again"))
    again = prepared(path=str(texts), tokenizer="bpe", vocab_size=300)
    text = "the hat é <|endoftext|>"
    assert again.decode(again.encode(text)) == text
    assert again.encode(text) == data.encode(text)
    assert len(again.encode("the cat and the")) < 8
    assert again.vocab_size == 300
    assert max(tokens(again.train_dataloader())) < 300
    assert again._train.tokens.dtype == np.uint16
    assert again.bytes_per_token > 1


def test_pretrained_tokenizer_from_a_folder(texts, tmp_path):
    fast = Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1, "hello": 2, "world": 3}, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "tokenizer"
    PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>", unk_token="[UNK]").save_pretrained(folder)
    file = tmp_path / "hello.txt"
    file.write_text("hello world " * 50)
    data = prepared(path=str(file), tokenizer=str(folder), validation_fraction=0)
    assert data.vocab_size == 4
    assert data._train.tokens.tolist() == [2, 3] * 50 + [1]
    assert data.decode([2, 3]) == "hello world"
    assert data.bytes_per_token == pytest.approx(601 / 101)


# Hugging Face datasets


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "txt"])
def test_local_datasets(tmp_path, kind):
    folder = tmp_path / "rows"
    folder.mkdir()
    rows = ["first row " * 5, "second row " * 5, "", "third row " * 5]
    table = pandas.DataFrame({"text": rows, "number": range(4)})
    if kind == "jsonl":
        table.to_json(folder / "rows.jsonl", orient="records", lines=True)
    elif kind == "parquet":
        table.to_parquet(folder / "rows.parquet")
    else:
        (folder / "rows.txt").write_text("\n".join(rows))
    data = prepared(dataset=str(folder), validation_fraction=0)
    assert data.decode(data._train.tokens) == "".join(f"{row}\0" for row in rows if row)


def test_dataset_split_and_text_field(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text(json.dumps({"body": split * 10}))
    data = prepared(dataset=str(folder), dataset_split="test", text_field="body", validation_fraction=0)
    assert data.decode(data._train.tokens) == "test" * 10 + "\0"


# The cache


def test_second_run_reads_the_cache(texts, monkeypatch, tmp_path):
    data = prepared(path=str(texts))
    assert data.cache_dir == tmp_path / "xdg" / "lightning_gemini"
    monkeypatch.setattr(TextData, "_build", lambda *_: pytest.fail("built again"))
    prepared(path=str(texts), batch_size=3, sequence_length=20)


def test_whatever_shapes_the_tokens_makes_a_new_entry(texts):
    data = prepared(path=str(texts))
    prepared(path=str(texts), split_seed=5)
    prepared(path=str(texts), validation_fraction=0.3)
    prepared(path=str(texts), tokenizer="bpe", vocab_size=300, batch_size=1)
    prepared(path=str(texts), tokenizer="bpe", vocab_size=301, batch_size=1)
    (texts / "new.txt").write_text("new")
    prepared(path=str(texts))
    os.utime(texts / "new.txt", ns=(1, 1))
    prepared(path=str(texts))
    assert len(entries(data)) == 7


def test_changed_dataset_makes_a_new_entry(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "rows.txt").write_text("before\n" * 20)
    data = prepared(dataset=str(folder))
    prepared(dataset=str(folder))
    assert len(entries(data)) == 1
    (folder / "rows.txt").write_text("afterwards\n" * 20)
    assert data.encode("afterwards")[0] in tokens(prepared(dataset=str(folder)).train_dataloader())
    assert len(entries(data)) == 2


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError("No space left on device")])
def test_interrupted_run_leaves_nothing(texts, monkeypatch, interruption):
    def interrupt(*_):
        raise interruption

    data = TextData(path=str(texts))
    with monkeypatch.context() as patch:
        patch.setattr(lightning_gemini.data, "split_documents", interrupt)
        with pytest.raises((KeyboardInterrupt, OSError)):
            data.prepare_data()
    assert list(data.cache_dir.iterdir()) == []
    prepared(path=str(texts))


def test_two_runs_at_once_share_one_whole_entry(texts, monkeypatch):
    original = split_documents

    def split_while_another_run_finishes(*arguments):
        monkeypatch.setattr(lightning_gemini.data, "split_documents", original)
        prepared(path=str(texts))
        return original(*arguments)

    monkeypatch.setattr(lightning_gemini.data, "split_documents", split_while_another_run_finishes)
    data = prepared(path=str(texts))
    assert len(list(data.cache_dir.iterdir())) == 1
    assert len(tokens(data.train_dataloader()))


@pytest.mark.parametrize("damage", ["truncated", "missing", "description"])
def test_damaged_entry_is_built_again(texts, damage):
    data = prepared(path=str(texts))
    (entry,) = entries(data)
    whole = (entry / "train.bin").read_bytes()
    if damage == "truncated":
        (entry / "train.bin").write_bytes(whole[:-1])
    elif damage == "missing":
        (entry / "train.bin").unlink()
    else:
        (entry / "meta.json").write_text('{"dtype": ')
    prepared(path=str(texts))
    assert (entry / "train.bin").read_bytes() == whole


# What it says when it cannot


def test_path_and_dataset():
    with pytest.raises(ValueError, match="either path or dataset, not both; got path='a' and dataset='b'"):
        TextData(path="a", dataset="b")


def test_path_does_not_exist():
    with pytest.raises(FileNotFoundError, match="path '/no/such' does not exist"):
        TextData(path=["/", "/no/such"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sequence_length": 1}, "sequence_length must be at least 2"),
        ({"validation_fraction": 1.0}, "at least 0 and below 1, got 1.0"),
        ({"tokenizer": "bpe", "vocab_size": 256}, "at least 257 .* got 256"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        TextData(**arguments)


def test_no_text_found(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"No text found in .*empty: expected UTF-8 text"):
        prepared(path=str(tmp_path / "empty"))


def test_too_short_for_one_batch(texts):
    with pytest.raises(ValueError, match=r"too short: its 1616 training tokens make 1 windows .*batch_size=2"):
        prepared(path=str(texts), sequence_length=1000)


def test_evaluation_needs_no_whole_training_batch(texts):
    data = prepared(path=str(texts))
    data.batch_size = 1000
    data.setup("validate")
    assert len(data.val_dataloader()) == 1


def test_too_short_for_validation(texts):
    with pytest.raises(ValueError, match=r"404 validation tokens make no window .*raise validation_fraction=0.2"):
        prepared(path=str(texts), sequence_length=500)


def test_setup_without_prepare(texts):
    with pytest.raises(RuntimeError, match=r"no tokenized text at .*call prepare_data\(\) first"):
        TextData(path=str(texts)).setup("fit")


def test_unknown_tokenizer(texts, tmp_path):
    for name in ("byts", str(tmp_path)):
        with pytest.raises(ValueError, match=r"(?s)is neither 'bytes' nor 'bpe', and .* Check the spelling"):
            prepared(path=str(texts), tokenizer=name)


def test_missing_and_wrong_text_column(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "rows.jsonl").write_text(json.dumps({"body": "text", "number": 3}))
    with pytest.raises(ValueError, match=r"no column 'text'; its columns are body, number\. .*text_field"):
        prepared(dataset=str(folder))
    with pytest.raises(ValueError, match="column 'number' holds int64; expected strings"):
        prepared(dataset=str(folder), text_field="number")


def test_datasets_is_not_installed(monkeypatch):
    original = builtins.__import__

    def without_datasets(name, *arguments, **keywords):
        if name == "datasets":
            raise ModuleNotFoundError("No module named 'datasets'")
        return original(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without_datasets)
    with pytest.raises(ModuleNotFoundError, match=r"needs the `datasets` package.*pip install"):
        prepared(dataset="anything")
