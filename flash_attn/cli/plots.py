"""PNG plots of the command line; matplotlib is imported only when one is drawn."""

from pathlib import Path


def line_plot(
    path: Path,
    title: str,
    x_label: str,
    y_label: str,
    series: dict[str, tuple[list, list]],
    log: bool = False,
) -> None:
    """Write a line plot of `series` (name -> (x, y)) to `path`; `log` makes both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, (x, y) in series.items():
        axes.plot(x, y, label=name, marker="o" if len(x) < 30 else None)
    if log:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
