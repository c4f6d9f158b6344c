"""Figures with the numbers behind them; three of them carry most of what the notebooks show."""

import io
import json

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Image

from support import stored
from support.claims import plain
from support.stored import folder


def save(figure, name, profile, **numbers):
    """Write runs/<profile>/figures/<name>.png and the plotted numbers as <name>.json; return it.

    What a notebook shows is the file itself, so the two can not differ. A palette of 128 colours
    keeps sheets of pictures small.
    """
    from PIL import Image as Raster

    path = folder("runs", profile, "figures") / f"{name}.png"
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=getattr(figure, "file_dpi", 100))
    plt.close(figure)
    small = io.BytesIO()
    Raster.open(buffer).convert("RGB").quantize(128).save(small, "png", optimize=True)
    stored.write(path, small.getvalue())
    if numbers:
        stored.write(path.with_suffix(".json"), json.dumps(plain(numbers)) + "\n")
    return Image(path)


def agreement(panels, *, unit="nats", colour=None, colour_label="", titles=None, symlog=None):
    """Return a figure of actual against predicted changes, one panel a prediction, and the line.

    panels : {name: (predicted (k,), actual (k,))}; colour : (k,) values that colour the dots;
    titles : {name: text}, by default each name with its r and slope; symlog : axes are linear up to
    this value and logarithmic beyond.
    """
    from support.evaluation import agreement as measured

    figure, axes = plt.subplots(
        1, len(panels), figsize=(3.3 * len(panels), 3.5), sharex=True, sharey=True, squeeze=False
    )
    cmap = None if colour is None else "viridis"
    for axis, (name, (predicted, actual)) in zip(axes[0], panels.items(), strict=True):
        found = measured(predicted, actual)
        ends = [np.min([predicted, actual]), np.max([predicted, actual])]
        axis.plot(ends, ends, color="0.6", lw=1)
        dots = axis.scatter(predicted, actual, c=colour, s=12, cmap=cmap)
        text = f"{name}\nr {found.r:.2f}, slope {found.slope:.2f}"
        axis.set(title=(titles or {}).get(name, text), xlabel=f"predicted change ({unit})")
        if symlog:
            axis.set_xscale("symlog", linthresh=symlog)
            axis.set_yscale("symlog", linthresh=symlog)
            axis.xaxis.get_major_locator().set_params(numticks=5)  # else labels overlap
            axis.xaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.tick_params(labelsize=7)  # seven ticks fit a panel
    axes[0, 0].set_ylabel(f"actual change ({unit})")
    if colour is not None:
        figure.colorbar(dots, ax=axes, label=colour_label)
    return figure


def curves(axis, x, lines, *, marker=None, **labels):
    """Draw lines with bands on an axis and return it.

    lines : {name: y (k,)} or {name: (y, low, high)}, the band a 95 % one; labels : what
    `axis.set` takes (xlabel, ylabel, title, xscale, ylim, ...).
    """
    for name, values in lines.items():
        y, *band = values if isinstance(values, tuple) else (values,)
        (line,) = axis.plot(x, y, marker=marker, ms=4, label=name)
        if band:
            axis.fill_between(x, *band, alpha=0.15, color=line.get_color(), lw=0)
    axis.set(**labels)
    if len(lines) > 1:
        axis.legend()
    return axis


def gallery(images, captions, *, columns=6, titles=None, size=1.5, title=None):
    """Return a figure with one captioned picture a cell, readable at page width.

    images : pictures (h, w, 3) uint8, or (h, w) grey; captions : text under each;
    titles : one a row, written at its left; None leaves them out.
    """
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(
        rows, columns, squeeze=False, figsize=(size * columns, (size + 0.42) * rows)
    )
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.set_frame_on(False)
        axis.grid(False)
    for axis, image, caption in zip(axes.flat, images, captions, strict=False):
        axis.imshow(image, cmap="gray_r" if np.ndim(image) == 2 else None)
        axis.set_xlabel(caption, fontsize=8, labelpad=3, parse_math=False)  # names of files
    for axis, text in zip(axes[:, 0], titles or [], strict=False):
        axis.set_ylabel(text, fontsize=9, parse_math=False)
    if title:
        figure.suptitle(title, fontsize=11)
    figure.file_dpi = 80  # pictures hold noise, which no compression makes small
    return figure


def captions(table, rows, nats):
    """Return captions for rows of a manifest: index and kind, below them the influence in nats."""
    kinds = table["subtype"].str.replace("_", " ").iloc[rows]
    return [f"{i} {k}\n{v:+.2g}" for i, k, v in zip(rows, kinds, nats, strict=True)]
