"""What `numba-dequant bench` prints."""


def assert_measured(text, dtype, names):
    title, head, *rows = text.splitlines()
    assert f"to {dtype}" in title
    assert head.startswith("format")
    assert [row.split()[0] for row in rows] == names
    assert all(float(row.split()[1]) > 0 and "█" in row for row in rows)
