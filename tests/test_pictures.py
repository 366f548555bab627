"""data.py: folders of pictures of every kind, .rec files from elsewhere, and the batches that come of both."""
import hashlib
import itertools
import os
import pathlib
import signal
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import data

import cv2
import joblib
import mxnet as mx
import numpy as np
import pytest
from conftest import ROOT, cases, ended, newest, refused

import dcgan

COLOURS = np.array(list(itertools.product((20, 120, 220), (20, 120, 220), (70, 170))))[:14]  # RGB: as BGR none is one
SIZES = [(120, 90), (300, 200), (200, 300), (64, 64), (257, 500)]
NAMES = ['my photos', 'été', 'a#1', 'a;b', 'a?b', '[a]*', 'a.rec', "it's", 'a\udcff']


def plain(colour, size=(90, 120)):
    """A picture of one colour, BGR."""
    return np.full(size + (3,), colour[::-1], np.uint8)


def encoded(image, ending='.jpg', *options):
    return cv2.imencode(ending, image, list(options))[1].tobytes()


def load(path, rank=0, workers=1, **changes):
    """The iterator over a folder or a .rec."""
    out = str(pathlib.Path(path).parent / 'out')
    s = dcgan.Settings(**{**dict(imgnet_path=str(path), out=out, batch_size=2, ctx=(mx.cpu(),)), **changes})
    return data.load_pictures(s, rank, workers)


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
    """Its images and classes, without what only fills up the last batch."""
    found = [next(batches).data for _ in range(-(-batches.num_data // batches.batch_size))]
    return [np.concatenate([array.asnumpy() for array in arrays])[:batches.num_data] for arrays in zip(*found)]


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


# ---------------------------------------------------------------- packing a folder

def test_a_folder_is_packed_once(photos, capsys):
    batches = load(photos, batch_size=4)
    assert batches.num_data == 14 and batches.class_names == [] and batches.classes is None
    path, = packed(photos)
    assert '14 pictures packed' in capsys.readouterr().out
    names = [f'/deeper/{i}.jpg' if i % 2 else f'/{i}.jpg' for i in range(14)]
    order = sorted(range(14), key=lambda i: hashlib.sha256(names[i].encode()).hexdigest())
    assert colours(epoch(batches)[0]) == order
    for (_, image), number in zip(records(path), order):
        shrink = min(1, 256 / min(SIZES[number % 5]))
        assert image.shape == (*(round(size * shrink) for size in SIZES[number % 5]), 3)
    made = path.stat().st_mtime_ns
    assert load(photos).checksum == batches.checksum
    assert packed(photos) == [path] and path.stat().st_mtime_ns == made and not capsys.readouterr().out


@cases('change', {
    'one more': lambda folder: write_folder(folder, {'new.jpg': plain(COLOURS[0])}),
    'one less': lambda folder: (folder / '0.jpg').unlink(),
    'touched': lambda folder: os.utime(folder / '0.jpg', (1, 1)),
    'to another class': lambda folder: (folder / '0.jpg').rename(folder / 'deeper' / '0.jpg')})
def test_a_folder_that_has_changed(photos, change):
    """It is packed again, and of the files beside it only what this program has made is removed."""
    ends = '', '-old', '-01234567', 'x-dcgan-01234567', '-dcgan-0123456g'
    others = [photos.parent / f'photos{end}.rec' for end in ends]
    for path in others:
        path.write_bytes(b'mine')
    load(photos)
    before, = set(packed(photos)) - set(others)
    change(photos)
    load(photos)
    after, = set(packed(photos)) - set(others)
    assert after != before and [path.read_bytes() for path in others] == [b'mine'] * 5
    assert len(records(after)) == len([path for path in photos.rglob('*') if path.is_file()])


def test_what_does_not_count(photos):
    """Hidden files, and the pictures that the program itself writes if `out` lies in the folder."""
    first = load(photos, out=str(photos / 'out'))
    write_folder(photos, {'._0.jpg': b'macOS', '.cache/a.jpg': plain(COLOURS[0]), 'out/gout.png': plain(COLOURS[0])})
    assert load(photos, out=str(photos / 'out')).path == first.path
    write_folder(photos, {'Thumbs.db': b'no picture'})  # packed again: the same pictures in the same order
    again = load(photos, out=str(photos / 'out'))
    assert again.path != first.path and again.checksum == first.checksum


@cases('end', {'SIGKILL': signal.SIGKILL, 'Ctrl-C': signal.SIGINT})
def test_killed_while_packing(photos, end):
    code = f'''
import sys, time
sys.path.insert(0, 'tests')
import test_pictures
encode = test_pictures.cv2.imencode
test_pictures.joblib.cpu_count = lambda: 1
def slow(*args):
    print('at work', flush=True)
    time.sleep(0.5)
    return encode(*args)
test_pictures.cv2.imencode = slow
test_pictures.load({str(photos)!r})'''
    with subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          cwd=ROOT) as process:
        assert any('at work' in line for line in process.stdout)
        process.send_signal(end)
        begun = process.communicate(timeout=60)[0].count('at work')
    assert process.returncode == -end and begun < 10  # of fourteen
    assert [path.suffix for path in packed(photos)] == ([f'.{process.pid}'] if end == signal.SIGKILL else [])
    assert len(epoch(load(photos))[0]) == 14
    assert [path.suffix for path in packed(photos)] == ['.rec']


def test_two_starts_at_once(photos, monkeypatch):
    """The first to end wins; the other takes what that has made."""
    def overtaken(fd):
        monkeypatch.undo()
        load(photos)

    monkeypatch.setattr(os, 'fsync', overtaken)
    monkeypatch.setattr(os, 'getpid', lambda: 12345)
    assert len(epoch(load(photos))[0]) == 14 and [path.suffix for path in packed(photos)] == ['.rec']


@cases('at', {'handing out': (ThreadPoolExecutor, 'submit', 14), 'writing': (mx.recordio, 'pack', 1)})
def test_the_work_ends_soon(photos, monkeypatch, at):
    """Whatever ends the packing, and when: of the pictures that wait for a thread, only a few are still made."""
    def end(*args):
        calls.append(args)
        result = call(*args)
        if len(calls) == number:
            begun.clear()
            raise KeyboardInterrupt
        return result

    def slow(*args):
        begun.append(args)
        time.sleep(0.05)
        return encode(*args)

    module, name, number = at
    calls, begun, call, encode = [], [], getattr(module, name), cv2.imencode
    monkeypatch.setattr(joblib, 'cpu_count', lambda: 1)
    monkeypatch.setattr(cv2, 'imencode', slow)
    monkeypatch.setattr(module, name, end)
    pytest.raises(KeyboardInterrupt, load, photos)
    assert len(calls) == number and len(begun) <= 8 and not packed(photos)


def test_places_that_cannot_be_written(photos, monkeypatch):
    def full(*args):
        os.write(os.open('/dev/full', os.O_WRONLY), b'full')

    for module, name in (os, 'fsync'), (mx.recordio, 'pack'):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            refused(lambda: load(photos), 'No space left')
            assert not packed(photos)
    monkeypatch.setattr(os, 'access', lambda path, mode: str(path) != str(photos.parent))
    for _ in range(2):
        assert load(photos).num_data == 14
        path, = packed(photos)
        assert path.parent.name == 'out'
    refused(lambda: load(photos, out='/proc/self/out'), '/proc/self/out')


@pytest.mark.parametrize('name', NAMES)
def test_any_name(tmp_path, name):
    """Of folders, files and classes, and of a .rec from elsewhere."""
    folder = write_folder(tmp_path / name, {f'{name} {i}.jpg': plain(COLOURS[i]) for i in range(4)})
    assert sorted(colours(epoch(load(folder))[0])) == [0, 1, 2, 3]
    write_folder(folder, {f'{name}/5.jpg': plain(COLOURS[5]), 'broken \udcff': b''})
    assert sorted(colours(epoch(load(folder))[0])) == [0, 1, 2, 3, 5]
    path, = packed(folder)
    assert len(epoch(load(path.rename(tmp_path / f'mine {name}.rec')))[0]) == 5


def test_nothing_to_read(tmp_path):
    folder = tmp_path / 'photos'
    refused(lambda: load(folder), folder, 'no such file')
    folder.mkdir()
    refused(lambda: load(folder), folder, 'no picture')
    write_folder(folder, {'letter.txt': b'Dear Ann', 'a.jpg': b''})
    refused(lambda: load(folder), folder, 'no picture')
    assert not packed(folder)
    write_folder(folder, {'b.jpg': plain(COLOURS[0])})
    refused(lambda: load(folder), 'batch of 2', '1 pictures')


def exif(jpeg, orientation):
    """A JPEG with EXIF data of this orientation."""
    tiff = b'Exif\0\0' + b'MM\0*' + struct.pack('>IHHHIHHI', 8, 1, 0x112, 3, 1, orientation, 0, 0)
    return jpeg[:2] + b'\xff\xe1' + struct.pack('>H', len(tiff) + 2) + tiff + jpeg[2:]


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
    'PNG of 16 bits': (encoded(PICTURE.astype(np.uint16) * 257, '.png'), PICTURE),
    'grey TIFF of 16 bits': (encoded(GREY.astype(np.uint16) * 257, '.tif'), GREY.repeat(3, 2)),
    'turned JPEG': (exif(encoded(PICTURE), 6), np.rot90(PICTURE, 3)),
    'mirrored JPEG': (exif(encoded(PICTURE), 2), PICTURE[:, ::-1]),
    'transparent PNG': (encoded(HIDING, '.png'), WHITE),
    'transparent TIFF': (encoded(HIDING, '.tif'), WHITE),
    'transparent WebP': (encoded(HIDING, '.webp', cv2.IMWRITE_WEBP_QUALITY, 101), WHITE),
    'transparent PNG of 16 bits': (encoded(HIDING.astype(np.uint16) << 8 | 99, '.png'), WHITE),
    'half transparent PNG': (encoded(HALF, '.png'), OVER_WHITE)})
def test_kinds_of_pictures(tmp_path, content, expected):
    folder = write_folder(tmp_path / 'photos', {'a.jpg': content, 'b': content})  # names do not matter
    images, = epoch(load(folder, augment=False))
    for _, image in records(packed(folder)[0]):
        assert image.shape == expected.shape
        inner = np.ix_(*(np.r_[10:30, size - 30:size - 10] for size in image.shape[:2]))  # JPEG's edges are not sharp
        assert abs(image[inner].astype(int) - expected[inner]).max() < 12
    side = min(expected.shape[:2])
    top, left = ((size - side) // 2 for size in expected.shape[:2])
    square = cv2.resize(expected[top:top + side, left:left + side], (64, 64), interpolation=cv2.INTER_AREA)
    assert abs(images[0] - (square[:, :, ::-1].transpose(2, 0, 1) / 127.5 - 1)).mean() < 0.05


@pytest.mark.skipif(not cv2.haveImageWriter('a.gif'), reason='this OpenCV does not read GIF')
def test_first_picture_of_an_animation(tmp_path):
    moving = cv2.Animation()
    moving.frames = [cv2.cvtColor(plain(COLOURS[i]), cv2.COLOR_BGR2BGRA) for i in (0, 5, 9)]
    moving.durations = [100] * 3
    (tmp_path / 'photos').mkdir()
    for ending in ('gif', 'webp'):
        cv2.imwriteanimation(str(tmp_path / 'photos' / f'a.{ending}'), moving)
    images, = epoch(load(tmp_path / 'photos'))
    assert len(images) == 2 and abs(images * 127.5 + 127.5 - COLOURS[0][:, np.newaxis, np.newaxis]).mean() < 20


NOISE = np.random.RandomState(0).randint(0, 256, (90, 120, 3), np.uint8)
HEADER = struct.pack('>4sIIBBBBB', b'IHDR', 12000, 12000, 8, 2, 0, 0, 0)  # 144 million pixels
DAMAGED = {
    'empty': b'', 'one byte': b'\xff', 'text': b'These are my holiday photos.\n' * 99, 'zeros': bytes(5000),
    'random': np.random.RandomState(0).bytes(5000), 'JPEG with nothing behind its start': b'\xff\xd8\xff\xe0',
    **{f'{ending} cut to {share} of 10': encoded(NOISE, ending)[:len(encoded(NOISE, ending)) * share // 10]
       for ending in ('.jpg', '.png', '.webp', '.bmp', '.tif') for share in (3, 9)},
    'PNG with a wrong checksum': encoded(NOISE, '.png')[:5000] + b'wrong' + encoded(NOISE, '.png')[5005:],
    'bomb': encoded(NOISE, '.png')[:12] + HEADER + struct.pack('>I', zlib.crc32(HEADER)) + encoded(NOISE, '.png')[33:]}


def test_what_cannot_be_read_is_named(tmp_path, capfd):
    """Ten of them, and then their number."""
    broken = dict(zip((f'{i:02}.jpg' for i in range(99)), DAMAGED.values()))
    folder = write_folder(tmp_path / 'photos', {**broken, 'a.jpg': plain(COLOURS[0]), 'b.jpg': plain(COLOURS[1])})
    os.mkfifo(folder / 'pipe')  # to open it would hang
    (folder / 'link.jpg').symlink_to('nowhere')
    assert sorted(colours(epoch(load(folder))[0])) == [0, 1]
    out, err = capfd.readouterr()
    assert out.count('.jpg') == 10 and f'2 pictures packed, {len(DAMAGED)} files skipped' in out
    with pytest.raises(cv2.error, match='CV_IO_MAX_IMAGE_PIXELS'):  # not allocated
        cv2.imdecode(np.frombuffer(DAMAGED['bomb'], np.uint8), cv2.IMREAD_COLOR)
    assert all(line.startswith(('libpng', 'Corrupt', 'TIFF')) for line in err.splitlines()), err  # no OpenCV's lines


def test_extreme_shapes_and_sizes(tmp_path):
    shapes = (1, 1), (1, 3000), (3000, 1), (2000, 40), (70000, 2)  # the last is longer than a JPEG may be
    folder = write_folder(tmp_path / 'photos', {
        f'{i}.png': encoded(np.full(shape + (3,), 99, np.uint8), '.png') for i, shape in enumerate(shapes)})
    for augment in (True, False):
        images, = epoch(load(folder, augment=augment))
        assert len(images) == 4 and abs(images * 127.5 + 127.5 - 99).max() < 3
    # a checkerboard of single pixels becomes grey, not black or white or stripes: it is shrunk by averaging
    board = (np.indices((1111, 1400)).sum(axis=0) % 2 * 255).astype(np.uint8)
    folder = write_folder(tmp_path / 'boards', {f'{i}.png': encoded(board, '.png') for i in range(2)})
    for source in (folder, write_rec(tmp_path / 'board.rec', [pack(encoded(board, '.png'))] * 2)):
        assert abs(epoch(load(source))[0]).max() < 0.1


# ---------------------------------------------------------------- batches

def test_batches(photos):
    batches = load(photos, batch_size=4, ctx=(mx.cpu(1),))
    told, = batches.provide_data
    assert (told.name, told.shape, told.dtype) == ('data', (4, 3, 64, 64), np.float32)
    found = [next(batches).data[0] for _ in range(7)]
    assert all(images.context == mx.cpu(1) and images.dtype == np.float32 for images in found)
    images = np.concatenate([images.asnumpy() for images in found])
    batches.reset()
    assert sorted(colours(images[:14])) == list(range(14)) and colours(images[14:]) == colours(images[:14])
    again = load(photos, batch_size=4)
    again.skip(3)
    assert np.array_equal(next(again).data[0].asnumpy(), images[12:16])
    images, = epoch(load(photos, nc=1))
    assert images.shape == (14, 1, 64, 64)
    expected = sorted(COLOURS @ [0.299, 0.587, 0.114])
    assert np.allclose(sorted(images.mean(axis=(1, 2, 3)) * 127.5 + 127.5), expected, atol=3)


def test_crops(tmp_path):
    """Black is -1 and white 1; the parts of one picture come in different crops, mirrored or not, or always as one."""
    ramp = np.linspace(0, 255, 300).astype(np.uint8)[np.newaxis, :, np.newaxis].repeat(200, 0).repeat(3, 2)
    ramp[:8], ramp[-8:] = 0, 255
    path = write_rec(tmp_path / 'ramp.rec', [pack(encoded(ramp, '.png'))] * 40)
    batches = load(path, batch_size=40)
    images, others = epoch(batches)[0], epoch(batches)[0]
    assert not np.array_equal(images, others)  # nor are they those of the epoch before
    assert images.min() >= -1 and images.max() <= 1
    rows = images[:, 0, 32]
    assert 8 <= (rows[:, -1] > rows[:, 0]).sum() <= 32
    width = abs(rows[:, -1] - rows[:, 0]) / 2 * 300 / 200  # of the crop, as a share of the shorter side
    assert 0.70 < width.min() < 0.80 and 0.93 < width.max() < 1.02
    batches = load(path, batch_size=40, augment=False)
    images = np.concatenate([epoch(batches)[0], epoch(batches)[0]])
    assert (images == images[0]).all()
    assert abs(images[0, 0, 32, [0, -1]] - [-2 / 3, 2 / 3]).max() < 0.02
    assert images[0, 0, 0].max() == -1 and images[0, 0, -1].min() == 1


def test_workers(photos):
    refused(lambda: load(photos, 0, 2), photos, 'once on one machine')
    assert not packed(photos)
    load(photos)
    shares = [load(photos, rank, 4, batch_size=3) for rank in range(4)]
    assert {share.num_data for share in shares} == {3} and len({share.checksum for share in shares}) == 1
    assert len(set(sum((colours(epoch(share)[0]) for share in shares), []))) == 12
    refused(lambda: load(photos, 0, 4, batch_size=4), 'the batch of 4', '3 pictures a worker')


def test_classes_by_sub_folders(tmp_path, capsys):
    pictures = {f'{["cat", "dog", "emu"][i % 3]}/{"x/" * (i % 2)}{i}.jpg': plain(COLOURS[i]) for i in range(12)}
    folder = write_folder(tmp_path / 'photos', {**pictures, 'bear/letter.txt': b'no bear', 'README.txt': b'classes'})
    load(folder)
    capsys.readouterr()
    for rank in (0, 1):
        batches = load(folder, rank, 2, conditional=True)
        assert batches.class_names == ['0', '1', '2'] and batches.classes.dtype == np.int32
        assert np.bincount(batches.classes).tolist() == [4, 4, 4]
        assert [(told.name, told.shape) for told in batches.provide_data] == [('data', (2, 3, 64, 64)), ('digit', (2,))]
        images, classes = epoch(batches)
        assert classes.tolist() == [i % 3 for i in colours(images)] == batches.classes[rank * 6:][:6].tolist()
        assert ('classes: 0 cat, 1 dog, 2 emu\n' in capsys.readouterr().out) == (rank == 0)
    write_folder(folder, {'stray.jpg': plain(COLOURS[0])})
    refused(lambda: load(folder, conditional=True), folder, 'sub-folder')


# ---------------------------------------------------------------- a .rec from elsewhere

SMALL = pack(encoded(np.full((40, 50, 3), 99, np.uint8)))
MAGIC = struct.pack('<I', 0xced7230a)
SMALL_REC = (MAGIC + struct.pack('<I', len(SMALL)) + SMALL + bytes(-len(SMALL) % 4)) * 8
LAST = len(SMALL_REC) * 7 // 8


@cases('content', {
    'empty': b'',
    'random': np.random.RandomState(0).bytes(5000),
    'one byte': SMALL_REC[:1],
    'wrong last magic number': SMALL_REC[:LAST] + b'x' + SMALL_REC[LAST + 1:],
    'cut in the last magic number': SMALL_REC[:LAST + 2],
    'cut in the last header': SMALL_REC[:LAST + 4],
    'cut after the last header': SMALL_REC[:LAST + 8],
    'cut in the last data': SMALL_REC[:-100],
    'cut by one byte': SMALL_REC[:-1],
    'trailing bytes': SMALL_REC + b'more',
    'trailing zeros': SMALL_REC + bytes(64),
    'ends after the first of several parts': SMALL_REC + MAGIC + struct.pack('<I', 1 << 29 | 40) + SMALL[:40],
    'a part without its beginning': MAGIC + struct.pack('<I', 3 << 29 | 40) + SMALL[:40] + SMALL_REC,
    'fewer than a batch': SMALL_REC[:LAST // 7 * 3]})
def test_damaged_rec(tmp_path, content):
    path = tmp_path / 'train.rec'
    path.write_bytes(content)
    refused(lambda: load(path, batch_size=4), path)


@cases('record, words', {
    'text': (pack(b'a letter'), 'no picture'), 'short': (b'hello', 'no picture'), 'empty': (b'', 'no picture'),
    'cut JPEG': (SMALL[:-100], 'damaged'), 'cut PNG': (pack(encoded(NOISE, '.png')[:-100]), 'damaged'),
    'cut BMP': (pack(encoded(NOISE, '.bmp')[:-9]), 'damaged'),
    'labels that are cut': (struct.pack('<IfQQ', 99, 0, 0, 0) + b'abc', 'no picture'),
    'InsightFace': (pack(b'', labels=(9, 12)), 'InsightFace')})
def test_a_record_that_is_no_picture(tmp_path, record, words):
    for number in (0, 5, 8):
        packs = [SMALL] * 8
        packs.insert(number, record)
        path = write_rec(tmp_path / f'{number}.rec', packs)
        refused(lambda path=path: load(path), path, f'record {number} ', words)


def test_records_of_all_kinds(tmp_path):
    """Every picture that OpenCV reads; several labels; a record of three parts, as MXNet makes it of its own number."""
    images = [encoded(plain(COLOURS[i]), ending) for i, ending in enumerate(('.jpg', '.png', '.bmp', '.webp', '.tif'))]
    packs = [pack(image, 10.5) for image in images + [encoded(plain(COLOURS[5])) + bytes(99)]]
    packs.append(pack(encoded(plain(COLOURS[6])), labels=(4, 5, 6)))
    packs.append(pack(encoded(plain(COLOURS[7])), labels=[4] * 100))
    image = encoded(plain(COLOURS[8]))
    packs.append(pack(image + bytes(-len(image) % 4) + MAGIC * 2 + b'end', 7))
    path = write_rec(tmp_path / 'kinds.rec', packs)
    batches = load(path, conditional=True)
    images, classes = epoch(batches)
    assert colours(images) == list(range(9)) and classes.tolist() == [2] * 6 + [0, 0, 1] == batches.classes.tolist()
    assert batches.class_names == ['0', '1', '2'] and load(path).classes is None
    path = write_rec(tmp_path / 'hiding.rec', [pack(encoded(HIDING, '.png'))] * 2)
    assert epoch(load(path, augment=False))[0][0, :, :30, :30].min() == 1


def test_a_picture_that_is_damaged_within(tmp_path, monkeypatch):
    """Its ends are right, so at first it is not decoded; later that is one line, not the end of the process."""
    image = encoded(NOISE, '.png')
    path = write_rec(tmp_path / 'a.rec', [SMALL, pack(image[:3000] + b'wrong' + image[3005:])])
    with monkeypatch.context() as patch:
        patch.setattr(cv2, 'imdecode', None)
        batches = load(path)
    refused(batches.next, path, 'record 1 ')


# ---------------------------------------------------------------- a whole run

@pytest.mark.parametrize('changes', [dict(nc=1, augment=False), dict(nc=3, conditional=True)], ids=str)
def test_a_run_on_pictures(tiny, tmp_path, capsys, changes):
    """Trained, resumed, and made images of; each column of a conditional run's pictures has a class."""
    pictures = {f'{kind}/{i}.png': plain(COLOURS[kind], SIZES[i % 5]) for kind in (0, 4) for i in range(6)}
    folder = write_folder(tmp_path / 'photos', pictures)
    s = tiny(dataset='imagenet', imgnet_path=str(folder), batch_size=5, epochs=2, coverage=True, **changes)
    dcgan.train(s)
    out = capsys.readouterr().out
    assert '12 pictures packed' in out and 'data: imagenet, 3 iterations an epoch' in out
    assert ('classes: 0 0, 1 4' in out) == s.conditional
    shown = cv2.imread(f'{newest(s.out)}/data.png')
    if s.conditional:
        for column, kind in enumerate((0, 4)):
            assert abs(shown[20:40, 64 * column + 32] - COLOURS[kind][::-1].astype(int)).max() < 10
    else:
        assert np.ptp(shown, axis=2).max() == 0  # grey
    again = dict(vars(s), resume='latest')
    dcgan.train(dcgan.Settings(**{**again, 'epochs': 3}))
    assert 'epoch: 2 iter: 3' in capsys.readouterr().out
    dcgan.train(dcgan.Settings(**{**again, 'sample': 4, 'digits': '1' if s.conditional else ''}))
    assert len(os.listdir(f'{newest(s.out)}/sample-0002')) == 4
    write_folder(folder, {'4/more.png': plain(COLOURS[4])})
    assert 'trained with other data' in ended(dcgan.Settings(**{**again, 'epochs': 4}))
