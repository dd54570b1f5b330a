"""Times Punchline and any server that speaks vLLM's `/classify` or `/score`, by turns, over HTTP: same images, same captions.

Stands alone (httpx, Pillow, NumPy); knows of both servers nothing but their addresses. The table goes to stdout, progress to stderr.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import itertools
import json
import math
import os
import platform
import random
import re
import secrets
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import httpx
import numpy as np
from PIL import Image, ImageDraw

Side = Literal["ours", "peer"]
Kind = Literal["cold", "warm"]
SIDES: tuple[Side, Side] = ("ours", "peer")
KINDS: tuple[Kind, Kind] = ("cold", "warm")
TIMEOUT_S = 600.0
OURS_TIMEOUT_MS = 120_000  # Punchline's own cap of a deadline; its default of 10 s is short for a slow machine

VOCABULARY = (
    "a an the this that my your he we you I one two three only never again just man woman boss king queen cat dog duck sheep "
    "robot doctor lawyer pirate ghost judge wife office desk couch bar boat cave island bed door window phone lamp table chair "
    "says thinks told looks talks runs stands sits should have was is are gone left meeting merger reports parking phase free "
    "sorry better happy angry tired old young at for in near on under with before and but who"
)  # everyday words, each one token for most tokenizers
WORDS = tuple(VOCABULARY.split())
SYSTEM = "You are a careful judge of captions . You say how funny a caption is for the cartoon shown ."
QUESTION = (
    "Rate the caption that follows . Think about whether the joke is clear , whether the caption fits the picture , whether a reader "
    "would laugh , and whether the wording is short . Answer with one number only , where a higher number means a funnier caption ."
)
CAPTION_MARK = " Candidate caption: "
TAIL = "\nHow funny is this caption for the cartoon ?"
IMAGE_SIZE = (448, 308)


class Refused(Exception):
    """The comparison cannot be made or trusted; the message is one line for whoever started it."""


@dataclass(frozen=True, slots=True)
class Work:
    """One group: a picture and the captions asked about it."""

    png: bytes
    captions: tuple[str, ...]

    @property
    def data_url(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


@dataclass(frozen=True, slots=True)
class Case:
    """A row pair of the table: so many images at once, so many captions each, with a new image and with a known one."""

    num_images: int
    num_captions: int

    def name(self, kind: Kind) -> str:
        return f"{self.num_images} images x {self.num_captions} {kind}" if self.num_images > 1 else f"{self.num_captions} {kind}"


@dataclass(slots=True)
class Usage:
    """What a server says its answers cost, added up over the groups of one measurement."""

    num_tokens: int = 0
    num_cached: int = 0


@dataclass(frozen=True, slots=True)
class Measured:
    """Groups asked at once: seconds for all of them, what they cost, and the scores of each."""

    seconds: float
    usage: Usage
    scores: list[list[float]]


@dataclass(slots=True)
class Cell:
    """What one side needed for one row: seconds a group in each round, the tokens of a group, and the scores of every group."""

    seconds: list[float] = field(default_factory=list)
    num_tokens: int = 0
    num_cached: int = 0  # the most that a group took from a cache
    scores: list[list[float]] = field(default_factory=list)

    def add(self, measured: Measured) -> None:
        """A round."""
        num_groups = len(measured.scores)
        self.seconds.append(measured.seconds / num_groups)
        self.num_tokens = measured.usage.num_tokens // num_groups
        self.num_cached = max(self.num_cached, measured.usage.num_cached // num_groups)
        self.scores += measured.scores

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def __str__(self) -> str:
        return f"{self.median:.3f} ({min(self.seconds):.3f} .. {max(self.seconds):.3f})"


Table = dict[str, dict[Side, Cell]]


def captions(seed: str, num_captions: int) -> tuple[str, ...]:
    """Captions of 10, 13, .. 31 words, then from 10 again."""
    rng = random.Random(seed)  # noqa: S311 (made-up text)
    return tuple(" ".join(rng.choices(WORDS, k=10 + 3 * (index % 8))) for index in range(num_captions))


def picture(seed: str) -> bytes:
    """A PNG of forty circles, boxes and lines under faint noise: nothing that compresses to nothing, nothing that was seen before."""
    rng = random.Random(seed)  # noqa: S311
    width, height = IMAGE_SIZE
    image = Image.new("RGB", IMAGE_SIZE, (250, 250, 245))
    draw = ImageDraw.Draw(image)
    for _ in range(40):
        x, y, size = rng.randrange(width), rng.randrange(height), rng.randrange(5, 60)
        colour = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
        shape = rng.randrange(3)
        if shape == 0:
            draw.ellipse((x - size, y - size, x + size, y + size), outline=colour, width=2)
        elif shape == 1:
            draw.rectangle((x, y, x + size, y + size), fill=colour)
        else:
            draw.line((x, y, rng.randrange(width), rng.randrange(height)), fill=(0, 0, 0), width=3)
    noise = np.random.default_rng(rng.getrandbits(63)).integers(-12, 13, (height, width, 1))
    stream = io.BytesIO()
    Image.fromarray((np.asarray(image).astype(np.int16) + noise).clip(0, 255).astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def workload(seed: int, turn: str, case: Case) -> dict[Kind, list[Work]]:
    """The groups of one turn: a new picture each, and for the warm half the same pictures with new captions."""
    pictures = [picture(f"{seed}/{turn}/{case}/{index}") for index in range(case.num_images)]
    return {
        kind: [Work(png, captions(f"{seed}/{turn}/{case}/{index}/{kind}", case.num_captions)) for index, png in enumerate(pictures)]
        for kind in KINDS
    }


class Server(Protocol):
    """How one kind of server is asked for the scores of a group."""

    url: str
    probe: str  # a route to open connections with

    def num_requests(self, work: Work) -> int: ...

    def requests(self, client: httpx.AsyncClient, work: Work) -> list[httpx.Request]:
        """All requests of a group, ready to be sent."""

    def read(self, work: Work, answers: Sequence[Any], usage: Usage) -> list[Any]:
        """The scores of a group, unchecked."""


class Punchline:
    """Our side: a group is one `POST /score`, the picture as a file of the form."""

    def __init__(self, url: str, *, prompt_style: str, by_id: bool) -> None:
        self.url = url
        self.probe = "/livez"
        self._prompt_style = prompt_style
        self._by_id = by_id
        self._ids: dict[bytes, str] = {}  # a picture's bytes to the id the server gave it

    def num_requests(self, work: Work) -> int:
        return 1

    def requests(self, client: httpx.AsyncClient, work: Work) -> list[httpx.Request]:
        prompt, texts = self._texts(work)
        options: dict[str, Any] = {"timeout_ms": OURS_TIMEOUT_MS} | ({} if prompt is None else {"prompt": prompt})
        known = self._ids.get(work.png) if self._by_id else None
        if known is not None:
            return [client.build_request("POST", f"{self.url}/score", json={"image": known, "captions": texts, **options})]
        form = {"caption": texts} | {name: str(value) for name, value in options.items()}
        return [client.build_request("POST", f"{self.url}/score", data=form, files={"image": ("cartoon.png", work.png, "image/png")})]

    def _texts(self, work: Work) -> tuple[str | None, list[str]]:
        """Prompt and captions, so that with the artifact's template the model reads what the peer's reads."""
        if self._prompt_style == "whole":
            return QUESTION + CAPTION_MARK, [caption + TAIL for caption in work.captions]
        return (QUESTION if self._prompt_style == "template" else None), list(work.captions)

    def read(self, work: Work, answers: Sequence[Any], usage: Usage) -> list[Any]:
        (answer,) = answers
        self._ids[work.png] = answer["image_id"]
        usage.num_tokens += answer["usage"]["tokens"]
        usage.num_cached += answer["usage"]["cached_tokens"]
        return list(answer["scores"])


class Classify:
    """A peer that takes a chat with a `data:` URL: one request a caption, all at once."""

    def __init__(self, url: str, model: str | None) -> None:
        self.url = url
        self.probe = "/health"
        self._model = {} if model is None else {"model": model}

    def num_requests(self, work: Work) -> int:
        return len(work.captions)

    def requests(self, client: httpx.AsyncClient, work: Work) -> list[httpx.Request]:
        return [client.build_request("POST", f"{self.url}/classify", json=self._body(work.data_url, text)) for text in work.captions]

    def _body(self, image: str, caption: str) -> dict[str, Any]:
        text = {"type": "text", "text": QUESTION + CAPTION_MARK + caption + TAIL}
        user = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": image}}, text]}
        return {**self._model, "messages": [{"role": "system", "content": SYSTEM}, user], "use_activation": False}

    def read(self, work: Work, answers: Sequence[Any], usage: Usage) -> list[Any]:
        usage.num_tokens += sum(_prompt_tokens(answer) for answer in answers)
        found = [[number for item in answer["data"] for number in item["probs"]] for answer in answers]
        if odd := [numbers for numbers in found if len(numbers) != 1]:
            raise Refused(f"{self.url}/classify gave {len(odd[0])} scores for one caption")
        return [number for (number,) in found]


class PairScore:
    """A peer that takes the picture as the query and the captions as documents: one request a group."""

    def __init__(self, url: str, model: str | None) -> None:
        self.url = url
        self.probe = "/health"
        self._model = {} if model is None else {"model": model}

    def num_requests(self, work: Work) -> int:
        return 1

    def requests(self, client: httpx.AsyncClient, work: Work) -> list[httpx.Request]:
        prompt = {"type": "text", "text": QUESTION + CAPTION_MARK}
        query = {"content": [{"type": "image_url", "image_url": {"url": work.data_url}}, prompt]}
        body = {**self._model, "queries": query, "documents": [caption + TAIL for caption in work.captions], "use_activation": False}
        return [client.build_request("POST", f"{self.url}/score", json=body)]

    def read(self, work: Work, answers: Sequence[Any], usage: Usage) -> list[Any]:
        (answer,) = answers
        usage.num_tokens += _prompt_tokens(answer)
        return [item["score"] for item in sorted(answer["data"], key=lambda item: item["index"])]


def _prompt_tokens(answer: Any) -> int:
    return int((answer.get("usage") or {}).get("prompt_tokens") or 0)


def check_scores(scores: Sequence[Any], work: Work, where: str) -> None:
    """One finite number a caption, or Refused: a fast wrong answer is no answer."""
    if len(scores) != len(work.captions):
        raise Refused(f"{where} gave {len(scores)} scores for {len(work.captions)} captions")
    if wrong := [score for score in scores if not _is_finite(score)]:
        raise Refused(f"{where} gave a score that is no finite number: {wrong[0]!r}")


def _is_finite(score: Any) -> bool:
    return isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score)


async def timed(client: httpx.AsyncClient, server: Server, works: Sequence[Work], where: str) -> Measured:
    """Seconds from the first byte sent to the last answer read, of all groups at once; bodies are made before, answers checked after."""
    asked = [server.requests(client, work) for work in works]
    began = time.perf_counter()
    sent = await _all(client, [request for requests in asked for request in requests], where)
    seconds = time.perf_counter() - began
    answers, usage, scores = iter(sent), Usage(), []
    for work, requests in zip(works, asked, strict=True):
        found = _read(server, work, [next(answers) for _ in requests], usage, where)
        check_scores(found, work, where)
        scores.append(found)
    return Measured(seconds, usage, scores)


async def _all(client: httpx.AsyncClient, requests: Sequence[httpx.Request], where: str) -> list[httpx.Response]:
    """Every response to its last byte, or Refused."""
    try:
        responses = await asyncio.gather(*(client.send(request) for request in requests))
    except httpx.HTTPError as error:
        raise Refused(f"{where}: {type(error).__name__}: {error}".rstrip(": ")) from error
    for response in responses:
        if response.status_code != httpx.codes.OK:
            text = " ".join(response.text.split())[:300]
            raise Refused(f"{where}: {response.request.method} {response.request.url} answered {response.status_code}: {text}")
    return responses


def _read(server: Server, work: Work, responses: Sequence[httpx.Response], usage: Usage, where: str) -> list[Any]:
    try:
        return server.read(work, [response.json() for response in responses], usage)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Refused(f"{where} gave an answer of another shape ({type(error).__name__}: {error}); is the route right?") from error


class Processes:
    """Stops the server that is not measured, with its descendants, and lets it go on before its turn and at the end.

    One that goes on has `settle_s` seconds before it is measured: whatever it does every so often is due at once after a stop.
    """

    def __init__(self, pids: dict[Side, int | None], settle_s: float) -> None:
        self._settle_s = settle_s
        self._pids = {side: pid for side, pid in pids.items() if pid is not None}
        self._stopped: dict[Side, list[int]] = {}
        trees = {side: _tree(pid) for side, pid in self._pids.items()}
        for side, tree in trees.items():
            if os.getpid() in tree:
                raise Refused(f"--pause-pid-{side} {tree[0]}: this script runs inside that process and would stop itself")
            if any(tree[0] in other for name, other in trees.items() if name != side):
                raise Refused(f"--pause-pid-{side} {tree[0]} runs inside the other server's process; both would stop together")

    def turn(self, side: Side) -> None:
        """Only this side may run."""
        was_stopped = side in self._stopped
        self._go_on(side)
        for other in self._pids:
            if other != side and other not in self._stopped:
                self._stop(other)
        if was_stopped:
            time.sleep(self._settle_s)

    def _stop(self, side: Side) -> None:
        """Twice, because a process may have forked while its tree was read."""
        stopped = self._stopped.setdefault(side, [])
        for _ in range(2):
            for pid in _tree(self._pids[side]):
                if pid not in stopped:
                    stopped.append(pid)
                    _signal(pid, signal.SIGSTOP)

    def _go_on(self, side: Side) -> None:
        for pid in reversed(self._stopped.pop(side, [])):
            _signal(pid, signal.SIGCONT)

    def release(self) -> None:
        """Everything that was stopped goes on."""
        for side in tuple(self._stopped):
            self._go_on(side)


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _tree(root: int) -> list[int]:
    """A process and its descendants, parents first, from /proc."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            after_name = stat.read_text(encoding="utf-8", errors="replace").rpartition(") ")[2]  # a name may hold anything
            children.setdefault(int(after_name.split()[1]), []).append(int(stat.parent.name))
    if root not in (pid for family in children.values() for pid in family):
        raise Refused(f"there is no process {root} to pause" if children else "pausing a server needs /proc")
    found = [root]
    for pid in found:  # grows while it is read
        found += children.get(pid, [])
    return found


@contextlib.contextmanager
def releasing(processes: Processes) -> Iterator[None]:
    """Whatever ends the block, SIGTERM and SIGHUP included, stopped servers go on."""

    def leave(number: int, _frame: Any) -> None:
        raise SystemExit(128 + number)

    old = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        processes.release()
        for number, handler in old.items():
            signal.signal(number, handler)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured, how often, from which seed."""

    cases: tuple[Case, ...]
    num_rounds: int
    seed: int

    def order(self, index: int) -> tuple[Side, ...]:
        """Who goes first in a round: the sides swap each time."""
        return SIDES if index % 2 == 0 else SIDES[::-1]


async def compare(plan: Plan, servers: dict[Side, Server], processes: Processes) -> Table:
    """One warm-up each, then all rounds: for every case a turn of one side, cold and warm, and the same turn of the other."""
    table: Table = {case.name(kind): {side: Cell() for side in SIDES} for case in plan.cases for kind in KINDS}
    for side in SIDES:
        _progress(f"warm-up: {side}")
        processes.turn(side)
        await _turn(servers[side], side, workload(plan.seed, "warm-up", plan.cases[0]), plan.cases[0], {})
    for index in range(plan.num_rounds):
        for case in plan.cases:
            works = workload(plan.seed, f"round {index}", case)
            for side in plan.order(index):
                processes.turn(side)
                cells = {kind: table[case.name(kind)][side] for kind in KINDS}
                await _turn(servers[side], side, works, case, cells)
                shown = ", ".join(f"{case.name(kind)} {cells[kind].seconds[-1]:.3f} s" for kind in KINDS)
                _progress(f"round {index + 1} of {plan.num_rounds}: {side} {shown}")
    return table


async def _turn(server: Server, side: Side, works: dict[Kind, list[Work]], case: Case, cells: dict[Kind, Cell]) -> None:
    """Cold, then warm, over connections that were opened before the clock runs."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(timeout=TIMEOUT_S, limits=limits, trust_env=False) as client:
        num_requests = sum(server.num_requests(work) for work in works["cold"])
        await _open_connections(client, server, num_requests, f"{side} at {server.url}")
        for kind in KINDS:
            measured = await timed(client, server, works[kind], f"{side} at {server.url}, {case.name(kind)}")
            if kind in cells:
                cells[kind].add(measured)


async def _open_connections(client: httpx.AsyncClient, server: Server, num_connections: int, where: str) -> None:
    """Any answer will do: a peer need not have the probe's route. Also gives a server that was stopped a moment to come back."""
    try:
        await asyncio.gather(*(client.get(server.url + server.probe) for _ in range(num_connections)))
    except httpx.HTTPError as error:
        raise Refused(f"{where} cannot be reached: {type(error).__name__}: {error}".rstrip(": ")) from error


def ratio(row: dict[Side, Cell]) -> float:
    """How many times longer the peer's median is."""
    return row["peer"].median / row["ours"].median


def lowest_ratio(row: dict[Side, Cell]) -> float:
    """The same of the round that was worst for us."""
    return min(peer / ours for ours, peer in zip(row["ours"].seconds, row["peer"].seconds, strict=True))


def as_text(table: Table, plan: Plan, servers: dict[Side, Server]) -> str:
    """The table and the lines below it."""
    rows = [["seconds a group, median (range)", "ours", "peer", "peer / ours", "worst round"]]
    rows += [[name, str(row["ours"]), str(row["peer"]), f"{ratio(row):.2f}", f"{lowest_ratio(row):.2f}"] for name, row in table.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]) for row in rows
    ]
    turns = "; ".join(" ".join(plan.order(index)) for index in range(plan.num_rounds))
    lines += [f"ours {servers['ours'].url}, peer {servers['peer'].url} ({type(servers['peer']).__name__}), seed {plan.seed}"]
    lines += [f"{plan.num_rounds} rounds, turns: {turns}", _tokens_line(table), str(agreement(table)), f"client on {hardware()}"]
    return "\n".join(lines)


def _tokens_line(table: Table) -> str:
    """By it one sees that both were given the same work, and that cold was cold."""
    cold = {name: row for name, row in table.items() if name.endswith("cold")}
    counted = [
        f"{name.removesuffix(' cold')}: {row['ours'].num_tokens:,} and {_or_unknown(row['peer'].num_tokens)}" for name, row in cold.items()
    ]
    cached = max(row["ours"].num_cached for row in cold.values())
    return (
        f"tokens of a group's captions scored apart, ours and peer: {'; '.join(counted)}; ours took {cached:,} of a cold group from a cache"
    )


def _or_unknown(number: int) -> str:
    return f"{number:,}" if number else "?"


@dataclass(frozen=True, slots=True)
class Agreement:
    """By it one sees whether both serve one model. A quick answer that is another answer is none."""

    largest: float  # difference of a caption's two scores
    spread: float  # median over the groups of the standard deviation within one, of ours
    same_order: float  # share of the pairs of a group that both put in the same order; NaN without pairs

    def __str__(self) -> str:
        pairs = "" if math.isnan(self.same_order) else f", {self.same_order:.1%} of the pairs in the same order"
        return f"scores of both differ by at most {self.largest:.2g}, those of a group among themselves by {self.spread:.2g}{pairs}"


def agreement(table: Table) -> Agreement:
    """Of every group of every round."""
    groups = [
        (np.array(ours), np.array(peer))
        for row in table.values()
        for ours, peer in zip(row["ours"].scores, row["peer"].scores, strict=True)
    ]
    pairs = [
        np.sign(ours[first] - ours[second]) == np.sign(peer[first] - peer[second])
        for ours, peer in groups
        for first, second in itertools.combinations(range(len(ours)), 2)
    ]
    return Agreement(
        largest=max((float(np.abs(ours - peer).max()) for ours, peer in groups), default=math.nan),
        spread=statistics.median(float(ours.std()) for ours, _ in groups) if groups else math.nan,
        same_order=statistics.fmean(pairs) if pairs else math.nan,
    )


def as_json(table: Table, plan: Plan, servers: dict[Side, Server]) -> dict[str, Any]:
    """The same for machines, with every single measurement."""
    rows = [
        {
            "row": name,
            "ratio": ratio(row),
            "worst_round": lowest_ratio(row),
            **{side: {"median_s": row[side].median, "seconds": row[side].seconds, "tokens": row[side].num_tokens} for side in SIDES},
        }
        for name, row in table.items()
    ]
    turns = [plan.order(index) for index in range(plan.num_rounds)]
    urls = {side: servers[side].url for side in SIDES}
    return {
        "urls": urls,
        "route": type(servers["peer"]).__name__.lower(),
        "seed": plan.seed,
        "turns": turns,
        "client": hardware(),
        "agreement": {name: None if math.isnan(value) else value for name, value in asdict(agreement(table)).items()},
        "rows": rows,
    }


def hardware() -> str:
    """The machine this runs on, in one line."""
    found = ""
    with contextlib.suppress(OSError):
        match = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        found = match.group(1) if match else ""
    cpu = found or platform.processor() or platform.machine()
    return f"{cpu}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _address(name: str, text: str) -> str:
    """An http(s) address without its trailing slash. Raises Refused."""
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL as error:
        raise Refused(f"{name} {text!r} is no address: {error}") from None
    if url.scheme not in ("http", "https") or not url.host or url.query or url.fragment:
        raise Refused(f"{name} {text!r} is no address; it looks like http://127.0.0.1:8000")
    return text.rstrip("/")


def _cases(groups: str, num_images: int) -> tuple[Case, ...]:
    sizes = groups.split(",")
    if not all(size.strip().isdecimal() and int(size) > 0 for size in sizes) or len({int(size) for size in sizes}) != len(sizes):
        raise Refused(f"--groups {groups!r}: different group sizes separated by commas, as 8,16")
    if num_images < 2:
        raise Refused(f"--images {num_images}: at least 2, they are sent at once")
    return (*(Case(1, int(size)) for size in sizes), Case(num_images, int(sizes[0])))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="against_peer.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", required=True, metavar="URL", help="Punchline")
    parser.add_argument("--peer", required=True, metavar="URL", help="the server to compare with")
    parser.add_argument("--peer-route", choices=("classify", "score"), default="classify", help="which of vLLM's routes it speaks")
    parser.add_argument("--model", metavar="NAME", help="the peer's name of the model; left out, no name is sent")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="turns of each side (3)")
    parser.add_argument("--groups", default="8,16", metavar="N,N", help="captions of a group (8,16)")
    parser.add_argument("--images", type=int, default=4, metavar="N", help="groups sent at once in the last rows, of the first size (4)")
    parser.add_argument("--seed", type=int, metavar="N", help="of pictures and captions; by default a new one, so that cold is cold")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measurement there")
    parser.add_argument("--ours-by-id", action="store_true", help="warm requests name the picture by its id; the peer's still send it")
    parser.add_argument(
        "--ours-prompt-style",
        choices=("template", "whole", "default"),
        default="template",
        help="template: the artifact's template adds the words around prompt and caption; whole: it adds none, they are sent; "
        "default: no prompt is sent, for a model with a fixed one",
    )
    parser.add_argument("--pause-pid-ours", type=int, metavar="PID", help="stop this process and its descendants during the peer's turns")
    parser.add_argument("--pause-pid-peer", type=int, metavar="PID", help="the same for the peer during ours")
    parser.add_argument("--settle", type=float, default=5.0, metavar="S", help="seconds a server that was stopped has before its turn (5)")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> None:
    """Everything the command does. Raises Refused."""
    if arguments.rounds < 1:
        raise Refused(f"--rounds {arguments.rounds}: at least 1")
    if arguments.json and not arguments.json.parent.is_dir():
        raise Refused(f"--json {arguments.json}: there is no folder {arguments.json.parent}")
    seed = secrets.randbelow(10**9) if arguments.seed is None else arguments.seed
    plan = Plan(_cases(arguments.groups, arguments.images), arguments.rounds, seed)
    speaks = Classify if arguments.peer_route == "classify" else PairScore
    ours = Punchline(_address("--ours", arguments.ours), prompt_style=arguments.ours_prompt_style, by_id=arguments.ours_by_id)
    servers: dict[Side, Server] = {"ours": ours, "peer": speaks(_address("--peer", arguments.peer), arguments.model)}
    processes = Processes({"ours": arguments.pause_pid_ours, "peer": arguments.pause_pid_peer}, arguments.settle)
    with releasing(processes):
        table = asyncio.run(compare(plan, servers, processes))
    if arguments.json:
        arguments.json.write_text(json.dumps(as_json(table, plan, servers), indent=1) + "\n", encoding="utf-8")
    print(as_text(table, plan, servers))


def main(argv: Sequence[str] | None = None) -> int:
    """0 when everything was measured, 1 with one line on stderr otherwise."""
    try:
        run(_arguments(argv))
    except (Refused, OSError) as error:
        print(f"against_peer: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
