"""Reports without their figures, which take 5 s of a core; tests of pretrain/comparison/report draw them.

    python -m tests.undrawn MODULE [ARGUMENT ...]

runs a module as a program, whose reports lack figures.
"""

import runpy
import sys
from collections.abc import Callable

_REPORT = "pretrain.comparison.report"
FIGURES: dict[str, str | bytes] = {
    f"{_REPORT}.figures.svg_panel": "<svg></svg>",
    f"{_REPORT}.picture.summary_png": b"",
    f"{_REPORT}.picture.summary_pdf": b"",
}
"""Full name of a function that draws -> what stands for its figure."""


def undrawn(figure: str | bytes) -> Callable[..., str | bytes]:
    """A function of any arguments that returns `figure`."""
    return lambda *_, **__: figure


def main() -> None:
    """Run the module that the first argument names as a program, with the arguments behind it."""
    from pretrain.comparison.report import figures, picture

    modules = {figures.__name__: figures, picture.__name__: picture}
    for name, figure in FIGURES.items():
        module, _, function = name.rpartition(".")
        setattr(modules[module], function, undrawn(figure))
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
