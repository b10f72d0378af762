"""The chart of README: what each format reaches to FP16, beside its roof and what others reach."""

import matplotlib as mpl
from matplotlib import pyplot as plt

INK = {"light": "#1f2328", "dark": "#e6edf3"}
# Okabe and Ito's colours, which colour-blind people can tell apart; the greys are told apart by length and legend.
OURS, LLAMA_CPP, PYTORCH = "#0072b2", "#e69f00", "#999999"


def draw(results, peers, theme, path):
    ink = INK[theme]
    names = results.formats
    style = {
        "svg.hashsalt": "numba_dequant", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9,
        "text.color": ink, "axes.edgecolor": ink, "axes.labelcolor": ink, "xtick.color": ink, "ytick.color": ink,
    }  # fmt: skip
    with mpl.rc_context(style):
        figure, axes = plt.subplots(figsize=(8, 9), layout="constrained")
        tiles = [results.one("test_kernel", name=name, dtype="float16", mapping="tile") for name in names]
        theirs = [peers["GB/s"].get(name, {}).get("llama.cpp", {}).get("float16") for name in names]
        eager = [results.one("test_eager_pytorch", name=name) for name in names]
        places = range(len(names))
        axes.barh(places, [tile["GB/s"] for tile in tiles], 0.8, color=OURS, label="numba_dequant")
        for label, color, speeds, height in (
            ("llama.cpp, CUDA C++", LLAMA_CPP, theirs, 0.5),
            ("PyTorch, eager", PYTORCH, [each and each["GB/s"] for each in eager], 0.22),
        ):
            axes.barh(places, [speed or 0 for speed in speeds], height, color=color, label=label)
        roofs = [tile["roof GB/s"] for tile in tiles]
        axes.plot(roofs, places, "|", color=ink, markersize=10, markeredgewidth=1.5, label="only moving bytes")
        axes.set_yticks(places, names)
        axes.invert_yaxis()
        axes.margins(y=0.01)
        axes.set_xlabel(f"GB/s read and written, to FP16, on one {results.machine['gpu']}")
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside upper center", ncols=4, frameon=False)
        figure.savefig(path, transparent=True, metadata={"Date": None})
        plt.close(figure)
