"""Loads in groups: the order of results, where progress is reported, errors, and early ends."""

import threading
import time

import pytest

from numba_dequant.loading.groups import GroupsOfGenerator


def numbers(count, on_bytes_read, fails_at=None):
    for number in range(count):
        if number == fails_at:
            raise OSError("the disk has failed")
        on_bytes_read(number)
        yield number


def groups_of(results, ends, on_bytes_read=lambda n_bytes: None, *, has_thread=True):
    return GroupsOfGenerator(results, ends, on_bytes_read, has_thread=has_thread)


@pytest.mark.parametrize("has_thread", [True, False])
@pytest.mark.parametrize("ahead", [1, 2, 4])
def test_groups_come_in_order(has_thread, ahead):
    reports = []

    def report(n_bytes):
        reports.append((n_bytes, threading.current_thread()))

    groups = groups_of(lambda count: numbers(7, count), [2, 2, 5, 7], report, has_thread=has_thread)
    found = []
    for _ in range(ahead):
        groups.begin()
    for number in range(4):
        found.append(groups.finish())
        if number + ahead < 4:
            groups.begin()
    groups.close()
    assert found == [[0, 1], [], [2, 3, 4], [5, 6]]
    assert {thread for _, thread in reports} == {threading.current_thread()}
    assert [n_bytes for n_bytes, _ in reports] == sorted(n_bytes for n_bytes, _ in reports)
    assert reports[-1][0] == 6


@pytest.mark.parametrize("has_thread", [True, False])
def test_an_error_comes_with_its_group(has_thread):
    groups = groups_of(lambda count: numbers(4, count, fails_at=3), [2, 4], has_thread=has_thread)
    groups.begin()
    groups.begin()
    assert groups.finish() == [0, 1]
    with pytest.raises(OSError, match="the disk has failed"):
        groups.finish()
    groups.close()


@pytest.mark.parametrize("n_begun", [0, 1])
def test_a_thread_that_reads_ends_when_the_groups_are_closed(n_begun):
    ended = threading.Event()

    def endless(count):
        try:
            while True:
                count(1)
                time.sleep(0.001)
            yield
        finally:
            ended.set()

    groups = groups_of(endless, [1])
    for _ in range(n_begun):
        groups.begin()
    if n_begun:
        time.sleep(0.05)
    groups.close()
    assert ended.is_set() == bool(n_begun)
    assert not [each for each in threading.enumerate() if each.name.startswith("numba_dequant load")]
