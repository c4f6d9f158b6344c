"""Figures with the numbers behind them; three of them carry most of what the notebooks show."""

import io
import json

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from IPython.display import Image
from matplotlib.image import AxesImage, BboxImage, FigureImage
from matplotlib.ticker import FixedLocator
from PIL import Image as Raster
from PIL.PngImagePlugin import PngInfo

from support import stored
from support.claims import plain
from support.stored import folder

WIDTHS = 3.3, 6.9  # inches: one column of a paper, and two


def style():
    """Set how figures look: 8 pt, in colours that colour-blind readers and grey prints keep apart.

    `save` brings a plot to the nearer of WIDTHS; its text keeps its size.
    """
    sns.set_theme(context="paper", style="whitegrid", palette="colorblind")
    kinds = ("font.size", "axes.titlesize", "axes.labelsize", "figure.titlesize")
    kinds += ("xtick.labelsize", "ytick.labelsize", "legend.fontsize", "legend.title_fontsize")
    settings = dict.fromkeys(kinds, 8) | {"figure.dpi": 80, "pdf.fonttype": 42}
    plt.rcParams.update(settings | {"figure.constrained_layout.use": True})


def save(figure, name, profile, **numbers):
    """Write runs/<profile>/figures/<name>.png and the plotted numbers as <name>.json; return it.

    What a notebook shows is the file itself, so the two can not differ. A palette of 256 colours
    keeps it small; that of a plot spares the rare colours. A plot is also written as PDF, and its
    PNG says that it is one.
    """
    path = folder("runs", profile, "figures") / f"{name}.png"
    rasters = AxesImage, BboxImage, FigureImage  # a photograph, a digit, or a map of values
    plot, info = not any(map(figure.findobj, rasters)), PngInfo()
    info.add_text("shows", "plot" if plot else "pictures")
    buffer, small, print_ = io.BytesIO(), io.BytesIO(), io.BytesIO()
    width, height = figure.get_size_inches()
    printed = WIDTHS[0] if width < 4.5 else WIDTHS[1]
    if plot or width > WIDTHS[1]:
        figure.set_size_inches(printed, height * printed / width)
    if plot:
        figure.savefig(print_, format="pdf", metadata={"CreationDate": None})  # else it has a date
        stored.write(path.with_suffix(".pdf"), print_.getvalue())
    figure.savefig(buffer, dpi=getattr(figure, "file_dpi", 145))
    plt.close(figure)
    image = Raster.open(buffer).convert("RGB")
    image = image.quantize(256, Raster.Quantize.MAXCOVERAGE if plot else None)
    image.save(small, "png", optimize=True, pnginfo=info)
    stored.write(path, small.getvalue())
    if numbers:
        stored.write(path.with_suffix(".json"), json.dumps(plain(numbers)) + "\n")
    return Image(path)


def agreement(panels, *, unit="nats", colour=None, colour_label="", symlog=None):
    """Return a figure of actual against predicted changes, one panel a prediction, and the line.

    panels : {name: (predicted (k,), actual (k,))}; colour : (k,) values that colour the dots;
    symlog : axes are linear up to this value and logarithmic beyond, if any value lies there.
    """
    from support.evaluation import agreement as measured

    figure, axes = plt.subplots(1, len(panels), figsize=(3.3 * len(panels), 4), squeeze=False)
    values = np.array(list(panels.values()), float)
    ends = np.nanmin(values), np.nanmax(values)
    passed = np.array([-1, 1]) * ends  # how far each side goes; `last`: its last power of ten
    sides = zip((-1, 1), passed, strict=True)
    last = [s * 10.0 ** np.floor(np.log10(e)) for s, e in sides if e > (symlog or 0)]
    bent, ticks = symlog is not None and max(passed) > symlog, [0, *last]
    if bent:
        unit += f",\nlogarithmic beyond {symlog:g}"
        more = np.unique([*ticks, *(np.sign(last) * symlog)])
        if max(passed) <= 100 * symlog and len(more) * len(f"{symlog:g}") <= 16:  # there is room
            ticks = more
    cmap = None if colour is None else "viridis"
    for axis, (name, (predicted, actual)) in zip(axes[0], panels.items(), strict=True):
        found = measured(predicted, actual)
        axis.plot(ends, ends, color="0.6", lw=1)
        dots = axis.scatter(predicted, actual, c=colour, s=12, cmap=cmap)
        title = f"{name}\nr {found.r:.2f}, slope {found.slope:.2f}"
        axis.set(title=title, xlabel=f"predicted change ({unit})", box_aspect=1)
        axis.locator_params(nbins=3)  # more labels overlap
        for scale, one in ((axis.set_xscale, axis.xaxis), (axis.set_yscale, axis.yaxis)):
            if bent:
                scale("symlog", linthresh=symlog)
                one.set_major_locator(FixedLocator(ticks))
            one.set_major_formatter("{x:g}")
        axis.label_outer()  # the line's ends give all axes the same limits
    axes[0, 0].set_ylabel(f"actual change ({unit})")
    if colour is not None:
        figure.colorbar(dots, ax=axes, label=colour_label)
    return figure


def curves(axis, x, lines, *, marker=None, **labels):
    """Draw lines with bands on an axis and return it.

    lines : {name: y (k,)} or {name: (y, low, high)}, the band a 95 % one; labels : what
    `axis.set` takes (xlabel, ylabel, title, xscale, ylim, ...).
    """
    for k, (name, values) in enumerate(lines.items()):
        y, *band = values if isinstance(values, tuple) else (values,)
        dashes = ("-", "--", ":", "-.")[k % 4]  # which a grey print keeps apart
        (line,) = axis.plot(x, y, dashes, marker=marker, ms=4, label=name)
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
    shape = size * columns, (size + 0.42) * rows
    bare = {"xticks": [], "yticks": [], "frame_on": False}
    figure, axes = plt.subplots(rows, columns, squeeze=False, figsize=shape, subplot_kw=bare)
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
    kinds = (k if len(k) <= 14 else f"{k[:13]}…" for k in kinds)
    rounded = (float(f"{v:.2g}") for v in nats)  # so that 120 is not shown as 1.2e+02
    return [f"{i} {k}\n{v:+g}" for i, k, v in zip(rows, kinds, rounded, strict=True)]
