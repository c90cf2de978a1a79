"""What `dragdiff methods` says, from what each method says of itself. Importing this module is cheap."""

from __future__ import annotations

from dragdiff import methods
from dragdiff.config import Config, config_class, load_config
from dragdiff.methods.method import total_forwards
from dragdiff.options import describe, walk


def overview() -> str:
    """A line for each method: name, year, paper, needs, uses, and forwards at its published settings."""
    rows = [("name", "year", "paper", "needs", "uses", "forwards")]
    for name in methods.NAMES:
        method = methods.find(name)
        forwards = sum(total_forwards(method.stages(_published(name))).values())
        needs, uses = (", ".join(entries) or "-" for entries in (method.needs, method.uses))
        rows.append((name, str(method.year), f"arXiv:{method.paper}", needs, uses, f"{forwards:.0f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([*map(str.ljust, row[:-1], widths), row[-1].rjust(widths[-1])]) for row in rows]
    return "\n".join(
        [
            *lines,
            "",
            "forwards: of the denoiser, for one real picture at the published settings; a step that trains counts for",
            "what it costs. `dragdiff methods NAME` says more; `method=NAME` chooses one.",
        ]
    )


def details(name: str) -> str:
    """All that is known of a method: its publication, needs, work, published values and own settings.

    Raises:
        UserError: there is none of this name; says which there are.
    """
    method = methods.find(name)
    config, defaults = _published(name), {key: value for key, _, value in walk(config_class(name)())}
    uses = f"; uses {' and '.join(method.uses)} where there is one" if method.uses else ""
    work = total_forwards(method.stages(config))
    parts = [
        f"{method.title} ({method.year})\nhttps://arxiv.org/abs/{method.paper}",
        method.summary,
        f"needs {' and '.join(method.needs) or 'nothing'}{uses}",
        f"note: {method.note}" if method.note else "",
        "work, in forwards of the denoiser for one real picture: "
        + ", ".join(f"{stage} {forwards:.0f}" for stage, forwards in work.items()),
    ]
    if method.published:
        lines = [f"  {key}={value}  (default {defaults[key]})" for key, value in method.published.items()]
        parts.append("\n".join([f"published values, which method={name} sets:", *lines]))
    if config.own is not None:
        parts.append(f"settings of its own:\n{describe(config.own, prefix=f'{name}.')}")
    return "\n\n".join(part for part in parts if part)


def _published(name: str) -> Config:
    return load_config(overrides=[f"method={name}"])
