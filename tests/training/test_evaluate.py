"""Tables to figures over a judge whose scores are known, and the command itself over the bundled demo, in process and over HTTP."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from app.artifacts import open_artifact
from tests.e2e.server import started
from tests.tiny import picture, write_text_only
from training.controls import CAPTION_ONLY, LENGTH, SHUFFLED, Control
from training.evaluate import BadArguments, Options, check_fit, main, measure_captions, measure_pairs, read_tables
from training.pairs import DataInvalid, Pair, RatedCaption, write_captions, write_pairs
from training.scorers import CaptionGroup, Outcome, Refusal, Target, weights_sha256

TARGET = Target("judge", "artifact", "f" * 64, "float32", "cpu", "Say it.", False, 1.0, True)
OPTIONS = Options(num_draws=200)
REFUSED = "refused"


def by_length(image: Path | None, prompt: str | None, caption: str) -> float:
    """Longer is better, the opposite of the length control."""
    return float(len(caption))


def by_own_image(image: Path | None, prompt: str | None, caption: str) -> float:
    """Captions say which image they fit; without the image all are equal."""
    return float(image is not None and image.stem in caption)


@dataclass
class Judge:
    """Implements `GroupScorer` by a function; refuses captions that say so."""

    answer: Callable[[Path | None, str | None, str], float] = by_length
    target: Target = TARGET
    asked: list[CaptionGroup] = field(default_factory=list)

    def score(self, groups: Sequence[CaptionGroup]) -> Iterator[tuple[Outcome, ...]]:
        for group in groups:
            self.asked.append(group)
            yield tuple(self._outcome(group, caption) for caption in group.captions)

    def _outcome(self, group: CaptionGroup, caption: str) -> Outcome:
        return Refusal("caption_too_long", "too long") if REFUSED in caption else self.answer(group.image, group.prompt, caption)


@dataclass
class Steps:
    """What was begun, with how many captions, and how many were done."""

    totals: dict[str, int] = field(default_factory=dict)
    done: dict[str, int] = field(default_factory=dict)

    def begin(self, what: str, total: int) -> Callable[[int], None]:
        self.totals[what], self.done[what] = total, 0

        def advance(number: int) -> None:
            self.done[what] += number

        return advance


def nothing(what: str, total: int) -> Callable[[int], None]:
    return lambda number: None


def pair(number: int, contest: str, chosen: str, rejected: str, **parts: Any) -> Pair:
    return Pair(f"pair-{number}", contest, f"images/{contest}.png", None, chosen, rejected, **parts)


def write_images(folder: Path, names: Sequence[str], *, same: bool = False) -> Path:
    (folder / "images").mkdir()
    for seed, name in enumerate(names):
        (folder / "images" / f"{name}.png").write_bytes(picture(56, 56, seed=0 if same else seed))
    return folder / "pairs.parquet"


def controls_of(judge: Judge, path: Path, pairs: Sequence[Pair], options: Options = OPTIONS) -> dict[str, Control]:
    return {control.name: control for control in measure_pairs(judge, path, pairs, options, nothing).controls}


def test_the_figures_of_a_table_by_hand(tmp_path: Path) -> None:
    """Longer wins. Contest 1: margins 2 and -1; contest 2: margin 0, and a pair with a refused caption, which is in no figure.

    Of three scored pairs one is won, one tied, one lost: accuracy 1/3 pooled, (1/2 + 0) / 2 over contests, mean margin 1/3. The
    control "shorter wins" is right in one pair of three and ties in another as well, so the model is ahead by nothing.
    """
    pairs = [
        pair(1, "1", "abcd", "ab", sigma_gap=3.5),
        pair(2, "1", "abc", "abcd", sigma_gap=9.0),
        pair(3, "2", "xy", "ab", sigma_gap=4.0),
        pair(4, "2", "ab", f"{REFUSED}", sigma_gap=4.0),
    ]
    steps = Steps()
    found = measure_pairs(Judge(), write_images(tmp_path, ["1", "2"]), pairs, OPTIONS, steps.begin)
    assert (found.coverage.num_pairs, found.coverage.num_scored, found.coverage.num_captions) == (4, 3, 6)
    assert (found.coverage.refused, found.coverage.unscored) == ({"caption_too_long": 1}, ("pair-4",))
    outcomes = found.agreement.outcomes
    assert (outcomes.wins, outcomes.ties, outcomes.losses, outcomes.margin_mean) == (1, 1, 1, pytest.approx(1 / 3))
    assert (found.agreement.pooled.value, found.agreement.macro.value) == (pytest.approx(1 / 3), 0.25)
    assert [(each.contest, each.outcomes.num_pairs) for each in found.contests] == [("1", 2), ("2", 1)]
    assert [(bucket.name, bucket.agreement.outcomes.num_pairs) for bucket in found.buckets] == [
        ("3 to 4", 1),
        ("4 to 5", 1),
        ("8 and more", 1),
    ]
    (length,) = [control for control in found.controls if control.name == LENGTH]
    assert length.agreement is not None
    assert length.difference is not None
    assert (length.agreement.outcomes.wins, length.agreement.outcomes.ties, length.difference.value) == (1, 1, 0.0)
    assert steps.totals == {"pairs": 6, CAPTION_ONLY: 5, SHUFFLED: 6}
    assert steps.done == steps.totals


def test_a_caption_of_many_pairs_is_scored_once_and_groups_are_bounded(tmp_path: Path) -> None:
    judge = Judge()
    pairs = [pair(number, "1", "the best one", f"worse {number}") for number in range(40)]
    options = replace(OPTIONS, controls=False, group_size=16)
    found = measure_pairs(judge, write_images(tmp_path, ["1"]), pairs, options, nothing)
    assert [len(group.captions) for group in judge.asked] == [16, 16, 9]
    assert found.controls == ()


def test_a_model_that_needs_its_image_is_found_out_by_both_controls(tmp_path: Path) -> None:
    """It is always right with the right image; without one and with another everything ties: no win, and half of one by guessing."""
    names = ["ant", "bee", "cow", "dog"]
    pairs = [pair(number, name, f"the {name}", f"the gnu of {number}") for number, name in enumerate(names)]
    found = controls_of(Judge(by_own_image), write_images(tmp_path, names), pairs)
    for name in (CAPTION_ONLY, SHUFFLED):
        control = found[name]
        assert control.agreement is not None
        assert control.guessing is not None
        assert control.difference is not None
        assert (control.agreement.outcomes.ties, control.agreement.pooled.value) == (4, 0.0)
        assert (control.guessing.value, control.difference.value) == (0.5, 0.5)
        assert control.difference.interval is not None
        assert control.difference.interval.low == 0.5


def test_shuffled_images_keep_captions_and_prompts_and_come_from_other_contests(tmp_path: Path) -> None:
    judge = Judge()
    names = [str(number) for number in range(6)]
    pairs = [replace(pair(int(name), name, f"long {name}", "short"), prompt=f"Scene {name}") for name in names]
    path = write_images(tmp_path, names)
    measure_pairs(judge, path, pairs, OPTIONS, nothing)
    real, blank, shuffled = judge.asked[:6], judge.asked[6:7], judge.asked[7:]
    assert {(group.image, group.prompt) for group in blank} == {(None, None)}
    for before in real:
        (after,) = [group for group in shuffled if group.prompt == before.prompt]
        assert after.captions == before.captions
        assert after.image is not None
        assert after.image != before.image
    assert {group.image for group in shuffled} == {group.image for group in real}


def test_two_files_of_one_picture_are_one_image(tmp_path: Path) -> None:
    """Two contests, two names, the same bytes: exchanging them would change nothing."""
    path = write_images(tmp_path, ["1", "2"], same=True)
    found = controls_of(Judge(), path, [pair(1, "1", "long", "s"), pair(2, "2", "long", "s")])
    assert "more than half" in str(found[SHUFFLED].skipped)


def test_controls_that_cannot_be_run_say_why(tmp_path: Path) -> None:
    text_only = replace(TARGET, takes_images=False)
    pairs = [replace(pair(1, "1", "long", "s"), image=None)]
    found = controls_of(Judge(target=text_only), tmp_path / "pairs.parquet", pairs)
    assert "neither image nor prompt" in str(found[CAPTION_ONLY].skipped)
    assert found[SHUFFLED].skipped == "the pairs have no image"
    over_http = controls_of(Judge(target=replace(TARGET, kind="server")), tmp_path / "pairs.parquet", pairs)
    assert "only in process" in str(over_http[CAPTION_ONLY].skipped)
    with_prompt = controls_of(Judge(target=text_only), tmp_path / "pairs.parquet", [replace(pairs[0], prompt="Scene")])
    assert with_prompt[CAPTION_ONLY].agreement is not None


def test_a_table_of_which_nothing_can_be_scored_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataInvalid, match=r"pairs\.parquet: the model refuses every pair, the first caption because too long"):
        measure_pairs(Judge(), write_images(tmp_path, ["1"]), [pair(1, "1", "a", f"{REFUSED}")], OPTIONS, nothing)


def test_the_artifacts_own_temperature_is_one_of_the_calibrations(tmp_path: Path) -> None:
    pairs = [pair(1, "1", "long", "s"), pair(2, "1", "a", "bb")]
    judge = Judge(target=replace(TARGET, temperature=2.5))
    found = measure_pairs(judge, write_images(tmp_path, ["1"]), pairs, replace(OPTIONS, controls=False), nothing).reliability
    assert [(each.name, each.temperature) for each in found[:2]] == [("raw margins", 1.0), ("as served", 2.5)]
    assert found[2].name == "fitted"
    assert found[2].loss <= min(each.loss for each in found)


@pytest.mark.parametrize(
    ("target", "options", "words"),
    [
        ({}, {}, r"row 2: no image, and the model needs one"),
        ({"takes_images": False}, {}, r"row 1: has an image, and the model takes none; --ignore-images"),
        ({"takes_images": None, "fixed_prompt": True}, {}, r"row 2: has a prompt, and the model has a fixed one; --ignore-prompts"),
    ],
)
def test_a_row_the_model_has_no_place_for_is_named(target: dict[str, Any], options: dict[str, Any], words: str) -> None:
    pairs = [pair(1, "1", "a", "b"), replace(pair(2, "1", "a", "b"), image=None, prompt="Scene")]
    with pytest.raises(DataInvalid, match=rf"pairs\.parquet, {words}"):
        check_fit(replace(TARGET, **target), Path("pairs.parquet"), pairs, replace(OPTIONS, **options))


def test_ignoring_makes_the_table_fit() -> None:
    pairs = [pair(1, "1", "a", "b"), replace(pair(2, "1", "a", "b"), image=None, prompt="Scene")]
    ignoring = replace(OPTIONS, ignore_images=True, ignore_prompts=True)
    check_fit(replace(TARGET, takes_images=False, fixed_prompt=True), Path("p"), pairs, ignoring)
    check_fit(replace(TARGET, fixed_prompt=True), Path("p"), [replace(pairs[0], prompt="Say it.")], OPTIONS)
    with pytest.raises(BadArguments, match="--ignore-images"):
        check_fit(TARGET, Path("p"), pairs, ignoring)
    with pytest.raises(DataInvalid, match="no rows"):
        check_fit(TARGET, Path("p"), [], OPTIONS)


def test_ignored_images_and_prompts_are_not_scored_with(tmp_path: Path) -> None:
    judge = Judge(target=replace(TARGET, takes_images=False))
    pairs = [replace(pair(number, str(number), "long", "s"), prompt=f"Scene {number}") for number in range(3)]
    measure_pairs(judge, tmp_path / "p", pairs, replace(OPTIONS, ignore_images=True, ignore_prompts=True), nothing)
    assert judge.asked == [CaptionGroup(None, None, ("long", "s"))]


def rated(contest: str, caption: str, mean: float, rank: int) -> RatedCaption:
    return RatedCaption(contest, f"images/{contest}.png", None, caption, mean, 0.1, 20, rank)


def test_best_of_n_by_hand(tmp_path: Path) -> None:
    """Ratings 1, 2, 4 with lengths 1, 2, 3: the model ranks as the crowd does, so the best of two gains 10/3 - 7/3 = 1, all there is.

    There are no three pairs of four, so n = 4, 8, 16 are left out; so is the refused caption.
    """
    captions = [rated("1", "a", 1.0, 3), rated("1", "bb", 2.0, 2), rated("1", "ccc", 4.0, 1), rated("1", REFUSED, 3.0, 4)]
    found = measure_captions(Judge(), tmp_path / "captions.parquet", captions, OPTIONS, nothing)
    (best,) = found.best_of
    assert best.share is not None
    assert (best.n, best.gain.value, best.share.value) == (2, pytest.approx(1.0), pytest.approx(1.0))
    assert (found.num_rated, found.num_scored, found.refused) == (4, 3, {"caption_too_long": 1})


@pytest.mark.parametrize("first", [0, 1])
def test_ranks_may_count_from_zero(tmp_path: Path, first: int) -> None:
    """The ten best of 300 have three letters, ranks 200 to 209 two, all others one: either way of counting finds them apart."""

    def caption(rank: int) -> str:
        letters = 3 if rank <= 10 else 2 if 200 <= rank <= 209 else 1
        return chr(0x4E00 + rank) * letters

    captions = [rated("1", caption(rank), 3 - rank / 100, rank - 1 + first) for rank in range(1, 301)]
    judge = Judge()
    found = measure_captions(judge, tmp_path / "c", captions, replace(OPTIONS, captions_per_contest=2), nothing)
    asked = {len(each) for group in judge.asked for each in group.captions if len(each) > 1}
    auc = {(each.better, each.worse): each.auc for each in found.bands}
    assert asked == {2, 3}
    top, middle = auc["1-10", "200-209"], auc["1-10", "median"]
    assert top is not None
    assert middle is not None
    assert (top.value, middle.value) == (1.0, 1.0)
    assert sum(len(group.captions) for group in judge.asked) <= 10 + 10 + 11 + 2


def test_only_a_sample_of_each_contest_is_scored_the_same_for_the_same_seed(tmp_path: Path) -> None:
    captions = [rated(contest, f"{contest} {number}", math.sin(number), 5000 + number) for contest in "12" for number in range(100)]
    asked = []
    for seed in (1, 1, 2):
        judge = Judge()
        options = replace(OPTIONS, captions_per_contest=20, seed=seed)
        found = measure_captions(judge, tmp_path / "c", captions, options, nothing)
        asked.append({caption for group in judge.asked for caption in group.captions})
        assert [best.n for best in found.best_of] == [2, 4, 8, 16]
        assert found.num_scored == len(asked[-1]) <= 2 * (20 + 11)
    assert asked[0] == asked[1] != asked[2]


# the command


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs and rated captions of the demo's own golden pictures: two captions of each fit, one has a fault, one is all wrong."""
    opened = open_artifact("demo", offline=True)
    golden = opened.golden()
    assert golden is not None
    folder = tmp_path_factory.mktemp("tables")
    (folder / "images").mkdir()
    pairs, captions = [], []
    for number, item in enumerate(item for item in golden.items if item.prompt is None):
        assert item.image is not None
        image = f"images/{number}.png"
        (folder / image).write_bytes((opened.root / item.image).read_bytes())
        places = [(better, worse) for better in (0, 1) for worse in (2, 3)]
        pairs += [
            Pair(f"{number}/{better}{worse}", str(number), image, None, item.captions[better], item.captions[worse], sigma_gap=4.0)
            for better, worse in places
        ]
        pairs.append(Pair(f"{number}/long", str(number), image, None, item.captions[0], "word " * 200))
        captions += [RatedCaption(str(number), image, None, text, 2.0 - rank / 4, 0.1, 20, rank) for rank, text in enumerate(item.captions)]
    write_pairs(folder / "pairs.parquet", pairs)
    write_captions(folder / "captions.parquet", captions)
    return folder


def command(target: str, tables: Path, out: Path, *flags: str) -> int:
    """The exit code."""
    arguments = [target, "--pairs", str(tables / "pairs.parquet"), "--captions", str(tables / "captions.parquet"), "--out", str(out)]
    with pytest.raises(SystemExit) as left:
        main([*arguments, "--draws", "100", *flags])
    return int(left.value.code or 0)


def test_the_demo_in_process_and_over_http_has_the_same_figures(tables: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The demo is right about all its golden pairs; the key that the server asks for stands in no report."""
    key = "a-key-of-letters-for-the-test"
    assert command("demo", tables, tmp_path / "local", "--device", "cpu", "--offline") == 0
    with started("--api-key", key, "--device", "cpu") as server:
        assert command(server.url, tables, tmp_path / "remote", "--api-key", key) == 0
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("local", "remote")]
    local, remote = reports
    assert local["target"]["fingerprint"] == remote["target"]["fingerprint"]
    assert local["target"]["weights_sha256"] == weights_sha256(open_artifact("demo", offline=True))
    assert remote["target"]["weights_sha256"] is None
    assert local["pairs"]["agreement"]["pooled"]["value"] == 1.0
    assert local["pairs"]["coverage"] == remote["pairs"]["coverage"]
    assert local["pairs"]["coverage"]["unscored"] == ["0/long", "1/long", "2/long"]
    for name in ("agreement", "contests", "buckets", "reliability", "margins"):
        assert flat(remote["pairs"][name]) == pytest.approx(flat(local["pairs"][name]), abs=1e-4)
    assert flat(remote["captions"]) == pytest.approx(flat(local["captions"]), abs=1e-4)
    assert [control["skipped"] is None for control in local["pairs"]["controls"]] == [True, True, True]
    assert [control["skipped"] is None for control in remote["pairs"]["controls"]] == [True, False, True]
    assert key not in (tmp_path / "remote" / "report.json").read_text() + (tmp_path / "remote" / "report.html").read_text()
    assert "accuracy, all pairs" in capfd.readouterr().err


def flat(value: Any) -> list[Any]:
    """The leaves in order."""
    if isinstance(value, dict | list):
        return [leaf for each in (value.values() if isinstance(value, dict) else value) for leaf in flat(each)]
    return [value if isinstance(value, int | float) and not isinstance(value, bool) else hash(value)]


@pytest.mark.parametrize(
    ("target", "flags", "code", "words"),
    [
        ("http://127.0.0.1:9", ("--device", "cpu"), 2, "--device is for a model in this process"),
        ("http://127.0.0.1:9", ("--offline",), 2, "--offline is for a model in this process"),
        ("demo", ("--api-key", "k"), 2, "--api-key is for a server"),
        ("demo", ("--device", "gpu"), 2, "--device must be auto, cpu, cuda or cuda:N"),
        ("demo", ("--group-size", "0"), 2, "group-size"),
        ("demo", ("--nonsense",), 2, "nonsense"),
        ("demo", ("--ignore-images", "--device", "cpu"), 2, "--ignore-images is for models that take no image"),
        ("http://127.0.0.1:9", (), 1, "does not answer"),
        ("no/such/artifact", ("--offline",), 3, "neither a directory nor a Hub id"),
    ],
)
def test_a_refusal_is_one_line_with_its_exit_code(
    tables: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], target: str, flags: tuple[str, ...], code: int, words: str
) -> None:
    assert command(target, tables, tmp_path, *flags) == code
    told = capfd.readouterr().err
    assert words in told
    assert "Traceback" not in told
    assert not (tmp_path / "report.json").exists()


def test_a_missing_table_is_named_before_the_model_is_loaded(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert command("no/such/artifact", tmp_path, tmp_path / "out") == 3
    assert "pairs.parquet: no such file" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_named(tables: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert command("demo", tables, tmp_path / "file") == 2
    assert "cannot be written" in capfd.readouterr().err


def test_a_report_that_cannot_be_written_is_one_line_and_the_old_one_stays(
    tables: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "report.html").mkdir()
    (tmp_path / "report.json").write_text("old")
    assert command("demo", tables, tmp_path, "--device", "cpu", "--offline", "--no-controls") == 1
    assert "the report could not be written (Is a directory); what was there is as it was" in capfd.readouterr().err
    assert (tmp_path / "report.json").read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "report.json"}


def test_tables_are_described_by_path_hash_and_counts(tables: Path) -> None:
    inputs = read_tables(tables / "pairs.parquet", None).inputs
    assert set(inputs) == {"pairs"}
    assert (inputs["pairs"].num_rows, inputs["pairs"].num_contests, len(inputs["pairs"].sha256)) == (15, 3, 64)


def test_a_text_only_model_is_evaluated_without_images_or_by_ignoring_them(
    tables: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its pairs with prompts have the control without them; nothing can be shuffled."""
    artifact = write_text_only(tmp_path / "model")
    assert command(str(artifact), tables, tmp_path / "out", "--offline") == 3
    assert "row 1: has an image, and the model takes none" in capfd.readouterr().err
    assert command(str(artifact), tables, tmp_path / "ignored", "--offline", "--ignore-images") == 0
    pairs = [Pair(f"{number}", f"{number % 3}", None, f"Scene {number}", f"a {number}", f"b {number}") for number in range(9)]
    captions = [RatedCaption("1", None, None, f"caption {number}", number / 4, 0.1, 20, 8 - number) for number in range(8)]
    write_pairs(tmp_path / "pairs.parquet", pairs)
    write_captions(tmp_path / "captions.parquet", captions)
    assert command(str(artifact), tmp_path, tmp_path / "text", "--offline") == 0
    report = json.loads((tmp_path / "text" / "report.json").read_text())
    assert report["target"]["takes_images"] is False
    assert report["pairs"]["coverage"]["num_scored"] == 9
    skipped = {control["name"]: control["skipped"] for control in report["pairs"]["controls"]}
    assert skipped == {LENGTH: None, CAPTION_ONLY: None, SHUFFLED: "the pairs have no image"}
