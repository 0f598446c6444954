"""The goals that the CPU kernels were given, each with the figure that was measured. Those are for 2 cores with AMX."""

from __future__ import annotations

import harness
from harness import find, fit_exponent, sweeps
from implementations import EAGER, FLOOR, FLOW, REFERENCE
from shapes import HEADS


def _timed(case: str, head: str, name: str) -> dict | None:
    csv = "head_cases" if case.startswith("train ") else "head"
    return next(iter(_of(csv, case, head, implementation=name)), None)


def _of(csv: str, case: str, head: str, **wanted) -> list[dict]:
    """Rows of the head as it is: it is timed with fewer rows of input, too."""
    return find(csv, case=case, head=head, N=HEADS[head].num_rows, **wanted)


def _ratio(case: str, head: str, name: str, column: str) -> float | None:
    row = _timed(case, head, name)
    return float(row[column]) if row and row.get(column) else None


def _fastest_baseline(case: str, head: str) -> tuple[str, float] | None:
    """The baseline nearest to us and its time over ours, each in its own run.

    Also of runs that were made again since, where we were slower: head.record_times keeps those.
    """
    rows = [*_of("head", case, head), *_of("head_slower", case, head)]
    rows = [row for row in rows if row["implementation"] not in (FLOW, FLOOR, REFERENCE)]
    pairs = [(row["implementation"], float(row["over_flow"])) for row in rows if row["over_flow"]]
    return min(pairs, key=lambda pair: pair[1], default=None)


def _peak(case: str, rows: int) -> float | None:
    found = find("head_memory", case=case, head="gemma-3-270m", N=rows, implementation=FLOW)
    return float(found[0]["peak_MiB"]) if found else None


def _error(name: str, kind: str, column: str) -> float | None:
    found = find("accuracy", head="gemma-3-270m", implementation=name, rows=kind)
    return float(max(found, key=lambda row: int(row["N"]))[column]) if found else None


def _line(goal: str, value: float | None, limit: float, at_most: bool = True, note: str = "") -> dict:
    bound = f"{'≤' if at_most else '≥'} {limit:.3g}"
    if value is None:
        return {"goal": goal, "limit": bound, "measured": "not measured", "reached": ""}
    is_reached = value <= limit if at_most else value >= limit
    shown = f"{value:.2g}" if value < 0.1 else f"{value:.3g}"
    return {"goal": goal, "limit": bound, "measured": shown + note,
            "reached": "yes" if is_reached else "no"}  # fmt: skip


def _speed() -> list[dict]:
    gemma, smol = "gemma-3-270m", "smollm2-135m"
    lines = [
        _line(f"score, {head}: time / torch.mm", _ratio("score", head, FLOW, "over_mm"), limit)
        for head, limit in ((gemma, 1.15), (smol, 1.2), (f"{gemma}-fp32", 1.2), (f"{smol}-fp32", 1.2))
    ]
    for case, fast, eager in (("score", 1.25, 2.5), ("train", 1.2, 2.3)):
        if best := _fastest_baseline(case, gemma):
            lines.append(_line(f"{case}, {gemma}: fastest baseline / ours", best[1], fast, False, f" ({best[0]})"))
        lines.append(
            _line(f"{case}, {gemma}: fp32-upcast eager / ours", _ratio(case, gemma, EAGER, "over_flow"), eager, False)
        )
        lines += _alone(case, gemma, fast, eager)
    for case, limit, what in (
        ("train weighted", 0.03, "weighted / plain - 1"),
        ("train half ignored", 0.6, "half ignored / dense"),
        ("train frozen head", 0.8, "frozen head / with dW"),
    ):
        for head in (gemma, smol):
            value = _ratio(case, head, FLOW, "over_first_case")
            note = ""
            if value is not None and case == "train weighted":
                value = abs(value - 1)
                rounds = harness.within_rounds(_timed(case, head, FLOW))
                note = f" (ratio within rounds {rounds})" if rounds else ""
            lines.append(_line(f"{what}, {head}", value, limit, note=note))
    return lines


def _alone(case: str, head: str, fast: float, eager: float) -> list[dict]:
    """The same two where every implementation has processes of its own."""
    ratios = {row["implementation"]: float(row["over_flow"]) for row in find("head_alone", case=case, head=head)}
    ratios = {name: ratio for name, ratio in ratios.items() if name not in (FLOW, FLOOR, REFERENCE)}
    if not ratios:
        return []
    best, where = min(ratios, key=ratios.get), f"{case}, {head}, each in processes of its own"
    return [
        _line(f"{where}: fastest baseline measured / ours", ratios[best], fast, False, f" ({best})"),
        _line(f"{where}: fp32-upcast eager / ours", ratios.get(EAGER), eager, False),
    ]


def _memory() -> list[dict]:
    lines = []
    for case, limit in (("score", 64), ("train", 256)):
        small, large = _peak(case, 1024), _peak(case, 8192)
        lines.append(_line(f"{case}, gemma-3-270m: peak MiB at N = 1024", small, limit))
        # Packed rows in bf16, for dW once more, and dH in fp32 for each of two threads; scoring packs 1024 rows at a time.
        linear = (8192 - 1024) * 640 * (0 if case == "score" else 2 + 2 + 2 * 4) / 2**20
        growth = None if small is None or large is None else (large - linear) / small
        note = "" if growth is None else f" (peak {large:.3g} MiB, of which {linear:.3g} is what N·D has grown by)"
        lines.append(_line(f"{case}: peak at N = 8192 / at N = 1024", growth, 1.1, note=note))
    return lines


def _accuracy() -> list[dict]:
    lines = [_line("loss error, bf16, V = 262144", _error(FLOW, "random", "loss_error"), 1e-5)]
    for kind, share in (("random", 1.0), ("p=0.9", 0.5), ("p=0.99", 0.5), ("p=0.999", 0.5)):
        for column in ("dinput_error", "dweight_error"):
            ours, eager = _error(FLOW, kind, column), _error("eager, 16-bit logits", kind, column)
            value = ours / eager if ours is not None and eager else None
            note = "" if value is None else f" ({ours:.1e} against {eager:.1e})"
            lines.append(_line(f"{column} / that of bf16 eager, {kind} rows", value, share, note=note))
    return lines


def _growth() -> list[dict]:
    lines = []
    for csv, where in (("sweep", "beside others"), ("sweep_alone", "in processes of its own")):
        for (case, dimension, name), points in sorted(sweeps(name=csv).items()):
            if name == FLOW and len(points) > 2:
                value = fit_exponent(points)
                limit = "0.9 - 1.1" if dimension != "D" else ""
                is_reached = ("yes" if 0.9 <= value <= 1.1 else "no") if limit else ""
                goal = f"{case}: exponent over {dimension}, {where}"
                lines.append({"goal": goal, "limit": limit, "measured": f"{value:.2f}", "reached": is_reached})
    return lines


def _end_to_end() -> list[dict]:
    lines = []
    for program, limit in (("score", 1.8), ("train", 1.5)):
        if row := next(
            iter(find("end_to_end", program=program, device="cpu", baseline="all", model="gemma-3-270m.gguf")), None
        ):
            what = f"{program}, Gemma 3 270M, GSM8K"
            lines.append(_line(f"{what}: tokens/s over transformers' loss", float(row["ratio"]), limit, False))
            lines.append(_line(f"{what}: difference of the mean losses", float(row["mean_loss_difference"]), 1e-3))
    return lines


def goal_table() -> list[str]:
    """A Markdown table of goals, limits and figures."""
    lines = [*_speed(), *_memory(), *_accuracy(), *_growth(), *_end_to_end()]
    return [harness.markdown(lines, ["goal", "limit", "measured", "reached"])]
