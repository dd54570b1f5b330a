"""Dialogues to pairs: where the prompt ends, and what is no pair."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from training.pairs import DataInvalid, Pair
from training.sources.hh_rlhf import EMPTY, EQUAL, NO_DIALOGUE, NOTHING_SHARED, TWICE, prepare_hh_rlhf
from training.sources.prepared import Advance, Prepared

SHARES = {"train": 0.5, "validation": 0.25, "test": 0.25}
ASKED = "\n\nHuman: Why is the sky blue?\n\nAssistant:"


class Silent:
    def begin(self, what: str, total: int | None) -> Advance:
        return lambda number: None


def lines(*pairs: tuple[object, object]) -> str:
    return "".join(json.dumps({"chosen": chosen, "rejected": rejected}) + "\n" for chosen, rejected in pairs)


def prepare(*places: Path, seed: int = 1) -> Prepared:
    return prepare_hh_rlhf(places, SHARES, seed, Silent())


def only(tmp_path: Path, chosen: str, rejected: str) -> Pair:
    (tmp_path / "test.jsonl").write_text(lines((chosen, rejected)))
    (pair,) = prepare(tmp_path / "test.jsonl").splits["test"].pairs
    return pair


def test_the_prompt_ends_with_the_shared_assistant_and_answers_keep_their_space(tmp_path: Path) -> None:
    pair = only(tmp_path, f"{ASKED} Rayleigh scattering.", f"{ASKED} Because.")
    assert (pair.prompt, pair.chosen, pair.rejected) == (ASKED, " Rayleigh scattering.", " Because.")
    assert pair.image is None
    assert pair.contest != pair.pair_id


def test_of_several_turns_the_last_shared_one_counts(tmp_path: Path) -> None:
    shared = f"{ASKED} Scattering.\n\nHuman: Of what?\n\nAssistant:"
    pair = only(tmp_path, f"{shared} Light.", f"{shared} Life.")
    assert (pair.prompt, pair.chosen, pair.rejected) == (shared, " Light.", " Life.")


def test_dialogues_that_part_earlier_keep_their_further_turns(tmp_path: Path) -> None:
    """The answers differ in the first turn; the word Assistant comes again behind that, and is no part of the prompt."""
    (tmp_path / "test.jsonl").write_text(
        lines((f"{ASKED} One.\n\nHuman: And?\n\nAssistant: Two.", f"{ASKED} Uno.\n\nHuman: And?\n\nAssistant: Due."))
    )
    prepared = prepare(tmp_path / "test.jsonl")
    (pair,) = prepared.splits["test"].pairs
    assert (pair.prompt, pair.chosen) == (ASKED, " One.\n\nHuman: And?\n\nAssistant: Two.")
    assert prepared.remarks == ["pairs whose dialogues part before the last turn, so an answer goes on with further turns: 1"]


def test_one_answer_may_begin_like_the_other(tmp_path: Path) -> None:
    pair = only(tmp_path, f"{ASKED} Yes, of course.", f"{ASKED} Yes")
    assert (pair.chosen, pair.rejected) == (" Yes, of course.", " Yes")


def test_everything_dropped_is_counted(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(
        lines(
            (f"{ASKED} good", f"{ASKED} bad"),
            (f"{ASKED} good", f"{ASKED} bad"),
            ("Human: a\n\nAssistant: b", "Human: a\n\nAssistant: c"),
            ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: z\n\nAssistant: c"),
            (f"{ASKED} same", f"{ASKED} same "),
            (f"{ASKED} something", f"{ASKED} "),
            (f"{ASKED}", f"{ASKED} something"),
        )
    )
    split = prepare(tmp_path / "train.jsonl").splits["train"]
    assert split.dropped == {TWICE: 1, NO_DIALOGUE: 1, NOTHING_SHARED: 1, EQUAL: 1, EMPTY: 2}
    assert (split.num_rows, len(split.pairs), split.captions) == (7, 1, [])


def test_pairs_of_one_prompt_share_a_contest(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(
        lines((f"{ASKED} a", f"{ASKED} b"), (f"{ASKED} c", f"{ASKED} d"), ("\n\nHuman: x\n\nAssistant: e", "\n\nHuman: x\n\nAssistant: f"))
    )
    pairs = prepare(tmp_path / "train.jsonl").splits["train"].pairs
    contests = {pair.chosen: pair.contest for pair in pairs}
    assert contests[" a"] == contests[" c"] != contests[" e"]


def as_jsonl(folder: Path, text: str) -> None:
    (folder / "train.jsonl").write_text(text)


def as_gzip(folder: Path, text: str) -> None:
    (folder / "train.jsonl.gz").write_bytes(gzip.compress(text.encode()))


def as_parquet(folder: Path, text: str) -> None:
    pq.write_table(pa.Table.from_pylist([json.loads(line) for line in text.splitlines()]), folder / "train-00000-of-00001.parquet")


@pytest.mark.parametrize("write", [as_jsonl, as_gzip, as_parquet])
def test_the_three_kinds_of_file_in_a_folder_of_folders(tmp_path: Path, write: Callable[[Path, str], None]) -> None:
    (tmp_path / "helpful-base").mkdir()
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "test.jsonl").write_text("left by a download")
    write(tmp_path / "helpful-base", lines((f"{ASKED} good", f"{ASKED} bad")))
    prepared = prepare(tmp_path)
    assert [(pair.chosen, pair.rejected) for pair in prepared.splits["train"].pairs] == [(" good", " bad")]
    assert list(prepared.splits) == ["train"]


def test_one_file_is_split_by_dialogue(tmp_path: Path) -> None:
    asked = [f"\n\nHuman: {number % 100}?\n\nAssistant:" for number in range(200)]
    (tmp_path / "all.jsonl").write_text(lines(*((f"{text} good {k}", f"{text} bad {k}") for k, text in enumerate(asked))))
    splits = prepare(tmp_path / "all.jsonl").splits
    contests = [{pair.contest for pair in split.pairs} for split in splits.values()]
    assert list(splits) == ["train", "validation", "test"]
    assert sum(len(split.pairs) for split in splits.values()) == 200
    assert sum(map(len, contests)) == len(set().union(*contests)) == 100


def test_the_order_is_mixed_by_the_seed(tmp_path: Path) -> None:
    asked = [f"\n\nHuman: {number:03}?\n\nAssistant:" for number in range(100)]
    (tmp_path / "train.jsonl").write_text(lines(*((f"{text} good", f"{text} bad") for text in asked)))
    orders = [[pair.prompt for pair in prepare(tmp_path / "train.jsonl", seed=seed).splits["train"].pairs] for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(map(str, orders[0])) == asked != orders[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json\n", "train.jsonl:2: not a line of JSON"),
        ("[1]\n", "train.jsonl:2: expected a JSON object"),
        ('{"chosen": "a"}\n', "train.jsonl:2: column 'rejected' is missing"),
        ('{"chosen": "a", "rejected": 3}\n', "train.jsonl:2: rejected must be text, found int"),
        ('{"chosen": "a", "rejected": null}\n', "train.jsonl:2: chosen and rejected must be text, found null"),
        ('{"chosen": "a", "rejected": "\\ud800"}\n', "train.jsonl:2: rejected holds half a surrogate pair"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "train.jsonl").write_text(lines((f"{ASKED} good", f"{ASKED} bad")) + text)
    with pytest.raises(DataInvalid) as caught:
        prepare(tmp_path / "train.jsonl")
    assert str(caught.value) == str(tmp_path / message)


def test_a_broken_archive_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(lines(*((f"{ASKED} good {k}", f"{ASKED} bad {k}") for k in range(1_000))).encode())
    (tmp_path / "train.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataInvalid, match=r"train.jsonl.gz:\d+: cannot be read \(EOFError\)"):
        prepare(tmp_path)
