"""What a study's rows say beside one another: means and spreads over seeds, against baselines, and in sentences."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any, NamedTuple

from lockstep.export.card import MIB
from lockstep.report.sources import Curve, Found, Row, Study

CLOSE = 1.0  # percent of perplexity over bf16 up to which a model counts as "nearly as good"
LEAD = 0.5  # percent: a smaller lead of one run over one other is no lead
MEASURED = ("perplexity", "accuracy", "agreement", "kl", "exact_line", "parses", "served_perplexity")
PER_RUN = (
    "weight_bytes",
    "bits_per_weight",
    "learning_rate",
    "quantize_seconds",
    "train_seconds",
    "train_tokens",
    "peak_bytes",
)
LOSSES = ("train/loss", "train_loss", "train_loss_step", "loss")
VALIDATION = ("val/loss", "val_loss", "eval/loss", "eval_loss")
PERPLEXITIES = ("val/perplexity", "val_perplexity", "eval/perplexity", "eval_perplexity", "perplexity")
DIVERGENCE, CROSS_ENTROPY = "qat/kl", "qat/cross_entropy"
SPIKES = "spike/count"


ONE_EACH = f"within {LEAD:g} %, and one run each: no spread is known"


class Spread(NamedTuple):
    """Mean over the seeds, and the standard deviation of a sample; None for a single seed."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """None if nothing was measured."""
        known = [value for value in values if value is not None]
        return cls(mean(known), stdev(known) if len(known) > 1 else None) if known else None

    def words(self, form: str) -> str:
        """``mean ± deviation``."""
        around = "" if self.deviation is None else f" ± {format(self.deviation, form.lstrip('+'))}"
        return format(self.mean, form) + around


@dataclass(frozen=True)
class Line:
    """All seeds of a row's label.

    `values` holds `MEASURED` and `PER_RUN`, and what follows from them, each paired by seed where both have it:
    ``increase`` of the perplexity over bf16 with the same tokens in %, ``won_back`` of what rounding to nearest loses
    in %, ``cost`` of a training token's time over plain fine-tuning's.
    """

    label: str
    scheme: str
    method: str
    format: str
    baseline: str | None
    seeds: tuple[int, ...]
    values: dict[str, Spread]

    def mean(self, name: str) -> float | None:
        return self.values[name].mean if name in self.values else None


def lines(study: Study) -> list[Line]:
    """The rows of `study` by label, in its order."""
    by_label: dict[str, list[Row]] = {}
    for row in study.rows:
        by_label.setdefault(row.label, []).append(row)
    return [_line(rows, study.rows) for rows in by_label.values()]


def _line(rows: Sequence[Row], every: Sequence[Row]) -> Line:
    first = rows[0]
    derived: dict[str, Callable[[Row], float | None]] = {
        "increase": lambda row: _increase(row, every),
        "won_back": lambda row: _won_back(row, every),
        "cost": lambda row: _cost(row, every),
    }
    plain = {name: Spread.of(getattr(row, name) for row in rows) for name in (*MEASURED, *PER_RUN)}
    found = plain | {name: Spread.of(map(value, rows)) for name, value in derived.items()}
    known = {name: spread for name, spread in found.items() if spread is not None}
    seeds = tuple(row.seed for row in rows)
    return Line(first.label, first.scheme, first.method, first.format or "", first.baseline, seeds, known)


def _reference(row: Row, every: Sequence[Row]) -> list[Row]:
    """The bf16 rows to compare `row` with: of its training tokens if there are, else of the most; of its seed if so."""
    of_bf16 = [one for one in every if one.baseline == "bf16"]
    alike = [one for one in of_bf16 if row.train_tokens and one.train_tokens == row.train_tokens]
    most = max((one.train_tokens or 0 for one in of_bf16), default=0)
    alike = alike or [one for one in of_bf16 if (one.train_tokens or 0) == most]
    return [one for one in alike if one.seed == row.seed] or alike


def _perplexity(rows: Iterable[Row]) -> float | None:
    spread = Spread.of(row.perplexity for row in rows)
    return spread and spread.mean


def _increase(row: Row, every: Sequence[Row]) -> float | None:
    reference = _perplexity(_reference(row, every))
    return None if row.perplexity is None or not reference else 100 * (row.perplexity / reference - 1)


def _won_back(row: Row, every: Sequence[Row]) -> float | None:
    """None where rounding to nearest loses nothing that could be won back."""
    rounded = [one for one in every if one.baseline == "rtn" and one.format == row.format and row.format]
    best, worst = _perplexity(_reference(row, every)), _perplexity(_of_seed(row, rounded))
    if row.perplexity is None or row.baseline is not None or best is None or worst is None or worst <= best:
        return None
    return 100 * (worst - row.perplexity) / (worst - best)


def _four_digits_agree(one: float, other: float) -> bool:
    """Whether they differ by no more than half a unit of the fourth significant digit."""
    return abs(one - other) <= 0.5 * 10 ** (math.floor(math.log10(one)) - 3)


def _of_seed(row: Row, rows: list[Row]) -> list[Row]:
    return [one for one in rows if one.seed == row.seed] or rows


def _cost(row: Row, every: Sequence[Row]) -> float | None:
    if row.baseline is not None or not row.train_seconds or not row.train_tokens:
        return None
    plain = [one for one in _reference(row, every) if one.train_seconds and one.train_tokens]
    if not plain:
        return None
    per_token = mean(one.train_seconds / one.train_tokens for one in plain if one.train_seconds and one.train_tokens)
    return row.train_seconds / row.train_tokens / per_token


def measure(found: Sequence[Line]) -> str:
    """What lines are ranked by: the increase over bf16, paired by seed, or the perplexity where no bf16 is known."""
    return "increase" if any("increase" in one.values for one in found) else "perplexity"


def front(found: Sequence[Line]) -> list[Line]:
    """The lines that no other beats in both bytes and `measure`, from the smallest to the largest."""
    ranked_by = measure(found)
    measured = [one for one in found if ranked_by in one.values and "weight_bytes" in one.values]

    def place(line: Line) -> tuple[float, float]:
        return line.values["weight_bytes"].mean, line.values[ranked_by].mean

    best, kept = math.inf, []
    for line in sorted(measured, key=place):
        if place(line)[1] < best:
            best = place(line)[1]
            kept.append(line)
    return kept


# In sentences --------------------------------------------------------------------------------------------------------


def sentences(found: Found) -> list[str]:
    """What was compared and what won, computed from what was found."""
    said = [sentence for study in found.studies for sentence in _of_study(study)]
    if not found.studies:
        said += _of_runs(found.curves)
    if found.checkpoints:
        smallest = min(found.checkpoints, key=lambda one: one.sizes.total)
        share = smallest.sizes.total / (smallest.sizes.before + smallest.sizes.plain)
        many = len(found.checkpoints)
        of = f"Of {many} exported checkpoints the smallest, " if many > 1 else "The exported checkpoint "
        said.append(
            f"{of}{smallest.path}{',' * (many > 1)} takes {smallest.sizes.total / MIB:,.1f} MiB, {share:.0%} of "
            "the same model in 16 bits."
        )
    if found.alignments:
        said.append(_of_alignments(found))
    return said + [_of_ptq(report.content) for report in found.ptqs] + _of_spikes(found.curves)


def warnings(found: Found) -> list[str]:
    """What a reader should know before believing the rest."""
    said = [*(f"Not read, damaged: {one}" for one in found.damaged), *found.skipped]
    for study in found.studies:
        every = lines(study)
        if not any(line.baseline == "bf16" for line in every):
            said.append(f"{study.path} marks no row as its bf16 baseline, so no increase over bf16 is given.")
        for row in study.rows:
            if (
                row.perplexity
                and row.served_perplexity
                and not _four_digits_agree(row.perplexity, row.served_perplexity)
            ):
                said.append(
                    f"{row.label}, seed {row.seed}: served perplexity is {row.served_perplexity:.5g}, the trained "
                    f"model's {row.perplexity:.5g}: they differ within four digits."
                )
            if row.aligned is False:
                said.append(f"{row.label}, seed {row.seed}: its export is not aligned with what was trained.")
        for line in every:
            if twice := {seed for seed in line.seeds if line.seeds.count(seed) > 1}:
                said.append(f"{line.label} has seed {min(twice)} more than once: its spread is not that over seeds.")
        alone = [line.label for line in every if line.mean("train_seconds") and len(line.seeds) < 2]
        if alone:
            said.append(f"One seed only, so no spread is known: {_listed(alone)}.")
    for report in found.alignments:
        if not report.content["aligned"]:
            said += [
                f"{report.content['checkpoint']} is not aligned: {line}" for line in report.content["failures"][:3]
            ]
    for run, records in found.gaps:
        measured = [one for one in records if "gap" in one]
        if measured and not (measured[-1]["gap"]["mean_abs"] or 0) <= measured[-1]["limit"]:
            said.append(f"{run}: the gap between trainer and engine was beyond its limit when it was last measured.")
    for curve in found.curves:
        if curve.metric in (*LOSSES, *VALIDATION) and any(not math.isfinite(value) for _, value in curve.points):
            step = next(step for step, value in curve.points if not math.isfinite(value))
            said.append(f"{curve.run}: {curve.metric} is not finite at step {step}.")
    return said


class Winner(NamedTuple):
    """The best line of a format, the `next` if there is one, and the `doubt` about its lead, in words or empty."""

    best: Line
    next: Line | None
    doubt: str


def winners(found: Sequence[Line]) -> list[Winner]:
    """The line with the least increase of each format, in the order of the lines."""
    by_format: dict[str, list[Line]] = {}
    for line in _quantized(found):
        if line.format and "increase" in line.values:
            by_format.setdefault(line.format, []).append(line)
    won = []
    for lines_of_it in by_format.values():
        best, *rest = sorted(lines_of_it, key=_increase_of)
        won.append(Winner(best, rest[0], _doubt(best, rest[0])) if rest else Winner(best, None, ""))
    return won


def _doubt(best: Line, second: Line) -> str:
    lead = _increase_of(second) - _increase_of(best)
    known = [deviation for one in (best, second) if (deviation := one.values["increase"].deviation) is not None]
    if not known:
        return ONE_EACH if lead < LEAD else ""
    return "within the spread of the seeds" if lead <= sum(known) else ""


def _quantized(found: Sequence[Line]) -> list[Line]:
    """Without bf16 and what is of its format, such as the model before it was trained."""
    plain = {line.format for line in found if line.baseline == "bf16" and line.format}
    return [line for line in found if line.baseline != "bf16" and line.format not in plain]


def _of_study(study: Study) -> list[str]:
    every = lines(study)
    bf16 = [line for line in every if line.baseline == "bf16" and "perplexity" in line.values]
    reference = max(bf16, key=lambda line: line.mean("train_tokens") or 0, default=None)
    against = f" against {reference.label} (perplexity {reference.values['perplexity'].mean:.4g})" if reference else ""
    methods = _quantized(every)
    formats = dict.fromkeys(line.format for line in methods if line.format)
    seeds = max(len(line.seeds) for line in every)
    spread = f", up to {seeds} seeds each" if seeds > 1 else ""
    said = [f"{_count(len(methods), 'row')} in {_count(len(formats), 'format')} were compared{against}{spread}."]
    return said + _smallest(methods, reference) + _most_won(winners(every))


def _most_won(won: Sequence[Winner]) -> list[str]:
    """Which methods win where there is another, and what the best of them wins back."""
    won = [one for one in won if one.next is not None]
    if not won:
        return []
    counts: dict[str, int] = {}
    for one in won:
        counts[one.best.method or one.best.label] = counts.get(one.best.method or one.best.label, 0) + 1
    named = ", ".join(f"{name} in {count} of {_count(len(won), 'format')}" for name, count in counts.items())
    said = [f"Lowest perplexity at equal bytes: {named}."]
    if doubtful := [one.best.format for one in won if one.doubt]:
        said.append(f"No clear lead over the next in {_listed(doubtful)}, see below.")
    backs = {one.best.label: one.best.values["won_back"] for one in won if "won_back" in one.best.values}
    if backs:
        low, high = min(backs, key=backs.__getitem__), max(backs, key=backs.__getitem__)
        least = f"{backs[low].words('.1f')} % ({low}) to " if low != high else ""
        said.append(f"Of what rounding to nearest loses they win back {least}{backs[high].words('.1f')} % ({high}).")
    return said


def _smallest(methods: Sequence[Line], reference: Line | None) -> list[str]:
    """The best quality per byte: the smallest that is nearly as good as bf16."""
    sized = [line for line in methods if "increase" in line.values and "weight_bytes" in line.values]
    if not sized:
        return []
    near = [line for line in sized if _increase_of(line) <= CLOSE]
    if not near:
        best = min(sized, key=_increase_of)
        return [f"None is within {CLOSE:g} % of bf16's perplexity; {best.label} is nearest."]
    best = min(near, key=lambda line: (line.values["weight_bytes"].mean, _increase_of(line)))
    full = reference and reference.mean("weight_bytes")
    share = f", {best.values['weight_bytes'].mean / full:.0%} of bf16's bytes" if full else ""
    return [
        f"Best quality for its bytes: the smallest within {CLOSE:g} % of bf16's perplexity is {best.label} "
        f"({best.values['weight_bytes'].mean / MIB:,.1f} MiB{share}): {best.values['increase'].words('+.2f')} %."
    ]


def _increase_of(line: Line) -> float:
    return line.values["increase"].mean


def metric(curves: Iterable[Curve], names: Sequence[str]) -> dict[str, Curve]:
    """For each run the longest of its curves that is called one of `names`: some trainers add a mean at the end."""
    found: dict[str, Curve] = {}
    for curve in curves:
        if curve.metric in names and (curve.run not in found or len(curve.points) > len(found[curve.run].points)):
            found[curve.run] = curve
    return found


def training(curves: Sequence[Curve]) -> tuple[dict[str, Curve], dict[str, Curve]]:
    """The training losses of the runs without a teacher, and of those with one: divergences, no cross-entropies."""
    taught = metric(curves, (DIVERGENCE,))
    losses = metric(curves, LOSSES)
    alone = {run: curve for run, curve in losses.items() if run not in taught}
    return alone, {run: curve for run, curve in losses.items() if run in taught}


def of_runs(curves: Sequence[Curve]) -> dict[str, dict[str, Curve]]:
    """What the runs are compared in, by its words; then by the run."""
    alone, taught = training(curves)
    found = {
        "training loss, last": alone,
        "training loss of distillation, last": taught,
        "KL from the teacher, nats, last": metric(curves, (DIVERGENCE,)),
        "cross-entropy beside it, nats, last": metric(curves, (CROSS_ENTROPY,)),
        "validation loss, last": metric(curves, VALIDATION),
        "validation perplexity, last": metric(curves, PERPLEXITIES),
        "SQNR of the weights, dB": metric(curves, ("qat/sqnr_db/mean",)),
        "codes flipped since the last look": metric(curves, ("qat/code_flips/mean",)),
        "codes that changed back": metric(curves, ("qat/oscillation/mean",)),
        "codes at the ends": metric(curves, ("qat/saturation/mean",)),
    }
    return {words: of_run for words, of_run in found.items() if of_run}


def _of_runs(curves: Sequence[Curve]) -> list[str]:
    """Which run ended best by validation; by training loss only if none was validated and none had a teacher."""
    every = dict.fromkeys(run for of_run in of_runs(curves).values() for run in of_run)
    alone, taught = training(curves)
    validated = max((metric(curves, names) for names in (VALIDATION, PERPLEXITIES)), key=len)
    said = f"{_count(len(every), 'run')} {'was' if len(every) == 1 else 'were'} compared"
    if not validated and taught:
        why = (
            "their training losses are divergences from a teacher"
            if len(every) == len(taught)
            else ("the training losses of those with a teacher are divergences from it, of the others cross-entropies")
        )
        return [f"{said}; none logs a validation loss, and {why}, so none is called best."]
    compared = validated or alone
    ends = {run: curve.points[-1][1] for run, curve in compared.items() if math.isfinite(curve.points[-1][1])}
    if not ends:
        return []
    best, *rest = sorted(ends, key=ends.__getitem__)
    end = f"{compared[best].metric} is {ends[best]:.4g} at the end"
    if len(every) == 1:
        return [f"One run, {best}: {end}."]
    if len(ends) < len(every):
        said += f", {len(ends)} of them by {'validation' if validated else 'training'} loss"
    if not rest:
        return [f"{said}: {best}, {end}."]
    following = f"(next: {', '.join(f'{run} {ends[run]:.4g}' for run in rest[:3])})"
    what = "best" if validated else "lowest in training, and none was validated"
    if ends[rest[0]] - ends[best] < LEAD / 100 * abs(ends[best]):
        what = f"lowest, but {ONE_EACH}"
    return [f"{said}; {best} is {what}: {end} {following}."]


def _of_spikes(curves: Sequence[Curve]) -> list[str]:
    counts = {run: max(value for _, value in curve.points) for run, curve in metric(curves, (SPIKES,)).items()}
    named = ", ".join(f"{_count(int(count), 'loss spike')} in {run}" for run, count in counts.items())
    return [f"Noticed while training: {named}."] if named else []


def _of_ptq(content: Mapping[str, Any]) -> str:
    """What `lockstep ptq` did, and where it hurts."""
    worst = sorted(content["rows"], key=lambda row: -row["error"])[:3]
    errors = ", ".join(f"{row['name']} {row['error']:.2%}" for row in worst)
    return (
        f"Post-training {content['method']} as {content['scheme']} took {content['seconds']:.1f} s for "
        f"{_count(len(content['rows']), 'layer')}; largest errors of a weight: {errors}."
    )


def _of_alignments(found: Found) -> str:
    verdicts = {report.content["checkpoint"]: bool(report.content["aligned"]) for report in found.alignments}
    failed = [name for name, aligned in verdicts.items() if not aligned]
    if not failed:
        return f"{_count(len(verdicts), 'alignment report')}: every checkpoint computes what was trained."
    return f"NOT aligned, {len(failed)} of {_count(len(verdicts), 'alignment report')}: {_listed(failed)}."


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
