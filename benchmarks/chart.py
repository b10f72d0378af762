"""The charts: the speed of each format and of loading, compared with other systems; loading by several ranks."""

from contextlib import contextmanager

import matplotlib as mpl
from matplotlib import pyplot as plt

INK = {"light": "#1f2328", "dark": "#e6edf3"}
# Okabe and Ito's palette for colour-blind readers.
OURS, LIGHT_OURS, LLAMA_CPP, PYTORCH = "#0072b2", "#56b4e9", "#e69f00", "#999999"


@contextmanager
def _figure(theme, size, n_columns, path, n_axes=1):
    ink = INK[theme]
    style = {
        "svg.hashsalt": "numba_dequant", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9,
        "text.color": ink, "axes.edgecolor": ink, "axes.labelcolor": ink, "xtick.color": ink, "ytick.color": ink,
    }  # fmt: skip
    with mpl.rc_context(style):
        figure, axes = plt.subplots(1, n_axes, figsize=size, layout="constrained")
        yield axes, ink
        for each in figure.axes:
            each.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside upper center", ncols=n_columns, frameon=False)
        figure.savefig(path, transparent=True, metadata={"Date": None})
        plt.close(figure)


def _from_top(axes):
    """The first bar at the top."""
    axes.invert_yaxis()
    axes.margins(y=0.01)


def speed(results, peers, theme, path, names=None):
    """A row for each format that was measured, or for each of `names`."""
    names = names or results.formats
    tiles = [results.one("test_kernel", name=name, dtype="float16", mapping="tile") for name in names]
    theirs = [peers["GB/s"].get(name, {}).get("llama.cpp", {}).get("float16") for name in names]
    eager = [results.one("test_eager_pytorch", name=name) for name in names]
    places = range(len(names))
    with _figure(theme, (8, 0.9 + 0.3 * len(names)), 4, path) as (axes, ink):
        axes.barh(places, [tile["GB/s"] for tile in tiles], 0.8, color=OURS, label="numba_dequant")
        for label, color, speeds, height in (
            ("llama.cpp, CUDA C++", LLAMA_CPP, theirs, 0.5),
            ("PyTorch, eager", PYTORCH, [each and each["GB/s"] for each in eager], 0.22),
        ):
            axes.barh(places, [speed or 0 for speed in speeds], height, color=color, label=label)
        rooflines = [tile["roof GB/s"] for tile in tiles]
        axes.plot(rooflines, places, "|", color=ink, markersize=10, markeredgewidth=1.5, label="only moving bytes")
        axes.set_yticks(places, names)
        axes.set_xlabel(f"GB/s read and written, to FP16, on one {results.machine['gpu']}")
        _from_top(axes)


def loading(results, theme, path):
    ways = {
        "ours": ("numba_dequant", OURS),
        "ours, 2 threads": ("the same with 2 threads", LIGHT_OURS),
        "pageable": ("a plain copy and a kernel each", LLAMA_CPP),
        "safetensors": ("safetensors, the file in FP16", PYTORCH),
    }
    found = results.of("test_load_gpu")
    names = list(dict.fromkeys(parameters["name"] for parameters, _ in found))
    with _figure(theme, (8, 3.4), 3, path) as (axes, ink):
        for number, (way, (label, color)) in enumerate(ways.items()):
            speeds = [results.one("test_load_gpu", name=name, way=way) for name in names]
            heights = [each["values"] / each["seconds"] / 1e9 for each in speeds]
            places = [place + 0.2 * (number - 1.5) for place in range(len(names))]
            axes.barh(places, heights, 0.18, color=color, label=label)
        bus = max(info["roof GB/s"] for _, info in found)
        axes.axvline(bus, color=ink, linestyle="--", linewidth=1, label="all that the bus carries of FP16")
        sizes = [results.one("test_load_gpu", name=name, way="ours")["file_bytes"] / 1e9 for name in names]
        labels = [f"like {name}\n{size:.3g} GB" for name, size in zip(names, sizes, strict=True)]
        axes.set_yticks(range(len(names)), labels)
        axes.set_xlabel(f"GB/s of FP16, from a file in the page cache, on one {results.machine['gpu']}")
        _from_top(axes)


def ranks(counts, models, theme, path):
    """Predicted seconds: model -> way -> (overlapped, exchanged last), for each number of ranks."""
    colors = {"sharded": OURS, "replicated": LLAMA_CPP}
    with _figure(theme, (8, 3.4), 2, path, n_axes=len(models)) as (panels, _):
        for axes, (model, ways) in zip(panels, models.items(), strict=True):
            for way, lines in ways.items():
                for how, style, seconds in zip(("overlapped", "exchanged last"), ("-", "--"), lines, strict=True):
                    label = f"{way}, {how}" if axes is panels[0] else None
                    places = range(len(counts))
                    axes.plot(
                        places, [1e3 * each for each in seconds], style, marker=".", color=colors[way], label=label
                    )
            axes.set_yscale("log")
            axes.set_ylim(10, 10_000)
            axes.set_yticks([10, 100, 1000, 10_000], ["10", "100", "1,000", "10,000"])
            axes.set_xticks(range(len(counts)), counts)
            axes.set_title(model, fontsize=9)
            axes.set_xlabel("ranks")
        panels[0].set_ylabel("ms, predicted")
