"""Dictionaries trained by hand, the sparse features that they should find, and their scores."""

import math

import pytest
import torch

from experiments.common import Trainings
from experiments.dictionaries.features import (
    N_CHILDREN,
    PAIRED,
    WORLDS,
    SparseFeatures,
    dictionary_jobs,
    known_features,
    noise_like,
    trained_dictionaries,
)
from experiments.dictionaries.measure import (
    active_per_text,
    describe_absorption,
    describe_fit,
    describe_recovery,
    explained_variance,
    feature_cosines,
    mean_slope,
    principal_components,
    recovered_by_frequency,
)
from experiments.dictionaries.model import (
    KERNEL_WIDTH,
    KINDS,
    PURPOSES,
    DictionaryRecipe,
    ReluL1,
    Scale,
    fit_dictionary,
    seed_for,
    unit_rows,
    wake_dead_,
)
from optim import AdamW
from utils import UserError, seeded_generator

SPARSITY = {"ReLU + L1": 0.3, "TopK": 3, "BatchTopK": 3, "JumpReLU": 0.05, "Matryoshka": 3}


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=seeded_generator(seed))


def recipe_of(kind, n_latents=16, steps=60, batch=32, **more):
    return DictionaryRecipe(kind, SPARSITY[kind], n_latents, steps, batch, **more)


def busy_dictionary(kind, d_in=6, d_out=5, n_latents=16):
    """A dictionary in which no parameter is 0 and no feature has length 1."""
    dictionary = recipe_of(kind, n_latents).fresh(d_in, d_out, seeded_generator(1))
    with torch.no_grad():
        for number, tensor in enumerate(dictionary.parameters()):
            tensor.add_(0.3 * drawn(*tensor.shape, seed=number))
    return dictionary


# The features


@pytest.mark.parametrize("world", WORLDS)
def test_each_feature_is_there_as_often_as_its_chance_says(world):
    features = SparseFeatures.draw_directions(world, 32, 8, 0.05, seed=0)
    x, values = features.draw(40_000, seeded_generator(1))

    share = (values > 0).double().mean(0)
    spread = (features.chances * (1 - features.chances) / 40_000).sqrt()

    assert (share - features.chances).abs().max() < 5 * spread.max()
    assert features.chances.mean() == pytest.approx(0.05)
    torch.testing.assert_close(x, values @ features.directions)
    torch.testing.assert_close(features.directions.norm(dim=1), torch.ones(32))


def test_in_the_world_zipf_the_third_feature_is_a_third_as_frequent_as_the_first():
    chances = SparseFeatures.draw_directions("zipf", 32, 8, 0.05, seed=0).chances

    torch.testing.assert_close(chances[0] / chances[[1, 2, 31]], torch.tensor([2.0, 3.0, 32.0]))


def test_paired_features_occur_together_as_often_as_they_should():
    features = SparseFeatures.draw_directions("pairs", 8, 4, 0.1, seed=0)
    is_there = features.draw(40_000, seeded_generator(1))[1] > 0

    with_first = is_there[:, 1][is_there[:, 0]].double().mean()
    of_strangers = is_there[:, 2][is_there[:, 0]].double().mean()

    assert with_first == pytest.approx(PAIRED, abs=0.03)
    assert of_strangers == pytest.approx(0.1, abs=0.03)


def test_a_child_is_never_without_its_parent_nor_with_a_sibling():
    features = SparseFeatures.draw_directions("hierarchy", 16, 8, 0.1, seed=0)
    is_there = features.draw(20_000, seeded_generator(1))[1] > 0
    parent, *children = features.families[1].tolist()

    n_children = is_there[:, children].sum(1)

    assert (is_there[:, parent] | (n_children == 0)).all()
    assert n_children.max() == 1
    alone = (n_children[is_there[:, parent]] == 0).double().mean()
    assert alone == pytest.approx(1 / (1 + N_CHILDREN), abs=0.02)


# The gradient


def naive_loss(dictionary, kind, x, target):
    """The loss as it is written in papers, for autograd."""
    pre = x @ dictionary.W_enc + dictionary.b_enc
    if kind == "ReLU + L1":
        z = pre.relu()
    elif kind == "JumpReLU":
        z = pre * (pre > dictionary.log_threshold.detach().exp())
    elif kind == "TopK":
        z = pre.relu() * (pre >= pre.sort(-1).values[:, -SPARSITY[kind]][:, None])
    else:
        z = pre.relu() * (pre >= pre.flatten().sort().values[-SPARSITY[kind] * len(x)])

    errors = []
    for end in dictionary.prefixes:
        written = z[:, :end] @ dictionary.W_dec[:end] + dictionary.b_dec
        errors.append((written - target).square().sum(-1).mean())
    loss = sum(errors) / len(errors)
    if kind == "ReLU + L1":
        loss = loss + dictionary.sparsity * z.sum(-1).mean()
    return loss, z


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_by_hand_equals_that_of_autograd(kind):
    dictionary = busy_dictionary(kind)
    x, target = drawn(32, 6, seed=2), drawn(32, 5, seed=3)

    loss, z = naive_loss(dictionary, kind, x, target)
    names = ("W_enc", "b_enc", "W_dec", "b_dec")
    expected = torch.autograd.grad(loss, [dictionary.tensors()[name] for name in names])
    by_hand = dictionary.backward_(x, target)

    torch.testing.assert_close(by_hand, z.detach())
    for name, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(dictionary.tensors()[name].grad, gradient, msg=name)


def test_a_threshold_learns_only_from_activations_near_it():
    dictionary = busy_dictionary("JumpReLU")
    x, target = drawn(32, 6, seed=2), drawn(32, 5, seed=3)
    dictionary.backward_(x, target)

    pre = (x @ dictionary.W_enc + dictionary.b_enc).detach()
    threshold = dictionary.log_threshold.detach().exp()
    z = torch.where(pre > threshold, pre, 0.0)
    error = z @ dictionary.W_dec.detach() + dictionary.b_dec.detach() - target
    expected = torch.zeros(16)
    n_near = 0
    for text in range(32):
        for latent in range(16):
            if (pre[text, latent] - threshold[latent]).abs() >= KERNEL_WIDTH / 2:
                continue
            n_near += 1
            blame = 2 * error[text] @ dictionary.W_dec.detach()[latent]
            slope = -(threshold[latent] * blame + dictionary.sparsity) / KERNEL_WIDTH
            expected[latent] += slope * threshold[latent] / 32

    assert n_near > 3
    torch.testing.assert_close(dictionary.log_threshold.grad, expected, rtol=1e-4, atol=1e-6)


# What is active


def test_top_k_keeps_k_latents_of_each_text_and_batch_top_k_keeps_k_on_average():
    pre = drawn(50, 16).abs() * torch.linspace(0.1, 2, 50)[:, None]

    of_each = busy_dictionary("TopK").activate(pre)
    of_batch = busy_dictionary("BatchTopK").activate(pre, training=True)

    assert ((of_each > 0).sum(1) == 3).all()
    assert (of_batch > 0).sum() == 150
    assert len(set((of_batch > 0).sum(1).tolist())) > 3, "each text got as many as the others"
    assert of_batch[of_batch > 0].min() >= pre[of_batch == 0].max()


@pytest.mark.parametrize("kind", KINDS)
def test_no_activation_is_negative(kind):
    """If all inputs are negative, TopK keeps no latent."""
    pre = drawn(50, 16) - 1.5
    z = busy_dictionary(kind).activate(pre, training=True)

    assert z.min() == 0
    assert (z > 0)[pre <= 0].sum() == 0


def test_batch_top_k_encodes_a_text_alone_as_it_does_among_others():
    x = drawn(256, 6)
    dictionary = fit_dictionary(recipe_of("BatchTopK", steps=400), x, seed=0)

    together = dictionary.encode(x)
    alone = torch.cat([dictionary.encode(row[None]) for row in x])

    torch.testing.assert_close(together, alone)
    assert active_per_text(together) == pytest.approx(3, abs=1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_dictionary_of_standardised_texts_turns_into_one_of_the_texts_themselves(kind):
    dictionary = busy_dictionary(kind)
    x, target = 3 * drawn(64, 6) + 5, 0.2 * drawn(64, 5, seed=1) - 2
    of_x, of_target = Scale.of(x), Scale.of(target)
    if kind in ("BatchTopK", "Matryoshka"):
        dictionary.threshold.fill_(0.4)
    z = dictionary.encode(of_x.standardise(x))
    written = dictionary.decode(z)

    dictionary.absorb_scales_(of_x, of_target)

    torch.testing.assert_close(dictionary.encode(x), of_target.unit * z)
    torch.testing.assert_close(dictionary.decode(dictionary.encode(x)),
                               of_target.unit * written + of_target.mean)


@pytest.mark.parametrize("kind", KINDS)
def test_scaling_and_shifting_the_texts_changes_nothing_that_is_learned(kind):
    """A dictionary of 100 x + 7 is that of x, in other units."""
    x = drawn(512, 6)
    recipe = recipe_of(kind)
    one = fit_dictionary(recipe, x, seed=0)
    other = fit_dictionary(recipe, 100 * x + 7, seed=0)

    torch.testing.assert_close(100 * one.encode(x), other.encode(100 * x + 7), rtol=0.02, atol=0.5)
    torch.testing.assert_close(100 * one.decode(one.encode(x)) + 7,
                               other.decode(other.encode(100 * x + 7)), rtol=0.02, atol=0.5)


# Training


@pytest.mark.parametrize("kind", KINDS)
def test_training_twice_gives_the_same_dictionary_and_so_does_a_file(kind, tmp_path):
    x = drawn(512, 6)
    recipe = recipe_of(kind)
    one, other = (fit_dictionary(recipe, x, seed=3) for _ in range(2))
    torch.save({name: tensor.detach() for name, tensor in one.tensors().items()},
               tmp_path / "dictionary.pt")
    read = recipe.restore(torch.load(tmp_path / "dictionary.pt"))

    for each in (other, read):
        assert torch.equal(one.encode(x), each.encode(x))
        assert torch.equal(one.decode(one.encode(x)), each.decode(each.encode(x)))
    torch.testing.assert_close(one.W_dec.detach().norm(dim=1), torch.ones(16))


def test_dictionaries_are_counted_whether_they_are_trained_or_read(tmp_path):
    jobs = {name: job for name, job in dictionary_jobs(quick=True).items()
            if job.recipe.kind == "TopK" and job.recipe.sparsity == 3}
    assert {job.world for job in jobs.values()} == set(WORLDS)
    found = []
    for trained in (sum(job.recipe.steps for job in jobs.values()), 0):
        trainings = Trainings([job.recipe.steps for job in jobs.values()])
        found.append(trained_dictionaries(jobs, 0, tmp_path, n_texts=512, trainings=trainings))
        assert (trainings.n_ready, trainings.steps_trained) == (len(jobs), trained)
    for name in jobs:
        assert torch.equal(found[0][name].W_enc, found[1][name].W_enc), name


def test_a_given_decoder_stays_as_it_is_while_the_encoder_learns():
    x, W_dec = drawn(512, 6), unit_rows(drawn(16, 6, seed=9))
    dictionary = fit_dictionary(recipe_of("TopK", steps=300), x, seed=0, W_dec=W_dec)
    untrained = fit_dictionary(recipe_of("TopK", steps=0), x, seed=0, W_dec=W_dec)

    assert torch.equal(dictionary.W_dec, W_dec)
    assert (describe_fit(dictionary, x)["explained"]
            > describe_fit(untrained, x)["explained"] + 0.02)


def test_a_dictionary_can_learn_to_write_something_other_than_its_input():
    x = drawn(2048, 6)
    target = x.relu() @ drawn(6, 4, seed=1)
    recipe = DictionaryRecipe("TopK", 8, 32, steps=800, batch=128)
    dictionary = fit_dictionary(recipe, x, seed=0, target=target)

    assert explained_variance(target, dictionary.decode(dictionary.encode(x))) > 0.9


def test_dead_latents_get_the_direction_of_an_error_and_the_optimiser_forgets_them():
    dictionary = busy_dictionary("JumpReLU", d_in=6, d_out=6)
    optimizer = AdamW(dictionary.parameters(), lr=0.01, weight_decay=0.0)
    x = drawn(64, 6, seed=4)
    dictionary.backward_(x, x)
    optimizer.step()
    dead = torch.zeros(16, dtype=torch.bool)
    dead[[2, 5]] = True
    errors = unit_rows(x - dictionary.decode(dictionary.encode(x)))
    kept = dictionary.W_dec.detach()[~dead].clone()

    wake_dead_(dictionary, optimizer, dead, x, x, seeded_generator(0))

    nearest = (dictionary.W_dec.detach()[dead] @ errors.T).amax(1)
    torch.testing.assert_close(nearest, torch.ones(2))
    assert torch.equal(dictionary.W_dec.detach()[~dead], kept)
    assert (dictionary.b_enc.detach()[dead] == 0).all()
    for parameter, average in zip(optimizer.parameters, optimizer.m, strict=True):
        if parameter is dictionary.b_dec:
            continue
        axis = 1 if parameter is dictionary.W_enc else 0
        forgotten = average.index_select(axis, torch.tensor([2, 5]))
        assert (forgotten == 0).all() and (average != 0).any()


def test_a_dead_latent_gets_the_direction_of_the_worst_text():
    """One text is reconstructed much worse than all others, so it is the one drawn."""
    dictionary = fit_dictionary(recipe_of("TopK", steps=0), drawn(64, 6), seed=0)
    optimizer = AdamW(dictionary.parameters(), lr=0.01, weight_decay=0.0)
    dictionary.backward_(drawn(8, 6), drawn(8, 6))
    optimizer.step()
    x = drawn(64, 6)
    x[17] *= 100
    error = x[17] - dictionary.decode(dictionary.encode(x[17]))
    dead = torch.zeros(16, dtype=torch.bool)
    dead[3] = True

    wake_dead_(dictionary, optimizer, dead, x, x, seeded_generator(0))

    torch.testing.assert_close(dictionary.W_dec.detach()[3], unit_rows(error))


def test_activations_that_are_all_the_same_are_refused():
    with pytest.raises(UserError, match="all activations are the same"):
        Scale.of(torch.ones(8, 3))


def test_impossible_recipes_are_refused():
    for bad, named in ((("TopJ", 3, 16), "TopJ"), (("TopK", 0, 16), "sparsity=0"),
                       (("TopK", 17, 16), "sparsity=17"), (("BatchTopK", 2.5, 16), "2.5"),
                       (("ReLU + L1", -0.1, 16), "-0.1"), (("JumpReLU", math.nan, 16), "nan"),
                       (("TopK", 1, 0), "n_latents=0"), (("TopK", 1, 4, -1), "steps=-1"),
                       (("TopK", 1, 4, 10, 0), "batch=0")):
        with pytest.raises(UserError, match=named):
            DictionaryRecipe(*bad)


def test_activations_of_a_wrong_shape_or_with_nan_are_refused():
    x = drawn(32, 6)
    with_nan = x.clone()
    with_nan[3, 2] = math.nan
    for bad, more in ((with_nan, {}), (x * 1e30, {}), (x.long(), {}), (x[None], {}), (x[0], {}),
                      (x, {"target": x[:5]}), (x, {"target": x[0]})):
        with pytest.raises(UserError):
            fit_dictionary(recipe_of("TopK"), bad, seed=0, **more)
    doubled = fit_dictionary(recipe_of("TopK"), x.double(), seed=0)
    assert torch.equal(doubled.W_dec, fit_dictionary(recipe_of("TopK"), x, seed=0).W_dec)


# How they are scored


def perfect_dictionary(directions):
    """A dictionary of orthogonal directions [latent, d], which copies its input."""
    dictionary = ReluL1(directions.shape[1], directions.shape[1], len(directions), 0.0,
                        seeded_generator(0), W_dec=directions)
    return dictionary


def test_explained_variance_is_one_for_a_copy_and_zero_for_the_mean():
    x = drawn(100, 4) + 3

    assert explained_variance(x, x) == pytest.approx(1)
    assert explained_variance(x, x.mean(0).expand_as(x)) == pytest.approx(0, abs=1e-6)
    assert explained_variance(x, 2 * x.mean(0) - x) == pytest.approx(-3, abs=1e-4)


def test_the_true_features_recover_all_and_silent_latents_recover_none():
    directions = torch.eye(8)
    values = drawn(200, 8).relu()
    dictionary = perfect_dictionary(directions)
    z = dictionary.encode(values @ directions)

    cosines = feature_cosines(dictionary, z, directions)
    silent = feature_cosines(dictionary, torch.zeros_like(z), directions)

    assert describe_recovery(cosines) == {
        "recovered": 1, "features' best": 1, "latents' best": 1}
    assert mean_slope(cosines, z, values) == pytest.approx(1)
    assert describe_recovery(silent)["recovered"] == 0
    assert recovered_by_frequency(cosines, torch.arange(8).float()) == [1, 1, 1, 1]


def test_recovery_counts_features_and_not_latents():
    """Three latents that match one feature recover one feature."""
    directions = torch.eye(4)
    cosines = torch.tensor([[1.0, 0, 0, 0], [0.95, 0.1, 0, 0], [0.99, 0, 0, 0], [0, 0.89, 0, 0]])
    chances = torch.tensor([0.1, 0.4, 0.3, 0.2])  # the first is the rarest

    assert describe_recovery(cosines)["recovered"] == 1 / len(directions)
    assert recovered_by_frequency(cosines, chances, 2) == [0, 0.5]


def test_a_parent_that_is_silent_while_its_child_is_active_counts_as_absorbed():
    features = SparseFeatures("hierarchy", torch.eye(4), torch.full((4,), 0.2))
    _, values = features.draw(4000, seeded_generator(0))
    is_child = values[:, 1:] > 0

    honest = perfect_dictionary(torch.eye(4))
    # each child's feature is parent + child, and the parent's latent is silent when one is there
    swallowing = torch.eye(4)
    swallowing[1:, 0] = 1
    swallower = perfect_dictionary(unit_rows(swallowing))
    z = values.clone()
    z[:, 0][is_child.any(1)] = 0

    def absorption(dictionary, z):
        cosines = feature_cosines(dictionary, z, features.directions)
        return describe_absorption(dictionary, features, cosines, z, values)

    assert absorption(honest, values) == {
        "parents": 1, "children": 1, "found": 1, "leaning": 0, "absorbed": 0, "silent alone": 0}
    found = absorption(swallower, z)
    assert (found["parents"], found["children"]) == (1, 0)
    assert found["absorbed"] == 1
    assert found["silent alone"] == 0
    assert found["leaning"] == pytest.approx(0.5**0.5)


def test_absorption_by_hand_where_directions_overlap():
    """One family, in two dimensions more than the features need; each number is worked out."""
    directions = unit_rows(torch.tensor([[1.0, 0, 0, 0], [0.6, 0.8, 0, 0], [0, 0, 1, 0],
                                         [0, 0, 0, 1]]))
    features = SparseFeatures("hierarchy", directions, torch.full((4,), 0.2))
    # the first latent is nearest to the parent, and to the first child too; the second is next
    W_dec = unit_rows(torch.tensor([[2.0, 1, 0, 0], [0.1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]))
    dictionary = perfect_dictionary(W_dec)
    values = torch.tensor([[1.0, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    # of the two texts with the first child, one is absorbed; in the other no latent is active
    z = torch.tensor([[0.0, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]])

    cosines = feature_cosines(dictionary, z, directions)
    found = describe_absorption(dictionary, features, cosines, z, values)

    first_child_holds = W_dec[1] @ directions[0]
    assert cosines[0, 0] > cosines[1, 0] and cosines[0, 1] > cosines[1, 1]
    assert found["leaning"] == pytest.approx((first_child_holds - 0.6).item() / 3, abs=1e-6)
    assert found["absorbed"] == pytest.approx((1 / 2 + 0 + 0) / 3)
    assert found["silent alone"] == 1


def test_the_slope_of_a_latent_is_measured_only_where_it_is_active():
    directions = torch.eye(2)
    values = torch.tensor([[2.0, 0], [4, 0], [0, 1]])
    z = torch.tensor([[1.0, 0], [0, 0], [0, 1]])  # half of the first; the second one in full
    cosines = feature_cosines(perfect_dictionary(directions), z, directions)

    assert mean_slope(cosines, z, values) == pytest.approx(0.75)


def test_leaning_is_nan_if_no_child_is_found():
    """A dictionary that has found nothing must not get the best leaning, 0."""
    features = SparseFeatures.draw_directions("hierarchy", 16, 8, 0.1, seed=0)
    x, values = features.draw(2000, seeded_generator(1))
    dictionary = perfect_dictionary(unit_rows(-features.directions + 0.1))
    z = torch.ones(len(x), 16)
    cosines = feature_cosines(dictionary, z, features.directions).clamp(max=0.6)
    found = describe_absorption(dictionary, features, cosines, z, values)

    assert found["found"] == 0
    assert math.isnan(found["leaning"])


def test_no_two_purposes_share_a_seed():
    """This holds over a thousand seeds, and for models, which are drawn from the seed itself."""
    seeds = {seed_for(purpose, seed) for purpose in PURPOSES for seed in range(1000)}

    assert len(seeds) == 1000 * len(PURPOSES)
    assert not seeds & set(range(1000)), "models are drawn from the seed itself"


def test_a_dictionary_does_not_begin_with_the_features_that_it_must_find():
    """Both depend on the experiment's seed; drawn in the same way, they would be the same."""
    features = known_features("uniform", seed=0)
    x, _ = features.draw(512, seeded_generator(1))
    untrained = fit_dictionary(DictionaryRecipe("TopK", 3, 128, steps=0), x, seed=0)

    cosines = untrained.W_dec.detach() @ features.directions.T
    assert cosines.max() < 0.9


def test_principal_components_copy_everything_and_are_uncorrelated():
    features = SparseFeatures.draw_directions("uniform", 32, 8, 0.05, seed=0)
    x, _ = features.draw(2000, seeded_generator(1))
    dictionary = principal_components(x)

    fit = describe_fit(dictionary, x)
    assert fit["explained"] == pytest.approx(1, abs=1e-5)
    assert fit["L0"] == pytest.approx(8)
    covariance = dictionary.pre(x)[:, :8].detach().T.cov()
    torch.testing.assert_close(covariance, covariance.diagonal().diag(), atol=1e-5, rtol=0)


def test_noise_has_the_covariance_of_the_texts_and_none_of_their_features():
    features = SparseFeatures.draw_directions("uniform", 32, 8, 0.05, seed=0)
    x, _ = features.draw(50_000, seeded_generator(1))
    noise = noise_like(x, seeded_generator(2))

    torch.testing.assert_close(noise.T.cov(), x.T.cov(), atol=0.01, rtol=0.1)
    kurtosis = ((noise - noise.mean(0)) / noise.std(0)).pow(4).mean(0)
    torch.testing.assert_close(kurtosis, torch.full((8,), 3.0), atol=0.3, rtol=0)


@pytest.mark.slow
def test_a_dense_dictionary_explains_more_and_recovers_less():
    """The experiment's claim at a smaller size, so that seconds are enough."""
    features = SparseFeatures.draw_directions("uniform", 32, 12, 0.05, seed=7)
    x, _ = features.draw(32_768, seeded_generator(1))
    held_out, _ = features.draw(8192, seeded_generator(2))

    def score(kind, sparsity):
        dictionary = fit_dictionary(DictionaryRecipe(kind, sparsity, 32, steps=1500), x, seed=0)
        cosines = feature_cosines(dictionary, dictionary.encode(held_out), features.directions)
        return describe_fit(dictionary, held_out)["explained"], describe_recovery(cosines)

    dense, missed = score("ReLU + L1", 0.003)
    sparse, found = score("TopK", 2)

    assert dense > sparse + 0.1
    assert found["recovered"] > 0.8 > 0.3 > missed["recovered"]
