"""The whole command on a tiny geometry: what it prints, what it refuses, how it ends."""

from __future__ import annotations

import inspect
import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from rich.console import Console

from app import cli
from app.bench.command import Options, bench, bench_settings, read_numbers, show
from app.bench.load import BUSY, busy_seconds
from app.bench.plot import check_plot, write_plot
from app.bench.report import MAX_RMS_OF_SPREAD, MAX_SHARE_OF_SPREAD, Hold, Report
from app.bench.run import Plan, run_ways
from app.bench.tables import WIDTH, _mark, tables_of
from app.bench.ways import COLD, HTTP_WARM, PADDED, PLAIN, WARM, WAYS, Measured, Row
from app.errors import SettingsInvalid
from app.geometry import GEOMETRIES, Limits, write_artifact
from app.metrics import Metrics
from app.settings import Settings
from tests.test_geometry import TINY, TINY_TEXT
from tests.tiny import write_text_only


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    artifact = write_artifact(TINY, tmp_path_factory.mktemp("bench") / "artifact")
    settings = Settings(model=str(artifact), device="cpu", dtype="float32", num_threads=1, max_timeout_ms=600_000, max_queue_tokens=1 << 20)
    return run_ways(Plan("tiny", settings, (1, 8), 2, (1, 2), num_pairs=20), lambda _: None)


@pytest.fixture(scope="module")
def conversation_report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    artifact = write_artifact(TINY_TEXT, tmp_path_factory.mktemp("bench") / "artifact", limits=Limits(400, 64))
    settings = Settings(model=str(artifact), device="cpu", dtype="float32", num_threads=1, max_timeout_ms=600_000, max_queue_tokens=1 << 20)
    return run_ways(Plan("tiny", settings, (1, 8), 1, (2,), num_pairs=20), lambda _: None)


def changed(report: Report, way: str, change: Callable[[Row], Row]) -> Report:
    rows = tuple(change(row) if row.way == way else row for row in report.measured.rows)
    return replace(report, measured=Measured(rows, report.measured.spread))


def wrong(report: Report, way: str) -> Report:
    """As if the scores of a way had differed."""
    return changed(report, way, lambda row: replace(row, runs=tuple(replace(run, gaps=(0.5,)) for run in row.runs)))


def text_of(report: Report) -> str:
    stream = io.StringIO()
    Console(width=WIDTH, file=stream).print(tables_of(report), highlight=False)
    return stream.getvalue()


def test_the_report_has_every_way_and_agrees(report: Report) -> None:
    assert [(row.way, row.num_captions) for row in report.measured.rows] == [(way, size) for size in (1, 8) for way in WAYS]
    assert report.disagreeing == []
    assert report.tolerance == 1e-4
    plain, padded = (report.measured.find(way, 8) for way in (PLAIN, PADDED))
    assert plain is not None
    assert padded is not None
    assert report.ratio(plain, PLAIN) == 1.0
    assert report.ratio(padded, PLAIN) == pytest.approx(plain.seconds / padded.seconds)
    assert report.subject.tokens.image == 176
    assert report.startup.seconds > 0
    assert report.overhead.model == "demo"
    assert [level.num_clients for level in report.levels] == [1, 2]
    assert [level.num_groups for level in report.levels] == [8, 8]


def test_json_has_all_of_it(report: Report) -> None:
    told = json.loads(json.dumps(report.as_dict()))
    assert set(told) == {"hardware", "subject", "matrix_rate", "ways", "agreement", "startup", "load", "overhead", "holds", "notes"}
    assert len(told["ways"]) == 12
    first = told["ways"][0]
    assert first["way"] == PLAIN
    assert first["seconds"]["min"] <= first["seconds"]["median"] <= first["seconds"]["max"]
    assert first["tokens"]["requested"] == first["tokens"]["computed"]
    assert told["agreement"]["agrees"] is True
    assert told["agreement"]["largest_difference"] < 1e-4
    assert all(isinstance(hold["passed"], bool) for hold in told["holds"])
    assert told["startup"]["ready_after_load_s"] >= 0


def test_the_table_has_all_of_it(report: Report) -> None:
    text = text_of(report)
    for name in (*WAYS, "x plain", "x padded", "of limit", "device idle", "numbers to hold", "limit: matrix products", "ready in"):
        assert name in text
    assert report.hardware.line in " ".join(text.split())
    assert "refused" not in text
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= WIDTH


def test_the_table_of_a_text_only_model_speaks_of_responses(conversation_report: Report) -> None:
    assert conversation_report.disagreeing == conversation_report.misnamed == []
    text = text_of(conversation_report)
    assert "tiny: 2 text layers of 64, float32, medians of 1 round" in text
    assert "responses to a conversation: 400 tokens shared, 64 a response's own" in text
    for name in ("responses", "responses/s", "one forward per response", "over HTTP, groups of 8, known conversations"):
        assert name in text
    assert "largest difference to one forward per response" in text
    (about_captions,) = [line for line in text.splitlines() if "caption" in line or "image" in line]
    assert about_captions.startswith("HTTP, queue and encoding (8 captions of a known image")  # measured on the demo
    assert "refused" not in text
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= WIDTH


def test_machines_read_the_same_names_of_every_model(report: Report, conversation_report: Report) -> None:
    ours, theirs = conversation_report.as_dict(), report.as_dict()
    assert [entry["way"] for entry in ours["ways"]] == [entry["way"] for entry in theirs["ways"]]
    assert ours["subject"]["tokens"] == {"image": 0, "prefix": 400, "shortest": 64, "longest": 64}
    assert [level["num_clients"] for level in ours["load"]] == [2]


def test_a_way_that_disagrees_over_responses_has_no_ratio(conversation_report: Report, capsys: pytest.CaptureFixture[str]) -> None:
    bad = wrong(conversation_report, COLD)
    assert {entry["times_plain"] for entry in bad.as_dict()["ways"] if entry["way"] == COLD} == {None}
    assert show(bad, Options()) == 1
    assert "scores disagree, ratios refused: shared prefix, cold, groups of 8: 5.0e-01" in capsys.readouterr().out


def meant(report: Report) -> Report:
    """As if it were of the model that the numbers to hold were set for."""
    subject = replace(report.subject, model="qwen2.5-vl-3b", layers=36, vision_layers=32, dtype="bfloat16")
    return replace(report, subject=subject)


def test_another_model_is_held_to_no_number_of_speed(report: Report) -> None:
    """They would all be missed, and say nothing."""
    assert {hold.unit for hold in report.holds()} == {"", "ms", "%"}
    assert not any("against" in hold.what or "memory" in hold.what or "ready" in hold.what for hold in report.holds())
    assert any("against" in hold.what for hold in meant(report).holds())


def test_a_way_that_disagrees_has_no_ratio(report: Report) -> None:
    bad = meant(wrong(report, COLD))
    assert {row.way for row in bad.disagreeing} == {COLD}
    told = bad.as_dict()
    assert {entry["times_plain"] for entry in told["ways"] if entry["way"] == COLD} == {None}
    assert all(entry["times_plain"] for entry in told["ways"] if entry["way"] != COLD)
    assert told["agreement"]["agrees"] is False
    holds = {hold["what"]: hold for hold in told["holds"]}
    assert holds["a group of 8, cold, against one forward per caption"]["found"] is None
    assert holds["a group of 8, cold, against one forward per caption"]["passed"] is False
    assert holds["a group of 8, warm, against one forward per caption"]["found"] is not None
    text = text_of(bad)
    assert "scores disagree, ratios refused: shared prefix, cold, groups of 8: 5.0e-01" in text
    assert "refused" in text


def test_a_row_that_is_not_what_its_name_says_has_no_ratio(report: Report, capsys: pytest.CaptureFixture[str]) -> None:
    """A warm run whose prefix was computed again, or a cold one whose picture was not: every ratio of that row is refused."""
    bad = changed(report, WARM, lambda row: replace(row, runs=(replace(row.runs[0], is_as_named=False), *row.runs[1:])))
    assert [(row.way, row.num_captions) for row in bad.misnamed] == [(WARM, 1), (WARM, 8)]
    told = bad.as_dict()
    assert {entry["times_plain"] for entry in told["ways"] if entry["way"] == WARM} == {None}
    assert {entry["share_of_limit"] for entry in told["ways"] if entry["way"] == WARM} == {None}
    assert all(entry["times_plain"] for entry in told["ways"] if entry["way"] != WARM)
    assert "not as cold or as warm as its name says, ratios refused: shared prefix, warm, groups of 8: " in text_of(bad)
    assert (report.misnamed, show(bad, Options())) == ([], 1)
    assert "refused" in capsys.readouterr().out


def test_what_is_wrong_has_no_rate_either(report: Report) -> None:
    bad = meant(wrong(report, COLD))
    assert {entry["share_of_limit"] for entry in bad.as_dict()["ways"] if entry["way"] == COLD} == {None}
    holds = {hold.what: hold for hold in bad.holds()}
    assert holds["a group of 8, cold, share of the matrix rate"].found is None


def test_a_padded_batch_that_disagrees_is_nobodys_measure(report: Report) -> None:
    told = wrong(report, PADDED).as_dict()
    assert {entry["times_padded"] for entry in told["ways"]} == {None}
    assert all(entry["times_plain"] for entry in told["ways"] if entry["way"] != PADDED)


def test_in_bfloat16_the_spread_is_the_measure(report: Report) -> None:
    spread = report.measured.spread
    assert spread is not None
    half = replace(report, subject=replace(report.subject, dtype="bfloat16"))
    assert (half.tolerance, half.rms_tolerance) == (MAX_SHARE_OF_SPREAD * spread, MAX_RMS_OF_SPREAD * spread)
    assert "largest difference to the plain way, float32" not in {hold.what for hold in half.holds()}


@pytest.mark.parametrize(("gaps", "refused"), [((0.8,), 1), ((0.8, 0.8), 1), ((0.8, 0.1, 0.1), 0), ((1.2, *[0.0] * 9), 1), ((0.4,), 0)])
def test_many_differences_have_half_the_spread_and_one_the_whole(report: Report, gaps: tuple[float, ...], refused: int) -> None:
    spread = report.measured.spread
    assert spread is not None
    half = replace(report, subject=replace(report.subject, dtype="bfloat16"))
    changed_row = next(row for row in half.measured.rows if row.way == WARM)
    runs = (replace(changed_row.runs[0], gaps=tuple(gap * spread for gap in gaps)),)
    rows = tuple(replace(row, runs=runs) if row is changed_row else row for row in half.measured.rows)
    assert len(replace(half, measured=Measured(rows, spread)).disagreeing) == refused


def test_every_way_has_eight_differences(report: Report, conversation_report: Report) -> None:
    """However few rounds, of one and of two here, where the groups are large enough."""
    for row in (*conversation_report.measured.rows, *report.measured.rows):
        if row.num_captions >= 8:
            assert len(row.gaps) >= 8, row.way
            assert row.rms is not None


def test_without_a_second_copy_there_is_no_ratio_and_no_fault(report: Report) -> None:
    rows = tuple(
        replace(row, runs=tuple(replace(run, gaps=None) for run in row.runs))
        for row in report.measured.rows
        if row.way not in (PLAIN, PADDED)
    )
    alone = replace(report, measured=Measured(rows, None), load_s=None, notes=("no memory for a second copy",))
    assert alone.disagreeing == []
    assert alone.ready_s is None
    assert {entry["times_plain"] for entry in alone.as_dict()["ways"]} == {None}
    assert "no way was compared with the plain one: no ratio" in text_of(alone)
    assert "no memory for a second copy" in text_of(alone)


@pytest.mark.parametrize("as_json", [False, True])
def test_the_exit_code_says_whether_scores_agree(report: Report, as_json: bool, capsys: pytest.CaptureFixture[str]) -> None:
    options = Options(as_json=as_json)
    assert show(report, options) == 0
    assert show(wrong(report, HTTP_WARM), options) == 1
    assert "refused" in capsys.readouterr().out or as_json


def test_numbers_to_hold_on_a_gpu(report: Report) -> None:
    of_16 = changed(report, COLD, lambda row: replace(row, num_captions=16))
    of_16 = changed(of_16, WARM, lambda row: replace(row, num_captions=16))
    on_gpu = replace(meant(of_16), hardware=replace(report.hardware, device="cuda:0"))
    names = [hold.what for hold in on_gpu.holds()]
    assert "a group of 16, cold, share of the matrix rate" in names
    assert "groups of 16, warm, captions a second" in names
    found = {hold.what: hold.found for hold in wrong(on_gpu, WARM).holds()}
    assert found["groups of 16, warm, captions a second"] is None
    assert found["groups of 16, cold, captions a second"] is not None


@pytest.mark.parametrize("name", ["plot.png", "plot.svg"])
def test_a_plot_is_a_picture(report: Report, tmp_path: Path, name: str) -> None:
    pytest.importorskip("matplotlib")
    check_plot(tmp_path / name)
    write_plot(report, tmp_path / name)
    begins = {"plot.png": b"\x89PNG", "plot.svg": b"<?xml"}[name]
    assert (tmp_path / name).read_bytes().startswith(begins)
    write_plot(replace(report, levels=()), tmp_path / name)


def test_a_place_for_a_plot_is_looked_at_and_left_as_it_was(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    there = tmp_path / "there.png"
    there.write_bytes(b"an older picture")
    check_plot(there)
    check_plot(tmp_path / "new.png")
    assert there.read_bytes() == b"an older picture"
    assert not (tmp_path / "new.png").exists()
    link = tmp_path / "link.png"
    link.symlink_to(tmp_path / "elsewhere.png")
    check_plot(link)
    assert link.is_symlink()
    assert not link.exists()


def test_what_was_measured_is_printed_before_it_is_drawn(report: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "plot.png").mkdir()
    with pytest.raises(SettingsInvalid, match="cannot be written: Is a directory"):
        show(report, Options(plot=tmp_path / "plot.png"))
    assert "tokens shared" in capsys.readouterr().out


def test_json_has_null_where_a_number_is_none(report: Report, capsys: pytest.CaptureFixture[str]) -> None:
    row = report.measured.rows[0]
    wrong = replace(row, runs=tuple(replace(run, gaps=(math.inf,)) for run in row.runs))
    spoilt = replace(report, measured=replace(report.measured, rows=(wrong, *report.measured.rows[1:])))
    show(spoilt, Options(as_json=True))

    def refuse(text: str) -> float:
        raise AssertionError(text)

    told = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert told["ways"][0]["largest_difference"] is None


def test_a_plot_speaks_of_responses_where_the_table_does(conversation_report: Report, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_plot(conversation_report, tmp_path / "plot.svg")
    assert conversation_report.subject.worded("groups of 8, known images") == "groups of 8, known conversations"


def test_the_whole_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a geometry to JSON on stdout; the artifact stays in the folder and serves the next run."""
    options = Options("tiny", layers=1, dtype="float32", groups="2", rounds=1, concurrency="", as_json=True, work=tmp_path / "work")
    assert bench(options, {"tiny": TINY}) == 0
    out, err = capsys.readouterr()
    assert "about " in err
    assert " for 1 round of groups of 2 (" in err
    told = json.loads(out)
    assert (told["subject"]["layers"], told["subject"]["vision_layers"], told["load"]) == (1, 2, [])
    assert {entry["captions"] for entry in told["ways"]} == {2}
    assert (tmp_path / "work" / "tiny-1-2" / "reward_model_config.json").is_file()


def test_the_whole_command_on_conversations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = Options("tiny", None, None, None, "float32", "2", 1, "", True, None, False, tmp_path, 500, 70)
    assert bench(options, {"tiny": TINY_TEXT}) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["subject"]["tokens"]["prefix"], told["subject"]["tokens"]["longest"]) == (500, 70)
    assert told["agreement"]["agrees"] is True
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-2"]


@pytest.mark.parametrize("recipe", [{"caption_role": "raw", "template": "{prompt}{caption}"}, {}], ids=["raw", "user"])
def test_a_text_only_artifact_is_measured_with_what_it_takes(tmp_path: Path, recipe: dict[str, Any]) -> None:
    artifact = write_text_only(tmp_path, kind="lora_head", max_prompt_tokens=100, max_caption_tokens=80, **recipe)
    settings = Settings(model=str(artifact), device="cpu", dtype="float32", num_threads=1)
    found = run_ways(Plan("tiny", settings, (2,), 1, (), num_pairs=2), lambda _: None)
    assert found.disagreeing == found.misnamed == []
    assert found.subject.tokens.longest == found.subject.tokens.shortest == 64
    assert found.notes == (f"the artifact takes no longer texts: conversations of {found.subject.tokens.prefix} tokens, not 400",)
    assert found.notes[0] in " ".join(text_of(found).split())


def test_a_model_of_images_has_no_conversations(tmp_path: Path) -> None:
    with pytest.raises(SettingsInvalid, match="belong to text-only models"):
        bench(Options(groups="2", rounds=1, concurrency="", response_tokens=10))
    with pytest.raises(SettingsInvalid, match="--noise measures captions of images, this model takes none"):
        bench(Options(artifact=str(write_text_only(tmp_path, kind="full_head")), noise=True))


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ({"geometry": "qwen2.5-vl-3b", "artifact": "demo"}, "choose one"),
        ({"layers": 2}, "belong to --geometry"),
        ({"work": Path("x")}, "belong to --geometry"),
        ({"noise": True, "plot": Path("x.png")}, "--noise"),
        ({"noise": True, "groups": "1"}, "--groups and --concurrency do not belong"),
        ({"noise": True, "concurrency": ""}, "--groups and --concurrency do not belong"),
        ({"noise": True, "conversation_tokens": 8}, "belong to conversations"),
    ],
)
def test_contradictions_are_refused(faults: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsInvalid, match=message):
        Options(**faults)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(geometry="gpt"), "expected one of"),
        (Options(geometry="qwen2.5-1.5b", vision_layers=2), "is text-only"),
        (Options(geometry="qwen3-8b", noise=True), "is text-only"),
        (Options(geometry="qwen2.5-vl-3b", conversation_tokens=8), "takes images"),
        (Options(groups="8,x"), "--groups '8,x'"),
        (Options(groups=""), "--groups ''"),
        (Options(concurrency="0"), "--concurrency '0'"),
        (Options(groups="257"), "at most 256 captions"),
        (Options(plot=Path("plot.pdf")), "ends in .png or .svg"),
        (Options(plot=Path("nowhere/plot.png")), "no folder nowhere"),
        (Options(plot=Path("/proc/plot.png")), "/proc/plot.png: cannot be written: "),
        (Options(geometry="qwen2.5-vl-3b", layers=37), "--layers 37: qwen2.5-vl-3b has 36"),
        (Options(geometry="qwen2.5-vl-3b", vision_layers=33), "--vision-layers 33: qwen2.5-vl-3b has 32"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(options: Options, message: str) -> None:
    with pytest.raises(SettingsInvalid, match=message):
        bench(options)


def test_numbers_are_ascending_and_each_once() -> None:
    assert read_numbers("--groups", "16, 1,8,8") == (1, 8, 16)
    assert read_numbers("--concurrency", "", none=True) == ()


def test_the_command_line_knows_every_geometry() -> None:
    annotation = inspect.get_annotations(cli.bench, eval_str=True)["geometry"]
    choice = get_args(get_args(annotation)[0])[0]
    assert set(get_args(choice)) == set(GEOMETRIES)


def test_the_server_under_test_refuses_nothing_the_bench_asks() -> None:
    settings = bench_settings("demo", "auto")
    assert (settings.dtype, settings.max_timeout_ms, settings.deterministic) == ("auto", 600_000, False)
    assert bench_settings("demo", "bfloat16").dtype == "bfloat16"


def test_the_servers_own_count_of_its_devices_work() -> None:
    metrics = Metrics()
    assert busy_seconds(metrics.registry) == 0.0, BUSY


@pytest.mark.parametrize(
    ("found", "ceiling", "mark"),
    [(7.6, 8.0, "held"), (7.0, 8.0, "MISSED"), (7.0, 7.2, "MISSED, beyond this machine"), (None, 7.2, "MISSED, beyond this machine")],
)
def test_a_ratio_that_no_machine_of_this_rate_could_reach_is_missed_and_says_so(found: float | None, ceiling: float, mark: str) -> None:
    """7.5 asks for 8 s where the other way takes 60; products at the best rate alone take 60 / 7.2."""
    assert _mark(Hold("a ratio", 7.5, "x", True, found, ceiling)) == mark


@pytest.mark.parametrize(
    ("gaps", "is_rounding"),
    [
        ((0.4, 0.4, 0.4, 0.4), True),
        ((0.6, 0.6, 0.6, 0.6), False),  # all of them are off
        ((0.9, 0.1, 0.1, 0.1), True),
        ((1.1, 0.0, 0.0, 0.0), False),  # one of them is another caption's
    ],
)
def test_in_bfloat16_all_scores_together_and_each_alone_are_held_to_the_spread(
    report: Report, gaps: tuple[float, ...], is_rounding: bool
) -> None:
    spread = report.measured.spread
    assert spread
    half = replace(report, subject=replace(report.subject, dtype="bfloat16"))
    found = changed(half, COLD, lambda row: replace(row, runs=(replace(row.runs[0], gaps=tuple(gap * spread for gap in gaps)),)))
    assert (not any(row.way == COLD for row in found.disagreeing)) == is_rounding
