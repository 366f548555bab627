"""data.Coverage: how generated images compare with real ones."""
import os

import data

import numpy as np
import pytest
import scipy.linalg
from conftest import REAL_MNIST, needs_mnist


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Where the classifier is kept."""
    monkeypatch.setenv('SCIKIT_LEARN_DATA', str(tmp_path))


def scaled(X, nc=1):
    return np.repeat(X / np.float32(127.5) - 1, nc, axis=1)


def batches(images, asked=None, size=100):
    return ((images[i:i + size], None if asked is None else asked[i:i + size]) for i in range(0, len(images), size))


@pytest.mark.parametrize('name', ['digits', pytest.param('mnist', marks=needs_mnist)])
def test_real_digits_in_three_channels(name):
    source = data.get_digits(labels=True) if name == 'digits' else data.get_mnist(REAL_MNIST, labels=True)
    X, held_out, y, labels = source
    coverage = data.Coverage(X, y, list('0123456789'))
    images = scaled(held_out[:coverage.num_images], 3)
    row = coverage.count(batches(images, labels[:len(images)], 64))
    assert row['asked'] > 0.97 and row['asked_worst'] > 0.9 and row['confidence'] > 0.95
    assert row['digits'] == 10 and row['kl'] < 0.02
    if name == 'digits':
        assert coverage.num_images == 1000 and coverage.floor is row['fd'] is None
    else:
        assert coverage.num_images == 5000 and 0.9 < coverage.floor < 1.15 and 0.8 < row['fd'] < 1.3
        grey = coverage.count(batches(scaled(held_out[:5000]) * 0.8))  # what a collapse looks like
        assert grey['fd'] > 5 and row['median'] == 0 and grey['median'] in (25, 26)


def patterns(classes, num_classes):
    """Noisy images, (n, 1, 64, 64) uint8, that a classifier tells apart without an error."""
    rng = np.random.RandomState(0)
    means = rng.choice([50, 200], (num_classes, 1, 16, 16))
    noisy = means[classes] + rng.normal(0, 20, (len(classes), 1, 16, 16))
    return noisy.clip(0, 255).astype(np.uint8).repeat(4, axis=2).repeat(4, axis=3)


@pytest.mark.parametrize('num_classes', [1, 2, 47])
def test_any_number_of_classes(num_classes):
    y = np.random.RandomState(1).permutation(2200) % num_classes
    coverage = data.Coverage(patterns(y, num_classes), y.astype(np.int32), [str(5 + c) for c in range(num_classes)])
    assert coverage.num_images == 1100
    row = coverage.count(batches(scaled(patterns(y[:1100], num_classes)), y[:1100].astype(np.float32)))
    assert list(row)[:num_classes] == [f'share_{5 + c}' for c in range(num_classes)]
    assert row['digits'] == num_classes and row['asked'] > 0.99 and row['confidence'] > 0.9 and row['kl'] < 0.05
    assert 0 < row['fd'] < 2 * coverage.floor
    row = coverage.count(batches(scaled(patterns(np.zeros(1100, int), num_classes))))  # one class alone
    assert row['share_5'] > 0.99 and row['digits'] == 1 and 'asked' not in row
    assert np.isclose(row['kl'], np.log(num_classes), atol=0.1)
    assert row['fd'] > 3 * coverage.floor or num_classes == 1


def test_by_hand():
    """A class is there with a tenth of its real share: 1 % is too little for 10.25 %, and enough for 9.75 %."""
    real = np.array([110, 110, 41, 39, 100])
    y = np.repeat(np.arange(5), real)
    coverage = data.Coverage(patterns(y, 5), y, list('abcde'))
    row = coverage.count(batches(scaled(patterns(np.repeat([0, 1, 2, 3], [50, 48, 1, 1]), 5))))
    shares = np.array([0.5, 0.48, 0.01, 0.01])
    assert [row[f'share_{name}'] for name in 'abcde'] == [*shares, 0] and row['digits'] == 3
    assert np.isclose(row['kl'], (shares * np.log(shares / (real / 400)[:4])).sum())

    asked = np.arange(100) % 5
    images = scaled(patterns(asked, 5), 3)
    images[:, 0] -= 0.2  # channels count by their mean
    images[:, 2] += 0.2
    asked[[0, 5]] = 4  # two of the first class where the last was asked for
    row = coverage.count(batches(images, asked, 7))
    assert row['median'] == np.median(np.rint((images.mean(axis=1) + 1) * 127.5))
    assert np.isclose(row['asked'], 0.98) and np.isclose(row['asked_worst'], 20 / 22)


@pytest.mark.filterwarnings('error')  # such as that a complex number became a real one
def test_the_distance():
    """Like the square root of the product; by hand if the covariances are singular, for then that is complex."""
    rng = np.random.RandomState(0)
    one, two = rng.normal(size=(50, 8)), rng.normal(0.3, 2, (60, 8))
    (a, A), (b, B) = ((x.mean(axis=0), np.cov(x.T)) for x in (one, two))
    expected = ((a - b) ** 2).sum() + np.trace(A + B - 2 * scipy.linalg.sqrtm(A @ B).real)
    assert np.isclose(data.frechet_distance((a, A), (b, B)), expected)
    rotation = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    A, B = (rotation @ np.diag(d) @ rotation.T for d in ([4, 9, 1, 0, 0, 0, 0, 0], [1, 9, 0, 25, 0, 0, 0, 0]))
    assert np.isclose(data.frechet_distance((a, A), (a, B)), 1 + 0 + 1 + 25, atol=1e-5)


def test_it_learns_at_the_first_count_and_is_kept(monkeypatch, capfd):
    """It is kept for the data that it has learnt. If it was stopped or cannot be kept, it learns anew."""
    MLP = data.sklearn.neural_network.MLPClassifier
    y = np.arange(200) % 10

    def count(y=y):
        coverage = data.Coverage(patterns(y, 10), y, list('0123456789'))
        return coverage.count(batches(scaled(patterns(y, 10))))

    with monkeypatch.context() as patch:  # scikit-learn takes Ctrl-C for an end like any other
        patch.setattr(MLP, '_backprop', lambda *args: os.kill(os.getpid(), 2))
        with pytest.raises(KeyboardInterrupt):
            count()
    row = count()
    with monkeypatch.context() as patch:
        patch.setattr(MLP, 'fit', None)
        assert count() == row
        with pytest.raises(TypeError):
            count((y + 1) % 10)
    for place in '/proc/self', '~nobody-of-that-name':
        monkeypatch.setenv('SCIKIT_LEARN_DATA', place)
        assert count() == row
    assert capfd.readouterr() == ('', '')
