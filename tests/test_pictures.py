"""data.py: folders of pictures of every kind, .rec files from elsewhere, and the batches that come of both."""
import concurrent.futures
import itertools
import os
import pathlib
import signal
import struct
import subprocess
import sys
import time
import types

import data

import cv2
import mxnet as mx
import numpy as np
import pytest
from conftest import ROOT

COLOURS = np.array(list(itertools.product((20, 120, 220), (20, 120, 220), (70, 170))))[:14]  # RGB: as BGR none is one
SIZES = [(120, 90), (300, 200), (200, 300), (64, 64), (257, 500)]


def cases(names, table):
    return pytest.mark.parametrize(names, list(table.values()), ids=list(table))


def plain(colour, size=(90, 120)):
    """A picture of one colour, BGR."""
    return np.full(size + (3,), colour[::-1], np.uint8)


def encoded(image, ending='.jpg', *options):
    return cv2.imencode(ending, image, list(options))[1].tobytes()


def settings(path, **changes):
    return types.SimpleNamespace(**{**dict(
        imgnet_path=str(path), out=str(pathlib.Path(path).parent / 'out'), batch_size=2, nc=3, ctx=(mx.cpu(),),
        augment=True, conditional=False), **changes})


def write_folder(folder, pictures):
    """Pictures by their names, of which a sub-folder may be part; a picture is an array or a file's bytes."""
    for name, picture in pictures.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture if isinstance(picture, bytes) else encoded(picture))
    return folder


@pytest.fixture
def photos(tmp_path):
    """Fourteen photos of one colour each; half of them in a sub-folder."""
    names = [f'deeper/{i}.jpg' if i % 2 else f'{i}.jpg' for i in range(14)]
    return write_folder(tmp_path / 'photos', {
        name: plain(colour, SIZES[i % 5]) for i, (name, colour) in enumerate(zip(names, COLOURS))})


def packed(folder):
    """The .rec files beside a folder and in `out`."""
    found = [*folder.parent.glob('*.rec*'), *(folder.parent / 'out').glob('*.rec*')]
    return sorted(path for path in found if path.is_file())


def epoch(batches):
    """One epoch as an array, without what only fills up the last batch."""
    number = -(-batches.num_data // batches.batch_size)
    return np.concatenate([next(batches).data[0].asnumpy() for _ in range(number)])[:batches.num_data]


def colours(images):
    """Which of COLOURS the images are."""
    means = images.mean(axis=(2, 3)) * 127.5 + 127.5
    distances = abs(means[:, np.newaxis] - COLOURS).max(axis=2)
    assert distances.min(axis=1).max() < 10
    return distances.argmin(axis=1).tolist()


def records(path):
    """What MXNet's own reader finds in a .rec: [(header, the picture)]."""
    reader = mx.recordio.MXRecordIO(str(path), 'r')
    return [mx.recordio.unpack_img(record, cv2.IMREAD_COLOR) for record in iter(reader.read, None)]


def pack(image, label=0., labels=()):
    """A record with one label, or with several, as MXNet's `pack` writes it; with several it needs NumPy below 2.3."""
    return struct.pack(f'<IfQQ{len(labels)}f', len(labels), label, 0, 0, *labels) + image


def write_rec(path, packs):
    writer = mx.recordio.MXRecordIO(str(path), 'w')
    for record in packs:
        writer.write(record)
    writer.close()
    return str(path)


def refused(call, *words):
    """A ValueError or OSError of one line, which has all the words."""
    with pytest.raises((ValueError, OSError)) as error:
        call()
    assert '\n' not in str(error.value)
    for word in words:
        assert str(word) in str(error.value)


# ---------------------------------------------------------------- packing a folder

def test_a_folder_is_packed_once(photos, capsys):
    batches = data.load_pictures(settings(photos, batch_size=4))
    assert batches.num_data == 14 and batches.class_names == [] and batches.classes is None
    path, = packed(photos)
    assert '14 pictures packed' in capsys.readouterr().out
    names = sorted(path for path in photos.rglob('*') if path.is_file())
    order = [names[i] for i in np.random.RandomState(1234).permutation(14)]
    found = records(path)
    assert colours(epoch(batches)) == [int(name.stem) for name in order]
    for (_, image), name in zip(found, order):
        height, width = SIZES[int(name.stem) % 5]
        shrink = min(1, 256 / min(height, width))
        assert image.shape == (round(height * shrink), round(width * shrink), 3)
    made = path.stat().st_mtime_ns
    again = data.load_pictures(settings(photos))
    assert again.checksum == batches.checksum
    assert packed(photos) == [path] and path.stat().st_mtime_ns == made and not capsys.readouterr().out


@cases('change', {
    'one more': lambda folder: write_folder(folder, {'new.jpg': plain(COLOURS[0])}),
    'one less': lambda folder: (folder / '0.jpg').unlink(),
    'a new name': lambda folder: (folder / '0.jpg').rename(folder / 'another.jpg'),
    'touched': lambda folder: os.utime(folder / '0.jpg', (1, 1)),
    'to another class': lambda folder: (folder / '0.jpg').rename(folder / 'deeper' / '0.jpg')})
def test_a_folder_that_has_changed(photos, change):
    data.load_pictures(settings(photos))
    before, = packed(photos)
    change(photos)
    data.load_pictures(settings(photos))
    after, = packed(photos)  # the old one is gone
    assert after != before
    pictures = [path for path in photos.rglob('*') if path.is_file()]
    assert len(records(after)) == len(pictures)


def test_what_does_not_count(photos):
    """Hidden files, and the pictures that the program itself writes if `out` lies in the folder."""
    s = settings(photos, out=str(photos / 'out'))
    data.load_pictures(s)
    before, = packed(photos)
    write_folder(photos, {'._0.jpg': b'macOS', '.cache/a.jpg': plain(COLOURS[0]), 'out/gout.png': plain(COLOURS[0])})
    data.load_pictures(s)
    assert packed(photos) == [before]


def test_no_file_of_others_is_touched(photos):
    ends = '', '-old', '-0123456789abcdef', 'x-dcgan-0123456789abcdef', '-dcgan-0123456789abcdeg'
    others = [photos.parent / f'photos{end}.rec' for end in ends]
    for path in others:
        path.write_bytes(b'mine')
    data.load_pictures(settings(photos))
    write_folder(photos, {'new.jpg': plain(COLOURS[0])})
    data.load_pictures(settings(photos))
    assert [path.read_bytes() for path in others] == [b'mine'] * 5
    assert len(packed(photos)) == 6


@cases('end', {'SIGKILL': signal.SIGKILL, 'Ctrl-C': signal.SIGINT, 'SIGTERM': signal.SIGTERM})
def test_killed_while_packing(photos, end):
    code = (f'import data, time, types, signal\nfrom mxnet import cpu\nsmall = data._small_jpeg\n'
            f'signal.signal(signal.SIGINT, signal.default_int_handler)\n'
            f'def slow(path):\n    print("at work", flush=True)\n    time.sleep(0.5)\n    return small(path)\n'
            f'data._small_jpeg = slow\ns = types.SimpleNamespace(**{vars(settings(photos, ctx=None))!r})\n'
            f's.ctx = (cpu(),)\ndata.load_pictures(s)')
    with subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          cwd=ROOT) as process:
        while 'at work' not in process.stdout.readline():
            assert process.poll() is None
        assert [path.suffix for path in packed(photos)] == ['.tmp']
        began = time.monotonic()
        process.send_signal(end)
        process.wait(60)
        assert process.returncode != 0 and time.monotonic() - began < 2.5  # fourteen would take longer on one core
    if end == signal.SIGINT:
        assert not packed(photos)
    assert len(epoch(data.load_pictures(settings(photos)))) == 14
    assert [path.suffix for path in packed(photos)] == ['.rec']


def test_a_full_disk(photos, monkeypatch):
    def no_space(*args):
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as patch:
        patch.setattr(os, 'fsync', no_space)
        refused(lambda: data.load_pictures(settings(photos)), 'No space left')
    assert not packed(photos)


def test_a_folder_whose_parent_cannot_be_written(photos, monkeypatch):
    monkeypatch.setattr(os, 'access', lambda path, mode: str(path) != str(photos.parent))
    for _ in range(2):
        assert data.load_pictures(settings(photos)).num_data == 14
        path, = packed(photos)
        assert path.parent.name == 'out'
    refused(lambda: data.load_pictures(settings(photos, out='/proc/self/out')), '/proc/self/out')


def test_two_pack_at_once(photos, monkeypatch):
    """The second waits for the first, and takes what it has made. (Two threads: a lock tells open files apart.)"""
    done, small = [], data._small_jpeg

    def slow(path):
        time.sleep(0.05)
        done.append(path)
        return small(path)

    monkeypatch.setattr(data, '_small_jpeg', slow)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        made = list(pool.map(lambda _: data._pack(str(photos), str(photos.parent / 'out'), 1)[0], range(2)))
    assert [str(path) for path in packed(photos)] == [made[0]] and made[0] == made[1] and len(done) == 14
    assert len(records(made[0])) == 14


@pytest.mark.parametrize('name', ['my photos', 'été', 'a#1', 'a;b', 'a?b', '[a]', 'a*', 'a.rec', "it's", 'a\udcff'])
def test_folders_and_files_of_any_name(tmp_path, name):
    folder = write_folder(tmp_path / name, {f'{name} {i}.jpg': plain(COLOURS[i]) for i in range(4)})
    assert sorted(colours(epoch(data.load_pictures(settings(folder))))) == [0, 1, 2, 3]
    write_folder(folder, {f'{name}/5.jpg': plain(COLOURS[5]), 'broken \udcff': b''})
    assert sorted(colours(epoch(data.load_pictures(settings(folder))))) == [0, 1, 2, 3, 5]
    assert len(packed(folder)) == 1


def test_nothing_to_read(tmp_path):
    (tmp_path / 'photos').mkdir()
    refused(lambda: data.load_pictures(settings(tmp_path / 'photos')), tmp_path / 'photos', 'no picture')
    write_folder(tmp_path / 'photos', {'letter.txt': b'Dear Ann', 'a.jpg': b''})
    refused(lambda: data.load_pictures(settings(tmp_path / 'photos')), tmp_path / 'photos', 'no picture')
    assert not packed(tmp_path / 'photos')
    write_folder(tmp_path / 'photos', {'b.jpg': plain(COLOURS[0])})
    refused(lambda: data.load_pictures(settings(tmp_path / 'photos')), 'has 1 pictures', 'batch of 2')
    refused(lambda: data.load_pictures(settings(tmp_path / 'nowhere')), tmp_path / 'nowhere', 'no such file')


def exif(jpeg, orientation):
    """A JPEG with EXIF data of this orientation."""
    tiff = b'Exif\0\0' + b'MM\0*' + struct.pack('>IHHHIHHI', 8, 1, 0x112, 3, 1, orientation, 0, 0)
    return jpeg[:2] + b'\xff\xe1' + struct.pack('>H', len(tiff) + 2) + tiff + jpeg[2:]


def png_exif(png, orientation):
    """A PNG with EXIF data of this orientation."""
    content = b'eXIf' + b'MM\0*' + struct.pack('>IHHHIHHI', 8, 1, 0x112, 3, 1, orientation, 0, 0)
    chunk = struct.pack('>I', len(content) - 4) + content + struct.pack('>I', data.zlib.crc32(content))
    return png[:33] + chunk + png[33:]  # after the header


def unassociated(image):
    """A TIFF whose alpha is declared as not multiplied into the colours, which cv2.imwrite does not do."""
    height, width, _ = image.shape
    tags = [(256, width), (257, height), (258, 8), (259, 1), (262, 2), (273, 8), (277, 4), (278, height),
            (279, image.size), (338, 2)]
    bits = 8 + image.size
    content = b'II*\0' + struct.pack('<I', bits + 8) + image[:, :, [2, 1, 0, 3]].tobytes()
    content += struct.pack('<5H', 8, 8, 8, 8, len(tags))
    for tag, value in tags:
        content += struct.pack('<HHII', tag, 3, 4, bits) if tag == 258 else struct.pack('<HHII', tag, 4, 1, value)
    return content + bytes(4)


QUARTERS = np.array([[(220, 20, 70), (20, 220, 70)], [(20, 20, 170), (120, 120, 70)]], np.uint8)  # BGR
PICTURE = QUARTERS.repeat(40, 0).repeat(60, 1)
GREY = PICTURE[:, :, :1]
HIDING = np.dstack([PICTURE, np.full(PICTURE.shape[:2], 255, np.uint8)])
HIDING[:40, :60, 3] = 0
WHITE = PICTURE.copy()
WHITE[:40, :60] = 255
HALF = np.dstack([PICTURE, np.full(PICTURE.shape[:2], 128, np.uint8)])
OVER_WHITE = (PICTURE.astype(float) * 128 / 255 + 127).round().astype(np.uint8)


@cases('content, expected', {
    'JPEG': (encoded(PICTURE), PICTURE),
    'progressive JPEG': (encoded(PICTURE, '.jpg', cv2.IMWRITE_JPEG_PROGRESSIVE, 1), PICTURE),
    'JPEG with more behind it': (encoded(PICTURE) + bytes(999), PICTURE),
    'PNG': (encoded(PICTURE, '.png'), PICTURE),
    'WebP': (encoded(PICTURE, '.webp'), PICTURE),
    'TIFF': (encoded(PICTURE, '.tif'), PICTURE),
    'BMP': (encoded(PICTURE, '.bmp'), PICTURE),
    'grey JPEG': (encoded(GREY), GREY.repeat(3, 2)),
    'grey PNG': (encoded(GREY, '.png'), GREY.repeat(3, 2)),
    'PNG of 16 bits': (encoded(PICTURE.astype(np.uint16) * 257, '.png'), PICTURE),
    'TIFF of 16 bits': (encoded(PICTURE.astype(np.uint16) * 257, '.tif'), PICTURE),
    'grey PNG of 16 bits': (encoded(GREY.astype(np.uint16) * 257, '.png'), GREY.repeat(3, 2)),
    'turned JPEG': (exif(encoded(PICTURE), 6), np.rot90(PICTURE, 3)),
    'mirrored JPEG': (exif(encoded(PICTURE), 2), PICTURE[:, ::-1]),
    'transparent PNG': (encoded(HIDING, '.png'), WHITE),
    'transparent TIFF': (encoded(HIDING, '.tif'), WHITE),
    'transparent WebP': (encoded(HIDING, '.webp', cv2.IMWRITE_WEBP_QUALITY, 101), WHITE),
    'transparent PNG of 16 bits': (encoded(HIDING.astype(np.uint16) << 8 | 99, '.png'), WHITE),
    'half transparent PNG': (encoded(HALF, '.png'), OVER_WHITE),
    'half transparent TIFF': (encoded(HALF, '.tif'), OVER_WHITE),
    'half transparent TIFF that libtiff multiplies': (unassociated(HALF), OVER_WHITE),
    'turned transparent PNG': (png_exif(encoded(HIDING, '.png'), 6), np.rot90(WHITE, 3))})
def test_kinds_of_pictures(tmp_path, content, expected):
    folder = write_folder(tmp_path / 'photos', {'a.jpg': content, 'b': content})  # names do not matter
    batches = data.load_pictures(settings(folder, augment=False))
    path, = packed(folder)
    for _, image in records(path):
        assert image.shape == expected.shape
        inner = np.ix_(*(np.r_[10:30, size - 30:size - 10] for size in image.shape[:2]))  # JPEG's edges are not sharp
        assert abs(image[inner].astype(int) - expected[inner]).max() < 12
    side = min(expected.shape[:2])
    top, left = ((size - side) // 2 for size in expected.shape[:2])
    square = cv2.resize(expected[top:top + side, left:left + side], (64, 64), interpolation=cv2.INTER_AREA)
    difference = epoch(batches)[0] - (square[:, :, ::-1].transpose(2, 0, 1) / 127.5 - 1)
    assert abs(difference).mean() < 0.05


@pytest.mark.skipif(not cv2.haveImageWriter('a.gif'), reason='this OpenCV does not read GIF')
def test_first_picture_of_an_animation(tmp_path):
    moving = cv2.Animation()
    moving.frames = [cv2.cvtColor(plain(COLOURS[i]), cv2.COLOR_BGR2BGRA) for i in (0, 5, 9)]
    moving.durations = [100] * 3
    for ending in ('gif', 'webp'):
        (tmp_path / 'photos').mkdir(exist_ok=True)
        cv2.imwriteanimation(str(tmp_path / 'photos' / f'a.{ending}'), moving)
    images = epoch(data.load_pictures(settings(tmp_path / 'photos', batch_size=1)))
    assert len(images) == 2 and abs(images * 127.5 + 127.5 - COLOURS[0][:, np.newaxis, np.newaxis]).mean() < 20


NOISE = np.random.RandomState(0).randint(0, 256, (90, 120, 3), np.uint8)


@cases('content', {
    'empty': b'', 'one byte': b'\xff', 'text': b'These are my holiday photos.\n' * 99, 'zeros': bytes(5000),
    'random': np.random.RandomState(0).bytes(5000), 'JPEG with nothing behind its start': b'\xff\xd8\xff\xe0',
    **{f'{ending} cut to {share} of 10': encoded(NOISE, ending)[:len(encoded(NOISE, ending)) * share // 10]
       for ending in ('.jpg', '.png', '.webp', '.bmp') for share in (3, 9)},
    'cut TIFF': encoded(NOISE, '.tif')[:5000],
    'PNG with a wrong checksum': encoded(NOISE, '.png')[:5000] + b'wrong' + encoded(NOISE, '.png')[5005:],
    'bomb': struct.pack('>8sI4sIIBBBBB', b'\x89PNG\r\n\x1a\n', 13, b'IHDR', 60000, 60000, 8, 2, 0, 0, 0)})
def test_damaged_pictures(tmp_path, capfd, content):
    good = {f'{i}.jpg': plain(COLOURS[i]) for i in range(3)}
    folder = write_folder(tmp_path / 'photos', {**good, 'b/broken.jpg': content})
    assert sorted(colours(epoch(data.load_pictures(settings(folder))))) == [0, 1, 2]
    out, err = capfd.readouterr()
    assert 'skipped' in out and 'broken.jpg' in out and not err


def test_a_png_that_promises_gigabytes(monkeypatch):
    """OpenCV would allocate them, and only then find that the file is shorter."""
    image = encoded(NOISE, '.png')
    assert data._decode(image).shape == NOISE.shape and data._decode(image + bytes(99)).shape == NOISE.shape
    monkeypatch.setattr(cv2, 'imdecode', None)
    where = image.index(b'IDAT') - 4
    assert data._decode(image[:where] + b'\x7f' + image[where + 1:]) is None


def test_ten_are_named(tmp_path, capsys):
    broken = {f'{i:02}.txt': b'broken' for i in range(30)}
    folder = write_folder(tmp_path / 'photos', {**broken, 'a.jpg': plain(COLOURS[0]), 'b.jpg': plain(COLOURS[1])})
    os.mkfifo(folder / 'pipe')  # to open it would hang
    (folder / 'link.jpg').symlink_to('nowhere')
    data.load_pictures(settings(folder))
    out = capsys.readouterr().out
    assert out.count('.txt') == 10 and '2 pictures packed, 30 files skipped' in out


def test_extreme_shapes(tmp_path):
    shapes = (1, 1), (1, 3000), (3000, 1), (2000, 40), (70000, 2)  # the last is longer than a JPEG may be
    folder = write_folder(tmp_path / 'photos', {
        f'{i}.png': encoded(np.full(shape + (3,), 99, np.uint8), '.png') for i, shape in enumerate(shapes)})
    for augment in (True, False):
        images = epoch(data.load_pictures(settings(folder, augment=augment)))
        assert len(images) == 4 and abs(images * 127.5 + 127.5 - 99).max() < 3


def test_shrinks_by_averaging(tmp_path):
    """A checkerboard of single pixels is grey, not black or white or stripes."""
    board = (np.indices((1111, 1400)).sum(axis=0) % 2 * 255).astype(np.uint8)
    folder = write_folder(tmp_path / 'photos', {f'{i}.png': encoded(board, '.png') for i in range(2)})
    for source in (folder, write_rec(tmp_path / 'board.rec', [pack(encoded(board, '.png'))] * 2)):
        assert abs(epoch(data.load_pictures(settings(source)))).max() < 0.1


# ---------------------------------------------------------------- batches

def test_batches(photos):
    data.load_pictures(settings(photos))
    path = str(packed(photos)[0])
    batches = data.ImagenetIter(path, 4, (3, 64, 64), mx.cpu(1))
    told, = batches.provide_data
    assert (told.name, told.shape, told.dtype) == ('data', (4, 3, 64, 64), np.float32) and not batches.provide_label
    first = epoch(batches)
    assert sorted(colours(first)) == list(range(14))
    batches.reset()
    batch = next(batches)
    assert batch.data[0].context == mx.cpu(1) and batch.data[0].dtype == np.float32
    assert colours(batch.data[0].asnumpy()) == colours(first[:4])
    batches.reset()  # in the middle
    assert colours(epoch(batches)) == colours(first)
    every = [colours(next(batches).data[0].asnumpy()) for _ in range(9)]  # goes on without a reset
    assert every[:4] == every[4:8] and every[3][:2] == colours(first[12:]) and every[3][2:] == every[0][:2]
    again = data.ImagenetIter(path, 4, (3, 64, 64))
    again.skip(3)
    assert colours(next(again).data[0].asnumpy()) == every[3]
    again = data.ImagenetIter(path, 4, (3, 64, 64))
    assert (epoch(again) == first).all()  # the same crops in every run


def test_crops(tmp_path):
    """Black is -1 and white 1; the parts of one picture come in different crops, mirrored or not, or always as one."""
    ramp = np.linspace(0, 255, 300).astype(np.uint8)[np.newaxis, :, np.newaxis].repeat(200, 0).repeat(3, 2)
    ramp[:8], ramp[-8:] = 0, 255
    path = write_rec(tmp_path / 'ramp.rec', [pack(encoded(ramp, '.png'))] * 40)
    images = epoch(data.ImagenetIter(path, 40, (3, 64, 64)))
    assert images.min() >= -1 and images.max() <= 1
    rows = images[:, 0, 32]
    rising = rows[:, -1] > rows[:, 0]
    assert 8 <= rising.sum() <= 32
    width = abs(rows[:, -1] - rows[:, 0]) / 2 * 300 / 200  # of the crop, as a share of the shorter side
    assert 0.70 < width.min() < 0.80 and 0.93 < width.max() < 1.02
    batches = data.ImagenetIter(path, 40, (3, 64, 64), augment=False)
    images = np.concatenate([epoch(batches), epoch(batches)])
    assert (images == images[0]).all()
    assert abs(images[0, 0, 32, [0, -1]] - [-2 / 3, 2 / 3]).max() < 0.02
    assert images[0, 0, 0].max() == -1 and images[0, 0, -1].min() == 1


def test_grey(photos):
    images = epoch(data.load_pictures(settings(photos, nc=1)))
    assert images.shape == (14, 1, 64, 64)
    expected = sorted(COLOURS @ [0.299, 0.587, 0.114])
    assert np.allclose(sorted(images.mean(axis=(1, 2, 3)) * 127.5 + 127.5), expected, atol=3)


def test_workers(photos):
    refused(lambda: data.load_pictures(settings(photos), 0, 2), photos, 'once on one machine')
    assert not packed(photos)
    data.load_pictures(settings(photos))
    shares = [data.load_pictures(settings(photos, batch_size=3), rank, 4) for rank in range(4)]
    assert {share.num_data for share in shares} == {3} and len({share.checksum for share in shares}) == 1
    seen = sum((colours(epoch(share)) for share in shares), [])
    assert len(set(seen)) == 12
    refused(lambda: data.load_pictures(settings(photos, batch_size=4), 0, 4), 'has 3 pictures a worker', 'batch of 4')


def classes_of(batches):
    """The class of each image of an epoch, and its colour."""
    found = [next(batches) for _ in range(-(-batches.num_data // batches.batch_size))]
    classes = np.concatenate([batch.data[1].asnumpy() for batch in found])[:batches.num_data]
    return classes.tolist(), colours(np.concatenate([batch.data[0].asnumpy() for batch in found])[:batches.num_data])


def test_classes_by_sub_folders(tmp_path, capsys):
    pictures = {f'{["cat", "dog", "emu"][i % 3]}/{"x/" * (i % 2)}{i}.jpg': plain(COLOURS[i]) for i in range(12)}
    folder = write_folder(tmp_path / 'photos', {**pictures, 'bear/letter.txt': b'no bear', 'README.txt': b'classes'})
    data.load_pictures(settings(folder))
    capsys.readouterr()
    for rank in (0, 1):
        batches = data.load_pictures(settings(folder, conditional=True), rank, 2)
        assert batches.class_names == ['0', '1', '2'] and batches.classes.dtype == np.int32
        assert np.bincount(batches.classes).tolist() == [4, 4, 4]
        assert [(told.name, told.shape) for told in batches.provide_data] == [('data', (2, 3, 64, 64)), ('digit', (2,))]
        classes, seen = classes_of(batches)
        assert classes == [i % 3 for i in seen] == batches.classes[rank * 6:][:6].tolist()
        assert ('classes: 0 cat, 1 dog, 2 emu\n' in capsys.readouterr().out) == (rank == 0)
    write_folder(folder, {'stray.jpg': plain(COLOURS[0])})
    refused(lambda: data.load_pictures(settings(folder, conditional=True)), folder, 'sub-folder')


def test_classes_of_a_rec(tmp_path):
    labels = [7, 3, 7, 10.5, 3, 3]
    path = write_rec(tmp_path / 'a.rec', [pack(encoded(plain(COLOURS[i])), label) for i, label in enumerate(labels)])
    batches = data.ImagenetIter(path, 4, (3, 64, 64), conditional=True)
    assert batches.class_names == ['0', '1', '2'] and batches.classes.tolist() == [1, 0, 1, 2, 0, 0]
    assert classes_of(batches) == ([1, 0, 1, 2, 0, 0], list(range(6)))
    assert data.ImagenetIter(path, 4, (3, 64, 64)).classes is None


# ---------------------------------------------------------------- a .rec from elsewhere

SMALL = pack(encoded(np.full((40, 50, 3), 99, np.uint8)))
SMALL_REC = (struct.pack('<II', 0xced7230a, len(SMALL)) + SMALL + bytes(-len(SMALL) % 4)) * 8
LAST = len(SMALL_REC) * 7 // 8


def test_small_rec(tmp_path):
    assert pathlib.Path(write_rec(tmp_path / 'a.rec', [SMALL] * 8)).read_bytes() == SMALL_REC


@cases('content', {
    'empty': b'',
    'random': np.random.RandomState(0).bytes(5000),
    'one byte': SMALL_REC[:1],
    'text': b'These are my holiday photos.\n' * 99,
    'wrong last magic number': SMALL_REC[:LAST] + b'x' + SMALL_REC[LAST + 1:],
    'cut in the last magic number': SMALL_REC[:LAST + 2],
    'cut in the last header': SMALL_REC[:LAST + 4],
    'cut after the last header': SMALL_REC[:LAST + 8],
    'cut in the last data': SMALL_REC[:-100],
    'cut by one byte': SMALL_REC[:-1],
    'cut in the second': SMALL_REC[:LAST // 5],
    'trailing bytes': SMALL_REC + b'more',
    'trailing zeros': SMALL_REC + bytes(64),
    'ends after the first of several parts': SMALL_REC + struct.pack('<II', 0xced7230a, 1 << 29 | len(SMALL) // 4 * 4)
    + SMALL[:len(SMALL) // 4 * 4],
    'fewer than a batch': SMALL_REC[:LAST // 7 * 3]})
def test_damaged_rec(tmp_path, content):
    path = tmp_path / 'train.rec'
    path.write_bytes(content)
    refused(lambda: data.load_pictures(settings(path, batch_size=4)), path)


@cases('record, words', {
    'text': (pack(b'a letter'), 'no picture'), 'a header': (pack(b''), 'no picture'), 'short': (b'hello', 'no picture'),
    'empty': (b'', 'no picture'), 'cut JPEG': (SMALL[:-100], 'damaged'),
    'cut PNG': (pack(encoded(NOISE, '.png')[:-100]), 'damaged'),
    'cut BMP': (pack(encoded(NOISE, '.bmp')[:-9]), 'damaged'),
    'labels that are cut': (struct.pack('<IfQQ', 99, 0, 0, 0) + b'abc', 'no picture'),
    'InsightFace': (pack(b'', labels=(9, 12)), 'InsightFace')})
def test_a_record_that_is_no_picture(tmp_path, capfd, record, words):
    for number in (0, 5, 8):
        packs = [SMALL] * 8
        packs.insert(number, record)
        path = write_rec(tmp_path / f'{number}.rec', packs)
        refused(lambda path=path: data.load_pictures(settings(path)), path, f'record {number} ', words)
    assert not capfd.readouterr().err


def test_records_of_all_kinds(tmp_path):
    """Every picture that OpenCV reads; several labels; more bytes behind a picture; transparent ones."""
    images = [encoded(plain(COLOURS[i]), ending) for i, ending in enumerate(('.jpg', '.png', '.bmp', '.webp', '.tif'))]
    packs = [pack(image) for image in images + [encoded(plain(COLOURS[5])) + bytes(99)]]
    packs.append(pack(encoded(plain(COLOURS[6])), labels=(4, 5, 6)))
    packs.append(pack(encoded(plain(COLOURS[7])), labels=[4] * 100))
    path = write_rec(tmp_path / 'kinds.rec', packs)
    batches = data.ImagenetIter(path, 2, (3, 64, 64), conditional=True)
    assert colours(epoch(batches)) == list(range(8)) and batches.classes.tolist() == [0] * 6 + [1, 1]
    path = write_rec(tmp_path / 'hiding.rec', [pack(encoded(HIDING, '.png'))] * 2)
    assert epoch(data.ImagenetIter(path, 2, (3, 64, 64), augment=False))[0, :, :30, :30].min() == 1


def test_most_are_not_decoded(tmp_path, monkeypatch):
    path = write_rec(tmp_path / 'a.rec', [SMALL, pack(encoded(NOISE, '.png'))] * 4)
    monkeypatch.setattr(data, '_decode', None)
    assert len(data._check_rec(path)[1]) == 8


MAGIC = struct.pack('<I', 0xced7230a)


def test_the_magic_number_inside(tmp_path, monkeypatch):
    """MXNet makes three parts of such a record; of a folder's picture we make one."""
    image = encoded(plain(COLOURS[3]))
    image += bytes(-len(image) % 4) + MAGIC * 2 + b'end'
    path = write_rec(tmp_path / 'train.rec', [pack(image)] * 3 + [pack(encoded(plain(COLOURS[4])))])
    assert colours(epoch(data.ImagenetIter(path, 2, (3, 64, 64)))) == [3, 3, 3, 4]
    os.truncate(path, 3 * (os.path.getsize(path) - len(SMALL)) // 4)
    refused(lambda: data.ImagenetIter(path, 2, (3, 64, 64)), path)
    small = data._small_jpeg
    monkeypatch.setattr(data, '_small_jpeg', lambda path: small(path) + MAGIC * 2 + b'end' + MAGIC)
    folder = write_folder(tmp_path / 'photos', {f'{i}.jpg': plain(COLOURS[i]) for i in range(4)})
    assert sorted(colours(epoch(data.load_pictures(settings(folder))))) == [0, 1, 2, 3]
    assert len(records(packed(folder)[0])) == 4  # MXNet's reader goes by the lengths, as ours


def test_a_picture_that_is_damaged_within(tmp_path):
    """Its ends are right; so it is told when it is decoded, in one line, not by the end of the process."""
    image = encoded(NOISE, '.png')
    path = write_rec(tmp_path / 'a.rec', [SMALL, pack(image[:3000] + b'wrong' + image[3005:])])
    batches = data.ImagenetIter(path, 2, (3, 64, 64))
    refused(batches.next, path, 'record 1 ')


@pytest.mark.parametrize('name', ['my photos.rec', 'été.rec', 'a#1.rec', 'a;b.rec', 'a?b.rec', '[a].rec'])
def test_rec_of_any_name(tmp_path, name):
    (tmp_path / name).write_bytes(SMALL_REC)
    assert len(epoch(data.ImagenetIter(str(tmp_path / name), 4, (3, 64, 64)))) == 8
