"""The report as one page of HTML. Nothing comes from elsewhere; it reads in light, in dark and on paper."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from lockstep.align.html import document, svg
from lockstep.align.page import figure as gap_figure
from lockstep.export.card import MIB
from lockstep.report import compare, figures
from lockstep.report.compare import Line, Spread
from lockstep.report.sources import UNREADABLE, Found, Report, Study, in_a_line

WORST = 10  # layers, in the tables
ENTRIES = 4  # of a list in the environment; longer ones are left out
STYLE = """
:root { color-scheme: light dark }
body { background: #fff } h2 { border-bottom: 1px solid #8886; padding-bottom: .2rem } h3 { font-size: 1rem }
table { font-size: .84rem } th, td { padding: .25rem .4rem } th { vertical-align: bottom } td { vertical-align: top }
th:first-child, td:first-child { min-width: 8rem } td b { font-weight: 700 }
small { color: #667085; display: block } figure { margin: 1rem 0 } figcaption { font-size: .9rem; color: #667085 }
.wide { overflow-x: auto } .lead { font-size: 1.05rem } .lead li { margin: .4rem 0 }
.warn { border-left: .3rem solid #d55e00; padding: .3rem 1rem .3rem 2rem; background: #d55e0014 }
.warn li, .said li { margin: .2rem 0; overflow-wrap: anywhere } pre { overflow-x: auto; font-size: .8rem }
.text td, .text th { text-align: left } figure svg { width: 100% } .text td:first-child { width: 16rem }
td { white-space: nowrap } td:first-child, .text td { white-space: normal; overflow-wrap: anywhere }
.paper { background: #fff; border-radius: .4rem }
@media screen and (prefers-color-scheme: dark) {
  body { background: #0d1117; color: #e6edf3 } th, td { border-color: #30363d } tr.bad td { background: #4a1d1a }
  small, figcaption { color: #9aa4b2 }
}
@media print {
  :root { color-scheme: light }
  body { font-size: 11px; max-width: none; margin: 0; background: #fff; color: #000; print-color-adjust: exact }
  figure, tr, li { break-inside: avoid } h2, h3, h3 + p { break-after: avoid } .wide { overflow: visible }
  figure svg { max-height: 85vh } details:not([open]) { display: none }
  table { font-size: .72rem } th, td { padding: .15rem .3rem } td { white-space: normal }
}
"""


def page(found: Found, title: str) -> str:
    """Everything in `found` as HTML; sections without data are left out.

    Files of a known kind that cannot be shown, as other versions wrote them maybe, go to `found.damaged`.
    """
    _set_illegible_apart(found)
    sections = (_top, _studies, _runs, _curves, _layers, _alignment, _gaps, _sizes, _cost, _commands)
    body = "\n".join(section for make in sections if (section := make(found)))
    return document(title, f"<h1>{escape(title)}</h1>\n{body}", STYLE)


def _set_illegible_apart(found: Found) -> None:
    shown: dict[str, Callable[[Found], object]] = {
        "studies": lambda one: (_top(one), _studies(one), _curves(one), _layers(one), _cost(one), _commands(one)),
        "alignments": lambda one: (_top(one), _alignment(one), _commands(one)),
        "calibrations": _layers,
        "ptqs": lambda one: (_top(one), _layers(one)),
        "sensitivities": _layers,
        "plans": _sizes,
    }
    for kind, show in shown.items():
        for one in list(getattr(found, kind)):
            try:
                show(Found(**{kind: [one]}))
            except UNREADABLE as error:
                getattr(found, kind).remove(one)
                found.damaged.append(f"{one.path}: {in_a_line(error)}")


# What pages are made of ----------------------------------------------------------------------------------------------


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table of cells that are HTML."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide {kind}"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _figure(image: str, caption: str, kind: str = "") -> str:
    """An image with words under it, which are HTML."""
    return f'<figure class="{kind}">{image}<figcaption>{caption}</figcaption></figure>'


def _list(lines: Iterable[str], kind: str) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<ul class="{kind}">{items}</ul>' if items else ""


def _number(value: float | None, form: str = ".4g") -> str:
    return "" if value is None else format(value, form) if math.isfinite(value) else str(value)


# What was compared ---------------------------------------------------------------------------------------------------


def _top(found: Found) -> str:
    runs = escape(", ".join(found.runs))
    return (
        f"{_list(compare.sentences(found), 'lead')}{_winners(found)}{_list(compare.warnings(found), 'warn')}"
        f"<p><small>Made by <code>lockstep report</code> from {runs}.</small></p>"
    )


def _winners(found: Found) -> str:
    """What is best in each format, beside the next."""
    rows = []
    for study in found.studies:
        for one in compare.winners(compare.lines(study)):
            size, back = one.best.mean("weight_bytes"), one.best.values.get("won_back")
            after = "the only row" if one.next is None else f"{escape(one.next.label)}, {_over(one.next)}"
            near = f"<small>{one.doubt}</small>" if one.doubt else ""
            rows.append(
                (
                    escape(one.best.format),
                    "" if size is None else f"{size / MIB:,.1f}",
                    f"<b>{escape(one.best.label)}</b>",
                    _over(one.best),
                    back.words(".1f") if back else "",
                    after + near,
                )
            )
    header = ("format", "MiB", "best", "perplexity over bf16, %", "won back from rounding, %", "next best")
    return _table(header, rows) if rows else ""


def _over(line: Line) -> str:
    return f"{line.values['increase'].words('+.2f')} %"


_COLUMNS: tuple[tuple[str, str, Callable[[float], float], str], ...] = (
    ("weights, MiB", "weight_bytes", lambda value: value / MIB, ",.1f"),
    ("bits a weight", "bits_per_weight", float, ".3f"),
    ("perplexity", "perplexity", float, ".4f"),
    ("over bf16, %", "increase", float, "+.3f"),
    ("won back, %", "won_back", float, ".1f"),
    ("next token, %", "accuracy", lambda value: 100 * value, ".2f"),
    ("agrees with bf16, %", "agreement", lambda value: 100 * value, ".2f"),
    ("KL, nats", "kl", float, ".4f"),
    ("next line exact, %", "exact_line", lambda value: 100 * value, ".1f"),
    ("line parses, %", "parses", lambda value: 100 * value, ".1f"),
    ("served perplexity", "served_perplexity", float, ".4f"),
    ("seconds to quantize", "quantize_seconds", float, ".1f"),
    ("learning rate", "learning_rate", float, ".0e"),
    ("time a token, times plain", "cost", float, ".2f"),
    ("peak of training, GiB", "peak_bytes", lambda value: value / MIB / 1024, ".1f"),
)
_LEGEND = (
    "Mean over the seeds ± standard deviation. Over bf16: the perplexity against the bf16 model that has seen as many "
    "tokens. Won back: the share of what rounding to nearest loses in this format, so that 100 % is bf16. Time "
    "a token: of training, over plain fine-tuning's. The best of each format is bold."
)


def _studies(found: Found) -> str:
    parts = []
    for study in found.studies:
        lines = compare.lines(study)
        several = f": {escape(study.path)}" if len(found.studies) > 1 else ""
        parts.append(f"<h2>Comparison{several}</h2>{_comparison(lines)}{_tradeoff(lines)}")
        if study.findings:
            parts.append(f"<h3>Noted by who ran it</h3>{_list(study.findings, 'said')}")
    return "".join(parts)


def _comparison(lines: Sequence[Line]) -> str:
    columns = [one for one in _COLUMNS if any(one[1] in line.values for line in lines)]
    best: dict[str, Line] = {}
    ranked_by = compare.measure(lines)
    for line in lines:
        if ranked_by in line.values and line.format and line.baseline != "bf16":
            best[line.format] = min(line, best.get(line.format, line), key=lambda one: one.values[ranked_by].mean)
    rows = []
    for line in lines:
        about = ", ".join(dict.fromkeys(one for one in (line.scheme, line.method) if one not in line.label))
        cells = [_spread(line.values.get(name), scaled, form) for _, name, scaled, form in columns]
        if best.get(line.format) is line:
            at = next(number for number, column in enumerate(columns) if column[1] == ranked_by)
            cells[at] = f"<b>{cells[at]}</b>"
        rows.append([f"{escape(line.label)}<small>{escape(about)}</small>", str(len(line.seeds)), *cells])
    header = ["", "seeds", *(words for words, *_ in columns)]
    return f"{_table(header, rows)}<p><small>{_LEGEND}</small></p>"


def _spread(spread: Spread | None, scaled: Callable[[float], float], form: str) -> str:
    if spread is None:
        return ""
    around = f" <small>± {format(scaled(spread.deviation), form.lstrip('+'))}</small>" if spread.deviation else ""
    return format(scaled(spread.mean), form) + around


def _tradeoff(lines: Sequence[Line]) -> str:
    measured = [one for one in lines if "perplexity" in one.values and one.baseline != "bf16"]
    parts = []
    if any("weight_bytes" in one.values for one in measured):
        front = [one for one in compare.front(lines) if one.baseline != "bf16"]
        named = ", ".join(f"<b>{number}</b> {escape(one.label)}" for number, one in enumerate(front, 1))
        caption = (
            f"Lower and further left is better; bars are the spread over the seeds. Best for their bytes: {named}."
        )
        parts.append(
            "<h2>Quality against bytes</h2>" + _figure(figures.inline(figures.tradeoff(lines, front)), caption)
        )
    if len(measured) > 1:
        caption = (
            "The same by format, best on top. The dashed line is bf16. Logarithmic where one row is far from the rest."
        )
        parts.append(_figure(figures.inline(figures.by_format(lines)), caption))
    return "".join(parts)


# Runs ----------------------------------------------------------------------------------------------------------------


def _runs(found: Found) -> str:
    named = compare.of_runs(found.curves)
    runs = list(dict.fromkeys(run for of_run in named.values() for run in of_run))
    if not runs:
        return ""
    rows = []
    for run in runs:
        steps = max(of_run[run].points[-1][0] for of_run in named.values() if run in of_run)
        ends = [_number(of_run[run].points[-1][1]) if run in of_run else "" for of_run in named.values()]
        rows.append([escape(run), str(steps), *ends])
    return f"<h2>Runs</h2>{_table(['run', 'steps', *named], rows)}"


def _curves(found: Found) -> str:
    alone, taught = compare.training(found.curves)
    flipped, back = "codes flipped since the last look, %", "codes that changed back (oscillation), %"
    logged = {
        "training loss, nats": alone,
        "training loss of distillation, nats": taught,
        "KL from the teacher, nats": compare.metric(found.curves, (compare.DIVERGENCE,)),
        "cross-entropy of distillation, nats": compare.metric(found.curves, (compare.CROSS_ENTROPY,)),
        "validation perplexity": compare.metric(found.curves, compare.PERPLEXITIES),
        "weights, signal to quantization noise, dB": compare.metric(found.curves, ("qat/sqnr_db/mean",)),
        flipped: compare.metric(found.curves, ("qat/code_flips/mean",)),
        back: compare.metric(found.curves, ("qat/oscillation/mean",)),
    }
    panels: dict[str, dict[str, list[figures.Points]]] = {
        words: {run: [curve.points] for run, curve in of_run.items()} for words, of_run in logged.items()
    }
    for run, curve in compare.metric(found.curves, compare.VALIDATION).items():
        panels["validation perplexity"].setdefault(
            run, [[(step, math.exp(min(loss, 700))) for step, loss in curve.points]]
        )
    for shares in (panels[flipped], panels[back]):
        for run, ((*points,),) in shares.items():
            shares[run] = [[(step, 100 * value) for step, value in points]]
    colours = {"bf16": figures.INK}
    for study in found.studies:
        panels |= _losses(study)
        colours |= {name: colour for name, (colour, _) in figures.method_styles(compare.lines(study)).items()}
    shown = {words: runs for words, runs in panels.items() if runs}
    if not shown:
        return ""
    caption = (
        f"The mean over the seeds. Of more than {figures.POINTS} points the means of as many stretches are drawn. Axes "
        "leave out how curves fall from their start."
    )
    *drawn, last = map(figures.inline, figures.curves(shown, colours))
    return f"<h2>Over the steps</h2>{''.join(_figure(one, '') for one in drawn)}{_figure(last, caption)}"


def _losses(study: Study) -> dict[str, dict[str, list[figures.Points]]]:
    """The loss of each method, a panel for each format; in each of them bf16. Losses with a teacher apart."""
    curves: dict[tuple[str, str], list[figures.Points]] = {}
    taught: dict[str, dict[str, list[figures.Points]]] = {}
    for row in study.rows:
        panel = "" if row.baseline == "bf16" else row.format or ""
        if row.curve and row.kl_share:
            words = f"training loss of distillation, nats{panel and f': {panel}'}"
            taught.setdefault(words, {}).setdefault(row.method or row.label, []).append(row.curve)
        elif row.curve:
            curves.setdefault((panel, row.method or row.label), []).append(row.curve)
    formats = dict.fromkeys(panel for panel, _ in curves if panel) or dict.fromkeys(panel for panel, _ in curves)
    return {
        f"training loss, nats{panel and f': {panel}'}": {
            name: seeds for (of_panel, name), seeds in curves.items() if of_panel in ("", panel)
        }
        for panel in formats
    } | taught


# Layers --------------------------------------------------------------------------------------------------------------


def _layers(found: Found) -> str:
    parts = []
    measured = found.layers()
    by_run = {run: layers for run, layers in measured.items() if any(map(math.isfinite, layers.values()))}
    if measured:
        parts.append("<h3>How near the weights sit to their grid</h3>")
    if exact := [run for run in measured if run not in by_run]:
        parts.append(f"<p>Left out, without a finite ratio: {escape(', '.join(exact))}.</p>")
    if by_run:
        drawn = figures.layer_maps(by_run, "SQNR, dB", worst_is_low=True)
        if drawn is not None:
            more = f" The first {figures.MAPS} of {len(by_run)} runs." if len(by_run) > figures.MAPS else ""
            caption = (
                f"Signal to quantization noise of each layer's weights; dark is worse. Of experts the worst.{more}"
            )
            parts.append(_figure(figures.inline(drawn), caption))
        parts += [_worst(run, layers) for run, layers in by_run.items()]
    for report in found.sensitivities:
        costs = report.content["costs"]
        caption = (
            f"<code>{escape(report.path)}</code>: what the mean loss ({report.content['loss']:.4g} nats unquantized) "
            f"gains when one unit alone is quantized; the {figures.BARS} costliest."
        )
        parts.append("<h3>What each layer costs</h3>" + _figure(figures.inline(figures.sensitivities(costs)), caption))
    parts += [_calibration(report) for report in found.calibrations]
    parts += [_ptq(report) for report in found.ptqs]
    return f"<h2>By layer</h2>{''.join(parts)}" if parts else ""


def _worst(run: str, layers: Mapping[str, float]) -> str:
    worst = sorted((value, layer) for layer, value in layers.items() if math.isfinite(value))[:WORST]
    table = _table(("layer", "SQNR, dB"), [(escape(layer), f"{value:.2f}") for value, layer in worst])
    return f"<details><summary>{escape(run)}: the worst {len(worst)} layers</summary>{table}</details>"


def _ptq(report: Report) -> str:
    content = report.content
    worst = sorted(content["rows"], key=lambda row: -row["error"])[:WORST]
    table = _table(("layer", "error of the weight"), [(escape(row["name"]), f"{row['error']:.2%}") for row in worst])
    return (
        f"<h3>Post-training: {escape(content['method'])}</h3><p><code>{escape(report.path)}</code>, as "
        f"{escape(content['scheme'])}, {content['seconds']:.1f} s; the {len(worst)} largest errors |served - before| / "
        f"|before| of {len(content['rows'])} layers:</p>{table}"
    )


def _calibration(report: Report) -> str:
    def ratio(row: Mapping[str, Any]) -> float:
        return max((one["ratio"] for one in row["outliers"]), default=0.0)

    worst = sorted(report.content["rows"], key=ratio, reverse=True)[:WORST]
    rows = [(escape(row["name"]), f"{row['range']:.4g}", f"{row['clipped']:.3%}", f"{ratio(row):.1f}") for row in worst]
    header = ("layer", "range", "inputs clipped", "largest channel over the median one")
    return (
        f"<h3>Ranges of the inputs</h3><p><code>{escape(report.path)}</code>, by {escape(report.content['observer'])}, "
        f"the {len(rows)} layers with the largest outliers of {len(report.content['rows'])}:</p>{_table(header, rows)}"
    )


def _alignment(found: Found) -> str:
    if not found.alignments:
        return ""
    rows, failures, differing = [], [], {}
    for report in found.alignments:
        content = report.content
        yes, name = content["aligned"], content["checkpoint"]
        verdict = f'<span class="verdict {"yes" if yes else "no"}">{"" if yes else "not "}aligned</span>'
        run = [layer for layer in content["layers"] if layer["outputs"]]
        end = content["end_to_end"] or {}
        difference = float(end.get("mean_logprob_difference", math.nan))
        rows.append(
            (
                f"{escape(name)}<small>kernel {escape(str(content['kernel']))}</small>",
                verdict,
                f"{sum(layer['weight_equal'] for layer in content['layers'])} of {len(content['layers'])}",
                f"{min((float(layer['equal']) for layer in run), default=math.nan):.3%}",
                f"{difference:.2e}",
                f"{float(end.get('kl', math.nan)):.2e}",
                f"{float(end.get('top1_agreement', math.nan)):.2%}",
            )
        )
        failures += [f"{name}: {line}" for line in content["failures"]]
        differing[name] = {layer["name"]: 100 * (1 - float(layer["equal"])) for layer in run}
    header = (
        *("checkpoint", "", "weights bit-equal", "outputs bit-equal, least layer"),
        *("mean |log-probability difference|, nats", "KL, nats", "top-1 agreement"),
    )
    differs = any(value for layers in differing.values() for value in layers.values())
    drawn = figures.layer_maps(differing, "outputs not bit-equal, %", worst_is_low=False) if differs else None
    image = "" if drawn is None else _figure(figures.inline(drawn), "Training forward against the true kernel.")
    return f"<h2>Does it serve what it trained?</h2>{_table(header, rows)}{_list(failures, 'warn')}{image}"


def _gaps(found: Found) -> str:
    parts = []
    for run, records in found.gaps:
        measured = [one for one in records if "gap" in one]
        if measured:
            last = measured[-1]
            caption = (
                f"{escape(run)}: at step {last['step']} the mean |log-probability difference| is "
                f"{_number(last['gap']['mean_abs'])} nats, the limit {_number(last['limit'])}."
            )
            drawn = gap_figure(records)
            drawn.subplots_adjust(left=0.11)  # the page is narrower than that figure's own
            parts.append(_figure(svg(drawn), caption, "paper"))
    return f"<h2>The gap between trainer and engine</h2>{''.join(parts)}" if parts else ""


# Sizes, memory, cost -------------------------------------------------------------------------------------------------


def _sizes(found: Found) -> str:
    parts = []
    if found.checkpoints:
        parts.append(
            _figure(figures.inline(figures.sizes(found.checkpoints)), "What the bytes of each checkpoint are.")
        )
        rows = [
            (
                f"{escape(one.path)}<small>{escape('; '.join(one.schemes))}</small>",
                str(one.layers),
                f"{one.sizes.codes / MIB:,.1f}",
                f"{one.sizes.scales / MIB:,.1f}",
                f"{one.sizes.plain / MIB:,.1f}",
                f"{one.sizes.total / MIB:,.1f}",
                f"{one.sizes.bits_per_weight:.2f}",
                f"{one.sizes.total / (one.sizes.before + one.sizes.plain):.0%}",
            )
            for one in found.checkpoints
        ]
        header = ("checkpoint", "layers", "codes, MiB", "scales, MiB", "not quantized, MiB", "all, MiB")
        parts.append(_table((*header, "bits a quantized weight", "share of 16 bits"), rows))
    for report in found.plans:
        content, totals = report.content, report.content["totals"]
        cells = [
            (words, *(f"{totals[f'{use}_{when}']['per_gpu'] / 2**30:,.2f}" for when in ("before", "after")))
            for use, words in (("serve", "serving"), ("train", "training"))
        ]
        fitting = ", ".join(gpu for gpu, fits in content["fits"].items() if fits["serve_after"]) or "none listed"
        parts.append(
            f"<h3>Memory of {escape(content['model'])} as {escape(content['scheme'])}</h3>"
            f"{_table(('GiB on each GPU', 'before', 'after'), cells)}"
            f"<p>GPUs that serve it, {content['gpus']} of them: {escape(fitting)}.</p>"
        )
    return f"<h2>Sizes and memory</h2>{''.join(parts)}" if parts else ""


def _cost(found: Found) -> str:
    rows = []
    for study in found.studies:
        for line in compare.lines(study):
            seconds, count = line.mean("train_seconds"), line.mean("train_tokens")
            if seconds:
                speed = f"{count / seconds:,.0f}" if count else ""
                cost = _number(line.mean("cost"), ".2f")
                rows.append((escape(line.label), f"{seconds:,.0f}", f"{(count or 0) / 1e6:,.1f}", speed, cost))
    if not rows:
        return ""
    header = ("", "seconds", "tokens, millions", "tokens a second", "time a token, times plain fine-tuning")
    return f"<h2>What it costs to make</h2>{_table(header, rows)}"


# How it was run ------------------------------------------------------------------------------------------------------


def _commands(found: Found) -> str:
    parts = []
    for study in found.studies:
        said = {**_words(study.model), **_words(study.environment)}
        rows = [(escape(name), escape(value)) for name, value in said.items()]
        parts.append(f"<h3>{escape(study.path)}</h3>{_table(('', ''), rows, 'text') if rows else ''}{_of_rows(study)}")
    for report in found.alignments:
        about = ", ".join(f"{name} {value}" for name, value in _words(report.content.get("environment") or {}).items())
        parts.append(f"<p><code>{escape(report.path)}</code>: {escape(about)}</p>" if about else "")
    for path, text in found.configs:
        runs = f"<p><code>lockstep fit --config {escape(path)}</code></p>" if Path(path).name == "config.yaml" else ""
        parts.append(f"{runs}<details><summary>{escape(path)}</summary><pre>{escape(text)}</pre></details>")
    body = "".join(parts)
    return f"<h2>Environment and commands</h2>{body}" if body else ""


def _of_rows(study: Study) -> str:
    commands = dict.fromkeys((row.label, row.command) for row in study.rows if row.command)
    rows = [(escape(label), f"<code>{escape(command or '')}</code>") for label, command in commands]
    table = _table(("row", "command"), rows, "text")
    return f"<details><summary>{len(rows)} commands</summary>{table}</details>" if rows else ""


def _words(about: Mapping[str, Any]) -> dict[str, str]:
    """Free fields in words: nested ones flat, without long lists, bytes and seconds with units."""
    said: dict[str, str] = {}
    for name, value in about.items():
        if isinstance(value, Mapping):
            said |= {f"{name}: {inner}": words for inner, words in _words(value).items()}
        elif isinstance(value, list) and (len(value) > ENTRIES or any(isinstance(one, list | dict) for one in value)):
            continue
        elif isinstance(value, int | float) and name.endswith("bytes"):
            said[name] = f"{value / MIB:,.1f} MiB" if value < 1024 * MIB else f"{value / MIB / 1024:,.1f} GiB"
        elif isinstance(value, int | float) and name.endswith("seconds"):
            said[name] = f"{value:,.1f} s"
        else:
            said[name] = "none" if value is None else value if isinstance(value, str) else json.dumps(value)
    return said
