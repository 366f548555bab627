"""data.py: folders of pictures of every kind, .rec files from elsewhere, and the batches that come of both."""
import hashlib
import itertools
import os
import pathlib
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import data

import cv2
import mxnet as mx
import numpy as np
import pytest
from conftest import ROOT, cases, ended, newest, read_state, refused, state, train_and_stop

import dcgan

COLOURS = np.array(list(itertools.product((20, 120, 220), (20, 120, 220), (70, 170))))[:14]  # RGB: as BGR none is one
SIZES = [(120, 90), (300, 200), (200, 300), (64, 64), (257, 500)]
NOISE = np.random.RandomState(0).randint(0, 256, (90, 120, 3), np.uint8)


def plain(colour, size=(90, 120)):
    """A picture of one colour, BGR."""
    return np.full(size + (3,), colour[::-1], np.uint8)


def encoded(image, ending='.jpg'):
    return cv2.imencode(ending, image)[1].tobytes()


def load(path, rank=0, workers=1, **changes):
    """The iterator over a folder or a .rec."""
    out = pathlib.Path(path).parent / 'out'
    s = dcgan.Settings(**{**dict(imgnet_path=str(path), out=str(out), batch_size=2, ctx=(mx.cpu(),)), **changes})
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
    """The .rec files, whole and unfinished, beside a folder and in `out`."""
    return sorted([*folder.parent.glob('*-dcgan-*'), *(folder.parent / 'out').glob('*-dcgan-*')])


def epoch(batches):
    """Its images and classes, without what only fills up the last batch."""
    found = [next(batches).data for _ in range(-(-batches.num_data // batches.batch_size))]
    return [np.concatenate([array.asnumpy() for array in arrays])[:batches.num_data] for arrays in zip(*found)]


def colours(images):
    """Which of COLOURS the images are."""
    distances = abs(images.mean(axis=(2, 3))[:, np.newaxis] * 127.5 + 127.5 - COLOURS).max(axis=2)
    assert distances.min(axis=1).max() < 10
    return distances.argmin(axis=1).tolist()


def pack(picture, label=0., labels=()):
    """A record with one label, or with several."""
    return struct.pack(f'<IfQQ{len(labels)}f', len(labels), label, 0, 0, *labels) + picture


def write_rec(path, packs):
    writer = mx.recordio.MXRecordIO(str(path), 'w')
    for record in packs:
        writer.write(record)
    writer.close()
    return path


SMALL = pack(encoded(plain(COLOURS[0])))


# ---------------------------------------------------------------- packing a folder

def test_a_folder_is_packed_once_and_again_when_it_has_changed(photos, capsys):
    batches = load(photos, batch_size=4)
    path, = packed(photos)
    assert '14 pictures packed' in capsys.readouterr().out
    names = [f'/deeper/{i}.jpg' if i % 2 else f'/{i}.jpg' for i in range(14)]
    assert colours(epoch(batches)[0]) == sorted(range(14), key=lambda i: hashlib.sha256(names[i].encode()).digest())
    somebody_elses = photos.parent / 'photos-dcgan-0123456g.rec'
    somebody_elses.touch()
    assert load(photos).checksum == batches.checksum and not capsys.readouterr().out
    for change, num_data in ((lambda: write_folder(photos, {'new.jpg': NOISE}), 15),
                             (lambda: os.utime(photos / '0.jpg', (1, 1)), 15),
                             (lambda: (photos / '0.jpg').rename(photos / 'deeper' / '0.jpg'), 15)):
        change()
        assert load(photos).num_data == num_data
        before, (path,) = path, set(packed(photos)) - {somebody_elses}  # the old one is removed
        assert path != before
    assert somebody_elses.exists()


def test_what_is_packed(photos):
    """Nothing hidden, no thumbnails of Synology's, nothing from `out`; what links lead to once."""
    first = load(photos, out=f'{photos}/out')
    write_folder(photos, dict.fromkeys(['._0.jpg', '.cache/a.jpg', 'deeper/@eaDir/1.jpg/SYNO.jpg', 'out/a.png'], NOISE))
    assert load(photos, out=f'{photos}/out').path == first.path
    write_folder(photos, {'Thumbs.db': b'no picture'})  # packed again: the same pictures in the same order
    again = load(photos, out=f'{photos}/out')
    assert again.path != first.path and again.checksum == first.checksum
    other = write_folder(photos.parent / 'other', {'a.jpg': NOISE})
    for link, target in ('self', '.'), ('deeper/up', '..'), ('deeper/self', '.'), ('link', other), ('more', other):
        (photos / link).symlink_to(target)
    assert load(photos, out=f'{photos}/out').num_data == 15


@pytest.mark.parametrize('end', [signal.SIGKILL, signal.SIGINT])
def test_killed_while_packing(photos, end):
    """To pack them all would take minutes: they must not all be decoded before the end."""
    (photos.parent / 'large.jpg').write_bytes(encoded(NOISE.repeat(30, 0).repeat(30, 1)))
    links = [photos / f'link {i}.jpg' for i in range(5000)]
    for link in links:
        link.symlink_to('../large.jpg')
    code = f'import sys; sys.path.insert(0, "tests"); import test_pictures; test_pictures.load({str(photos)!r})'
    process = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               cwd=ROOT)
    try:
        assert 'packing 5014 files' in process.stdout.readline()
        time.sleep(0.3)
        while end == signal.SIGKILL and not any(path.stat().st_size for path in packed(photos)):
            time.sleep(0.01)
        process.send_signal(end)
        assert 'pictures packed' not in process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == -end and bool(packed(photos)) == (end == signal.SIGKILL)
    for link in links:
        link.unlink()
    assert load(photos).num_data == 14 and [path.suffix for path in packed(photos)] == ['.rec']


def test_three_starts_at_once(photos):
    for i in range(300):
        (photos / f'link {i}.jpg').symlink_to('0.jpg')
    with ThreadPoolExecutor(3) as pool:
        assert [batches.num_data for batches in pool.map(load, [photos] * 3)] == [314] * 3
    assert load(photos).num_data == 314 and [path.suffix for path in packed(photos)] == ['.rec']


def test_what_may_not_be_read_or_written(capsys):
    with tempfile.TemporaryDirectory() as folder:  # pytest's own is root's alone
        user = os.geteuid()
        mine = pathlib.Path(folder, 'mine')
        os.chmod(folder, 0o777)
        os.setresuid(user or 65534, user or 65534, user)  # root may read all
        try:
            photos = write_folder(mine / 'photos', dict.fromkeys(['a.jpg', 'b.jpg', 'c.jpg', 'closed/d.jpg'], NOISE))
            (mine / 'out').mkdir()
            for path, mode in (mine, 0o500), (photos / 'c.jpg', 0), (photos / 'closed', 0):
                path.chmod(mode)
            assert load(photos).num_data == 2 and packed(photos)[0].parent.name == 'out'
            line, = (line for line in capsys.readouterr().out.splitlines() if 'Permission denied' in line)
            assert 'c.jpg' in line and 'closed' in line
            (photos / 'c.jpg').chmod(0o600)
            assert load(photos).num_data == 3
            photos.chmod(0)
            refused(lambda: load(photos), 'Permission denied', photos)
        finally:
            os.setresuid(user, user, user)


def test_a_disk_that_is_full(photos):
    """Or a limit of file sizes, as a quota has: nothing is left."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))
    try:
        refused(lambda: load(photos), 'File too large')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not packed(photos)


@pytest.mark.parametrize('name', ["it's été", '[a]*?', 'a\nb', 'a\udcff'])
def test_any_name(tmp_path, name):
    """Of folders, files and classes, and of a .rec from elsewhere."""
    folder = write_folder(tmp_path / name, {f'{name} {i}.jpg': plain(COLOURS[i]) for i in range(4)})
    assert load(folder).num_data == 4
    write_folder(folder, {f'{name}/5.jpg': plain(COLOURS[5]), f'broken {name}': b''})
    assert sorted(colours(epoch(load(folder))[0])) == [0, 1, 2, 3, 5]
    path, = packed(folder)
    assert len(epoch(load(path.rename(tmp_path / f'mine {name}.rec')))[0]) == 5


# ---------------------------------------------------------------- kinds of files

def exif(jpeg, orientation):
    """A JPEG with EXIF data of this orientation."""
    tiff = b'Exif\0\0' + b'MM\0*' + struct.pack('>IHHHIHHI', 8, 1, 0x112, 3, 1, orientation, 0, 0)
    return jpeg[:2] + b'\xff\xe1' + struct.pack('>H', len(tiff) + 2) + tiff + jpeg[2:]


QUARTERS = np.array([[(220, 20, 70), (20, 220, 70)], [(20, 20, 170), (120, 120, 70)]], np.uint8)  # BGR
PICTURE = QUARTERS.repeat(40, 0).repeat(60, 1)
GREY = PICTURE[:, :, :1]
OPACITY = np.array([[0, 128], [255, 255]], np.uint8).repeat(40, 0).repeat(60, 1)[:, :, np.newaxis]
CLEAR = np.dstack([PICTURE, OPACITY])
OVER_WHITE = 255 - (255 - PICTURE) * (OPACITY / 255)


@cases('content, expected', {
    'JPEG': (encoded(PICTURE), PICTURE),
    'grey JPEG with more behind it': (encoded(GREY) + bytes(999), GREY.repeat(3, 2)),
    'WebP': (encoded(PICTURE, '.webp'), PICTURE),
    'grey TIFF of 16 bits': (encoded(GREY.astype(np.uint16) * 257, '.tif'), GREY.repeat(3, 2)),
    'turned JPEG': (exif(encoded(PICTURE), 6), np.rot90(PICTURE, 3)),
    'clear PNG': (encoded(CLEAR, '.png'), OVER_WHITE),
    'clear PNG of 16 bits': (encoded(CLEAR.astype(np.uint16) << 8 | 99, '.png'), OVER_WHITE)})
def test_kinds_of_pictures(tmp_path, content, expected):
    """In a folder, where names do not matter, and in a .rec from elsewhere."""
    folder = write_folder(tmp_path / 'photos', {'a.jpg': content, 'b': content})
    rec = write_rec(tmp_path / 'same.rec', [pack(content)] * 2)
    side = min(expected.shape[:2])
    top, left = ((size - side) // 2 for size in expected.shape[:2])
    square = cv2.resize(expected[top:top + side, left:left + side], (64, 64), interpolation=cv2.INTER_AREA)
    for path in folder, rec:
        for image in epoch(load(path, augment=False))[0]:
            assert abs(image - (square[:, :, ::-1].transpose(2, 0, 1) / 127.5 - 1)).mean() < 0.04


PNG = encoded(NOISE, '.png')


@cases('content, words', {
    'empty': (b'', 'empty'), 'text': (b'These are my holiday photos.\n' * 99, 'no picture'),
    'cut PNG': (PNG[:-9000], 'damaged'), 'wrong checksum': (PNG[:5000] + b'wrong' + PNG[5005:], 'damaged'),
    'LFS': (b'version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n', 'git lfs pull'),
    'web page': (b'<!DOCTYPE html><html>', 'web page'), 'zip': (b'PK\3\4' + bytes(99), 'unpack it'),
    'HEIC': (b'\0\0\0\x18ftypheic' + bytes(99), 'HEIC'),
    'float TIFF': (encoded(NOISE.astype(np.float32), '.tif'), 'float32')})
def test_what_is_no_picture(tmp_path, capfd, content, words):
    """In a folder, in a .rec and instead of it."""
    folder = write_folder(tmp_path / 'photos', {'a.jpg': content, 'b': NOISE, 'c': NOISE})
    assert load(folder).num_data == 2
    out, err = capfd.readouterr()
    line, = (line for line in out.splitlines() if 'WARNING' in line)
    assert words in line and 'a.jpg' in line and '2 pictures packed, 1 files skipped' in out
    assert all(line.startswith(('libpng', 'Corrupt', 'TIFF')) for line in err.splitlines()), err  # no OpenCV's lines
    refused(lambda: load(folder / 'a.jpg'), folder / 'a.jpg', words, 'imgnet_path')
    path = write_rec(tmp_path / 'a.rec', [SMALL, SMALL, pack(content)])
    refused(lambda: epoch(load(path)), path, 'record 2', words)


def test_nothing_to_read(tmp_path):
    folder = tmp_path / 'photos'
    refused(lambda: load(folder), folder, 'No such file', 'imgnet_path')
    folder.mkdir()
    os.mkfifo(folder / 'pipe')  # to open it would hang
    refused(lambda: load(folder), folder, 'no picture')
    write_folder(folder, {'b.jpg': NOISE})
    refused(lambda: load(folder), 'batch of 2', '1 pictures')
    refused(lambda: load(folder / 'b.jpg'), folder / 'b.jpg', 'a single picture')


def test_each_line_names_ten_files(tmp_path, capsys):
    """Very dark pictures of 16 bits, of which perhaps only 12 are used; a link to nowhere."""
    dark, bright = (encoded(NOISE.astype(np.uint16) * factor, '.png') for factor in (16, 257))
    folder = write_folder(tmp_path / 'photos', {**{f'{i:02}.png': dark for i in range(12)}, 'a.png': bright})
    (folder / 'link').symlink_to('nowhere')
    assert load(folder).num_data == 13
    dark, link = sorted(line for line in capsys.readouterr().out.splitlines() if 'WARNING' in line)
    assert 'nearly black' in dark and '12 files' in dark and dark.count('.png') == 10 and 'a.png' not in dark
    assert 'not there' in link and '/link' in link


# ---------------------------------------------------------------- batches

def test_gray_pictures(photos):
    images, = epoch(load(photos, nc=1))
    expected = sorted(COLOURS @ [0.299, 0.587, 0.114])
    assert np.allclose(sorted(images.mean(axis=(1, 2, 3)) * 127.5 + 127.5), expected, atol=3)


def test_an_epoch_is_filled_up_from_its_start(photos):
    batches = load(photos, batch_size=4, ctx=(mx.cpu(1),))
    images = [next(batches).data[0] for _ in range(8)]
    assert all(batch.context == mx.cpu(1) and batch.dtype == np.float32 for batch in images)
    found = colours(np.concatenate([batch.asnumpy() for batch in images]))
    assert sorted(found[:14]) == list(range(14)) and found == (found[:14] + found[:2]) * 2


def test_classes_and_workers(tmp_path, capsys):
    """A class is a sub-folder with all that is below it; each worker has a share, and knows the classes of all."""
    pictures = {f'{["cat", "dog", "emu"][i % 3]}/{"x/" * (i % 2)}{i}.jpg': plain(COLOURS[i]) for i in range(14)}
    folder = write_folder(tmp_path / 'photos', {**pictures, 'bear/letter.txt': b'no bear', 'README.txt': b'classes'})
    refused(lambda: load(folder, 0, 2), folder, 'once on one machine')
    found = colours(epoch(load(folder))[0])
    capsys.readouterr()
    for rank in range(4):
        batches = load(folder, rank, 4, conditional=True, batch_size=3)
        assert 'classes: 0 cat, 1 dog, 2 emu\n' in capsys.readouterr().out
        assert batches.class_names == ['0', '1', '2']
        assert batches.classes.tolist() == [i % 3 for i in found]
        images, classes = epoch(batches)
        assert colours(images) == found[3 * rank:][:3] and classes.tolist() == [i % 3 for i in colours(images)]
    refused(lambda: load(folder, 0, 4, batch_size=4), 'the batch of 4', '3 pictures a worker')
    write_folder(folder, {'stray.jpg': NOISE})
    refused(lambda: load(folder, conditional=True), folder, 'sub-folder')


def test_crops(tmp_path):
    """Black is -1 and white 1; the parts of one picture come in different crops, mirrored or not, or always as one."""
    ramp = np.linspace(0, 255, 300).astype(np.uint8)[np.newaxis, :, np.newaxis].repeat(200, 0).repeat(3, 2)
    ramp[:8], ramp[-8:] = 0, 255
    path = write_rec(tmp_path / 'ramp.rec', [pack(encoded(ramp, '.png'))] * 40)
    images, = epoch(load(path, batch_size=40))
    assert images.min() >= -1 and images.max() <= 1
    rows = images[:, 0, 32]
    assert 8 <= (rows[:, -1] > rows[:, 0]).sum() <= 32
    width = abs(rows[:, -1] - rows[:, 0]) / 2 * 300 / 200  # of the crop, as a share of the shorter side
    assert 0.70 < width.min() < 0.80 and 0.93 < width.max() < 1.02
    images, = epoch(load(path, batch_size=40, augment=False))
    assert (images == images[0]).all()
    assert abs(images[0, 0, 32, [0, -1]] - [-2 / 3, 2 / 3]).max() < 0.02
    assert images[0, 0, 0].max() == -1 and images[0, 0, -1].min() == 1


def test_crops_follow_from_seed_epoch_worker_and_iteration(tmp_path):
    path = write_rec(tmp_path / 'a.rec', [pack(encoded(NOISE))] * 40)
    batches = load(path, batch_size=10)
    drawn = [next(batches).data[0].asnumpy() for _ in range(8)]
    for epoch_number, iteration in (1, 2), (0, 3), (0, 1), (1, 0):  # the same, whatever was drawn before
        batches.begin_epoch(epoch_number, iteration)
        assert np.array_equal(next(batches).data[0].asnumpy(), drawn[4 * epoch_number + iteration])
    first = next(load(path, 0, 2, batch_size=10)).data[0].asnumpy()
    assert np.array_equal(first, drawn[0])
    for others in load(path, 1, 2, batch_size=10), load(path, batch_size=10, seed=9):
        drawn.append(next(others).data[0].asnumpy())
    assert len({batch.tobytes() for batch in drawn}) == 10


# ---------------------------------------------------------------- a .rec from elsewhere

MAGIC = struct.pack('<I', 0xced7230a)


def rec(record):
    return MAGIC + struct.pack('<I', len(record)) + record + bytes(-len(record) % 4)


ONE = rec(SMALL)


@cases('content', {
    'random': np.random.RandomState(0).bytes(5000), 'cut in a header': ONE + ONE[:4], 'cut': ONE + ONE[:-100],
    'trailing bytes': ONE * 2 + b'more',
    'ends after the first of several parts': ONE * 2 + MAGIC + struct.pack('<I', 1 << 29 | 40) + SMALL[:40],
    'InsightFace': ONE * 2 + rec(pack(b'', labels=(9, 12))), 'cut JPEG': ONE * 2 + rec(SMALL[:-100]),
    'short': ONE * 2 + rec(b'hello'), 'fewer than a batch': ONE})
def test_damaged_rec(tmp_path, content):
    path = tmp_path / 'train.rec'
    path.write_bytes(content)
    refused(lambda: load(path), path)


def test_records_of_all_kinds(tmp_path):
    """Several labels, and a record of three parts, as MXNet makes it of its own number."""
    image, bmp = encoded(plain(COLOURS[0])), encoded(plain(COLOURS[1]), '.bmp')
    packs = [pack(bmp, 10.5), pack(image, labels=(4, 5)), pack(image, labels=[4] * 99),
             pack(bmp[:4000] + MAGIC * 2 + bmp[4008:], 7)]
    batches = load(write_rec(tmp_path / 'kinds.rec', packs), conditional=True)
    images, classes = epoch(batches)
    assert colours(images) == [1, 0, 0, 1] and classes.tolist() == [2, 0, 0, 1] and batches.class_names == list('012')


# ---------------------------------------------------------------- a whole run

@pytest.mark.parametrize('changes', [dict(nc=1), dict(nc=3, conditional=True)], ids=str)
def test_a_run_on_pictures(tiny, tmp_path, capsys, changes):
    """Stopped in the middle of an epoch and resumed: to the last bit the run that was not. Then samples are made."""
    pictures = {f'{kind}/{i}.png': plain(COLOURS[kind], SIZES[i % 5]) for kind in (0, 4) for i in range(7)}
    folder = write_folder(tmp_path / 'photos', pictures)
    changes = dict(dataset='imagenet', imgnet_path=str(folder), batch_size=1, epochs=2, coverage=True, **changes)
    whole, part = (tiny(**{**changes, 'out': str(tmp_path / out)}) for out in ('whole', 'part'))
    dcgan.train(whole)
    assert 'data: imagenet, 14 iterations an epoch' in capsys.readouterr().out
    train_and_stop(part, 7)
    assert read_state(newest(part.out))[0]['iteration'] == 10
    part.resume = 'latest'
    dcgan.train(part)
    assert state(part.out) == state(whole.out)
    shown = cv2.imread(f'{newest(part.out)}/data.png')
    assert (np.ptp(shown, axis=2).max() == 0) == (part.nc == 1)
    dcgan.train(dcgan.Settings(**{**vars(part), 'sample': 4, 'digits': '1' if part.conditional else ''}))
    assert len(os.listdir(f'{newest(part.out)}/sample-0001')) == 4
    write_folder(folder, {'4/more.png': NOISE})
    assert 'trained with other images' in ended(dcgan.Settings(**{**vars(part), 'epochs': 3}))
