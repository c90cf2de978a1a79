"""What a run of the benchmark found, for people: as a table, and beside another run's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dragdiff.errors import UserError


def table(results: dict[str, Any]) -> str:
    """The results for people."""
    lines = [
        f"{'stage':<14} {'x forward':>9} {'range':>11} {'s a step':>9} {'GFLOP':>7} {'x roof':>7} {'peak MB':>8}",
    ]
    for name, stage in results["stages"].items():
        spread = f"{stage['ratio_low']:.2f}-{stage['ratio_high']:.2f}" if "ratio" in stage else ""
        lines.append(
            f"{name:<14} {_number(stage, 'ratio', '.3f'):>9} {spread:>11} {_number(stage, 'seconds', '.4g'):>9} "
            f"{_number(stage, 'gflop', '.4g'):>7} {_number(stage, 'over_roof', '.2f'):>7} "
            f"{_number(stage, 'peak_mb', '.0f'):>8}"
        )
    if "overhead" in results:
        took = results["overhead"]
        added = took.get("added_ms", took["product_ms"] - took["bare_ms"])  # older results say no more
        spread = f" ({took['added_low']:.1f} to {took['added_high']:.1f})" if "added_low" in took else ""
        lines.append(
            f"a drag step of a tiny model: {took['product_ms']:.1f} ms, {took['bare_ms']:.1f} in a bare loop: "
            f"the framework adds {added:.1f}{spread}"
        )
    if "batch" in results:
        shares = ", ".join(
            f"{name} {found['ratio']:.2f} ({found['ratio_low']:.2f}-{found['ratio_high']:.2f})"
            for name, found in results["batch"].items()
        )
        lines.append(f"{results['settings']['batch']} edits at once, a step by those of one by one: {shares}")
    machine = results["machine"]
    lines.append(
        f"{machine['device']}, threads {machine['threads']}, torch {machine['torch']}, clock {results['clock']}"
    )
    return "\n".join(lines)


def _number(stage: dict[str, float], key: str, style: str) -> str:
    return format(stage[key], style) if key in stage else "-"


def parts_table(results: dict[str, Any]) -> str:
    """The results of benchmarks/gpu.py for people, in Markdown."""
    machine = results["machine"]
    lines = [f"{machine['device']}, torch {machine['torch']}\n" if machine else "no machine\n"]
    lines += ["| part | state | s | found |", "|---|---|---|---|"]
    for name, part in results["parts"].items():
        said = [*_sentences(part["found"]), *([part["why"]] if part["why"] else [])]
        lines.append(f"| {name} | {part['state']} | {part['seconds']:.0f} | {'<br>'.join(said).replace('|', '/')} |")
    return "\n".join(lines)


def _sentences(found: dict[str, Any]) -> list[str]:
    """What a part found."""
    lines = []
    for name, value in found.get("functions", {}).items():
        lines.append(f"{name}: {value:.2g} from the CPU")
    for name, checks in found.get("runs", {}).items():
        worst = max(checks, key=lambda check: checks[check]["of_tolerance"])
        lines.append(
            f"{name}: at most {checks[worst]['deviation']:.2g} from the published code ({worst}, "
            f"{checks[worst]['of_tolerance']:.2g} of the tolerance)"
        )
        lines += [f"{name}, {check}: {said['wrong']}" for check, said in checks.items() if "wrong" in said]
    for name, stage in found.get("stages", {}).items():
        spread = f"{stage['ratio_low']:.2f}-{stage['ratio_high']:.2f}"
        lines.append(f"{name}: {stage['seconds']:.4g} s a step, {stage['ratio']:.2f} forwards ({spread})")
    lines += found.get("notes", [])
    if "of_stages" in found:
        parts = ", ".join(f"{name} {seconds:.3g}" for name, seconds in found["of_stages"].items())
        lines.append(f"{found['seconds']:.3g} s ({parts}), {found['drag_steps']} drag steps")
    if "ratio" in found:
        spread = f"{found['ratio_low']:.2f}-{found['ratio_high']:.2f}"
        lines.append(f"a drag step takes {found['ratio']:.2f} ({spread}) of one by one")
    if "peak_mb" in found:
        lines.append(f"peak {found['peak_mb']:.0f} MB")
    if "forward_seconds" in found:
        lines.append(f"a bare forward: {found['forward_seconds']:.4g} s")
    return lines


def comparison(before: dict[str, Any], after: dict[str, Any]) -> str:
    """What changed from one run's results to another's."""
    lines = [f"{'':<14} {'before':>9} {'after':>9} {'change':>8}"]
    for name in [name for name in before["stages"] if name in after["stages"]]:
        for key, unit in (("ratio", "x forward"), ("peak_mb", "peak MB")):
            one, two = before["stages"][name].get(key), after["stages"][name].get(key)
            if one and two:
                lines.append(f"{name:<14} {one:>9.4g} {two:>9.4g} {two / one - 1:>+8.1%}  {unit}")
    for name, found in before.get("batch", {}).items():
        if name in after.get("batch", {}):
            one, two = found["ratio"], after["batch"][name]["ratio"]
            unit = f"batch of {after['settings']['batch']}, {name}"
            lines.append(f"{'':<14} {one:>9.4g} {two:>9.4g} {two / one - 1:>+8.1%}  {unit}")
    both = [results["settings"] for results in (before, after)]
    other = [
        f"{key} ({one} before, {two} after)"
        for key in dict.fromkeys([*both[0], *both[1]])
        if (one := both[0].get(key, "none")) != (two := both[1].get(key, "none")) and key != "output"
    ]
    if before["machine"] != after["machine"]:
        other.append("the machine")
    return "\n".join(lines + ([f"they also differ in {', '.join(other)}"] if other else []))


def read(path: str) -> dict[str, Any]:
    """Results that a run wrote.

    Raises:
        UserError: missing, or something else.
    """
    try:
        results = json.loads(Path(path).read_text("utf-8"))
        _ = table(results), results["settings"].items()
    except OSError as error:
        raise UserError(f"cannot read {path!r}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path!r} holds no results of this benchmark") from None
    return results
