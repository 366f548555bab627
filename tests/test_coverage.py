"""data.Coverage: how generated images compare with real ones."""
import tracemalloc
import types
import unittest.mock

import data

import numpy as np
import pytest
import scipy.linalg
from conftest import REAL_MNIST, needs_mnist


def scaled(X, nc=1):
    return np.repeat(X / np.float32(127.5) - 1, nc, axis=1)


def batches(images, asked=None, size=100):
    return ((images[i:i + size], None if asked is None else asked[i:i + size]) for i in range(0, len(images), size))


@pytest.fixture(scope='module', params=['digits', pytest.param('mnist', marks=needs_mnist)])
def digits(request):
    """A name, Coverage of the real digits, and held-out images with their labels."""
    source = data.get_digits(labels=True) if request.param == 'digits' else data.get_mnist(REAL_MNIST, labels=True)
    X, held_out, y, labels = source
    return request.param, data.Coverage(X, y, list('0123456789')), held_out, labels


def test_real_digits_in_three_channels(digits):
    name, coverage, held_out, labels = digits
    images = scaled(held_out[:coverage.num_images], 3)
    row = coverage.count(batches(images, labels[:len(images)], 64))
    assert row['asked'] > 0.97 and row['asked_worst'] > 0.9 and row['confidence'] > 0.95
    assert row['digits'] == 10 and row['kl'] < 0.02
    if name == 'digits':
        assert coverage.num_images == 1000 and coverage.floor is row['fd'] is None
    else:
        assert coverage.num_images == 5000 and 0.9 < coverage.floor < 1.15 and 0.8 < row['fd'] < 1.3
        assert coverage.real_median == row['median'] == 0
        grey = coverage.count(batches(scaled(held_out[:5000]) * 0.8))  # what a collapse looks like
        assert grey['fd'] > 5 and grey['median'] in (25, 26)


@pytest.mark.parametrize('num_classes', [1, 2, 26, 47])
def test_any_number_of_classes(num_classes):
    rng = np.random.RandomState(0)
    patterns = rng.choice([50, 200], (num_classes, 1, 16, 16))

    def draw(classes):
        noisy = patterns[classes] + rng.normal(0, 20, (len(classes), 1, 16, 16))
        return noisy.clip(0, 255).astype(np.uint8).repeat(4, axis=2).repeat(4, axis=3)

    y = rng.permutation(2200) % num_classes
    names = [str(5 + c) for c in range(num_classes)]
    X = draw(y)
    coverage = data.Coverage(X, y.astype(np.int32), names)
    assert coverage.num_images == 1100
    row = coverage.count(batches(scaled(draw(y[:1100])), y[:1100].astype(np.float32)))  # as RandIter has them
    assert list(row)[:num_classes] == [f'share_{name}' for name in names]
    assert row['digits'] == num_classes and row['asked'] > 0.99 and row['confidence'] > 0.9 and row['kl'] < 0.05
    assert 0 < row['fd'] < 2 * coverage.floor
    assert abs(coverage.real_median - np.median(X[:2200:2])) <= 1
    row = coverage.count(batches(scaled(draw(np.zeros(1100, int)))))  # one class alone
    assert row['share_5'] > 0.99 and row['digits'] == 1 and 'asked' not in row
    assert np.isclose(row['kl'], np.log(num_classes), atol=0.1)
    assert row['fd'] > 3 * coverage.floor or num_classes == 1


def judge(classifier, *labelled):
    """Coverage with a classifier that is not fitted."""
    classifier.n_iter_ = 66  # all passes
    with unittest.mock.patch('sklearn.neural_network.MLPClassifier') as made:
        made.return_value.fit.return_value = classifier
        return data.Coverage(*labelled)


def reader(y, confidence=0.9):
    """Coverage whose classifier reads the class from an image's grey level."""
    num_classes = max(y) + 1

    def predict_proba(features):
        level = np.rint((features[:, :1] + 1) * 127.5)
        return np.where(np.arange(num_classes) == level, confidence, (1 - confidence) / 9)

    classifier = types.SimpleNamespace(coefs_=[np.eye(256)], intercepts_=[0], predict_proba=predict_proba)
    return judge(classifier, np.zeros((len(y), 1, 64, 64), np.uint8), np.asarray(y), [f'c{i}' for i in range(10)])


def flat(levels, nc=1):
    return scaled(np.asarray(levels).reshape(-1, 1, 1, 1) * np.ones((1, nc, 64, 64)))


def test_by_hand():
    """A class is there with a tenth of its real share: 0.9 % are too few of one in ten, and enough of one in twelve."""
    images = flat([0] * 500 + [1] * 491 + [2] * 9)
    row = reader(np.arange(10)).count(batches(images))
    shares = np.array([0.5, 0.491, 0.009])
    assert [row[f'share_c{digit}'] for digit in range(4)] == [0.5, 0.491, 0.009, 0]
    assert np.isclose(row['confidence'], 0.9) and np.isclose(row['kl'], (shares * np.log(shares / 0.1)).sum())
    assert row['digits'] == 2 and row['median'] == 0 and row['fd'] is None
    assert 'asked' not in row
    row = reader([*range(10), 0, 1]).count(batches(images))
    assert row['digits'] == 3
    single = reader([0, 0])  # scikit-learn gives a single class a second column
    single.class_names = ['c0']
    single.classifier.predict_proba = lambda features: np.tile([0.4, 0.6], (len(features), 1))
    assert single.count(batches(images))['share_c0'] == 1
    asked = np.arange(100) % 10
    images = flat(asked)
    asked[[0, 10]] = 5  # two zeros where fives were asked for
    row = reader(np.arange(10)).count(batches(images, asked, 7))
    assert np.isclose(row['asked'], 0.98) and np.isclose(row['asked_worst'], 10 / 12) and row['median'] == 4
    # channels count by their mean
    images = flat(np.full(30, 4), 3)
    images[:, 0], images[:, 1] = -1, 8 / 127.5 - 1
    row = reader(np.arange(10)).count(batches(images))
    assert row['share_c4'] == 1 and row['median'] == 4


@pytest.mark.filterwarnings('error')  # such as that a complex number became a real one
def test_the_distance():
    """By the square root of the product; and for singular covariances, of which that is complex, by hand."""
    rng = np.random.RandomState(0)
    one, two = rng.normal(size=(50, 8)), rng.normal(0.3, 2, (60, 8))
    (a, A), (b, B) = ((x.mean(axis=0), np.cov(x.T)) for x in (one, two))
    expected = ((a - b) ** 2).sum() + np.trace(A + B - 2 * scipy.linalg.sqrtm(A @ B).real)
    assert np.isclose(data.frechet_distance((a, A), (b, B)), expected)
    rotation = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    A, B = (rotation @ np.diag(d) @ rotation.T for d in ([4, 9, 1, 0, 0, 0, 0, 0], [1, 9, 0, 25, 0, 0, 0, 0]))
    assert np.isclose(data.frechet_distance((a, A), (a, B)), 1 + 0 + 1 + 25, atol=1e-5)


def test_what_is_compared_and_in_how_much_memory():
    """The distance is that of all answers of the hidden layer at once, but the images are never floats all at once."""
    rng = np.random.RandomState(0)
    X = rng.randint(0, 256, (2200, 1, 64, 64)).astype(np.uint8)
    layer, bias = rng.normal(size=(256, 256)) / 16, rng.normal(size=256)
    coverage = judge(types.SimpleNamespace(coefs_=[layer], intercepts_=[bias],
                                           predict_proba=lambda features: np.ones((len(features), 2)) / 2),
                     X, np.arange(2200) % 2, 'ab')

    def generated():
        for i in range(22):
            yield np.random.default_rng(i).random((50, 3, 64, 64), np.float32) * 1.5 - 1, None

    tracemalloc.start()
    row = coverage.count(generated())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6 and row['median'] in (95, 96)  # as floats they are 54e6 bytes

    def normal(images):
        answers = np.maximum(images.reshape(-1, 16, 4, 16, 4).mean(axis=(2, 4)).reshape(-1, 256) @ layer + bias, 0)
        return answers.mean(axis=0), np.cov(answers.T)

    fakes = np.concatenate([images.mean(axis=1) for images, _ in generated()])
    reals, others = (normal(scaled(X[half::2])) for half in (0, 1))
    assert np.isclose(row['fd'], data.frechet_distance(reals, normal(fakes)), rtol=1e-4)
    assert np.isclose(coverage.floor, data.frechet_distance(reals, others), rtol=1e-4)


def test_ctrl_c_while_the_classifier_learns(monkeypatch):
    """scikit-learn ends the fit with a warning alone: a half-learned classifier would judge the whole run."""
    from sklearn.neural_network import MLPClassifier

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(MLPClassifier, '_backprop', interrupted)
    X, _, y, _ = data.get_digits(labels=True)
    with pytest.raises(KeyboardInterrupt):
        data.Coverage(X, y, list('0123456789'))
