"""The search: feasible and new candidates only, scored as views, the optimum found with fewer looks than at random, resumed."""

import json
import math
import random
from dataclasses import replace
from statistics import median

import pytest
import torch

from daekit.errors import UserError
from daekit.students.figure import search_svg
from daekit.students.importance import first_n, measure_importance, sort_teacher
from daekit.students.scorer import CandidateScorer
from daekit.students.search import Round, read_log, run_search
from daekit.students.selection import require_valid
from daekit.students.shapes import Shape, count_parameters
from daekit.students.slicing import slice_model, view_model
from daekit.students.space import Window, space_of
from daekit.students.strategies import crossed, draw, evolve, grid, mutated
from tests.helpers.student_cases import CONFIGS, VOCABULARY, first_units, rows, teacher

SPACES = [("coarse", "uniform"), ("coarse", "layerwise"), ("fine", "uniform"), ("fine", "layerwise")]


def space(case="mistral", granularity="coarse", units="layerwise", **options):
    config = CONFIGS[case]
    return space_of(config, first_n(config), granularity, units, **{"blocks": 4} | options)


def window(case, low=0.3, high=0.6):
    whole = count_parameters(CONFIGS[case])
    return Window(int(low * whole), int(high * whole))


def smooth(selection, tokens):
    """A score without a model: its best student keeps certain sizes and certain layers."""
    shape = selection.shape
    sizes = abs(shape.hidden_size - 36) / 12 + abs(shape.intermediate_size - 20) / 10 + abs(shape.num_key_value_heads - 2)
    return sizes + len(set(selection.layers) ^ {0, 2, 3}) + sum(map(sum, selection.neurons)) * 1e-5


def propose(strategy, space, count, score=smooth):
    """The first candidates of a strategy."""
    found, batch = [], next(strategy, None)
    while batch:
        found += batch
        if len(found) >= count:
            return found
        try:
            batch = strategy.send([score(space.selection(each), 0) for each in batch])
        except StopIteration:
            break
    return found


@pytest.mark.parametrize("case", ["llama", "qwen3", "gpt_neox-sequential"])
@pytest.mark.parametrize(("granularity", "units"), SPACES)
@pytest.mark.parametrize("kind", ["evolve", "draw"])
def test_all_that_is_proposed_is_feasible_and_new(case, granularity, units, kind):
    choices, limits = space(case, granularity, units), window(case, 0.2, 0.7)
    strategy = (
        evolve(choices, limits, 3, initial=16, offspring=8, elite_size=4) if kind == "evolve" else draw(choices, limits, 3)
    )
    found = propose(strategy, choices, 60)
    assert len(found) == len(set(found)) > 4
    for candidate in found:
        selection = choices.selection(candidate)
        require_valid(CONFIGS[case], selection)
        assert limits.holds(count_parameters(CONFIGS[case], selection.shape))
        assert choices.parameters(candidate) == count_parameters(CONFIGS[case], selection.shape)
    if granularity == "fine":
        assert len({candidate.layers for candidate in found if len(candidate.layers) == 3}) > 1
    else:
        assert all(candidate.hidden == tuple(range(len(candidate.hidden))) for candidate in found)
    if (granularity, units) == ("fine", "layerwise"):
        assert any(len(set(candidate.neurons)) > 1 for candidate in found)


def test_a_grid_is_everything_that_fits():
    choices, limits = space(), window("mistral")
    found = propose(grid(choices, limits, batch=7), choices, 10**6)
    shapes = [choices.shape(candidate) for candidate in found]
    assert shapes == choices.shapes(limits) and len(set(shapes)) == len(shapes)
    by_hand = 0
    for layers in range(1, 5):
        for hidden in (12, 24, 36, 48):
            for neurons in (10, 20, 30, 40):
                for groups in (1, 2, 3):
                    for queries in (1, 2):
                        attention = 2 * hidden * groups * queries * 16 + 2 * hidden * groups * 16
                        total = 2 * 40 * hidden + hidden + layers * (attention + 3 * hidden * neurons + 2 * hidden)
                        by_hand += limits.low <= total <= limits.high
    assert len(found) == by_hand > 50
    any_layers = replace(choices, any_layers=True)
    expected = sum(math.comb(4, shape.num_hidden_layers) for shape in shapes)
    assert len(set(propose(grid(any_layers, limits), any_layers, 10**6))) == expected


def test_both_ends_of_the_window_belong_to_it():
    choices = space()
    sizes = sorted({choices.parameters(each) for each in propose(grid(choices, Window(0, 10**9)), choices, 10**6)})
    found = {count_parameters(choices.config, shape) for shape in choices.shapes(Window(sizes[3], sizes[6]))}
    assert found == set(sizes[3:7])


def test_a_budget_that_nothing_meets_names_the_nearest_sizes():
    choices = space()
    sizes = sorted({choices.parameters(each) for each in propose(grid(choices, Window(0, 10**9)), choices, 10**6)})
    gap = max(range(len(sizes) - 1), key=lambda index: sizes[index + 1] - sizes[index])
    low, high = sizes[gap], sizes[gap + 1]
    with pytest.raises(UserError, match=rf"nearest sizes have {low:,} and {high:,}.*Widen the window"):
        next(evolve(choices, Window(low + 1, high - 1), 0))
    with pytest.raises(UserError, match=rf"nearest sizes have {sizes[0]:,} parameters|have {sizes[0]:,}"):
        next(draw(choices, Window(1, 2), 0))
    with pytest.raises(UserError, match="blocks=7: does not divide the teacher's hidden_size=48"):
        space(blocks=7)


def looks_until(strategy, choices, scores, optimum):
    """How many candidates a strategy looks at until the optimum is among them."""
    looked, batch = 0, next(strategy)
    while True:
        for candidate in batch:
            looked += 1
            if candidate == optimum:
                return looked
        batch = strategy.send([scores[candidate] for candidate in batch])


def test_evolution_finds_the_optimum_that_a_grid_proves_with_fewer_looks_than_random():
    """Scored by a real teacher, by KL."""
    model = teacher("mistral", initializer_range=0.08)
    importance = measure_importance(model, rows())
    sort_teacher(model, importance)
    choices = replace(space_of(model.config, importance, blocks=4), any_layers=True, queries=(2,))
    limits = window("mistral", 0.37, 0.55)
    scorer = CandidateScorer(model, rows(3, seed=9), vocab_size=VOCABULARY, tokens=30, objective="kl")
    everything = propose(grid(choices, limits), choices, 10**6)
    scores = {candidate: scorer(choices.selection(candidate), 30) for candidate in everything}
    optimum = min(scores, key=scores.__getitem__)
    settings = dict(initial=16, offspring=8, elite_size=6)
    evolved = [looks_until(evolve(choices, limits, seed, **settings), choices, scores, optimum) for seed in range(9)]
    drawn = [looks_until(draw(choices, limits, seed), choices, scores, optimum) for seed in range(9)]
    assert len(everything) > 90
    assert median(evolved) < 0.7 * median(drawn)


@pytest.mark.parametrize("case", ["llama", "mistral", "gpt_neox-sequential"])
def test_in_a_space_of_thousands_evolution_needs_a_small_part_of_the_looks(case):
    choices, limits = replace(space(case, blocks=8), any_layers=True), window(case, 0.3, 0.6)
    everything = propose(grid(choices, limits), choices, 10**6)
    best = random.Random(case).choice(everything)
    wanted = choices.shape(best)

    def distance(candidate):
        shape, off = choices.shape(candidate), 0.0
        for name in ("hidden_size", "intermediate_size", "num_key_value_heads", "num_attention_heads"):
            off += abs(getattr(shape, name) / getattr(wanted, name) - 1)
        return off + len(set(candidate.layers) ^ set(best.layers))

    scores = {candidate: distance(candidate) for candidate in everything}
    evolved = [looks_until(evolve(choices, limits, seed), choices, scores, best) for seed in range(9)]
    assert median(evolved) < 0.5 * len(everything) / 2  # random looks at half of it in the mean


def test_a_student_is_scored_as_the_slice_would_be():
    model = teacher("qwen3")
    choices, limits = space("qwen3", "fine"), window("qwen3")
    text = rows(5, seed=2)
    text[0]["labels"] = [-100] * 4 + text[0]["labels"][4:]
    candidates = propose(draw(choices, limits, 1), choices, 4)[:4]
    scorers = {
        kind: CandidateScorer(model, text, vocab_size=VOCABULARY, tokens=40, objective=kind) for kind in ("perplexity", "kl")
    }
    for selection in map(choices.selection, candidates):
        student = slice_model(model, selection)
        for by, scorer in scorers.items():
            for tokens in (1, 40):
                assert scorer(selection, tokens) == pytest.approx(plain_score(student, model, text, tokens, by), rel=1e-4)


def test_by_kl_the_teacher_runs_once_over_the_text():
    model = teacher("mistral")
    scorer = CandidateScorer(model, rows(5), vocab_size=VOCABULARY, tokens=40, objective="kl", batch_size=2)
    runs = []
    model.model.layers[0].register_forward_pre_hook(lambda module, inputs: runs.append(len(inputs[0])))
    choices = space()
    for candidate in propose(draw(choices, window("mistral"), 0), choices, 6)[:6]:
        scorer(choices.selection(candidate), 40)
    assert 3 <= sum(runs) <= 5  # rows, together
    assert scorer(first_units(model.config), 40) == 0.0


@torch.no_grad()
def plain_score(student, model, text, tokens, by):
    total, count = 0.0, 0
    for row in text:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        log_p = student(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        log_t = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        kept = labels != -100
        nll = -log_p[kept].gather(1, labels[kept, None])
        kl = (log_t[kept].exp() * (log_t[kept] - log_p[kept])).sum()
        total += float(nll.sum() if by == "perplexity" else kl)
        count += int(kept.sum())
        if count >= tokens:
            return total / count


@pytest.mark.parametrize("case", ["llama-biases-tied", "gpt_neox", "qwen2"])
def test_coarse_candidates_take_no_memory_for_weights(case):
    model = teacher(case)
    theirs = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    choices = replace(space(case), queries=(CONFIGS[case].num_attention_heads // space(case).own.num_key_value_heads,))
    smaller = 0
    for candidate in propose(draw(choices, window(case, 0.2, 0.8), 0), choices, 12)[:12]:
        view = view_model(model, choices.selection(candidate))
        own = [parameter for parameter in view.parameters() if parameter.untyped_storage().data_ptr() not in theirs]
        assert own == []
        smaller += sum(p.numel() for p in view.parameters()) < sum(p.numel() for p in model.parameters())
    assert smaller == 12


def test_text_that_is_too_short_is_refused_with_the_numbers():
    text = rows(3)
    tokens = sum(len(row["labels"]) - 1 for row in text)
    CandidateScorer(teacher("mistral"), text, vocab_size=VOCABULARY, tokens=tokens)
    with pytest.raises(UserError, match=rf"{tokens} tokens to score in 3 rows.*wants {tokens + 1}"):
        CandidateScorer(teacher("mistral"), text, vocab_size=VOCABULARY, tokens=tokens + 1)


STAGES = (Round(10, keep=0.5), Round(20, keep=0.25), Round(40))


def run(log=None, candidates=50, score=smooth, seed=1, rounds=STAGES, progress=None):
    choices = space(granularity="fine")
    strategy = evolve(choices, window("mistral"), seed, initial=16, offspring=8, elite_size=4)
    return run_search(
        choices, strategy, score, rounds, candidates=candidates, log=log, identity={"seed": seed}, progress=progress
    )


def test_survivors_of_a_look_are_its_best_and_only_they_see_more_text(tmp_path):
    calls = []

    def score(selection, tokens):
        calls.append(tokens)
        return smooth(selection, tokens) + random.Random(f"{selection.hidden}{tokens}").random()

    result = run(tmp_path / "log.jsonl", score=score)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()[1:]]
    assert calls == [line["tokens"] for line in lines]
    assert result.tokens == sum(calls) and result.candidates == 56
    first = lines[:26]  # the first batch: 16, half of them, a quarter of these
    assert [line["round"] for line in first] == [0] * 16 + [1] * 8 + [2] * 2
    for number, size in ((0, 8), (1, 2)):
        ranked = sorted((line for line in first if line["round"] == number), key=lambda line: line["score"])
        later = [line["candidate"] for line in first if line["round"] == number + 1]
        assert sorted(map(str, later)) == sorted(str(line["candidate"]) for line in ranked[:size])
    finals = [line["score"] for line in lines if line["round"] == 2]
    assert [scored.score for scored in result.finalists] == sorted(finals)
    assert result.best.score == min(finals)
    assert len(read_log(tmp_path / "log.jsonl")) == 56


def test_the_best_stay_parents(tmp_path):
    """Every child after the first generation is at most a few genes from one of the best so far."""
    result = run(candidates=400, rounds=(Round(10),))
    assert result.best.score < 0.6  # all sizes and layers right: next to nothing is left


@pytest.mark.parametrize("killed_at", [0, 1, 20, 37])
def test_a_killed_search_goes_on_to_the_same_result(killed_at, tmp_path):
    whole, log = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    expected = run(whole)
    count = 0

    def killed(selection, tokens):
        nonlocal count
        if count == killed_at:
            raise KeyboardInterrupt
        count += 1
        return smooth(selection, tokens)

    with pytest.raises(KeyboardInterrupt):
        run(log, score=killed)
    with log.open("a") as stream:
        stream.write('{"round": 0, "tok')  # the last line was being written
    asked = []
    result = run(log, score=lambda selection, tokens: asked.append(tokens) or smooth(selection, tokens))
    assert result.best == expected.best and result.finalists == expected.finalists and result.tokens == expected.tokens

    def without_time(path):
        return [{**json.loads(line), "seconds": 0} for line in path.read_text().splitlines()]

    assert without_time(log) == without_time(whole)
    assert len(asked) == len(without_time(whole)) - 1 - killed_at
    run(log, score=lambda *_: pytest.fail("a finished search scores nothing"))


def test_logs_of_other_searches_and_damaged_ones_are_refused(tmp_path):
    log = tmp_path / "log.jsonl"
    run(log)
    with pytest.raises(UserError, match=r"another search \(seed: 1 there, 2 here\)"):
        run(log, seed=2)
    with pytest.raises(UserError, match="rounds"):
        run(log, rounds=(Round(10),))
    lines = log.read_text().splitlines()
    log.write_text("\n".join([*lines[:3], lines[3][:20], *lines[4:]]) + "\n")
    with pytest.raises(UserError, match="line 4 is damaged"):
        run(log)


def test_progress_says_how_fast_and_what_is_best(tmp_path):
    lines = []
    run(tmp_path / "log", progress=lines.append)
    assert len(lines) == 6 and lines[-1].startswith("search 56/56")
    assert all("candidates/s" in line and "left" in line and "nats" in line and "parameters)" in line for line in lines)
    again = []
    run(tmp_path / "log", progress=again.append)
    assert "from the log" in again[0] and "candidates/s" not in again[0]


def test_a_space_that_is_used_up_ends_the_search():
    choices = replace(space(), layers=(2,), hidden=(24, 36), neurons=(20,), groups=(2, 3), queries=(2,))
    limits = Window(0, 10**9)
    for strategy in (
        evolve(choices, limits, 0, initial=2, offspring=2, elite_size=2),
        draw(choices, limits, 0),
        grid(choices, limits),
    ):
        assert run_search(choices, strategy, smooth, [Round(1)], candidates=1000).candidates == 4


def test_the_plot_shows_every_candidate(tmp_path):
    run(tmp_path / "log")
    svg = search_svg(read_log(tmp_path / "log")).svg
    for words in ("million parameters", "perplexity", "dropped out early", "best"):
        assert words in svg
    assert "KL to teacher" in search_svg(read_log(tmp_path / "log"), objective="kl").svg


@pytest.mark.parametrize("units", ["uniform", "layerwise"])
def test_one_change_may_be_another_part_of_the_same_number(units):
    choices, generator = space(granularity="fine", units=units), random.Random(0)
    before = choices.first(Shape(2, 24, 20, 2, 2, 16))
    changed = [mutated(choices, before, generator) for _ in range(300)]
    same_size = [each for each in changed if choices.shape(each) == choices.shape(before) and each != before]
    for name in ("layers", "hidden", "neurons", "groups"):
        alone = [each for each in same_size if replace(each, **{name: getattr(before, name)}) == before]
        assert alone, name
    assert {len(each.neurons) for each in changed} == ({1} if units == "uniform" else {1, 2, 3})


def test_what_a_layer_chose_goes_with_it_to_the_child():
    choices, generator = space(granularity="fine"), random.Random(0)
    one = replace(choices.first(Shape(2, 24, 20, 2, 2, 16)), layers=(0, 2), neurons=((0, 3), (1, 2)))
    other = replace(one, layers=(1, 2), neurons=((2, 3), (0, 2)))
    found = {(child.layers, child.neurons) for child in (crossed(choices, one, other, generator) for _ in range(200))}
    own, theirs = {(one.layers, one.neurons)}, {(other.layers, other.neurons)}
    mixed = {((0, 2), ((0, 1), (0, 2))), ((1, 2), ((0, 1), (1, 2)))}  # a layer that the other parent lacks: the first blocks
    assert found == own | theirs | mixed
