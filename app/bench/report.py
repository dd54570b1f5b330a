"""All that a run of the bench found, with the ratios it stands for: for people as tables, for machines as one object.

A ratio of a way whose scores are not those of the plain way is refused everywhere, and so is what rests on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from app.bench.limit import Rate
from app.bench.load import Level
from app.bench.loopback import Startup
from app.bench.overhead import Overhead
from app.bench.ways import COLD, PADDED, PLAIN, WARM, Measured, Row
from app.hardware import Hardware

MAX_DIFFERENCE = 1e-4  # of two scores in float32
# In bfloat16 the largest of many differences says little: it grows with their number. Scores of the wrong caption would be
# sqrt(2) spreads away on average, and one of them among right ones more than a spread.
MAX_RMS_OF_SPREAD = 0.5
MAX_SHARE_OF_SPREAD = 1.0
GROUP_SIZE = 8  # what the numbers to hold speak of
GPU_GROUP_SIZE = 16
MEANT = "qwen2.5-vl-3b"  # at whole depth and in bfloat16: what the numbers to hold were set for
_MEANT_LAYERS = (36, 32)
MIN_WEIGHTS_BYTES = 1 << 30  # below, the process itself is larger than any share of them


@dataclass(frozen=True, slots=True)
class Tokens:
    """Of one cold group, as the artifact's own encoder counts them."""

    image: int
    prefix: int  # the image's among them
    shortest: int  # a caption's own
    longest: int


@dataclass(frozen=True, slots=True)
class Subject:
    """What was measured."""

    model: str
    layers: int
    vision_layers: int
    hidden: int
    dtype: Literal["float32", "bfloat16"]
    fingerprint: str
    tokens: Tokens
    rounds: int

    @property
    def shape(self) -> str:
        return shape_of(self.layers, self.hidden, self.vision_layers)

    @property
    def heading(self) -> str:
        """What was measured, in one line."""
        return f"{self.model}: {self.shape}, {self.dtype}, medians of {counted(self.rounds, 'round')}"

    @property
    def takes_images(self) -> bool:
        return self.vision_layers > 0

    def worded(self, text: str) -> str:
        """A text-only model scores responses to conversations, where others score captions of images."""
        if self.takes_images:
            return text
        return text.replace("caption", "response").replace("image", "conversation")

    @property
    def is_meant(self) -> bool:
        """Whether the numbers to hold were set for this."""
        return (self.model, (self.layers, self.vision_layers), self.dtype) == (MEANT, _MEANT_LAYERS, "bfloat16")


@dataclass(frozen=True, slots=True)
class Hold:
    """A number to hold. `found` is None where it was refused.

    `ceiling`: what it would be if every product ran at the machine's rate of that time and nothing else took time.
    """

    what: str
    wanted: float
    unit: str  # "x", "%", "ms", ..
    at_least: bool
    found: float | None
    ceiling: float | None = None

    @property
    def is_beyond(self) -> bool:
        """Whether this machine could not reach it with nothing but products at its rate."""
        return self.ceiling is not None and self.at_least and self.ceiling < self.wanted

    @property
    def passed(self) -> bool:
        if self.found is None:
            return False
        return self.found >= self.wanted if self.at_least else self.found <= self.wanted


@dataclass(frozen=True, slots=True)
class Report:
    """One run of the bench."""

    hardware: Hardware
    subject: Subject
    rate: Rate
    startup: Startup
    load_s: float | None  # of a second, untouched load of the same artifact; None where memory was missing
    measured: Measured
    levels: tuple[Level, ...]
    overhead: Overhead
    notes: tuple[str, ...] = ()

    @property
    def tolerance(self) -> float | None:
        """The largest difference of one score to the plain way's that counts as rounding; None without a plain way."""
        if self.measured.spread is None:
            return None
        return MAX_DIFFERENCE if self.subject.dtype == "float32" else MAX_SHARE_OF_SPREAD * self.measured.spread

    @property
    def rms_tolerance(self) -> float | None:
        """The same for the root mean square of a way's differences."""
        if self.measured.spread is None:
            return None
        return MAX_DIFFERENCE if self.subject.dtype == "float32" else MAX_RMS_OF_SPREAD * self.measured.spread

    @property
    def rms(self) -> float | None:
        """The largest of a way."""
        found = [row.rms for row in self.measured.rows if row.rms is not None]
        return max(found) if found else None

    @property
    def difference(self) -> float | None:
        found = [row.difference for row in self.measured.rows if row.difference is not None]
        return max(found) if found else None

    @property
    def disagreeing(self) -> list[Row]:
        return [row for row in self.measured.rows if row.difference is not None and not self._is_rounding(row)]

    @property
    def misnamed(self) -> list[Row]:
        """Ways that computed more or less than their name says, an audit of a cache for instance."""
        return [row for row in self.measured.rows if not row.is_as_named]

    @property
    def ready_s(self) -> float | None:
        """From weights in memory to ready: all of the start less what a load takes."""
        return None if self.load_s is None else max(0.0, self.startup.seconds - self.load_s)

    def ratio(self, row: Row, reference: str) -> float | None:
        """How many times faster a way is than another at its size, by medians; None when either's scores are not the plain way's."""
        other = self.measured.find(reference, row.num_captions)
        if other is None or not (self._is_rounding(row) and self._is_rounding(other)) or self._is_refused(row):
            return None
        return other.seconds / row.seconds

    def share_of_limit(self, row: Row) -> float | None:
        """Of the machine's rate at the time; None for a way that is wrong: quick nonsense has no rate."""
        return None if self._is_refused(row) else row.share_of_rate

    def holds(self) -> list[Hold]:
        """The numbers to hold that this run says something about: of speed only for what they were set for."""
        if not self.subject.is_meant:
            return [*self._precision_holds(), *self._server_holds()]
        groups = [
            *self._ratio_holds(COLD, GROUP_SIZE, PLAIN, 6.5),
            *self._ratio_holds(COLD, GROUP_SIZE, PADDED, 7.5),
            *self._ratio_holds(WARM, GROUP_SIZE, PLAIN, 15.0),
            *self._ratio_holds(COLD, 1, PLAIN, 1.0),
        ]
        return [*groups, *self._limit_holds(), *self._precision_holds(), *self._server_holds(), *self._start_holds()]

    def as_dict(self) -> dict[str, Any]:
        """Everything the tables show; refused ratios are null."""
        return {
            "hardware": self.hardware.as_dict(),
            "subject": asdict(self.subject),
            "matrix_rate": asdict(self.rate) | {"best": self.rate.best},
            "ways": [self._row_dict(row) for row in self.measured.rows],
            "agreement": {
                "largest_difference": self.difference,
                "tolerance": self.tolerance,
                "largest_rms": self.rms,
                "rms_tolerance": self.rms_tolerance,
                "spread": self.measured.spread,
                "agrees": not self.disagreeing,
                "misnamed": [{"way": row.way, "captions": row.num_captions} for row in self.misnamed],
            },
            "startup": self._startup_dict(),
            "load": [asdict(level) for level in self.levels],
            "overhead": asdict(self.overhead),
            "holds": [asdict(hold) | {"passed": hold.passed, "is_beyond": hold.is_beyond} for hold in self.holds()],
            "notes": list(self.notes),
        }

    def _is_rounding(self, row: Row) -> bool:
        if row.difference is None or row.rms is None or self.tolerance is None or self.rms_tolerance is None:
            return False
        return row.difference <= self.tolerance and row.rms <= self.rms_tolerance

    def _is_refused(self, row: Row) -> bool:
        return row in self.disagreeing or not row.is_as_named

    def _row_dict(self, row: Row) -> dict[str, Any]:
        last = row.runs[-1]
        return {
            "way": row.way,
            "captions": row.num_captions,
            "seconds": {"median": row.seconds, "min": row.fastest_s, "max": row.slowest_s, "all": [run.seconds for run in row.runs]},
            "captions_per_s": row.num_captions / row.seconds,
            "tokens": {"requested": last.num_tokens, "computed": last.num_computed_tokens, "cached": last.num_cached_tokens},
            "flops": last.flops,
            "share_of_limit": self.share_of_limit(row),
            "matrix_rates": [run.rate for run in row.runs],
            "times_plain": self.ratio(row, PLAIN),
            "times_padded": self.ratio(row, PADDED),
            "largest_difference": row.difference,
            "rms_difference": row.rms,
        }

    def _startup_dict(self) -> dict[str, Any]:
        peak = self.startup.peak
        memory = None if peak is None else asdict(peak) | {"over_weights": peak.over_weights}
        return {"whole_s": self.startup.seconds, "load_s": self.load_s, "ready_after_load_s": self.ready_s, "memory": memory}

    def _ratio_holds(self, way: str, size: int, reference: str, wanted: float) -> list[Hold]:
        row, other = self.measured.find(way, size), self.measured.find(reference, size)
        if row is None or other is None:
            return []
        ceiling = other.seconds * other.rate / max(run.flops for run in row.runs)
        name = "a single caption" if size == 1 else f"a group of {size}"
        return [
            Hold(
                f"{name}, {way.removeprefix('shared prefix, ')}, against {reference}",
                wanted,
                "x",
                True,
                self.ratio(row, reference),
                ceiling,
            )
        ]

    def _limit_holds(self) -> list[Hold]:
        on_gpu = self.hardware.device.startswith("cuda")
        size, share = (GPU_GROUP_SIZE, 50.0) if on_gpu else (GROUP_SIZE, 70.0)
        row, known = self.measured.find(COLD, size), self.measured.find(WARM, size)
        if row is None or known is None:
            return []
        share_found = self.share_of_limit(row)
        found = None if share_found is None else 100 * share_found
        of_limit = Hold(f"a group of {size}, cold, share of the matrix rate", share, "%", True, found)
        speeds = [("cold", row, 1000.0), ("warm", known, 1800.0)] if on_gpu else []
        return [of_limit, *(self._speed_hold(name, each, wanted) for name, each, wanted in speeds)]

    def _speed_hold(self, name: str, row: Row, wanted: float) -> Hold:
        found = None if self._is_refused(row) else row.num_captions / row.seconds
        return Hold(f"groups of {row.num_captions}, {name}, captions a second", wanted, "/s", True, found)

    def _precision_holds(self) -> list[Hold]:
        if self.subject.dtype != "float32" or self.difference is None:
            return []
        return [Hold("largest difference to the plain way, float32", MAX_DIFFERENCE, "", False, self.difference)]

    def _server_holds(self) -> list[Hold]:
        over = Hold(f"HTTP, queue and encoding on top of the scorer, p50 ({self.overhead.model})", 5.0, "ms", False, self.overhead.p50_ms)
        last = self.levels[-1] if self.levels else None
        if last is None or last.idle_share is None:
            return [over]
        return [over, Hold(f"device idle with {last.num_clients} clients", 3.0, "%", False, 100 * last.idle_share)]

    def _start_holds(self) -> list[Hold]:
        found = [] if self.ready_s is None else [Hold("ready after the weights are in memory", 10.0, "s", False, self.ready_s)]
        if self.startup.peak is not None and self.startup.peak.weights_bytes >= MIN_WEIGHTS_BYTES:
            found.append(Hold("memory over the weights", 15.0, "%", False, 100 * self.startup.peak.over_weights))
        return found


def shape_of(layers: int, hidden: int, vision_layers: int) -> str:
    """In words; 0 vision layers: a model of text alone."""
    text = f"{counted(layers, 'text layer')} of {hidden}"
    return f"{text}, {counted(vision_layers, 'vision layer')}" if vision_layers else text


def counted(number: int, what: str) -> str:
    """`1 round`, `3 rounds`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def tokens_of(prefix: int, image: int, lengths: Sequence[int]) -> Tokens:
    """From the lengths of whole rows."""
    return Tokens(image, prefix, min(lengths) - prefix, max(lengths) - prefix)
