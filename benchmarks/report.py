"""Write README's tables: the formats from the registry, the speed from a result of throughput.py.

python benchmarks/report.py benchmarks/results/h100.json
"""

import json
import re
import sys
from pathlib import Path

import numba_dequant as nd

README = Path(__file__).parents[1] / "README.md"


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def formats():
    return table(
        ["format", "id", "elements per block", "bytes per block", "bits per weight", "a block is"],
        [
            [each.name, each.ggml_id, each.block_size, each.type_size, f"{each.bits_per_weight:.4g}", each.summary]
            for each in nd.FORMATS.values()
            if each.block_size > 1
        ],
    )


def speed(result):
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    first = result["rows"][0]
    rows = [
        [row["format"], f"{row['tile']:.0f}", f"{row['roof']:.0f}", f"{row['share']:.1%}", f"{row['block']:.0f}"]
        for row in result["rows"]
        if row["dtype"] == "float16"
    ]
    return (
        f"{machine['gpu']}, {first['elements']:,} elements, device copy {result['device_copy']:.0f} GB/s; "
        f"Python {machine['python']}, {versions}; `{result['command']}`.\n\n"
        + table(["format", "GB/s", "roof", "share of roof", "one block"], rows)
    )


def main():
    text = README.read_text()
    with open(sys.argv[1]) as file:
        parts = {"formats": formats(), "speed": speed(json.load(file))}
    for name, part in parts.items():
        pattern = rf"(<!-- {name}: [^>]*-->\n).*?(<!-- /{name} -->)"
        text, count = re.subn(
            pattern, lambda match, part=part: f"{match[1]}\n{part}\n\n{match[2]}", text, flags=re.DOTALL
        )
        assert count == 1, name
    README.write_text(text)


if __name__ == "__main__":
    main()
