"""data.py: what every source yields, and every way in which what it reads can be wrong."""
import functools
import gzip
import os
import socket
import struct
import tempfile
import types
import urllib.error
import warnings
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
    'MNIST': ('-', '.gz', (28, 28), range(10)),  # and Fashion-MNIST and KMNIST, which have its names
    'unpacked, with dots in the names': ('.', '', (14, 56), [3, 7]),
    'larger than 64x64': ('-', '', (100, 80), [0, 255])})
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
    X, y = write_mnist(tmp_path)  # MNIST's own names come first
    assert_equal(data.get_mnist(str(tmp_path), labels=True), prepared(X, y, 60))


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
    X, y = write_mnist(tmp_path)
    expected = data.get_mnist(str(tmp_path), labels=True)
    arrays = dict(x_train=X[:60], y_train=y[:60], x_test=X[60:], y_test=y[60:])
    folder = tmp_path / 'keras'
    folder.mkdir()
    path = folder / 'mnist.npz'
    np.savez_compressed(path, **arrays)
    for name in path, folder:
        assert_equal(data.get_mnist(str(name), labels=True), expected)
    path.write_bytes(path.read_bytes()[:-1000])
    refused(lambda: data.get_mnist(str(path)), path, 'damaged')
    for change in dict(x_test=X[60:] / 255), dict(y_train=y[:59]):
        np.savez(path, **{**arrays, **change})
        refused(lambda: data.get_mnist(str(path)), path, "not Keras' mnist.npz")


@cases('name, damage, problem', {
    'cut short': (IMAGES, lambda b: b[:-1], 'cut short'),
    'floats': (IMAGES, lambda b: b'\0\0\x0d\x03' + b[4:], '0xd03'),
    'labels given as images': (IMAGES, lambda b: idx(np.zeros(60, np.uint8)), '0x801'),
    'fewer labels': (LABELS, lambda b: idx(np.zeros(59, np.uint8)), '59 labels for 60 images'),
    'no pixels': (IMAGES, lambda b: idx(np.zeros((60, 28, 0), np.uint8)), '[60, 28, 0]'),
    'gzip cut short': (IMAGES, lambda b: gzip.compress(b)[:-20], 'damaged'),
    'web page': (IMAGES, lambda b: b'\n<!DOCTYPE html>', 'this is a web page'),
    'Git LFS': (IMAGES, lambda b: b'version https://git-lfs.github.com/spec/v1\n', 'git lfs pull')})
def test_damaged_idx(tmp_path, name, damage, problem):
    write_mnist(tmp_path)
    path = tmp_path / name
    path.write_bytes(damage(path.read_bytes()))
    refused(lambda: data.get_mnist(str(tmp_path)), path, problem)


def test_one_file_is_missing(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / LABELS).unlink()
    refused(lambda: data.get_mnist(str(tmp_path)), tmp_path / LABELS, 'no such file', 'mnist_path')


@pytest.mark.parametrize('path', ['', 'train.csv', 'no/where'])
def test_no_mnist_there(tmp_path, path):
    """The folder itself has Kaggle's CSV."""
    (tmp_path / 'train.csv').write_text('label,pixel0')
    refused(lambda: data.get_mnist(str(tmp_path / path)), tmp_path / path, IMAGES, 'mnist.npz', 'CSV', 'not read')


def test_a_folder_that_this_user_may_not_read():
    with tempfile.TemporaryDirectory() as folder:  # pytest's own is root's alone
        os.chmod(folder, 0)
        user = os.geteuid()
        os.seteuid(user or 65534)  # root may read all
        try:
            refused(lambda: data.get_mnist(folder), folder, 'Permission denied')
        finally:
            os.seteuid(user)


def test_batches():
    """Each level is the float that NumPy makes of it; classes are positions among the sorted labels."""
    X, _ = random_images(3, (1, 64, 64))
    assert len(np.unique(X)) == 256
    batches = data.PixelIter(X, np.array([7, 200, 3]), 3, 3, mx.cpu(1), conditional=True)
    assert batches.class_names == ['3', '7', '200'] and batches.num_data == 3
    assert_equal([batches.classes], [np.array([1, 2, 0], np.int32)])
    found = next(batches).data
    expected = [np.tile(X.astype(np.float32) / (255.0 / 2) - 1.0, (1, 3, 1, 1)), np.array([1, 2, 0], np.float32)]
    assert_equal([array.asnumpy() for array in found], expected)
    latents = next(data.RandIter(5, 7, mx.cpu(1), batches.classes))  # the textbook judges what is in them
    assert all(array.context == mx.cpu(1) for array in found + latents.data + latents.label)


def test_the_checksum_is_of_all_pixels_and_labels():
    """By it a run is told that it resumes with other images; each worker has the same."""
    X, y = random_images(8, (1, 64, 64))
    other_X, other_y = X.copy(), y.copy()
    other_X[-1, 0, -1, -1] ^= 1
    other_y[0] ^= 1
    sums = [data.PixelIter(*images, 2).checksum for images in ((X, y), (other_X, y), (X, other_y))]
    assert len(set(sums)) == 3
    assert data.PixelIter(X, y, 2, rank=1, workers=2).checksum == sums[0]


ask = functools.partial(dcgan.Settings, batch_size=10, ctx=(mx.cpu(),), conditional=True)


def test_two_workers_share_the_data(tmp_path):
    """Each has half of the images, and knows the classes of all: labels 3 and 7 are positions 0 and 1."""
    X, _, y, _ = prepared(*write_mnist(tmp_path, labels=[3, 7]), 60)
    pixels = []
    for rank in 0, 1:
        name, batches, (all_X, classes, class_names) = data.load_data(ask(mnist_path=str(tmp_path)), rank, 2)
        assert (name, batches.num_data, batches.class_names, class_names) == ('mnist', 30, ['3', '7'], ['3', '7'])
        assert_equal([all_X, classes, batches.classes], [X] + [(y == 7).astype(np.int32)] * 2)
        pixels += [np.rint(batch.data[0].asnumpy() * 127.5 + 127.5)[:, :1] for batch in batches]
    assert np.array_equal(np.concatenate(pixels), X)
    refused(lambda: data.load_data(ask(mnist_path=str(tmp_path), batch_size=31), 0, 2), 'batch_size = 31', '30 images')


def test_digits_instead(monkeypatch, capsys):
    """Without MNIST: only if the user has not named a folder, and there is one process."""
    monkeypatch.setattr(data, '_from_openml', mock.Mock(side_effect=OSError('no network')))
    name, batches, _ = data.load_data(ask())
    assert (name, batches.num_data, len(batches.class_names)) == ('digits', 1500, 10)
    assert "no network. Training on scikit-learn's 8x8 digits" in capsys.readouterr().out
    for changes, workers in (dict(mnist_path='nowhere'), 1), (dict(), 2):
        with pytest.raises(OSError):
            data.load_data(ask(**changes), 0, workers)


@pytest.fixture
def openml(tmp_path, monkeypatch):
    """Stands for OpenML; `problem` is what scikit-learn raises."""
    X, y = random_images(210)
    server = types.SimpleNamespace(expected=prepared(X, y, 180), problem=None, home=tmp_path / 'home')

    def fetch(name, **options):
        assert (name, options['version'], options['as_frame']) == ('mnist_784', 1, False)
        assert socket.getdefaulttimeout() <= 20  # scikit-learn itself would wait for ever
        warnings.warn('trying again', stacklevel=1)
        if server.problem:
            raise server.problem
        return types.SimpleNamespace(data=X.reshape(-1, 784).astype(float), target=y.astype(str).astype(object))

    monkeypatch.setattr('sklearn.datasets.fetch_openml', fetch)
    monkeypatch.setenv('SCIKIT_LEARN_DATA', str(server.home))
    yield server
    socket.setdefaulttimeout(None)


def test_openml(openml, capfd):
    """What fails is told in one line. What was parsed is kept, and made again if it is damaged."""
    for problem in urllib.error.HTTPError('', 500, 'a fault', {}, None), ValueError('md5 checksum does not match'):
        openml.problem = problem
        refused(data.get_mnist, 'OpenML', 'mnist_path', str(problem))
    openml.problem = None
    assert_equal(data.get_mnist(labels=True), openml.expected)
    kept, = openml.home.glob('joblib/**/output.pkl')
    kept.write_bytes(kept.read_bytes()[:-1])
    assert_equal(data.get_mnist(labels=True), openml.expected)
    out, err = capfd.readouterr()
    assert 'reading MNIST from OpenML' in out and not err
    openml.problem = OSError('the server is gone')
    assert_equal(data.get_mnist(labels=True), openml.expected)
    assert capfd.readouterr() == ('', '')


def test_openml_cannot_be_kept(openml, monkeypatch, tmp_path):
    """Without a folder to write to, or a home, the line says what to set."""
    monkeypatch.setenv('SCIKIT_LEARN_DATA', '/proc/self')  # not even root can write there
    refused(data.get_mnist, '/proc/self', 'SCIKIT_LEARN_DATA', 'mnist_path')
    monkeypatch.delenv('SCIKIT_LEARN_DATA')
    monkeypatch.delenv('HOME')
    monkeypatch.setattr('pwd.getpwuid', mock.Mock(side_effect=KeyError))  # as a container may have it
    monkeypatch.chdir(tmp_path)
    refused(data.get_mnist, 'no home folder', 'SCIKIT_LEARN_DATA', 'mnist_path')
    assert not os.path.exists('~')
