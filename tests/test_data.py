"""data.py: what every source yields, and every way in which what it reads can be wrong."""
import functools
import gzip
import hashlib
import io
import json
import socket
import struct
import types
import urllib.error
from unittest import mock

import data

import cv2
import joblib
import mxnet as mx
import numpy as np
import pytest
from conftest import REAL_MNIST, cases, needs_mnist, refused
from sklearn.datasets import _openml, fetch_openml, load_digits

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


@cases('name, damage, problem', {
    'empty': (IMAGES, lambda b: b'', 'damaged'),
    'cut in the header': (IMAGES, lambda b: b[:15], 'damaged'),
    'cut in the data': (IMAGES, lambda b: b[:-1], 'cut short'),
    'trailing byte': (IMAGES, lambda b: b + b'\0', 'left over'),
    'wrong magic': (IMAGES, lambda b: b'\0\0\x0d\x03' + b[4:], '0xd03'),
    'labels given as images': (IMAGES, lambda b: idx(np.zeros(60, np.uint8)), '0x801'),
    'images given as labels': (LABELS, lambda b: idx(np.zeros((60, 28, 28), np.uint8)), '0x803'),
    'fewer labels': (LABELS, lambda b: idx(np.zeros(59, np.uint8)), '59 labels for 60 images'),
    'no pixels': (IMAGES, lambda b: idx(np.zeros((60, 28, 0), np.uint8)), '[60, 28, 0]'),
    'absurd size': (IMAGES, lambda b: b[:8] + b'\xff' * 8 + b[16:], '4294967295, 4294967295]'),
    'no images': (IMAGES, lambda b: idx(np.zeros((0, 28, 28), np.uint8)), '[0, 28, 28]'),
    'absurd count': (IMAGES, lambda b: b[:4] + b'\xff' * 4 + b[8:], '4294967295'),
    'gzip cut short': (IMAGES, lambda b: gzip.compress(b)[:-20], 'damaged'),
    'gzip with a flipped byte': (IMAGES, lambda b: flipped(gzip.compress(b), 1000), 'damaged'),
    'gzip with a wrong checksum': (IMAGES, lambda b: flipped(gzip.compress(b), -8), 'damaged'),
    'gzip and more': (IMAGES, lambda b: gzip.compress(b) + b'more', 'damaged')})
def test_damaged_idx(tmp_path, name, damage, problem):
    write_mnist(tmp_path)
    path = tmp_path / name
    path.write_bytes(damage(path.read_bytes()))
    refused(lambda: data.get_mnist(str(tmp_path)), path, problem)


@pytest.mark.parametrize('name', [IMAGES, LABELS, 't10k-images-idx3-ubyte', 't10k-labels-idx1-ubyte', 'the folder'])
def test_missing_idx(tmp_path, name):
    write_mnist(tmp_path)
    (tmp_path / name).unlink(missing_ok=name == 'the folder')
    missing = tmp_path / 'nowhere' / IMAGES if name == 'the folder' else tmp_path / name
    refused(lambda: data.get_mnist(str(missing.parent)), missing, 'no such file', 'mnist_path')


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


def test_digits_instead(monkeypatch, capsys):
    """Without MNIST: only where a person has not named a folder, wants it so, and there is one process."""
    monkeypatch.setattr(data, '_from_openml', no_space)
    name, batches, _ = data.load_data(ask())
    assert (name, batches.num_data, len(batches.class_names)) == ('digits', 1500, 10)
    assert "No space left on device. Training on scikit-learn's 8x8 digits" in capsys.readouterr().out
    for changes, workers in (dict(mnist_path='nowhere'), 1), (dict(fallback=''), 1), (dict(), 2):
        with pytest.raises(OSError):
            data.load_data(ask(**changes), 0, workers)


@pytest.fixture(scope='module')
def mnist_784():
    """210 images, their digits, by address the pages with which OpenML serves them, and the last one's wrong."""
    X, y = random_images(210)
    columns = [f'pixel{i}' for i in range(1, 785)]
    rows = '\n'.join(','.join(map(str, [*image, digit])) for image, digit in zip(X.reshape(210, 784), y))
    arff = ''.join(['@RELATION mnist_784\n', *(f'@ATTRIBUTE {name} real\n' for name in columns),
                    '@ATTRIBUTE class {0,1,2,3,4,5,6,7,8,9}\n@DATA\n', rows]).encode()
    feature = {'data_type': 'numeric', 'is_target': 'false', 'is_ignore': 'false', 'is_row_identifier': 'false',
               'number_of_missing_values': '0'}
    features = [dict(feature, index=str(i), name=name) for i, name in enumerate(columns)]
    features.append(dict(feature, index='784', name='class', data_type='nominal', is_target='true',
                         nominal_value=list('0123456789')))
    about = {'id': '554', 'name': 'mnist_784', 'version': '1', 'format': 'ARFF', 'status': 'active',
             'description': 'handwritten', 'file_id': '52667', 'md5_checksum': hashlib.md5(arff).hexdigest(),
             'url': 'https://www.openml.org/data/v1/download/52667/mnist_784.arff'}
    pages = {
        'data_name/mnist_784/limit/2/data_version/1': {'data': {'dataset': [dict(about, did=554)]}},
        'data/features/554': {'data_features': {'feature': features}},
        'data/qualities/554': {'data_qualities': {'quality': [{'name': 'NumberOfInstances', 'value': '210.0'}]}},
        'json/data/554': {'data_set_description': about}}
    pages = {address: json.dumps(page).encode() for address, page in pages.items()}
    pages['download'] = gzip.compress(arff)
    wrong = gzip.compress(arff.replace(b',7,', b',8,', 1))
    return X, y, pages, wrong


@pytest.fixture
def openml(mnist_784, monkeypatch, tmp_path):
    """Answers scikit-learn as OpenML does; `faults`: part of an address -> what goes wrong there."""
    X, y, pages, wrong = mnist_784
    server = types.SimpleNamespace(X=X, y=y, pages=dict(pages), wrong=wrong, faults={}, home=tmp_path / 'home',
                                   waits=[])  # for how many seconds a request waits that is not answered

    def urlopen(request):
        kind = next(kind for kind in server.pages if kind in request.full_url)
        fault, page = server.faults.get(kind), server.pages[kind]
        if fault in ('silent', 'stalled'):
            server.waits.append(socket.getdefaulttimeout())
        if isinstance(fault, int):
            raise urllib.error.HTTPError(request.full_url, fault, 'a fault', {}, None)
        if fault == 'silent':
            raise TimeoutError('timed out')
        answer = io.BytesIO(page[:len(page) // 2] if fault in ('cut', 'stalled') else page)
        answer.info = lambda: {'Content-Encoding': 'gzip' * (kind == 'download')}
        if fault == 'stalled':
            answer.read = mock.Mock(side_effect=[answer.read(), TimeoutError('timed out')])
        return answer

    monkeypatch.setattr(_openml, 'urlopen', urlopen)
    monkeypatch.setattr(_openml.time, 'sleep', lambda seconds: None)
    monkeypatch.setenv('SCIKIT_LEARN_DATA', str(server.home))
    yield server
    socket.setdefaulttimeout(None)


def test_openml(openml, monkeypatch, capsys):
    """Fetched by scikit-learn, once: what was parsed is kept, and made again where it is damaged."""
    printed, urlopen = [], _openml.urlopen
    monkeypatch.setattr(_openml, 'urlopen', lambda *args: printed.append(capsys.readouterr().out) or urlopen(*args))
    expected = prepared(openml.X, openml.y, 180)
    assert_equal(data.get_mnist(labels=True), expected)
    assert 'OpenML' in printed[0]  # before it does anything
    openml.pages.clear()
    assert_equal(data.get_mnist(labels=True), expected)  # the server is gone
    assert not capsys.readouterr().out
    kept, = openml.home.glob('joblib/**/output.pkl')
    content = kept.read_bytes()
    for damaged in b'', content[:-1], flipped(content, len(content) // 2), np.random.RandomState(0).bytes(2000):
        kept.write_bytes(damaged)
        assert_equal(data.get_mnist(labels=True), expected)  # from what scikit-learn has kept
        capsys.readouterr()
        data.get_mnist()
        assert not capsys.readouterr().out  # it is whole again


def test_a_damaged_copy_of_scikit_learns(openml):
    fetch_openml('mnist_784', version=1, as_frame=False, parser='liac-arff', data_home=str(openml.home))
    next(path for path in openml.home.glob('**/*.gz') if 'download' in str(path)).write_bytes(openml.wrong)
    assert_equal(data.get_mnist(labels=True), prepared(openml.X, openml.y, 180))


@pytest.mark.parametrize('kind, fault, reason', [
    ('data_name', 500, '500'), ('data_name', 412, 'not found'), ('json/data/554', 404, '404'),
    ('download', 500, '500'), ('download', 'cut', 'ended'), ('download', 'checksum', 'checksum'),
    ('data_name', 'silent', 'timed out'), ('download', 'stalled', 'timed out')])
def test_openml_fails(openml, kind, fault, reason):
    """In one line and not after minutes; and nothing bad is kept."""
    kind = next(page for page in openml.pages if kind in page)
    good = openml.pages[kind]
    if fault == 'checksum':
        openml.pages[kind] = openml.wrong
    else:
        openml.faults[kind] = fault
    refused(data.get_mnist, 'OpenML', 'mnist_path', reason)
    assert sum(openml.waits) <= 90 and all(openml.waits)
    openml.faults.clear()
    openml.pages[kind] = good
    assert len(data.get_mnist()[0]) == 180


def no_space(*args, **kwargs):
    raise OSError(28, 'No space left on device')


@pytest.mark.filterwarnings('ignore:Unable to cache')
def test_openml_cannot_be_kept(openml, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(joblib.numpy_pickle, 'dump', no_space)
        assert len(data.get_mnist()[0]) == 180
    monkeypatch.setenv('SCIKIT_LEARN_DATA', '/proc/self')  # where not even root can write
    refused(data.get_mnist, '/proc/self', 'SCIKIT_LEARN_DATA', 'mnist_path')
