"""Survivors that are accepted, each with a reason."""

from pathlib import Path

FILE = Path(__file__).with_name("argued.toml")


def entries():
    """(module, function, text of the mutant) -> reason."""
    import tomllib  # Python 3.11

    found = {}
    for each in tomllib.loads(FILE.read_text("utf-8")).get("argued", []):
        for text in each["mutants"]:
            key = each["module"], each["function"], text
            if key in found:
                raise ValueError(f"argued twice: {key}")
            found[key] = each["reason"]
    return found
