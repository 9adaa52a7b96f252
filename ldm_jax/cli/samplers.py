"""List the samplers and what each is good for: order of convergence, network evaluations a step, whether it draws noise.

  ldm samplers                 all of them, the time grids, and the guidances
  ldm samplers dpmpp_2m        one, in full: equation, paper, options
  ldm samplers --stochastic    those that draw noise (--deterministic: those that do not)

Any of them: ldm sample ... --sampler=NAME --steps=N --grid=NAME --guidance=W --guidance-method=NAME --guidance-schedule=NAME
--threshold=NAME; with options of theirs, NAME:OPTION=VALUE,... (in a config: sampler.options, grid_options, guidance_options, ...).
"""

import argparse
import inspect
import re
from collections.abc import Callable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="a sampler, a grid or a guidance, in full")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--stochastic", action="store_true", help="only those that draw noise")
    kind.add_argument("--deterministic", action="store_true", help="only those that do not")


def headline(function: Callable) -> str:
    """The first line of a docstring, without its full stop; '-' where there is none."""
    return (inspect.getdoc(function) or "-").splitlines()[0].rstrip(".")


def paper(function: Callable) -> str:
    """The first arXiv number of a docstring, or '-'."""
    number = re.search(r"arXiv:\s*(\d{4}\.\d{4,5})", inspect.getdoc(function) or "")
    return number.group(1) if number else "-"


def facts(stochastic: bool | None = None) -> list[tuple[str, ...]]:
    """(name, order, evaluations a step, noise, arXiv number, headline) of each sampler; all of them, or one kind."""
    from ldm_jax.diffusion.samplers import SAMPLERS

    rows = []
    for name, make in SAMPLERS.items():
        sampler = make()
        if stochastic in (None, sampler.stochastic):
            noise = "yes" if sampler.stochastic else "no"
            rows.append((name, f"{sampler.order:g}", f"{sampler.evaluations:g}", noise, paper(make), headline(make)))
    return rows


def table(rows: list[tuple[str, ...]]) -> str:
    """Columns as wide as their widest entry; the last one as it comes."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return "\n".join("  ".join([*(cell.ljust(w) for cell, w in zip(row, widths)), row[-1]]) for row in rows)


def run(args: argparse.Namespace, rest: list[str]) -> int:
    from ldm_jax.diffusion.grids import GRIDS
    from ldm_jax.diffusion.samplers import SAMPLERS
    from ldm_jax.sampling.settings import METHODS, SCHEDULES, THRESHOLDS

    thresholds = {name: function for name, function in THRESHOLDS.items() if name != "none"}
    if args.name:
        tables = SAMPLERS | GRIDS | METHODS | thresholds
        if args.name not in tables:
            raise ValueError(f"no sampler, grid or guidance is called {args.name!r}; `ldm samplers` lists them")
        function = tables[args.name]
        options = ", ".join(str(p.replace(annotation=p.empty)) for p in inspect.signature(function).parameters.values())
        print(f"{args.name}({options})\n\n{inspect.getdoc(function) or '-'}")
        return 0
    kind = True if args.stochastic else False if args.deterministic else None
    print(table([("sampler", "order", "evals", "noise", "arXiv", "what it is"), *facts(kind)]))
    if kind is None:
        grids = [(name, paper(grid), headline(grid)) for name, grid in GRIDS.items()]
        print("\n" + table([("grid", "arXiv", "what it is"), *grids]))
        for title, functions in (("guidance method", METHODS), ("threshold", thresholds)):
            rows = [(name, paper(function), headline(function)) for name, function in functions.items()]
            print("\n" + table([(title, "arXiv", "what it is"), *rows]))
        print(f"\nguidance schedules (arXiv 2404.13040): {', '.join(SCHEDULES)}")
    return 0
