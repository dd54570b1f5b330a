"""Pairs as JSON lines, the layout of the public vision reward benchmarks, to preference pairs with their pictures copied."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from training.pairs import Pair, image_path_fault
from training.sampling import interleave, split_contests
from training.sources.pictures import PictureFolder, PictureRejected
from training.sources.prepared import Prepared, Progress, Split, followed, in_order
from training.sources.tables import Row, find_tables, read_rows, splits_of

VIDEO = "the row shows a video"
EQUAL = "chosen and rejected are equal"
_USED = {"id", "prompt", "chosen", "rejected", "image", "video"}


@dataclass(frozen=True, slots=True)
class Lines:
    """Where the lines and their pictures lie, and what makes pairs dependent."""

    files: Sequence[Path]
    images: Path | None = None
    contest_key: str = "id"


@dataclass(slots=True)
class _Reader:
    """One pass over the files."""

    lines: Lines
    pictures: PictureFolder
    ids: Counter[str] = field(default_factory=Counter)
    other_keys: Counter[str] = field(default_factory=Counter)

    def pair(self, row: Row) -> Pair | str:
        """The line as a pair, or why it is none. Raises DataInvalid."""
        self.other_keys.update(row.values.keys() - _USED - {self.lines.contest_key})
        name, contest, prompt = _name(row, "id"), _name(row, self.lines.contest_key), _prompt(row)
        chosen, rejected = _answer(row, "chosen"), _answer(row, "rejected")
        if row.values.get("video"):
            return VIDEO
        if chosen == rejected:
            return EQUAL
        self.ids[name] += 1
        pair_id = name if self.ids[name] == 1 else f"{name}#{self.ids[name]}"
        return Pair(pair_id, contest, self._image(row), prompt, chosen, rejected)

    def _image(self, row: Row) -> str | None:
        image = row.text("image") if "image" in row.values else None
        if image is None:
            return None
        if self.lines.images is None:
            raise row.fault("it has an image; say with --images where the pictures lie")
        if fault := image_path_fault(image):
            raise row.fault(fault.replace("of the table", "of images"))
        path = self.lines.images / image
        if not path.resolve().is_relative_to(self.lines.images.resolve()):
            raise row.fault("image leaves the folder of images")
        if not path.is_file():
            raise row.fault(f"image {image} does not exist in {self.lines.images}")
        try:
            return self.pictures.add(path.read_bytes())
        except PictureRejected as error:
            raise row.fault(f"image {image}: {error}") from None


def prepare_jsonl(lines: Lines, shares: Mapping[str, float], seed: int, pictures: PictureFolder, progress: Progress) -> Prepared:
    """Pairs by split. Raises DataInvalid for a line that is no pair or whose picture is missing or refused."""
    paths = find_tables(lines.files, (".jsonl", ".jsonl.gz"))
    named = splits_of(paths)
    reader = _Reader(lines, pictures)
    splits: dict[str, Split] = defaultdict(Split)
    by_contest: dict[str, dict[str, list[Pair]]] = defaultdict(lambda: defaultdict(list))
    for row in _rows(paths, progress):
        contest = _name(row, lines.contest_key)
        name = named[row.path] if named else split_contests([contest], shares, seed)[contest]
        splits[name].num_rows += 1
        pair = reader.pair(row)
        if isinstance(pair, str):
            splits[name].dropped[pair] += 1
        else:
            by_contest[name][contest].append(pair)
    for name, split in splits.items():
        split.pairs = interleave(by_contest[name], seed)
    listed = ", ".join(f"{key} ({count:,})" for key, count in sorted(reader.other_keys.items()))
    repeated = sum(count > 1 for count in reader.ids.values())
    remarks = [f"keys that were not used, with their number of lines: {listed}"] if listed else []
    remarks += [f"ids on more than one line, told apart by #2, #3, ..: {repeated:,}"] if repeated else []
    return Prepared(in_order(splits), paths, remarks=remarks)


def _rows(paths: Sequence[Path], progress: Progress) -> Iterator[Row]:
    for path in paths:
        yield from followed(read_rows(path), progress.begin(f"reading {path.name}", None))


def _name(row: Row, key: str) -> str:
    """An id or a category: text, or a whole number as text."""
    value = row.value(key)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not (text := row.text(key)) or not text.strip():
        raise row.fault(f"{key} is empty")
    return text


def _prompt(row: Row) -> str | None:
    prompt = row.text("prompt")
    if prompt is not None and not prompt.strip():
        raise row.fault("prompt is empty; null stands for the model's default prompt")
    return prompt


def _answer(row: Row, key: str) -> str:
    text = row.text(key)
    if text is None or not text.strip():
        raise row.fault(f"{key} is empty")
    return text
