"""The alignment report as one self-contained page, and what pages are made of: no script or image from elsewhere."""

from __future__ import annotations

import io
from collections.abc import Iterable
from html import escape
from typing import Any

from lockstep.align.report import AlignmentReport, describe_schemes

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
.verdict { display: inline-block; padding: .15rem .7rem; border-radius: .3rem; color: #fff; font-weight: 600 }
.yes { background: #1a7f37 } .no { background: #b42318 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100% }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left; min-width: 20rem; overflow-wrap: anywhere }
tr.bad td { background: #fdeceb } code { font-size: .9em } svg { max-width: 100%; height: auto }
"""


def page(report: AlignmentReport) -> str:
    """`report` as HTML."""
    failures = report.failures()
    verdict = '<span class="verdict no">not aligned</span>' if failures else '<span class="verdict yes">aligned</span>'
    environment = ", ".join(f"{name} {value}" for name, value in report.environment.items())
    failed = "".join(f"<li>{escape(line)}</li>" for line in failures)
    body = f"""<h1>Does it serve what it trained? {verdict}</h1>
<p>Checkpoint <code>{escape(report.checkpoint)}</code>, scheme <b>{escape(describe_schemes(report))}</b>, true kernel
<b>{escape(report.kernel)}</b>; {escape(environment)}.</p>
{f"<h2>What is wrong</h2><ul>{failed}</ul>" if failures else ""}
<h2>End to end</h2>{_end_to_end(report)}
<h2>Outputs by layer</h2>{_plots(report)}
<h2>Layers</h2>{_layers(report)}
"""
    return document(f"Alignment of {report.checkpoint}", body)


def document(title: str, body: str, style: str = "") -> str:
    """A whole page of `body`, which is HTML, with more CSS in `style`."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>
<style>{STYLE}{style}</style></head><body>
{body}</body></html>
"""


def table(header: Iterable[str], rows: Iterable[tuple[bool, Iterable[str]]]) -> str:
    """A table of text. Rows that come with True are marked as bad."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(
        f"<tr{' class=bad' if bad else ''}>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>"
        for bad, row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def svg(figure: Any) -> str:
    """A matplotlib figure as inline SVG, the same bytes for the same figure."""
    import matplotlib

    image = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "lockstep"}):
        figure.savefig(image, format="svg", metadata={"Date": None})
    return image.getvalue()[image.getvalue().index("<svg") :]


def _end_to_end(report: AlignmentReport) -> str:
    result = report.end_to_end
    if result is None:
        return "<p>Not computed: some tensors of the checkpoint cannot be used.</p>"
    rows = [
        ("positions compared", f"{result.positions}"),
        ("mean |log-probability difference|, nats", f"{result.mean_logprob_difference:.3e}"),
        ("largest |log-probability difference|, nats", f"{result.max_logprob_difference:.3e}"),
        ("KL(fake || true), nats", f"{result.kl:.3e}"),
        ("k3 estimate, nats", f"{result.k3:.3e}"),
        ("top-1 agreement", f"{result.top1_agreement:.3%}"),
        ("largest |logit difference|", f"{result.max_logit_difference:.3e}"),
    ]
    return table(("measure", "value"), ((False, row) for row in rows))


def _layers(report: AlignmentReport) -> str:
    header = ("layer", "scheme", "weight", "outputs bit-equal", "classic fake quant", "max ulps", "difference")
    rows, failures = [], report.failures()
    for layer in report.layers:
        measured = (
            f"{layer.equal:.4%}",
            "-" if layer.classic_equal is None else f"{layer.classic_equal:.2%}",
            f"{layer.max_ulps}",
            f"{layer.difference:.2e}",
            f"{layer.fake_error:.3e}",
            f"{layer.true_error:.3e}",
        )
        weight = "equal" if layer.weight_equal else "differs"
        bad = any(line.startswith(f"{layer.name}:") for line in failures)
        rows.append((bad, (layer.name, str(layer.scheme), weight, *(measured if layer.outputs else ["-"] * 6))))
    return table((*header, "error of fake", "error of true"), rows)


def _plots(report: AlignmentReport) -> str:
    """Share of outputs that differ, and the errors against float64, for each layer, as inline SVG."""
    from matplotlib.figure import Figure

    layers = [layer for layer in report.layers if layer.outputs]
    if not layers:
        return "<p>No layer could be run.</p>"
    numbers = range(len(layers))
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    differing, errors = figure.subplots(2, 1, sharex=True)
    differing.bar(numbers, [100 * (1 - layer.equal) for layer in layers], color="#b42318")
    limit = 100 * max(1 - report.least_equal(layer) for layer in layers)
    if limit < 100:
        differing.axhline(limit, color="#555", linestyle="--", linewidth=1, label=f"allowed: {limit:.2g} %")
        differing.legend()
    differing.set(ylabel="outputs not bit-equal, %", title="Training forward against the true kernel")
    differing.set_ylim(bottom=0)
    errors.plot(numbers, [layer.fake_error for layer in layers], "o", color="#0969da", label="training forward")
    errors.plot(numbers, [layer.true_error for layer in layers], "x", color="#bc4c00", label="true kernel")
    errors.set(yscale="log", ylabel="relative error norm", title="Error of each against float64 on the trained weights")
    errors.legend()
    if len(layers) <= 40:
        errors.set_xticks(numbers, [layer.name for layer in layers], rotation=90, fontsize=8)
    else:
        errors.set_xlabel("layer, in the model's order")
    return svg(figure)
