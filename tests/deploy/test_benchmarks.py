"""The scripts under deploy/benchmarks against tiny servers that speak their dialects: arithmetic, turns, refusals, pausing."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import io
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
from PIL import Image

from app.artifacts import open_artifact
from app.bench.workload import Workload
from app.contracts import EncodedGroup
from app.encoding import load_encoder
from app.golden import GOLDEN_LIMITS
from tests.several import Salted

SCRIPTS = Path(__file__).parents[2] / "deploy/benchmarks"
Request = dict[str, Any]
Reply = Callable[[str, Request], Any]


def load(name: str) -> ModuleType:
    """A script as a module; dataclasses look themselves up in sys.modules."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


against_peer = load("against_peer")


@dataclass
class FakeServer:
    """Answers what `reply` says of each path and body, and keeps them in order. An int is a status."""

    name: str
    reply: Reply
    log: list[tuple[str, str, Request]]
    on_request: Callable[[], None] = lambda: None
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> FakeServer:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # head and body leave together; apart, Nagle's algorithm holds the body back for 40 ms

            def do_GET(self) -> None:
                self._send(200, {})

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                answer = outer.answer(self.path, self.headers["content-type"], body)
                self._send(answer, {"error": "no"}) if isinstance(answer, int) else self._send(200, answer)

            def _send(self, status: int, answer: Any) -> None:
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                """Quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def answer(self, path: str, content_type: str, body: bytes) -> Any:
        request = json.loads(body) if content_type == "application/json" else read_form(content_type, body)
        with self.lock:
            self.on_request()
            self.log.append((self.name, path, request))
        return self.reply(path, request)


def read_form(content_type: str, body: bytes) -> Request:
    """A multipart body: the file's bytes under image, captions as a list, the rest as text."""
    message = message_from_bytes(b"content-type: " + content_type.encode() + b"\r\n\r\n" + body)
    form: Request = {"captions": []}
    for part in message.get_payload():  # type: ignore[union-attr]
        name, data = part.get_param("name", header="content-disposition"), part.get_payload(decode=True)  # type: ignore[union-attr]
        if name == "caption":
            form["captions"].append(data.decode())
        else:
            form[name] = data if name == "image" else data.decode()
    return form


def punchline(path: str, request: Request) -> Any:
    """Speaks Punchline's /score, by file and by id."""
    image = request["image"]
    name = image if isinstance(image, str) else "sha256:" + hashlib.sha256(image).hexdigest()
    scores = [float(len(caption)) for caption in request["captions"]]
    usage = {"captions": len(scores), "tokens": 300 * len(scores), "computed_tokens": 1, "cached_tokens": 0}
    return {"scores": scores, "image_id": name, "usage": usage}


def vllm(path: str, request: Request) -> Any:
    """Speaks vLLM's /classify with messages, and /score."""
    usage = {"prompt_tokens": 290}
    if path == "/classify":
        return {"data": [{"index": 0, "label": "LABEL_0", "probs": [0.5], "num_classes": 1}], "usage": usage}
    return {"data": [{"index": n, "object": "score", "score": 0.5} for n in range(len(request["documents"]))], "usage": usage}


@dataclass
class Pair:
    ours: FakeServer
    peer: FakeServer
    log: list[tuple[str, str, Request]]

    def run(self, *flags: str) -> int:
        return int(against_peer.main(["--ours", self.ours.url, "--peer", self.peer.url + "/", "--seed", "7", *flags]))


@pytest.fixture
def pair() -> Iterator[Pair]:
    log: list[tuple[str, str, Request]] = []
    with FakeServer("ours", punchline, log) as ours, FakeServer("peer", vllm, log) as peer:
        yield Pair(ours, peer, log)


def runs(log: list[tuple[str, str, Request]]) -> list[str]:
    """Who was asked, neighbours of the same name once."""
    names = [name for name, _, _ in log]
    return [name for index, name in enumerate(names) if index == 0 or names[index - 1] != name]


def shown(request: Request) -> tuple[bytes, str]:
    """The picture and the text of a /classify request."""
    picture, text = request["messages"][1]["content"]
    return base64.b64decode(picture["image_url"]["url"].removeprefix("data:image/png;base64,")), text["text"]


def test_the_table_is_the_arithmetic_of_the_measurements(pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pair.run("--groups", "3,5", "--images", "2", "--json", str(tmp_path / "peer.json")) == 0
    table, found = capsys.readouterr().out, json.loads((tmp_path / "peer.json").read_text())
    names = ["3 cold", "3 warm", "5 cold", "5 warm", "2 images x 3 cold", "2 images x 3 warm"]
    assert [row["row"] for row in found["rows"]] == names
    for row, line in zip(found["rows"], table.splitlines()[1:], strict=False):
        ours, peer = row["ours"], row["peer"]
        assert len(ours["seconds"]) == len(peer["seconds"]) == 3
        assert ours["median_s"] == statistics.median(ours["seconds"])
        assert row["ratio"] == pytest.approx(statistics.median(peer["seconds"]) / statistics.median(ours["seconds"]))
        assert row["worst_round"] == pytest.approx(min(p / o for o, p in zip(ours["seconds"], peer["seconds"], strict=True)))
        assert line.startswith(row["row"])
        assert line.split()[-2:] == [f"{row['ratio']:.2f}", f"{row['worst_round']:.2f}"]
        assert f"{ours['median_s']:.3f} ({min(ours['seconds']):.3f} .. {max(ours['seconds']):.3f})" in line
    assert "3 rounds, turns: ours peer; peer ours; ours peer" in table
    assert "3: 900 and 870; 5: 1,500 and 1,450; 2 images x 3: 900 and 870" in table
    assert found["turns"] == [["ours", "peer"], ["peer", "ours"], ["ours", "peer"]]


def test_medians_and_ratios_of_known_seconds() -> None:
    row = {"ours": against_peer.Cell([1.0, 2.0, 4.0]), "peer": against_peer.Cell([3.0, 2.0, 6.0])}
    assert str(row["ours"]) == "2.000 (1.000 .. 4.000)"
    assert against_peer.ratio(row) == 1.5
    assert against_peer.lowest_ratio(row) == 1.0


def test_a_peer_that_does_not_count_tokens_is_compared_all_the_same(pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def silent(path: str, request: Request) -> Any:
        return {name: value for name, value in vllm(path, request).items() if name != "usage"}

    pair.peer.reply = silent
    assert pair.run("--groups", "3", "--images", "2", "--json", str(tmp_path / "peer.json")) == 0
    assert "3: 900 and ?; 2 images x 3: 900 and ?" in capsys.readouterr().out
    assert json.loads((tmp_path / "peer.json").read_text())["rows"][0]["peer"]["tokens"] == 0


def test_the_scores_of_both_are_held_against_each_other(pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def alike(path: str, request: Request) -> Any:
        _, text = shown(request)
        caption = text.split(against_peer.CAPTION_MARK)[1].removesuffix(against_peer.TAIL)
        return {"data": [{"probs": [len(caption) + 0.25]}]}

    pair.peer.reply = alike
    assert pair.run("--groups", "3", "--images", "2", "--json", str(tmp_path / "peer.json")) == 0
    assert "scores of both differ by at most 0.25, those of a group among themselves by " in capsys.readouterr().out
    found = json.loads((tmp_path / "peer.json").read_text())["agreement"]
    assert (found["largest"], found["same_order"]) == (0.25, 1.0)
    assert found["spread"] > 1


def test_the_agreement_of_known_scores() -> None:
    ours, peer = against_peer.Cell(scores=[[1.0, 2.0, 4.0], [5.0]]), against_peer.Cell(scores=[[1.0, 3.0, 2.5], [4.0]])
    found = against_peer.agreement({"3 cold": {"ours": ours, "peer": peer}})
    assert (found.largest, found.same_order) == (1.5, pytest.approx(2 / 3))
    assert found.spread == pytest.approx(statistics.pstdev([1, 2, 4]) / 2)
    lone = against_peer.agreement({"1 cold": {side: against_peer.Cell(scores=[[1.0]]) for side in ("ours", "peer")}})
    assert str(lone) == "scores of both differ by at most 0, those of a group among themselves by 0"


def test_the_sides_take_turns_and_swap_who_goes_first(pair: Pair) -> None:
    assert pair.run("--groups", "2", "--images", "2", "--rounds", "2") == 0
    # warm-up; then two cases a round: ours first in the first round, the peer first in the second, so it has two turns in a row
    assert runs(pair.log) == ["ours", "peer"] + ["ours", "peer"] * 2 + ["ours", "peer", "ours"]


def test_both_see_the_same_pictures_and_captions_and_cold_is_new(pair: Pair) -> None:
    assert pair.run("--groups", "2", "--images", "2", "--rounds", "2", "--model", "judge") == 0
    ours = [(request["image"], caption) for name, _, request in pair.log if name == "ours" for caption in request["captions"]]
    peer = [shown(request) for name, _, request in pair.log if name == "peer"]
    mark, tail = against_peer.CAPTION_MARK, against_peer.TAIL
    assert {(image, against_peer.QUESTION + mark + caption + tail) for image, caption in ours} == set(peer)
    assert len(set(ours)) == len(ours)  # no caption of a picture comes twice
    assert len({image for image, _ in ours}) == 1 + 2 * 3  # the warm-up's, and one group and two a round
    assert all(Image.open(io.BytesIO(image)).size == (448, 308) for image, _ in ours)
    assert all(request["model"] == "judge" and request["use_activation"] is False for name, _, request in pair.log if name == "peer")
    assert {request["prompt"] for name, _, request in pair.log if name == "ours"} == {against_peer.QUESTION}


def test_the_seed_decides_the_work() -> None:
    case = against_peer.Case(2, 8)
    assert against_peer.workload(1, "round 0", case) == against_peer.workload(1, "round 0", case)
    assert against_peer.workload(1, "round 0", case) != against_peer.workload(2, "round 0", case)
    work = against_peer.workload(1, "round 0", case)
    assert [each.png for each in work["cold"]] == [each.png for each in work["warm"]]
    assert [len(caption.split()) for caption in work["cold"][0].captions] == [10, 13, 16, 19, 22, 25, 28, 31]


def test_a_peer_that_takes_pairs_gets_one_request_a_group(pair: Pair) -> None:
    assert pair.run("--groups", "3", "--images", "2", "--rounds", "1", "--peer-route", "score") == 0
    asked = [(path, request) for name, path, request in pair.log if name == "peer"]
    assert {path for path, _ in asked} == {"/score"}
    assert [len(request["documents"]) for _, request in asked] == [3] * (2 + 2 + 4)  # warm-up, one group, two at once: cold and warm
    assert all("model" not in request for _, request in asked)


def test_warm_by_id_only_on_request(pair: Pair) -> None:
    flags = ("--groups", "2", "--images", "2", "--rounds", "1")
    assert pair.run(*flags) == 0
    assert all(isinstance(request["image"], bytes) for name, _, request in pair.log if name == "ours")
    pair.log.clear()
    assert pair.run(*flags, "--ours-by-id") == 0
    kinds = [type(request["image"]) for name, _, request in pair.log if name == "ours"]
    assert kinds == [bytes, str, bytes, str, bytes, bytes, str, str]


@pytest.mark.parametrize(("style", "prompt", "has_tail"), [("whole", True, True), ("template", True, False), ("default", False, False)])
def test_prompt_styles(pair: Pair, style: str, prompt: bool, has_tail: bool) -> None:
    assert pair.run("--groups", "1", "--images", "2", "--rounds", "1", "--ours-prompt-style", style) == 0
    request = next(request for name, _, request in pair.log if name == "ours")
    assert ("prompt" in request) is prompt
    assert request["captions"][0].endswith(against_peer.TAIL) is has_tail


def wrong_number(path: str, request: Request) -> Any:
    return {**punchline(path, request), "scores": [1.0]}


def not_a_number(path: str, request: Request) -> Any:
    return {**vllm(path, request), "data": [{"index": 0, "probs": [float("nan")]}]}


def nothing(path: str, request: Request) -> Any:
    return {**punchline(path, request), "scores": [None, None]}


def two_classes(path: str, request: Request) -> Any:
    return {**vllm(path, request), "data": [{"index": 0, "probs": [0.4, 0.6]}]}


def another_shape(path: str, request: Request) -> Any:
    return [[{"label": "LABEL_0", "score": 0.7}]]


def failing(path: str, request: Request) -> Any:
    return 503


@pytest.mark.parametrize(
    ("side", "reply", "message"),
    [
        ("ours", wrong_number, "gave 1 scores for 2 captions"),
        ("ours", nothing, "gave a score that is no finite number: None"),
        ("ours", failing, r"answered 503: \{.error.: .no.\}"),
        ("peer", not_a_number, "gave a score that is no finite number: nan"),
        ("peer", two_classes, "gave 2 scores for one caption"),
        ("peer", another_shape, "gave an answer of another shape"),
        ("peer", failing, "POST http://127.0.0.1:[0-9]+/classify answered 503"),
    ],
)
def test_a_wrong_answer_stops_with_one_line(pair: Pair, side: str, reply: Reply, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    (pair.ours if side == "ours" else pair.peer).reply = reply
    assert pair.run("--groups", "2", "--images", "2", "--rounds", "1") == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert re.search(message, said.err.splitlines()[-1])
    assert said.err.count("against_peer:") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--ours", "localhost:8000"), "is no address"),
        (("--peer", "http://"), "is no address"),
        (("--groups", "8,x"), "different group sizes"),
        (("--groups", "8,8"), "different group sizes"),
        (("--images", "1"), "at least 2"),
        (("--rounds", "0"), "at least 1"),
        (("--pause-pid-peer", "999999999"), "there is no process 999999999"),
        (("--pause-pid-ours", "1"), "would stop itself"),
        (("--json", "/nowhere/at/all.json"), "there is no folder"),
    ],
)
def test_bad_arguments_stop_with_one_line(pair: Pair, flags: tuple[str, str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    if flags[0] == "--pause-pid-ours":
        flags = (flags[0], str(os.getpid()))
    assert pair.run(*flags) == 1
    assert message in capsys.readouterr().err
    assert pair.log == []


def test_a_server_that_is_not_there_stops_with_one_line(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    assert pair.run("--peer", "http://127.0.0.1:9") == 1
    assert "peer at http://127.0.0.1:9 cannot be reached" in capsys.readouterr().err


@pytest.fixture
def sleepers() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two processes that sleep, each with a child that does: they stand for servers."""
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(1, flush=True); import time; time.sleep(60)'])"
    started = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, start_new_session=True) for _ in range(2)]
    for process in started:
        assert process.stdout is not None
        process.stdout.readline()  # the child runs
    yield started
    for process in started:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def states(process: subprocess.Popen[bytes]) -> str:
    """The states of a process and its child in /proc: T is stopped."""
    return "".join(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] for pid in against_peer._tree(process.pid))


def settled(process: subprocess.Popen[bytes], wanted: str) -> str:
    """The kernel stops a process a moment after the signal was sent."""
    for _ in range(500):
        if states(process) == wanted:
            break
        time.sleep(0.01)
    return states(process)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="pausing reads /proc")
@pytest.mark.parametrize("fails", [False, True])
def test_the_other_server_is_stopped_with_its_children_and_goes_on(
    pair: Pair, sleepers: list[subprocess.Popen[bytes]], fails: bool
) -> None:
    ours, peer = sleepers
    seen: set[tuple[str, str, str]] = set()
    pair.ours.on_request = lambda: seen.add(("ours", settled(ours, "SS"), settled(peer, "TT")))
    pair.peer.on_request = lambda: seen.add(("peer", settled(ours, "TT"), settled(peer, "SS")))
    if fails:
        pair.peer.reply = not_a_number
    flags = (
        "--settle",
        "0.1",
        "--groups",
        "2",
        "--images",
        "2",
        "--rounds",
        "2",
        "--pause-pid-ours",
        str(ours.pid),
        "--pause-pid-peer",
        str(peer.pid),
    )
    assert pair.run(*flags) == int(fails)
    assert seen == {("ours", "SS", "TT"), ("peer", "TT", "SS")}
    assert settled(ours, "SS") == settled(peer, "SS") == "SS"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="pausing reads /proc")
def test_two_servers_of_one_process_cannot_be_paused_apart(
    pair: Pair, sleepers: list[subprocess.Popen[bytes]], capsys: pytest.CaptureFixture[str]
) -> None:
    outer, inner = against_peer._tree(sleepers[0].pid)
    assert pair.run("--pause-pid-ours", str(outer), "--pause-pid-peer", str(inner)) == 1
    assert "both would stop together" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="pausing reads /proc")
def test_stopped_servers_go_on_when_the_command_is_ended(pair: Pair, sleepers: list[subprocess.Popen[bytes]]) -> None:
    ours, peer = sleepers
    reached, leave = threading.Event(), threading.Event()

    def wait() -> None:
        reached.set()
        leave.wait(30)

    pair.ours.on_request = wait
    urls = [
        "--settle",
        "0.1",
        "--ours",
        pair.ours.url,
        "--peer",
        pair.peer.url,
        "--pause-pid-ours",
        str(ours.pid),
        "--pause-pid-peer",
        str(peer.pid),
    ]
    command = subprocess.Popen([sys.executable, str(SCRIPTS / "against_peer.py"), *urls], stderr=subprocess.DEVNULL)
    assert reached.wait(60)
    assert settled(peer, "TT") == "TT"
    command.terminate()
    assert command.wait(30) == 128 + signal.SIGTERM
    leave.set()
    assert settled(peer, "SS") == "SS"


def test_the_overhead_of_every_way() -> None:
    """A short run of the real servers: every row, every figure a number, differences those of the table."""
    pytest.importorskip("litserve")
    command = [sys.executable, str(SCRIPTS / "overhead.py"), "--requests", "20", "--rounds", "1", "--delay-ms", "2", "--clients", "1,4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    rows = [re.split(r" {2,}", line.strip()) for line in done.stdout.splitlines() if line.lstrip().startswith("2 ms")]
    ways = ["Punchline", "FastAPI, def", "FastAPI, async def", "LitServe"]
    assert [row[1:3] for row in rows] == [["1", "direct call"], *(["1", way] for way in ways), *(["4", way] for way in ways)]
    direct = float(rows[0][3])
    assert direct >= 2
    for row in rows[1:]:
        p50, p99, difference = float(row[3]), float(row[4]), float(row[6])
        assert p99 >= p50 > 2
        assert difference == pytest.approx(p50 - direct, abs=0.011)  # both were rounded to two digits
        assert float(row[5].replace(",", "")) > 0
    assert "litserve" in done.stdout.splitlines()[-1]


def test_no_canary_looks_at_the_fake_scorer(tmp_path: Path) -> None:
    """It would take lengths for golden scores gone wrong, and end the server in the middle of a measurement."""
    pytest.importorskip("litserve")
    overhead = load("overhead")
    server = overhead.ServerProcess("punchline", 0.0, tmp_path / "log")
    try:
        server.wait_until_ready()
        told = httpx.get(f"http://{overhead.HOST}:{server.port}/metrics", trust_env=False).text
    finally:
        server.end()
    looked = re.findall(r"^reward_golden_last_success_timestamp_seconds\{.*\} (\S+)$", told, re.MULTILINE)
    assert [float(at) for at in looked] == [0.0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--clients", "1.5"], "--clients '1.5'"),
        (["--clients", "0"], "--clients '0'"),
        (["--delay-ms", "x"], "--delay-ms 'x'"),
        (["--rounds", "0"], "at least 1"),
    ],
)
def test_overhead_refuses_bad_arguments(flags: list[str], message: str) -> None:
    pytest.importorskip("litserve")
    done = subprocess.run([sys.executable, str(SCRIPTS / "overhead.py"), *flags], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("overhead: ")
    assert message in done.stderr


def test_the_readme_names_every_file_here() -> None:
    text = (SCRIPTS / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in SCRIPTS.iterdir() if path.is_file() and path.name != "README.md" and path.name not in text] == []


def readme_block(command: str) -> str:
    text = (SCRIPTS.parents[1] / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(rf"^```\n(\$ {command}.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return str(block).rstrip()


def test_the_table_of_the_readme_is_the_output_of_the_newest_run() -> None:
    record = (SCRIPTS / "scoring-cpu.txt").read_text(encoding="utf-8")
    assert record.startswith(readme_block("punchline bench --geometry qwen2.5-vl-3b") + "\n")


def test_what_the_readme_shows_of_conversations_was_measured() -> None:
    record = (SCRIPTS / "conversation-cpu.txt").read_text(encoding="utf-8").splitlines()
    lines = readme_block("punchline bench --geometry qwen2.5-1.5b").splitlines()
    assert len(lines) > 10
    assert [line for line in lines if line and line not in record] == []


# The steps of the serving forward


def lengths_scorer(asked: list[tuple[str, int]], name: str, cold: float, warm: float) -> Callable[[EncodedGroup], list[float]]:
    """A caption's score is its length, and a little more: another little for a group of a picture it has seen."""
    seen: set[str] = set()

    def score(group: EncodedGroup) -> list[float]:
        asked.append((name, id(group)))
        shift = warm if group.key[0] in seen else cold
        seen.add(group.key[0])
        return [len(row) + shift for row in group.rows]

    return score


def test_steps_take_turns_on_the_same_groups_and_are_held_against_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    steps = load("steps")
    asked: list[tuple[str, int]] = []
    first = steps.Step("first", lengths_scorer(asked, "first", 0.0, 0.0), keeps=False)
    second = steps.Step("second", lengths_scorer(asked, "second", 0.25, 0.5), keeps=True)
    steps.measure([first, second], Workload(load_encoder(open_artifact("demo")), GOLDEN_LIMITS), 3, 2)
    assert [name for name, _ in asked] == ["first", "first", "first", "second", "second"] * 3
    (_, cold), (_, warm), (_, cold_1), (_, cold_2), (_, warm_2) = asked[:5]
    assert cold == cold_1 == cold_2 != warm == warm_2  # the same groups for both
    assert [len(times) for times in (first.cold, first.warm, second.cold, second.warm)] == [2, 0, 2, 2]
    assert (first.cold_difference, first.warm_difference) == (0.0, None)
    assert (second.cold_difference, second.warm_difference) == (0.25, 0.5)
    assert second.share_of_spread == pytest.approx(0.5 / 3)  # captions of 10, 13 and 16 words
    steps.print_table([first, second], "two steps")
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split()[-1] == "0.0e+00"
    assert lines[3].split()[-2:] == ["2.5e-01", "5.0e-01"]


def test_a_step_whose_score_is_no_number_is_infinitely_wrong() -> None:
    steps = load("steps")
    step = steps.Step("wrong", lambda _: [], keeps=True)
    step.compare([1.0, float("nan")], [1.0, 2.0], warm=True)
    assert step.share_of_spread == step.warm_difference == float("inf")


# Two models on one base


def test_models_are_measured_both_ways_and_held_against_each_alone(capsys: pytest.CaptureFixture[str]) -> None:
    load("models").main(sizes="1,2", rounds=1)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[2:6]] == [["1", "cold"], ["1", "warm"], ["2", "cold"], ["2", "warm"]]
    assert float(lines[6].split()[-1]) < 1e-4


@pytest.mark.parametrize(("shift", "found"), [(0.5, 0.5), (float("nan"), float("inf")), (float("inf"), float("inf"))])
def test_a_model_that_scores_otherwise_in_company_is_seen(shift: float, found: float) -> None:
    models = load("models")
    workload = Workload(load_encoder(open_artifact("demo")), GOLDEN_LIMITS)
    alone = Salted()
    group = replace(workload.encode(workload.request(2)), model="first")
    (scores,) = alone.score(alone.prepare([group]))
    shifted = replace(scores, values=(scores.values[0], scores.values[1] + shift))
    assert models.difference({"first": alone}, [group], [shifted]) == pytest.approx(found)
    assert models.difference({"first": alone}, [group], [scores]) == 0.0
