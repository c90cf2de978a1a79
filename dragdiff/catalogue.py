"""What `dragdiff methods` says, from what each method says of itself. Importing this module is cheap."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dragdiff import methods
from dragdiff.config import Config, config_class, load_config
from dragdiff.errors import UserError
from dragdiff.methods.method import total_forwards
from dragdiff.options import describe, walk


def names() -> list[str]:
    """The package's methods, and those that other installed ones offer."""
    return [*methods.NAMES, *methods.offered()]


def overview() -> str:
    """A line for each method: name, year, paper, needs, uses, and forwards at its published settings."""
    rows = [("name", "year", "paper", "needs", "uses", "forwards")]
    for name in names():
        method = methods.find(name)
        forwards = sum(total_forwards(method.stages(_published(name))).values())
        needs, uses = (", ".join(entries) or "-" for entries in (method.needs, method.uses))
        paper = f"arXiv:{method.paper}" if method.paper else "-"
        rows.append((name, str(method.year or "-"), paper, needs, uses, f"{forwards:.0f}"))
    return "\n".join(
        [
            *_table(rows),
            "",
            "forwards: of the denoiser, for one real picture at the published settings; a step that trains counts for",
            "what it costs. `dragdiff methods NAME` says more; `method=NAME` chooses one, or a file my_method.py.",
        ]
    )


def suitable(settings: Callable[[str], Config], chosen: Sequence[str]) -> str:
    """Which methods can edit something, and what the others lack.

    Args:
        settings: those by which the method of a name would; raises a `UserError` that says why it can't.
        chosen: names of methods.

    Raises:
        UserError: none can, all for the same reason.
    """
    rows, reasons = [("name", "forwards", "here")], []
    for name in chosen:
        try:
            config = settings(name)
        except UserError as error:
            reasons.append(str(error))
            rows.append((name, "-", f"can't: {error}"))
            continue
        work = total_forwards(methods.find(name).stages(config))
        parts = ", ".join(f"{stage} {forwards:.0f}" for stage, forwards in work.items())
        rows.append((methods.find(name).name, f"{sum(work.values()):.0f}", f"can run: {parts}"))
    if len(reasons) == len(rows) - 1 and len(set(reasons)) == 1:
        raise UserError(reasons[0])
    return "\n".join(_table(rows))


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines of equal columns, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = [all(cell[:1].isdigit() or cell == "-" for cell in column[1:]) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True)).rstrip()
        for row in rows
    ]


def details(name: str) -> str:
    """All that is known of a method: its publication, needs, work, published values and own settings.

    Raises:
        UserError: there is none of this name; says which there are.
    """
    method = methods.find(name)
    config, defaults = _published(name), {key: value for key, _, value in walk(config_class(method)())}
    uses = f"; uses {' and '.join(method.uses)} where there is one" if method.uses else ""
    work = total_forwards(method.stages(config))
    parts = [
        (f"{method.title} ({method.year})" if method.title else method.name)
        + (f"\nhttps://arxiv.org/abs/{method.paper}" if method.paper else ""),
        method.summary,
        f"needs {' and '.join(method.needs) or 'nothing'}{uses}",
        f"note: {method.note}" if method.note else "",
        f"licence of the authors' own code, which is not used here: {method.licence}" if method.licence else "",
        "work, in forwards of the denoiser for one real picture: "
        + ", ".join(f"{stage} {forwards:.0f}" for stage, forwards in work.items()),
    ]
    if method.published:
        lines = [f"  {key}={value}  (default {defaults[key]})" for key, value in method.published.items()]
        parts.append("\n".join([f"published values, which method={name} sets:", *lines]))
    if config.own is not None:
        parts.append(f"settings of its own:\n{describe(config.own, prefix=f'{method.name}.')}")
    return "\n\n".join(part for part in parts if part)


def _published(name: str) -> Config:
    return load_config(overrides=[f"method={name}"])
