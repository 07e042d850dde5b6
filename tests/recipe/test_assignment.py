import itertools
import math

import numpy as np
import pytest

from epic_quant.errors import RecipeError
from epic_quant.recipe.assignment import BY, Problem
from epic_quant.recipe.program import MAX_GAP, Option, assign
from epic_quant.spec import BF16, KVSpec, PLESpec, PolicySpec, Target, TensorClass, recipe_name

from .conftest import BITS, NUMEL, PARTS, make_prices

WEIGHTS = sum(NUMEL.values())
TABLE = Target(TensorClass.PLE_TABLE)


def problem(prices, by="tensor", **fields):
    return Problem(prices, PARTS, PLESpec("lru", 5000), by, **fields)


def resident_nbytes(policy):
    """The bytes in RAM under a policy, of which the PLE table's are those of a quarter of its rows."""
    total = PARTS["norms"]
    for target, numel in NUMEL.items():
        nbytes = numel * {"bf16": 16, **BITS}[str(policy.spec_of(target))] / 8
        total += nbytes / 4 if target == TABLE else nbytes
    return total + (
        PARTS["kv_cache"] if policy.kv.is_plain else 3 * 4000 * {"int8": 8.25, "int4": 4.25}[policy.kv.name] / 8
    )


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("budget", [60_000, 100_000, 150_000])
def test_a_recipe_within_resident_bytes_says_its_bytes_and_its_divergence(budget, by, prices):
    recipe = problem(prices, by).within_resident(budget)
    assert recipe.resident_nbytes <= budget
    assert recipe.resident_nbytes == pytest.approx(resident_nbytes(recipe.policy), abs=1)
    prediction = prices.predict(recipe.policy)
    assert recipe.predicted == pytest.approx(prediction.kl_divergence, rel=1e-5)
    # What `alone` leaves out are the cross terms between units; those of tensors in a unit are part of it.
    if by == "tensor" and recipe.policy.kv.is_plain:
        assert recipe.alone == pytest.approx(prediction.alone, rel=1e-5)
    assert recipe.policy.ple == PLESpec("lru", 5000)
    assert recipe.policy.name == recipe_name(recipe.resident_nbytes)
    assert PolicySpec.parse(str(recipe.policy)) == recipe.policy


@pytest.mark.parametrize("bits", [1.8, 3.0, 4.2, 8.0])
def test_a_recipe_within_bits_keeps_to_them_and_leaves_k_and_v(bits, prices):
    recipe = problem(prices).within_bits(bits)
    stored = prices.nbytes(recipe.policy)
    assert recipe.nbytes == stored <= bits * WEIGHTS / 8
    assert recipe.bits_per_weight == pytest.approx(8 * stored / WEIGHTS)
    assert recipe.policy.kv == KVSpec()


def test_a_recipe_for_gguf_counts_whole_tables_norms_in_fp32_and_what_is_kept(prices):
    keep = frozenset({"embedding"})
    recipe = problem(prices, keep=keep).within_gguf(90_000)
    assert prices.nbytes(recipe.policy) + 2 * PARTS["norms"] < 90_000
    assert recipe.policy.class_spec(TensorClass.EMBEDDING) == BF16


@pytest.mark.parametrize("bits", [2.0, 3.0, 5.0])
def test_a_finer_choice_never_costs_more_where_tensors_do_not_share_errors(bits):
    """One spec a tensor can be that of its class, so its least sum of prices is no larger."""
    prices = orthogonal(make_prices(common=0.0))
    found = {by: problem(prices, by).within_bits(bits).alone for by in BY}
    for finer, coarser in (("tensor", "layer"), ("tensor", "kind"), ("layer", "class"), ("kind", "class")):
        assert found[finer] <= found[coarser] * (1 + 1e-6)
    assert found["tensor"] < found["class"]


def orthogonal(prices):
    """The same prices with every tensor's derivatives at tokens of its own, so that there are no cross terms."""
    tensors = []
    for index, priced in enumerate(prices.tensors):
        derivatives = np.zeros_like(priced.derivatives)
        at = np.arange(index, derivatives.shape[1], len(prices.tensors))
        derivatives[:, at] = priced.derivatives[:, at]
        tensors.append(type(priced)(**{**vars(priced), "derivatives": derivatives}))
    return type(prices)(tuple(tensors), (), prices.num_predicted, prices.facts)


@pytest.mark.parametrize("by", BY)
def test_what_shares_a_unit_shares_a_spec(by, prices):
    policy = problem(prices, by).within_bits(3).policy
    grouped = {}
    for target in NUMEL:
        key = {
            "tensor": target,
            "layer": (target.tensor_class, target.layer),
            "kind": (target.tensor_class, target.kind),
            "class": target.tensor_class,
        }[by]
        grouped.setdefault(key, set()).add(policy.spec_of(target))
    assert all(len(specs) == 1 for specs in grouped.values())


def test_candidates_of_a_unit_are_those_that_all_its_tensors_have(prices):
    first, *others = prices.tensors
    fewer = type(first)(
        **{**vars(first), "candidates": first.candidates[:1], "nbytes": first.nbytes[:1]}
        | {"derivatives": first.derivatives[:1]}
    )
    units = problem(type(prices)((fewer, *others), (), prices.num_predicted), "class").units
    choices = {unit.name: [str(choice.spec) for choice in unit.choices] for unit in units}
    assert choices["sliding_attention"] == ["bf16", "int8-g128"]
    assert choices["mlp"] == ["bf16", *BITS]


def test_bytes_of_the_table_are_those_of_its_resident_rows(prices):
    unit = next(unit for unit in problem(prices).units if unit.name == "ple_table")
    for choice in unit.choices:
        assert choice.resident_nbytes == math.ceil(choice.nbytes / 4)


@pytest.mark.parametrize("by", BY)
def test_what_is_kept_stays_in_bf16_and_counts(by, prices):
    recipe = problem(prices, by, keep=frozenset({"mlp", "kv_cache"})).within_resident(130_000)
    assert all(recipe.policy.spec_of(target) == BF16 for target in NUMEL if target.tensor_class is TensorClass.MLP)
    assert recipe.policy.kv.is_plain
    assert recipe.resident_nbytes == pytest.approx(resident_nbytes(recipe.policy), abs=1)


def test_everything_can_be_kept(prices):
    keep = frozenset(target.tensor_class.value for target in NUMEL)
    recipe = problem(prices, keep=keep).within_bits(4)
    assert (recipe.policy, recipe.predicted) == (PolicySpec.of("", ple="lru:5000"), 0)
    assert recipe.resident_nbytes == sum(PARTS.values())


def test_k_and_v_get_one_spec_within_resident_bytes(prices):
    recipe = problem(prices).within_resident(60_000)
    assert not recipe.policy.kv.is_plain
    assert recipe.policy.kv_layers == ()


@pytest.mark.parametrize(
    ("make", "least"),
    [
        # All at 1.75 bits, a quarter of the table's rows, K and V at 4.25.
        (
            lambda problem, budget: problem.within_resident(budget),
            PARTS["norms"] + (WEIGHTS - NUMEL[TABLE] * 3 / 4) * 1.75 / 8 + 3 * 4000 * 4.25 / 8,
        ),
        (lambda problem, budget: problem.within_gguf(budget), 4096 + 2 * PARTS["norms"] + WEIGHTS * 1.75 / 8),
    ],
    ids=["resident", "gguf"],
)
def test_a_budget_below_the_least_is_refused_with_the_least(make, least, prices):
    with pytest.raises(RecipeError, match=f"9 bytes is too small: these specs need {round(least):,} at least"):
        make(problem(prices), 9)
    assert make(problem(prices), round(least)) is not None
    with pytest.raises(RecipeError, match="too small"):
        make(problem(prices), round(least) - 1)


def test_too_few_bits_are_refused_with_the_least(prices):
    with pytest.raises(RecipeError, match=r"1\.7 bits a weight are too few: these specs need 1\.75 at least"):
        problem(prices).within_bits(1.7)
    assert problem(prices).within_bits(1.75).bits_per_weight == 1.75


def test_an_unknown_class_to_keep_is_refused_with_similar_names(prices):
    with pytest.raises(RecipeError, match="unknown tensor class to keep 'mpl'; did you mean mlp"):
        problem(prices, keep=frozenset({"mpl"}))


def test_without_prices_there_is_no_recipe(prices):
    with pytest.raises(RecipeError, match="no prices"):
        problem(type(prices)((), (), 1))


def test_the_choice_is_the_best_of_all_where_all_can_be_tried(prices):
    """On four tensors: no assignment of these bytes has a smaller sum of prices."""
    few = type(prices)(prices.tensors[:4], (), prices.num_predicted)
    numel = sum(priced.numel for priced in few.tensors)
    recipe = Problem(orthogonal(few), PARTS).within_bits(4)
    every = itertools.product(
        *([(16, 0.0), *zip(BITS.values(), costs, strict=True)] for costs in own_prices(orthogonal(few)))
    )
    sizes = [priced.numel for priced in few.tensors]
    fitting = (
        sum(price for _, price in chosen)
        for chosen in every
        if sum(bits * size for (bits, _), size in zip(chosen, sizes, strict=True)) <= 4 * numel
    )
    assert recipe.alone == pytest.approx(min(fitting), rel=1e-6)


def own_prices(prices):
    return [[prices.price(priced, candidate)[0] for candidate in priced.candidates] for priced in prices.tensors]


def test_three_hundred_tensors_with_fifteen_specs_are_solved_near_the_dual_bound():
    rng = np.random.default_rng(0)
    bits = {f"int{2 + index % 7}-g{2 ** (1 + index // 7)}": 1.6 + 0.45 * index for index in range(15)}
    kinds = [(TensorClass.MLP, kind) for kind in ("gate_proj", "up_proj", "down_proj")]
    kinds += [(TensorClass.SLIDING_ATTENTION, kind) for kind in ("q_proj", "k_proj", "v_proj", "o_proj")]
    numel = {
        Target(tensor_class, kind, layer): int(rng.choice([26_214_400, 5_242_880, 1_310_720]))
        for layer in range(43)
        for tensor_class, kind in kinds
    }
    prices = make_prices(0, bits, numel, common=0.5)
    assert len(prices.tensors) > 300
    recipe = Problem(prices, {"norms": 1e6}).within_bits(4.2)
    # The best sum of prices is no worse than the proved gap, and near the dual bound of the relaxed problem.
    units = Problem(prices, {"norms": 1e6}).units
    options = [[Option(choice.nbytes, prices.cost(choice.derivatives)[0]) for choice in unit.choices] for unit in units]
    budget = int(4.2 * sum(numel.values()) / 8)
    chosen, gap = assign(options, budget)
    best = sum(options[unit][index].loss for unit, index in enumerate(chosen))
    assert gap <= MAX_GAP
    assert recipe.gap == gap
    assert sum(options[unit][index].cost for unit, index in enumerate(chosen)) <= budget
    bound = dual_bound(options, budget)
    assert bound * (1 - 1e-9) <= best <= bound * 1.001
    assert recipe.predicted <= prices.predict(recipe.policy).kl_divergence * (1 + 1e-5)


def dual_bound(options, budget):
    """The largest of the Lagrangian's minima over the price of a byte: no assignment loses less."""
    costs = np.array([[option.cost for option in unit] for unit in options], dtype=float)
    losses = np.array([[option.loss for option in unit] for unit in options])
    low, high = 0.0, losses.max() / costs.min()
    for _ in range(200):
        middle = (low + high) / 2
        chosen = (losses + middle * costs).argmin(axis=1)
        low, high = (middle, high) if costs[np.arange(len(costs)), chosen].sum() > budget else (low, middle)
    return (losses + high * costs).min(axis=1).sum() - high * budget
