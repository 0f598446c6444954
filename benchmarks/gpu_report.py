"""gpu.md from gpu.csv, which benchmarks/gpu.py has written: `python benchmarks/gpu_report.py`, on any machine."""

from __future__ import annotations

import harness

OURS = ("flow cuda", "flow triton")


def _title(row: dict) -> str:
    cap = f", soft-cap {float(row['softcap']):g}" if row["softcap"] else ""
    what = f"head, D={row['D']}" if row["D"] != "0" else "given logits"
    return f"{row['case']}, {what}: N={row['N']}, V={row['V']}{cap}, {row['dtype']}"


def table(rows: list[dict]) -> str:
    """Fastest first; times over the fastest of ours."""
    best = min((float(r["ms"]) for r in rows if r["implementation"] in OURS), default=None)
    share = ("% of matmul", "percent_of_matmul") if rows[0]["D"] != "0" else ("% of copy", "percent_of_copy")
    lines = [
        {
            "implementation": r["implementation"], "ms": r["ms"],
            "time / ours": f"{float(r['ms']) / best:.2f}" if best else "",
            share[0]: r[share[1]], "loss error": r["loss_error"],
            "gradient error": "" if r["case"] == "score" else r["gradient_error"], "peak MiB": r["peak_MiB"],
        }
        for r in sorted(rows, key=lambda r: float(r["ms"]))
    ]  # fmt: skip
    return harness.markdown(lines, list(lines[0]))


def report(rows: list[dict]) -> str:
    """The whole page."""
    text = ["# On a GPU"]
    for device in dict.fromkeys(r["device"] for r in rows):
        own = [r for r in rows if r["device"] == device]
        rates = [(float(r["copy_GB_s"]), float(r["matmul_TFLOP_s"])) for r in own]
        text.append(
            f"{device}, torch {own[0]['torch']}; {own[0]['machine']}. A copy moved {rates[0][0]:.0f} GB/s and a bf16 product "
            f"of 8192 made {rates[0][1]:.0f} TFLOP/s. Medians between CUDA events, the L2 cache overwritten before every run; "
            "errors against fp32: of the losses the largest (of the mean when training), of gradients relative to their norm. "
            "Losses of a head differ by the rounding of its logits to 16 bits. Peak memory is above the inputs, returned "
            "gradients included; `liger` writes the gradient of given logits over them."
        )
        for title in dict.fromkeys(map(_title, own)):
            text += [f"## {title}", table([r for r in own if _title(r) == title])]
        text += ["## Commands", *sorted({f"Commit {r['commit']}: `{r['command']}`" for r in own})]
    return "\n\n".join(text) + "\n"


if __name__ == "__main__":
    path = harness.RESULTS / "gpu.md"
    path.write_text(report(harness.read_csv("gpu")))
    print(f"wrote {path.relative_to(harness.ROOT)}")
