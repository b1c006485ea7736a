"""The rows of the study: which method, on which format, from which weights. What a row does is in training.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lockstep import Scheme

FORMATS = {
    "INT4 g128": Scheme.preset("W4A16"),
    "INT4 g32": Scheme.preset("W4A16", group_size=32),
    "INT4 channel": Scheme.preset("W4A16", strategy="channel"),
    "W8A8": Scheme.preset("W8A8"),
    "FP8_DYNAMIC": Scheme.preset("FP8_DYNAMIC"),
    "W4A8": Scheme.preset("W4A8"),
    "NVFP4": Scheme.preset("NVFP4"),
    "MXFP4": Scheme.preset("MXFP4"),
}
INT4 = ("INT4 g128", "INT4 g32", "INT4 channel")
EIGHT_BIT = ("W8A8", "FP8_DYNAMIC")
OTHERS = ("W4A8", "NVFP4", "MXFP4")

Method = Literal["bf16", "qat", "qad", "lora", "frozen-grid", "qlora", "ptq"]


@dataclass(frozen=True)
class Row:
    """One line of the table, run for each of `seeds`.

    Args:
        method: ``bf16``: the base model trained on in full precision. ``ptq``: that one, quantized by `library`.
            The others train on from the base model, on the same tokens.
        format: of `FORMATS`, or ``bf16``.
        library: the method of ``lockstep ptq``; of a trained row, what its weights start from.
        learned: weight scales are parameters.
        seeds: how many.
    """

    method: Method
    format: str = "bf16"
    library: str = ""
    learned: bool = False
    seeds: int = 3

    @property
    def label(self) -> str:
        """What the row is called, in tables and in file names."""
        names = {
            "bf16": "same tokens",
            "ptq": _PTQ.get(self.library, self.library),
            "qat": "QAT",
            "qad": "QAD",
            "lora": "merged LoRA QAT",
            "frozen-grid": "LoRA on a frozen grid",
            "qlora": "QLoRA",
        }
        start = f" from {_PTQ[self.library]}" if self.library and self.method != "ptq" else ""
        return f"{self.format} {names[self.method]}{start}{', learned scales' if self.learned else ''}"


_PTQ = {
    "rtn": "round to nearest",
    "minmax": "min-max",
    "percentile": "percentile",
    "mse": "MSE clipping",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "smoothquant": "SmoothQuant",
    "hqq": "HQQ",
}


def ptq(formats: tuple[str, ...], *libraries: str, seeds: int = 1) -> list[Row]:
    """Post-training rows."""
    return [Row("ptq", format, library, seeds=seeds) for format in formats for library in libraries]


def from_gptq(formats: tuple[str, ...], *methods: Method, seeds: int) -> list[Row]:
    """Trained rows that start from GPTQ's codes and scales."""
    return [Row(method, format, "gptq", learned=True, seeds=seeds) for format in formats for method in methods]


def few_rows(seeds: int) -> list[Row]:
    """What the answer hangs on, for a CPU."""
    return [
        Row("bf16", seeds=seeds),
        *ptq(("INT4 g128", "INT4 channel"), "rtn", seeds=seeds),
        Row("qad", "INT4 g128", seeds=seeds),
        Row("qat", "INT4 g128", seeds=seeds),
        *ptq(("INT4 g128",), "mse", "gptq", "awq", "hqq"),
        Row("qad", "INT4 channel", seeds=seeds),
        *ptq(("INT4 channel",), "gptq"),
        *from_gptq(("INT4 g128",), "qad", "qat", seeds=seeds),
    ]


def all_rows(seeds: int) -> list[Row]:
    """All rows, the ones that matter most first, since a run may end before the last."""

    def trained(formats: tuple[str, ...], *methods: Method) -> list[Row]:
        return [Row(method, format, seeds=seeds) for format in formats for method in methods]

    return [
        Row("bf16", seeds=seeds),
        *ptq(INT4, "rtn", seeds=seeds),
        *trained(("INT4 g128",), "qad", "qat"),
        *from_gptq(("INT4 g128",), "qad", "qat", seeds=seeds),
        *ptq(("INT4 g128",), "gptq", seeds=seeds),
        *ptq(("INT4 g128",), "minmax", "percentile", "mse", "awq", "hqq"),
        *from_gptq(("INT4 channel",), "qad", "qat", seeds=seeds),
        *ptq(("INT4 channel", "INT4 g32"), "gptq", seeds=seeds),
        *ptq(("INT4 channel", "INT4 g32"), "awq"),
        *from_gptq(("INT4 g32",), "qad", seeds=seeds),
        *ptq(EIGHT_BIT, "rtn", "smoothquant"),
        *ptq(("W8A8",), "gptq"),
        *trained(("FP8_DYNAMIC",), "qad"),
        *from_gptq(("W8A8",), "qad", seeds=seeds),
        *ptq(OTHERS, "rtn"),
        *ptq(("W4A8",), "gptq", "awq"),
        *from_gptq(("W4A8",), "qad", seeds=seeds),
        *trained(("NVFP4", "MXFP4"), "qad"),
        *trained(("INT4 channel",), "qad", "qat"),
        Row("qat", "INT4 g128", learned=True, seeds=seeds),
        Row("lora", "INT4 g128", seeds=seeds),
        Row("frozen-grid", "INT4 g128", seeds=seeds),
        Row("qlora", "NF4", seeds=seeds),
        Row("qat", "INT4 g128", "awq", learned=True, seeds=seeds),
        *ptq(("NVFP4", "MXFP4"), "awq"),
        *trained(("INT4 g32",), "qad", "qat"),
        *trained(("FP8_DYNAMIC", "NVFP4", "MXFP4"), "qat"),
    ]
