"""Batches are formed by rule, handed out until none is left, retried whole, and lost by nobody."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from xfuser.ray.batch.batches import Batch, Plan
from xfuser.ray.batch.prompts import Rejected
from xfuser.ray.batch.requests import Request
from xfuser.ray.batch.work import Task, Work


def request(index: int, steps: int = 50) -> Request:
    return Request(f"a{index}", index % 10, index, {"num_inference_steps": steps}, None, "p.jsonl", index + 1)


def plan_of(tmp_path: Path, requests: list[Request | Rejected], size: int = 4) -> Plan:
    Plan.write(tmp_path / "requests.jsonl", requests)
    return Plan(tmp_path / "requests.jsonl", size)


def batches(count: int, kinds: int = 1, size: int = 2) -> list[Batch]:
    return [Batch(n, n % kinds, tuple(range(n * size, n * size + size))) for n in range(count)]


def test_a_batch_is_of_one_kind_and_in_the_files_order(tmp_path: Path) -> None:
    steps = [50, 20, 50, 50, 20, 50, 50, 20, 50]
    plan = plan_of(tmp_path, [request(index, each) for index, each in enumerate(steps)])
    assert [each.members for each in plan.batches()] == [(0, 2, 3, 5), (1, 4, 7), (6, 8)]
    assert [each.number for each in plan.batches()] == [0, 1, 2]
    assert [each.id for each in plan.requests((7, 2))] == ["a7", "a2"]


def test_a_plan_is_the_same_again_and_another_for_other_requests(tmp_path: Path) -> None:
    first = plan_of(tmp_path, [request(index) for index in range(5)])
    assert plan_of(tmp_path, [request(index) for index in range(5)]).digest == first.digest
    assert plan_of(tmp_path, [request(index) for index in range(5)], size=2).digest != first.digest
    assert plan_of(tmp_path, [request(index) for index in range(6)]).digest != first.digest


def test_rejected_lines_are_no_requests(tmp_path: Path) -> None:
    bad = Rejected("p.jsonl", 2, "bad")
    assert Plan.write(tmp_path / "r.jsonl", [request(0), bad, request(1)]) == [bad]
    lines = (tmp_path / "r.jsonl").read_text().splitlines()
    assert [json.loads(each)["id"] for each in lines] == ["a0", "a1"]


def test_every_batch_is_handed_out_once() -> None:
    work = Work(batches(5), 3, learns=False)
    seen = []
    while (task := work.next()) is not None:
        seen.append(task.batch.number)
        work.done(task)
    assert seen == [0, 1, 2, 3, 4] and work.over


def test_what_has_failed_comes_first_again_and_whole() -> None:
    work = Work(batches(3), 3, learns=False)
    first = work.next()
    assert first is not None and work.failed(first) == ()
    again = work.next()
    assert again == Task(first.batch, attempt=2) and work.retries == 1


def test_a_batch_that_always_fails_is_tried_image_by_image() -> None:
    work = Work(batches(1, size=3), 2, learns=False)
    given_up: list[int] = []
    tries: list[tuple[tuple[int, ...], int]] = []
    while (task := work.next()) is not None:
        tries.append((task.batch.members, task.attempt))
        if 1 in task.batch.members:
            given_up += work.failed(task)
        else:
            work.done(task)
    assert given_up == [1] and work.over
    assert tries == [((0, 1, 2), 1), ((0, 1, 2), 2), ((0,), 3), ((1,), 3), ((1,), 4), ((2,), 3)]


def test_what_was_not_tried_is_handed_back() -> None:
    work = Work(batches(2), 1, learns=False)
    task = work.next()
    assert task is not None
    work.hand_back(task)
    assert work.next() == task and not work.over


def test_a_kind_is_learned_once_before_any_of_it_is_made() -> None:
    work = Work(batches(4, kinds=2), 3, learns=True)
    first, second = work.next(), work.next()
    assert first is not None and second is not None
    assert (first.learns, first.batch.kind, second.learns, second.batch.kind) == (True, 0, True, 1)
    assert work.next() is None and not work.over
    work.done(second)
    third = work.next()
    assert third is not None and not third.learns and third.batch.kind == 1
    work.done(first)
    rest = [work.next() for _ in range(3)]
    assert sorted(each.batch.number for each in rest if each) == [0, 2, 3]


def test_a_kind_that_was_learned_before_is_not_learned_again() -> None:
    work = Work(batches(2), 3, learns=True, known=[0])
    task = work.next()
    assert task is not None and not task.learns


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_lost_and_nothing_made_twice_whatever_fails(seed: int) -> None:
    """Random failures, hand-backs and orders of answers: each request is made once, or given up."""
    dice = random.Random(seed)
    work = Work(batches(12, kinds=3, size=3), 2, learns=bool(seed % 2))
    given: list[Task] = []
    made: list[int] = []
    given_up: list[int] = []
    for _ in range(10_000):
        if work.over:
            break
        task = work.next()
        if task is not None:
            given.append(task)
        if given and (task is None or dice.random() < 0.5):
            answered = given.pop(dice.randrange(len(given)))
            fate = dice.random()
            if fate < 0.15:
                work.hand_back(answered)
            elif fate < 0.4 and not answered.learns:
                given_up += work.failed(answered)
            else:
                work.done(answered)
                made += () if answered.learns else answered.batch.members
    assert work.over and sorted(made + given_up) == list(range(36))
