"""data.py: what every source yields, and what is said if it is wrong."""
import gzip
import os
import socket
import struct
import types
from unittest import mock

import data

import cv2
import mxnet as mx
import numpy as np
import pytest
from conftest import cases, refused
from sklearn.datasets import load_digits

import dcgan


def random_images(n, shape=(28, 28), labels=range(10)):
    """(n,) + shape pixels and (n,) labels, uint8."""
    rng = np.random.RandomState(0)
    return rng.randint(0, 256, (n,) + shape).astype(np.uint8), rng.choice(labels, n).astype(np.uint8)


def prepared(X, y, num_train):
    """What get_mnist has to make of images in the order of their files, in the plainest way."""
    order = np.random.RandomState(1234).permutation(len(X))
    how = cv2.INTER_LINEAR if max(X.shape[1:]) <= 64 else cv2.INTER_AREA
    images = np.stack([cv2.resize(X[i], (64, 64), interpolation=how) for i in order])[:, np.newaxis]
    return images[:num_train], images[num_train:], y[order[:num_train]], y[order[num_train:]]


def assert_equal(found, expected):
    for a, b in zip(found, expected):
        assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    assert len(found) == len(expected)


def test_digits():
    bunch = load_digits()
    expected = prepared(np.floor(bunch.images * 255 / 16).astype(np.uint8), bunch.target.astype(np.uint8), 1500)
    assert_equal(data.get_digits(labels=True), expected)
    assert_equal(data.get_digits(), expected[:2])  # again, and without labels


def idx(array):
    return struct.pack(f'>{1 + array.ndim}I', 0x800 + array.ndim, *array.shape) + array.tobytes()


def write_mnist(folder, dot='-', gz='', prefix='', test='t10k', shape=(28, 28), labels=range(10)):
    """60 training and 20 test images as MNIST's four files; returns (X, y) of all."""
    X, y = random_images(80, shape, labels)
    for part, where in (('train', slice(60)), (test, slice(60, None))):
        for kind, array in (('images{}idx3', X[where]), ('labels{}idx1', y[where])):
            content = gzip.compress(idx(array)) if gz else idx(array)
            (folder / f'{prefix}{part}-{kind.format(dot)}-ubyte{gz}').write_bytes(content)
    return X, y


@cases('dot, gz, shape, labels', {
    'MNIST': ('-', '.gz', (28, 28), range(10)),
    'unpacked, with dots in the names, larger than 64x64': ('.', '', (100, 80), [0, 255])})
def test_mnist(tmp_path, dot, gz, shape, labels):
    X, y = write_mnist(tmp_path, dot, gz, shape=shape, labels=labels)
    expected = prepared(X, y, 60)
    assert_equal(data.get_mnist(str(tmp_path), labels=True), expected)
    assert_equal(data.get_mnist(str(tmp_path)), expected[:2])


def test_emnist(tmp_path):
    """Its images lie transposed; of several sets in a folder `mnist_path` names one, by their names' beginning."""
    for name, num_classes in ('emnist-letters', 26), ('emnist-balanced', 47):
        X, y = write_mnist(tmp_path, gz='.gz', prefix=f'{name}-', test='test', labels=range(num_classes))
        expected = prepared(X.transpose(0, 2, 1), y, 60)
        assert_equal(data.get_mnist(str(tmp_path / name), labels=True), expected)
    refused(lambda: data.get_mnist(str(tmp_path)), tmp_path, 'mnist_path', tmp_path / 'emnist-balanced',
            tmp_path / 'emnist-letters')


IMAGES, LABELS = 'train-images-idx3-ubyte', 'train-labels-idx1-ubyte'


@cases('dot, layout', {'torchvision': ('-', 'MNIST/raw/{}'), 'Kaggle': ('.', '{0}/{0}')})
def test_folders_of_other_programs(tmp_path, dot, layout):
    """Their root will do, and each folder below it, and each file."""
    write_mnist(tmp_path, dot)
    expected = data.get_mnist(str(tmp_path), labels=True)
    root = tmp_path / 'root'
    for path in list(tmp_path.iterdir()):
        new = root / layout.format(path.name)
        new.parent.mkdir(parents=True, exist_ok=True)
        path.rename(new)
    for path in [root, *root.rglob('*')]:
        assert_equal(data.get_mnist(str(path), labels=True), expected)


def test_keras_npz(tmp_path):
    X, y = random_images(80)
    arrays = dict(x_train=X[:60], y_train=y[:60], x_test=X[60:], y_test=y[60:])
    path = tmp_path / 'mnist.npz'
    np.savez_compressed(path, **arrays)
    for name in path, tmp_path:
        assert_equal(data.get_mnist(str(name), labels=True), prepared(X, y, 60))
    path.write_bytes(path.read_bytes()[:-1000])
    refused(lambda: data.get_mnist(str(path)), path, 'damaged')
    np.savez(path, **{**arrays, 'x_test': X[60:] / 255})
    refused(lambda: data.get_mnist(str(path)), path, "not Keras' mnist.npz")


@cases('name, damage, problem', {
    'cut short': (IMAGES, lambda b: b[:-1], 'cut short'),
    'floats': (IMAGES, lambda b: b'\0\0\x0d\x03' + b[4:], '0xd03'),
    'fewer labels': (LABELS, lambda b: idx(np.zeros(59, np.uint8)), '59 labels for 60 images'),
    'gzip cut short': (IMAGES, lambda b: gzip.compress(b)[:-20], 'damaged'),
    'web page': (IMAGES, lambda b: b'\n<!DOCTYPE html>', 'web page'),
    'Git LFS': (IMAGES, lambda b: b'version https://git-lfs.github.com/spec/v1\n', 'git lfs pull')})
def test_damaged_idx(tmp_path, name, damage, problem):
    write_mnist(tmp_path)
    path = tmp_path / name
    path.write_bytes(damage(path.read_bytes()))
    refused(lambda: data.get_mnist(str(tmp_path)), path, problem)


def test_no_mnist_there(tmp_path):
    """The folder itself has Kaggle's CSV."""
    (tmp_path / 'train.csv').write_text('label,pixel0')
    for path in tmp_path, tmp_path / 'train.csv', tmp_path / 'no' / 'where':
        refused(lambda: data.get_mnist(str(path)), path, IMAGES, 'mnist.npz', 'CSV', 'not read')
    write_mnist(tmp_path)
    (tmp_path / LABELS).unlink()
    refused(lambda: data.get_mnist(str(tmp_path)), tmp_path / LABELS, 'no such file', 'mnist_path')


def ask(**changes):
    return dcgan.Settings(batch_size=10, ctx=(mx.cpu(),), conditional=True, **changes)


def test_two_workers_share_the_data(tmp_path):
    """Each has half of the images, and knows the classes of all: labels 7 and 200 are positions 0 and 1."""
    X, _, y, _ = prepared(*write_mnist(tmp_path, labels=[7, 200]), 60)
    pixels = []
    for rank in 0, 1:
        name, batches, (all_X, classes, class_names) = data.load_data(ask(mnist_path=str(tmp_path)), rank, 2)
        assert (name, batches.num_data, batches.class_names, class_names) == ('mnist', 30, ['7', '200'], ['7', '200'])
        assert_equal([all_X, classes, batches.classes], [X] + [(y == 200).astype(np.int32)] * 2)
        pixels += [np.rint(batch.data[0].asnumpy() * 127.5 + 127.5)[:, :1] for batch in batches]
    assert np.array_equal(np.concatenate(pixels), X)
    refused(lambda: data.load_data(ask(mnist_path=str(tmp_path)), 0, 7), 'batch_size = 10', '8 images')


def test_digits_instead(monkeypatch, capsys):
    """Without MNIST: only if the user has not named a folder, and there is one process."""
    monkeypatch.setattr(data, '_from_openml', mock.Mock(side_effect=OSError('no network')))
    name, batches, _ = data.load_data(ask())
    assert (name, batches.num_data, len(batches.class_names)) == ('digits', 1500, 10)
    assert "no network. Training on scikit-learn's 8x8 digits" in capsys.readouterr().out
    for changes, workers in (dict(mnist_path='nowhere'), 1), (dict(), 2):
        with pytest.raises(OSError):
            data.load_data(ask(**changes), 0, workers)


def test_openml(tmp_path, monkeypatch, capfd):
    """What fails is told in one line. What was parsed is kept, and made again if it is damaged."""
    X, y = random_images(210)
    expected = prepared(X, y, 180)
    bunch = types.SimpleNamespace(data=X.reshape(-1, 784).astype(float), target=y.astype(str).astype(object))
    answers = [OSError('a fault'), bunch, bunch]

    def fetch(name, version, **options):
        assert (name, version) == ('mnist_784', 1)
        assert socket.getdefaulttimeout() <= 20  # scikit-learn itself would wait for ever
        answer = answers.pop(0)
        if answer is not bunch:
            raise answer
        return answer

    monkeypatch.setattr('sklearn.datasets.fetch_openml', fetch)
    monkeypatch.setenv('SCIKIT_LEARN_DATA', str(tmp_path))
    refused(data.get_mnist, 'OpenML', 'mnist_path', 'a fault')
    assert_equal(data.get_mnist(labels=True), expected)
    kept, = tmp_path.glob('joblib/**/output.pkl')
    kept.write_bytes(kept.read_bytes()[:-1])
    assert_equal(data.get_mnist(labels=True), expected)
    out, err = capfd.readouterr()
    assert 'reading MNIST from OpenML' in out and not err
    assert_equal(data.get_mnist(labels=True), expected)
    assert capfd.readouterr() == ('', '')
    socket.setdefaulttimeout(None)


def test_without_a_home(monkeypatch, tmp_path):
    """As a container may have it: no folder called ~ is made."""
    for name in 'SCIKIT_LEARN_DATA', 'HOME':
        monkeypatch.delenv(name)
    monkeypatch.setattr('pwd.getpwuid', mock.Mock(side_effect=KeyError))
    monkeypatch.chdir(tmp_path)
    refused(data.get_mnist, 'no home folder', 'SCIKIT_LEARN_DATA', 'mnist_path')
    assert not os.path.exists('~')
