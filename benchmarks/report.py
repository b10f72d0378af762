"""Write README's tables: the formats from the registry, the speed from results of throughput.py and cpu.py.

python benchmarks/report.py benchmarks/results/h100.json benchmarks/results/cpu.json
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
    by_format = {}
    for row in result["rows"]:
        by_format.setdefault(row["format"], {})[row["dtype"]] = row
    rows = []
    for name, found in by_format.items():
        half = found["float16"]
        shares = [f"{found[dtype]['share']:.1%}" for dtype in ("float16", "bfloat16", "float32")]
        rows.append([name, f"{half['tile']:.0f}", f"{half['roof']:.0f}", *shares, f"{half['block']:.0f}"])
    return (
        f"{machine['gpu']}, {result['rows'][0]['elements']:,} elements, device copy {result['device_copy']:.0f} GB/s; "
        f"Python {machine['python']}, {versions}; `{result['command']}`.\n\n"
        + table(["format", "FP16", "roof", "share", "BF16 share", "FP32 share", "one block"], rows)
    )


def cpu(result):
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    rows = [[r["format"], f"{r['cpu']:.1f}", f"{r['gguf']:.2f}", f"{r['ratio']:.0f}"] for r in result["rows"]]
    return (
        f"{machine['cpu']}, {machine['threads']} threads, gguf-py on one, {result['rows'][0]['elements']:,} elements; "
        f"Python {machine['python']}, {versions}; `{result['command']}`.\n\n"
        + table(["format", "GB/s", "gguf-py", "ratio"], rows)
    )


def main():
    text = README.read_text()
    with open(sys.argv[1]) as gpu_file, open(sys.argv[2]) as cpu_file:
        parts = {"formats": formats(), "speed": speed(json.load(gpu_file)), "cpu": cpu(json.load(cpu_file))}
    for name, part in parts.items():
        pattern = rf"(<!-- {name}: [^>]*-->\n).*?(<!-- /{name} -->)"
        text, count = re.subn(
            pattern, lambda match, part=part: f"{match[1]}\n{part}\n\n{match[2]}", text, flags=re.DOTALL
        )
        assert count == 1, name
    README.write_text(text)


if __name__ == "__main__":
    main()
