"""data.py: what every source yields, and every way in which what it reads can be wrong."""
import functools
import gzip
import inspect
import os
import pathlib
import socket
import struct
import tempfile
import types
import urllib.error
import warnings
from unittest import mock

import data

import cv2
import joblib
import mxnet as mx
import numpy as np
import pytest
from conftest import REAL_MNIST, cases, needs_mnist, refused
from sklearn.datasets import fetch_openml, load_digits

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


def flipped(content, position, bits=0x10):
    content = bytearray(content)
    content[position] ^= bits
    return bytes(content)


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
    'unpacked': ('-', '', (28, 28), range(10)),
    'dots in the names': ('.', '', (28, 28), range(10)),
    'a class of small images': ('.', '.gz', (1, 1), [9]),
    'wide': ('-', '', (14, 56), [3, 7]),
    'larger than 64x64': ('-', '', (100, 80), [0, 255])})
def test_mnist(tmp_path, dot, gz, shape, labels):
    X, y = write_mnist(tmp_path, dot, gz, shape=shape, labels=labels)
    expected = prepared(X, y, 60)
    assert_equal(data.get_mnist(str(tmp_path), labels=True), expected)
    assert_equal(data.get_mnist(str(tmp_path)), expected[:2])


def test_emnist(tmp_path):
    """Its images lie transposed; of several sets in a folder `mnist_path` names one, by their names' beginning."""
    expected = {}
    for name, labels in ('emnist-letters', range(1, 27)), ('emnist-balanced', range(47)), ('kuzushiji', range(10)):
        X, y = write_mnist(tmp_path, gz='.gz', prefix=name + '-', test='test', shape=(28, 20), labels=labels)
        expected[name] = prepared(X.transpose(0, 2, 1) if 'emnist' in name else X, y, 60)
        if len(expected) == 1:
            assert_equal(data.get_mnist(str(tmp_path), labels=True), expected[name])
    for name in expected:
        assert_equal(data.get_mnist(str(tmp_path / name), labels=True), expected[name])
    for path in tmp_path, tmp_path / 'emnist':
        refused(lambda path=path: data.get_mnist(str(path)), path, 'mnist_path',
                *(tmp_path / f'emnist-{name}' for name in ('balanced', 'letters')))
    X, y = write_mnist(tmp_path)  # MNIST's own names come first
    assert_equal(data.get_mnist(str(tmp_path), labels=True), prepared(X, y, 60))


@needs_mnist
def test_real_mnist():
    X_train, X_test, y_train, y_test = data.get_mnist(REAL_MNIST, labels=True)
    assert X_train.shape == (60000, 1, 64, 64) and X_test.shape == (10000, 1, 64, 64)
    counts = np.bincount(np.concatenate([y_train, y_test]))
    assert counts.tolist() == [6903, 7877, 6990, 7141, 6824, 6313, 6876, 7293, 6825, 6958]


IMAGES, LABELS = 'train-images-idx3-ubyte', 'train-labels-idx1-ubyte'


@cases('layout', {'torchvision': 'MNIST/raw/{}', 'one folder deeper': 'raw/{}', 'Kaggle': '{0}/{0}'})
@pytest.mark.parametrize('dot', '-.')
def test_folders_of_other_programs(tmp_path, layout, dot):
    """Their root will do, and each folder below it, and each file."""
    write_mnist(tmp_path, dot)
    expected = data.get_mnist(str(tmp_path), labels=True)
    for path in list(tmp_path.iterdir()):
        new = tmp_path / 'root' / layout.format(path.name)
        new.parent.mkdir(parents=True, exist_ok=True)
        path.rename(new)
    for path in (tmp_path / 'root').glob('**'):
        assert_equal(data.get_mnist(f'{path}/', labels=True), expected)
    for path in (tmp_path / 'root').glob('**/*-ubyte'):
        assert_equal(data.get_mnist(str(path), labels=True), expected)


def test_several_sets(tmp_path):
    for name in 'MNIST/raw', 'FashionMNIST/raw':
        (tmp_path / name).mkdir(parents=True)
        write_mnist(tmp_path / name)
    refused(lambda: data.get_mnist(str(tmp_path)), 'mnist_path', tmp_path / 'MNIST/raw', tmp_path / 'FashionMNIST/raw')


def test_keras_npz(tmp_path):
    X, y = write_mnist(tmp_path)
    expected = data.get_mnist(str(tmp_path), labels=True)
    arrays = dict(x_train=X[:60], y_train=y[:60], x_test=X[60:], y_test=y[60:])
    path, folder = tmp_path / 'mine.npz', tmp_path / 'keras'
    folder.mkdir()
    for name in path, folder / 'mnist.npz':
        np.savez_compressed(name, **arrays)
    for name in path, folder:
        assert_equal(data.get_mnist(str(name), labels=True), expected)
    good = path.read_bytes()
    for content in good[:-1000], flipped(good, 3000), b'':
        path.write_bytes(content)
        refused(lambda: data.get_mnist(str(path)), path, 'damaged', 'mnist.npz')
    for change in dict(x_test=X[60:] / 255), dict(y_train=y[:59]), dict(y_test=y[60:].astype(object)):
        np.savez(path, **{**arrays, **change})
        refused(lambda: data.get_mnist(str(path)), path, 'mnist.npz')
    np.savez(path, X)
    refused(lambda: data.get_mnist(str(path)), path, 'x_train')


@cases('name, damage, problem', {
    'empty': (IMAGES, lambda b: b'', 'damaged'),
    'cut in the data': (IMAGES, lambda b: b[:-1], 'cut short'),
    'trailing byte': (IMAGES, lambda b: b + b'\0', 'left over'),
    'floats': (IMAGES, lambda b: b'\0\0\x0d\x03' + b[4:], 'float32'),
    '16 bits': (LABELS, lambda b: b'\0\0\x0b\x01' + b[4:], 'int16'),
    'labels given as images': (IMAGES, lambda b: idx(np.zeros(60, np.uint8)), '0x801'),
    'images given as labels': (LABELS, lambda b: idx(np.zeros((60, 28, 28), np.uint8)), '0x803'),
    'fewer labels': (LABELS, lambda b: idx(np.zeros(59, np.uint8)), '59 labels for 60 images'),
    'no pixels': (IMAGES, lambda b: idx(np.zeros((60, 28, 0), np.uint8)), '[60, 28, 0]'),
    'absurd size': (IMAGES, lambda b: b[:8] + b'\xff' * 8 + b[16:], '4294967295, 4294967295]'),
    'gzip cut short': (IMAGES, lambda b: gzip.compress(b)[:-20], 'damaged'),
    'gzip and more': (IMAGES, lambda b: gzip.compress(b) + b'more', 'damaged'),
    'web page': (IMAGES, lambda b: b'\n<!DOCTYPE html>', 'this is a web page'),
    'XML': (LABELS, lambda b: b'\xef\xbb\xbf<?xml version="1.0"?><Error>', "mnist_path = ''"),
    'Git LFS': (IMAGES, lambda b: b'version https://git-lfs.github.com/spec/v1\n', 'git lfs pull')})
def test_damaged_idx(tmp_path, name, damage, problem):
    write_mnist(tmp_path)
    path = tmp_path / name
    path.write_bytes(damage(path.read_bytes()))
    refused(lambda: data.get_mnist(str(tmp_path)), path, problem)


@pytest.mark.parametrize('name', [LABELS, 't10k-images-idx3-ubyte', 't10k-labels-idx1-ubyte'])
def test_missing_idx(tmp_path, name):
    write_mnist(tmp_path)
    (tmp_path / name).unlink()
    refused(lambda: data.get_mnist(str(tmp_path)), tmp_path / name, 'no such file', 'mnist_path')


@pytest.mark.parametrize('path', ['', 'train.csv', 'mnist.pkl.gz', 'nowhere', 'no/where'])
def test_no_mnist_there(tmp_path, path):
    """The folder itself has Kaggle's CSV and pickles."""
    for name in 'train.csv', 'mnist.pkl.gz':
        (tmp_path / name).write_text('label,pixel0')
    refused(lambda: data.get_mnist(str(tmp_path / path)), tmp_path / path, IMAGES, 'mnist.npz', 'CSV', 'not read')


def test_what_this_user_may_not_read():
    with tempfile.TemporaryDirectory() as folder:  # pytest's own is root's alone
        os.chmod(folder, 0o755)
        write_mnist(pathlib.Path(folder))
        for path in f'{folder}/{LABELS}', folder:
            os.chmod(path, 0)
            user = os.geteuid()
            os.seteuid(user or 65534)  # root may read all
            try:
                refused(lambda: data.get_mnist(folder), path, 'ermission denied')
            finally:
                os.seteuid(user)
                os.chmod(path, 0o755)


def test_batches():
    """Each level is the float that NumPy makes of it; classes are positions among the sorted labels."""
    X, _ = random_images(3, (1, 64, 64))
    assert len(np.unique(X)) == 256
    batches = data.PixelIter(X[:], np.array([7, 200, 3]), 3, 3, mx.cpu(1), conditional=True)
    assert batches.class_names == ['3', '7', '200'] and batches.num_data == 3
    assert_equal([batches.classes], [np.array([1, 2, 0], np.int32)])
    expected = [np.tile(X.astype(np.float32) / (255.0 / 2) - 1.0, (1, 3, 1, 1)), np.array([1, 2, 0], np.float32)]
    batch = next(batches)
    assert_equal([array.asnumpy() for array in batch.data], expected)
    assert [(told.shape, told.dtype) for told in batches.provide_data] == [(a.shape, a.dtype) for a in batch.data]
    latents = data.RandIter(5, 7, mx.cpu(1), batches.classes)  # the textbook judges what is in them
    told, = latents.provide_data
    rbatch = next(latents)
    assert (told.name, told.shape) == ('rand', (5, 10, 1, 1)) == ('rand', rbatch.data[0].shape)
    assert all(array.context == mx.cpu(1) for array in batch.data + rbatch.data + rbatch.label)
    X[:] = 255  # seen by the iterator: it has no copy of its own, float or not
    batches.reset()
    assert (next(batches).data[0].asnumpy() == 1).all()


def test_an_epoch_can_begin_in_its_middle():
    """As a run does that resumes; the last batch is filled up from the start."""
    X, y = random_images(7, (1, 64, 64))
    batches = data.PixelIter(X, y, 3)
    batches.begin_epoch(0)
    whole = [batch.data[0].asnumpy() for batch in batches]
    assert_equal([whole[2]], [np.concatenate([X[6:], X[:2]]).astype(np.float32) / (255.0 / 2) - 1.0])
    for iteration in 2, 0, 1, 3:
        batches.begin_epoch(1, iteration)
        assert_equal([batch.data[0].asnumpy() for batch in batches], whole[iteration:])


def test_the_checksum_is_of_all_pixels_and_labels():
    X, y = random_images(8, (1, 64, 64))
    other_X, other_y = X.copy(), y.copy()
    other_X[-1, 0, -1, -1] ^= 1
    other_y[0] ^= 1
    sums = [data.PixelIter(*labelled, 2, rank=rank, workers=2).checksum
            for labelled in ((X, y), (other_X, y), (X, other_y)) for rank in (0, 1)]
    assert sums[::2] == sums[1::2] and len(set(sums)) == 3


ask = functools.partial(dcgan.Settings, batch_size=10, ctx=(mx.cpu(),), conditional=True)


def test_two_workers_share_the_data(tmp_path):
    """Each has half of the images, and knows the classes of all: labels 3 and 7 are positions 0 and 1."""
    X, _, y, _ = prepared(*write_mnist(tmp_path, labels=[3, 7]), 60)
    loaded = [data.load_data(ask(mnist_path=str(tmp_path)), rank, 2) for rank in (0, 1)]
    pixels = []
    for name, batches, (all_X, classes, class_names) in loaded:
        assert (name, batches.num_data, batches.class_names, class_names) == ('mnist', 30, ['3', '7'], ['3', '7'])
        assert_equal([all_X, classes, batches.classes], [X] + [(y == 7).astype(np.int32)] * 2)
        found = list(batches)
        assert [batch.data[0].shape for batch in found] == [(10, 3, 64, 64)] * 3
        pixels += [np.rint(batch.data[0].asnumpy() * 127.5 + 127.5)[:, :1] for batch in found]
    assert np.array_equal(np.concatenate(pixels), X)
    refused(lambda: data.load_data(ask(mnist_path=str(tmp_path), batch_size=31), 0, 2), 'batch_size = 31', '30 images')


no_space = OSError(28, 'No space left on device')


def test_digits_instead(monkeypatch, capsys):
    """Without MNIST: only if the user has not named a folder, and there is one process."""
    monkeypatch.setattr(data, '_from_openml', mock.Mock(side_effect=no_space))
    name, batches, _ = data.load_data(ask())
    assert (name, batches.num_data, len(batches.class_names)) == ('digits', 1500, 10)
    assert "No space left on device. Training on scikit-learn's 8x8 digits" in capsys.readouterr().out
    for changes, workers in (dict(mnist_path='nowhere'), 1), (dict(), 2):
        with pytest.raises(OSError):
            data.load_data(ask(**changes), 0, workers)


@pytest.fixture
def openml(tmp_path, monkeypatch):
    """Stands for scikit-learn's `fetch_openml`; `problem` is what it raises."""
    X, y = random_images(210)
    server = types.SimpleNamespace(expected=prepared(X, y, 180), problem=None, home=tmp_path / 'home')

    def fetch(*args, **kwargs):
        asked = inspect.signature(fetch_openml).bind(*args, **kwargs).arguments
        assert (asked['name'], asked['version'], asked['as_frame']) == ('mnist_784', 1, False)
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
    """Fetched once: what was parsed is kept, and made again if it is damaged. In between nothing is said."""
    assert_equal(data.get_mnist(labels=True), openml.expected)
    out, err = capfd.readouterr()
    assert 'OpenML' in out and not err
    kept, = openml.home.glob('joblib/**/output.pkl')
    content = kept.read_bytes()
    for damaged in b'', content[:-1], flipped(content, len(content) // 2):
        for problem in OSError('the server is gone'), None:
            openml.problem = problem
            assert_equal(data.get_mnist(labels=True), openml.expected)
            assert capfd.readouterr() == ('', '')
        kept.write_bytes(damaged)
        assert_equal(data.get_mnist(labels=True), openml.expected)
        assert capfd.readouterr().err == ''


@pytest.mark.parametrize('problem', [
    urllib.error.HTTPError('', 500, 'a fault', {}, None), TimeoutError('timed out'), EOFError('ended too soon'),
    ValueError('md5 checksum does not match'), no_space], ids=str)
def test_openml_fails(openml, problem):
    """In one line; and nothing bad is kept."""
    openml.problem = problem
    refused(data.get_mnist, 'OpenML', 'mnist_path', data.last_line(problem))
    openml.problem = None
    assert_equal(data.get_mnist(labels=True), openml.expected)


def test_openml_cannot_be_kept(openml, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(joblib.numpy_pickle, 'dump', mock.Mock(side_effect=no_space))
        assert_equal(data.get_mnist(labels=True), openml.expected)
    monkeypatch.setenv('SCIKIT_LEARN_DATA', '/proc/self')  # not even root can write there
    refused(data.get_mnist, '/proc/self', 'SCIKIT_LEARN_DATA', 'mnist_path')
    monkeypatch.delenv('SCIKIT_LEARN_DATA')
    monkeypatch.delenv('HOME')
    monkeypatch.setattr('pwd.getpwuid', mock.Mock(side_effect=KeyError))  # as a container may have it
    monkeypatch.chdir(tmp_path)
    refused(data.get_mnist, 'no home folder', 'SCIKIT_LEARN_DATA', 'mnist_path')
    assert not os.path.exists('~')
