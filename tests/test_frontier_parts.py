"""Goals, dominance and hypervolume, the space of recipes, the choice of what to train."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

import pytest

from leanformers.errors import LeanError
from leanformers.frontier import Goal, Space, dominates, hypervolume, non_dominated, parse, parse_all
from leanformers.frontier.goals import objectives, relative
from leanformers.frontier.pareto import spread
from leanformers.frontier.select import Candidate, next_to_train, predicted, regained
from leanformers.frontier.space import name_of, trained_prefix
from leanformers.methods import Choice, Range, base, get, method


# -- goals ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "metric", "value", "relative"),
    [
        ("latency<=0.5x", "latency", 0.5, True),
        ("quality >= 0.99x", "quality", 0.99, True),
        ("quality>=.85", "quality", 0.85, False),
        ("bytes<=120MB", "bytes", 120e6, False),
        ("bytes <= 64 MiB", "bytes", 64 * 2**20, False),
        ("memory≤1e9", "memory", 1e9, False),
        ("latency<=5ms", "latency", 0.005, False),
        ("parameters<=10M", "parameters", 10e6, False),
        ("FLOPS<=0.3×", "flops", 0.3, True),
    ],
)
def test_goals_are_read(text, metric, value, relative):
    goal = parse(text)
    assert (goal.metric, goal.relative) == (metric, relative)
    assert goal.value == pytest.approx(value)
    assert parse(goal.text) == goal


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "cannot be read"),
        ("fast", "cannot be read"),
        ("latency<0.5x", "cannot be read"),
        ("latency<=half", "cannot be read"),
        ("speed<=0.5x", "names no metric"),
        ("latency>=2x", "takes <="),
        ("quality<=0.9x", "takes >="),
        ("bytes<=3ms", "unit 'ms'"),
        ("latency<=0x", "above 0"),
        ("latency<=-1x", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_goals_that_make_no_sense_are_refused(text, word):
    with pytest.raises(LeanError, match=word) as caught:
        parse(text)
    if word == "cannot be read":
        assert "METRIC<=NUMBER" in str(caught.value)


def test_goals_are_met_by_ratio_or_value():
    assert parse("latency<=0.5x").met({}, {"latency": 0.5})
    assert not parse("latency<=0.5x").met({}, {})
    assert parse("bytes<=1kB").met({"bytes": 1000}, {"bytes": 2.0})
    assert parse("quality<=1.0", better="lower").met({"quality": 0.9}, {})
    assert parse("latency<=0.5x").excess({}, {"latency": 0.6}) == pytest.approx(0.2)
    assert [goal.metric for goal in parse_all("latency<=1x, quality>=0.9x")] == ["latency", "quality"]
    assert objectives(parse_all(["bytes<=1x", "quality>=1x"])) == ("quality", "bytes")
    assert objectives([]) == ("quality", "latency", "bytes")
    assert relative(parse("quality>=0.8"), 0.9, "higher").value == pytest.approx(0.8 / 0.9)
    assert relative(parse("quality<=1.2", "lower"), 1.0, "lower").value == pytest.approx(1 / 1.2)
    assert relative(parse("bytes<=1kB"), 0.9, "higher") == parse("bytes<=1kB")


# -- dominance ------------------------------------------------------------------------------------------
def test_hypervolume_of_known_shapes():
    assert hypervolume([], (1, 1)) == 0
    assert hypervolume([(0.25,)], (1,)) == 0.75
    assert hypervolume([(0, 0)], (1, 1)) == 1
    assert hypervolume([(0, 0.5), (0.5, 0)], (1, 1)) == pytest.approx(0.75)
    assert hypervolume([(0, 0, 0)], (2, 2, 2)) == 8
    # Three unit-thick slabs that overlap pairwise in a bar and all in a cube.
    points = [(0, 0.5, 0.5), (0.5, 0, 0.5), (0.5, 0.5, 0)]
    assert hypervolume(points, (1, 1, 1)) == pytest.approx(3 * 0.25 - 2 * 0.125)
    assert hypervolume([(2, 0), (1, 0)], (1, 1)) == 0  # outside the corner


@pytest.mark.parametrize("size", [2, 3, 4])
def test_hypervolume_equals_inclusion_and_exclusion(size):
    rng = random.Random(size)
    corner = [1.0] * size
    for _ in range(20):
        points = [[rng.choice([0, 0.25, 0.5, 0.75, 1.1]) for _ in range(size)] for _ in range(5)]
        expected = 0.0
        for count in range(1, len(points) + 1):
            for chosen in itertools.combinations(points, count):
                box = 1.0
                for values in zip(*chosen, strict=True):
                    box *= max(0.0, 1 - max(values))
                expected += box if count % 2 else -box
        assert hypervolume(points, corner) == pytest.approx(expected)
        front = [points[i] for i in non_dominated(points)]
        assert hypervolume(front, corner) == pytest.approx(expected)


def test_non_dominated_and_spread():
    points = [(1, 4), (2, 2), (4, 1), (3, 3), (2, 2)]
    assert dominates((1, 1), (1, 2)) and not dominates((1, 1), (1, 1))
    assert non_dominated(points) == [0, 1, 2]
    assert spread(points, 2, (5, 5))[0] == 1
    assert set(spread(points, 9, (5, 5))) == {0, 1, 2}
    assert spread(points, 9, (1, 1)) == []


# -- the space ------------------------------------------------------------------------------------------
@pytest.fixture
def space(monkeypatch):
    monkeypatch.setattr(base, "_registry", {})
    monkeypatch.setattr("leanformers.methods._registry", base._registry)
    for slug, stage, order, trains, drawn, starts in [
        ("cut-words", "vocabulary", 0, False, {"keep": Range(0.1, 0.9)}, [{"keep": 0.3}]),
        ("drop", "structure", 0, False, {"layers": Range(1, 4)}, [{"layers": 2}, {"layers": 3}]),
        ("thin", "structure", 1, False, {"rank": Range(0.1, 0.9, log=True)}, [{"rank": 0.5}]),
        ("teach", "recover", 0, True, {}, [{}]),
        ("round", "quantise", 0, False, {"only": Choice([["a"], None])}, [{}]),
        ("tune", "prepare", 0, True, {}, [{}]),
    ]:
        fields = dict.fromkeys(drawn)
        cls = type(slug, (), {"__annotations__": dict.fromkeys(fields, object), **fields})
        cls.space = classmethod(lambda cls, drawn=drawn: drawn)
        cls.starts = classmethod(lambda cls, starts=starts: starts)
        method(slug, stage=stage, order=order, trains=trains)(dataclass(frozen=True)(cls))
    return Space([get(slug) for slug in ("round", "teach", "thin", "drop", "cut-words", "tune")])


def test_recipes_are_drawn_in_order_and_can_be_written_back(space):
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    order = ["cut-words", "drop", "thin", "teach", "round"]
    seen = set()
    for _ in range(200):
        steps = space.suggest(study.ask())
        slugs = [step["method"] for step in steps]
        assert slugs == sorted(set(slugs), key=order.index)
        assert "teach" not in slugs or {"drop", "thin"} & set(slugs)
        seen.add(tuple(slugs))
        study.enqueue_trial(space.params(steps))
        again = space.suggest(study.ask())
        assert again == steps
    assert len(seen) > 15


def test_widths_are_rounded_to_what_the_runtimes_store_where_a_method_can():
    from leanformers.deploy import width_multiple

    assert width_multiple(["openvino-int8", "torch"]) == 1
    assert width_multiple(["llama.cpp", "llama.cpp-q8_0"]) == 32
    assert width_multiple(["llama.cpp-q4_k_m", "llama.cpp-q8_0"]) == 256
    plain, rounded = (Space([get("optin"), get("drop-layers")], multiple=m) for m in (1, 256))
    assert plain.digest != rounded.digest
    assert not any("multiple" in step for steps in plain.starts() for step in steps)
    for steps in rounded.starts():
        assert all(step.get("multiple") == (256 if step["method"] == "optin" else None) for step in steps)


def test_starts_are_legal_and_the_useful_come_first(space):
    starts = space.starts()
    slugs = [[step["method"] for step in steps] for steps in starts]
    assert slugs[0] == ["cut-words", "round"]
    assert slugs[1] == ["drop", "teach"] and slugs[2] == ["cut-words", "drop", "teach", "round"]
    assert len(starts) == len({str(steps) for steps in starts})
    assert trained_prefix(space.infos, starts[2]) == 3 and trained_prefix(space.infos, starts[0]) == 0
    assert name_of(starts[1], "abcdef") == "drop+teach-abcd"
    assert space.digest == Space(list(space.infos.values())).digest
    assert space.digest != Space([space.infos["drop"]]).digest


def test_where_the_runtime_quantises_a_recipe_that_does_comes_last(space):
    from leanformers.deploy import quantises

    assert quantises("onnxruntime-int8") and quantises("llama.cpp-q4_k_m")
    assert not any(map(quantises, ("torch", "torch-compile", "openvino", "llama.cpp")))
    starts = Space(list(space.infos.values()), quantised=True).starts()
    slugs = [[step["method"] for step in steps] for steps in starts]
    assert [steps for steps in slugs if "round" in steps] == slugs[-1:] == [["round"]]
    assert slugs[0] == ["cut-words"] and ["cut-words", "drop", "teach"] in slugs


# -- the choice ------------------------------------------------------------------------------------------
def candidate(key, quality, latency, size, trains=True, **more):
    ratios = {"quality": quality, "latency": latency, "bytes": size}
    return Candidate(key=key, steps=[], quality=quality, ratios=ratios, measurement={}, trains=trains, **more)


GOALS = parse_all(["latency<=0.6x", "bytes<=0.3x", "quality>=0.98x"])
OBJECTIVES = ("quality", "latency", "bytes")


def test_the_first_training_goes_to_what_meets_all_goals():
    field = [
        candidate("a", 0.95, 0.55, 0.7),
        candidate("b", 0.93, 0.55, 0.25),
        candidate("c", 0.99, 0.9, 0.9),
    ]
    assert next_to_train(field, GOALS, OBJECTIVES).key == "b"


def test_each_goal_gets_its_turn_and_misses_are_learnt_from():
    missed = candidate("b", 0.90, 0.3, 0.25, full=0.92)
    slow = candidate("s", 0.99, 1.0, 0.25, trains=False)  # meets the goal on bytes
    quick = [candidate("q", 0.94, 0.55, 0.7), candidate("r", 0.90, 0.5, 0.7)]
    assert next_to_train([missed, slow, *quick], GOALS, OBJECTIVES).key == "q"
    assert regained([missed]) == pytest.approx(0.2)
    assert predicted(quick[0], 0.2) == pytest.approx(0.952)
    # Nothing is left that promises anything: what was tried dominates it.
    done = candidate("q", 0.94, 0.55, 0.7, full=0.985)
    worse = candidate("w", 0.80, 0.6, 0.8)
    assert next_to_train([slow, done, worse], GOALS, OBJECTIVES) is None


def test_what_runs_elsewhere_failed_or_takes_too_long_is_left():
    field = [
        candidate("a", 0.95, 0.5, 0.2, in_hand=True),
        candidate("b", 0.95, 0.5, 0.2, failed=True),
        candidate("c", 0.96, 0.4, 0.2, seconds=500.0),
    ]
    assert next_to_train(field, GOALS, OBJECTIVES, seconds_left=100) is None
    assert next_to_train(field, GOALS, OBJECTIVES, seconds_left=900).key == "c"
    assert isinstance(GOALS[0], Goal)


def test_without_goals_the_widest_frontier_is_sought():
    kept = candidate("k", 0.99, 1.0, 0.3, trains=False)
    field = [candidate("near", 0.985, 0.98, 0.3), candidate("far", 0.96, 0.4, 0.6)]
    assert next_to_train([kept, *field], (), OBJECTIVES).key == "far"


# -- a point in another runtime ---------------------------------------------------------------------------------


def test_names_in_other_runtimes():
    from leanformers.frontier.deployed import is_deployed, named, source_of

    name = named("drop-1", "openvino-int8")
    assert name == "drop-1@openvino-int8" and source_of(name) == "drop-1" and is_deployed(name)
    assert source_of("drop-1") == "drop-1" and not is_deployed("drop-1")


@pytest.mark.parametrize(("goal", "own", "drop"), [(0.99, 1.1, 0.1), (0.99, 0.99, None), (0.99, 0.9, None)])
def test_what_a_number_format_may_cost_a_point(goal, own, drop):
    """What lies between the point's quality and the goal's, as a share of the point's."""
    from leanformers.frontier.bench import may_lose

    assert may_lose(goal, own) == (None if drop is None else pytest.approx(drop))
