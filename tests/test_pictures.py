"""data.py: folders of pictures of every kind, .rec files from elsewhere, and the batches that come of both."""
import itertools
import os
import pathlib
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import data

import cv2
import mxnet as mx
import numpy as np
import pytest
from conftest import ROOT, cases, ended, newest, read_state, refused, state, train_and_stop

import dcgan

COLOURS = np.array(list(itertools.product((20, 120, 220), (20, 120, 220), (70, 170))))  # RGB: as BGR none is one
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
    """Write pictures under their names, which may contain a sub-folder; a picture is an array or a file's bytes."""
    for name, picture in pictures.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture if isinstance(picture, bytes) else encoded(picture))
    return folder


@pytest.fixture
def photos(tmp_path):
    """Fourteen photos of one colour each, half of them in a sub-folder, in a folder with an unusual name."""
    names = [f'deeper/{i}.jpg' if i % 2 else f'{i}.jpg' for i in range(14)]
    return write_folder(tmp_path / "it's [été]*?", {
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


def write_rec(path, pictures):
    """A .rec of pictures' bytes, as MXNet writes it."""
    writer = mx.recordio.MXRecordIO(str(path), 'w')
    for picture in pictures:
        writer.write(mx.recordio.pack(mx.recordio.IRHeader(0, 0, 0, 0), picture))
    writer.close()
    return path


# ---------------------------------------------------------------- packing a folder

def test_a_folder_is_packed_once_and_again_when_it_has_changed(photos, capsys):
    """Shuffled; a change leaves the other pictures in their order."""
    batches = load(photos, batch_size=4)
    order = colours(epoch(batches)[0])
    assert sorted(order) == list(range(14))
    assert order != sorted(order, key=lambda i: i % 2)  # the sub-folder's are not behind the others
    paths = packed(photos)
    assert '14 pictures packed' in capsys.readouterr().out
    assert load(photos).checksum == batches.checksum and not capsys.readouterr().out
    for change in (lambda: write_folder(photos, {'new.jpg': plain(COLOURS[14])}),
                   lambda: os.utime(photos / '0.jpg', (1, 1)),
                   lambda: (photos / '0.jpg').rename(photos / 'deeper' / '0.jpg')):
        change()
        batches = load(photos)
        path, = packed(photos)  # the old one is removed
        assert batches.num_data == 15 and path not in paths
        paths.append(path)
    assert [i for i in colours(epoch(batches)[0]) if i not in (0, 14)] == [i for i in order if i != 0]


def test_what_is_packed(photos):
    """Nothing hidden, no thumbnails of Synology's, nothing from `out`; what links lead to once."""
    first = load(photos, out=f'{photos}/out')
    write_folder(photos, dict.fromkeys(['._0.jpg', '.cache/a.jpg', 'deeper/@eaDir/1.jpg/SYNO.jpg', 'out/a.png'], NOISE))
    assert load(photos, out=f'{photos}/out').path == first.path
    other = write_folder(photos.parent / 'other', {'a.jpg': NOISE})
    for link, target in ('self', '.'), ('deeper/up', '..'), ('deeper/self', '.'), ('link', other), ('more', other):
        (photos / link).symlink_to(target)
    assert load(photos, out=f'{photos}/out').num_data == 15


def test_ended_while_packing(photos, capsys, monkeypatch):
    """By SIGKILL, then by Ctrl-C, which must not decode all the other pictures first: that takes CPU minutes."""
    monkeypatch.setenv('LOKY_MAX_CPU_COUNT', '2')  # so many pictures at once
    (photos.parent / 'large.jpg').write_bytes(encoded(NOISE.repeat(30, 0).repeat(30, 1)))
    links = [photos / f'link {i}.jpg' for i in range(5000)]
    for link in links:
        link.symlink_to('../large.jpg')

    code = f'import sys; sys.path.insert(0, "tests"); import test_pictures; test_pictures.load({str(photos)!r})'
    process = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.DEVNULL, cwd=ROOT)
    while process.poll() is None and not any(path.stat().st_size for path in packed(photos)):
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    left, = packed(photos)

    def interrupt():
        while len(packed(photos)) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    start = time.process_time()
    with pytest.raises(KeyboardInterrupt):
        load(photos)
    assert time.process_time() - start < 10
    out = capsys.readouterr().out
    assert 'packing 5014 files' in out and 'pictures packed' not in out
    assert packed(photos) == [left]

    for link in links:
        link.unlink()
    assert load(photos).num_data == 14
    assert [path.suffix for path in packed(photos)] == ['.rec']


def test_three_starts_at_once(photos):
    for i in range(300):
        (photos / f'link {i}.jpg').symlink_to('0.jpg')
    with ThreadPoolExecutor(3) as pool:
        assert [batches.num_data for batches in pool.map(load, [photos] * 3)] == [314] * 3
    assert [path.suffix for path in packed(photos)] == ['.rec']


def test_what_may_not_be_read(capsys):
    with tempfile.TemporaryDirectory() as folder:  # pytest's own is root's alone
        user = os.geteuid()
        os.chmod(folder, 0o777)
        os.setresuid(user or 65534, user or 65534, user)  # root may read all
        try:
            photos = write_folder(pathlib.Path(folder, 'photos'), dict.fromkeys(['a', 'b', 'c.jpg', 'closed/d'], NOISE))
            for path in photos / 'c.jpg', photos / 'closed':
                path.chmod(0)
            assert load(photos).num_data == 2
            line, = (line for line in capsys.readouterr().out.splitlines() if 'Permission denied' in line)
            assert 'c.jpg' in line and 'closed' in line
            photos.chmod(0)
            refused(lambda: load(photos), 'Permission denied', photos)
        finally:
            os.setresuid(user, user, user)


# ---------------------------------------------------------------- kinds of files

QUARTERS = np.array([[(220, 20, 70), (20, 220, 70)], [(20, 20, 170), (120, 120, 70)]], np.uint8)  # BGR
PICTURE = QUARTERS.repeat(40, 0).repeat(60, 1)
GREY = PICTURE[:, :, :1]
OPACITY = np.array([[0, 128], [255, 255]], np.uint8).repeat(40, 0).repeat(60, 1)[:, :, np.newaxis]
CLEAR = np.dstack([PICTURE, OPACITY])
OVER_WHITE = 255 - (255 - PICTURE) * (OPACITY / 255)
JPEG = encoded(PICTURE)
TURNED = b'Exif\0\0' + b'MM\0*' + struct.pack('>IHHHIHHI', 8, 1, 0x112, 3, 1, 6, 0, 0)  # orientation 6
TURNED_JPEG = JPEG[:2] + b'\xff\xe1' + struct.pack('>H', len(TURNED) + 2) + TURNED + JPEG[2:]


@cases('content, expected', {
    'turned JPEG': (TURNED_JPEG, np.rot90(PICTURE, 3)),
    'grey TIFF of 16 bits': (encoded(GREY.astype(np.uint16) * 257, '.tif'), GREY.repeat(3, 2)),
    'clear PNG': (encoded(CLEAR, '.png'), OVER_WHITE)})
def test_kinds_of_pictures(tmp_path, content, expected):
    """In a folder, where names do not matter, and in a .rec from elsewhere."""
    folder = write_folder(tmp_path / 'photos', {'a.jpg': content, 'b': content})
    rec = write_rec(tmp_path / 'same.rec', [content] * 2)
    side = min(expected.shape[:2])
    top, left = ((size - side) // 2 for size in expected.shape[:2])
    square = cv2.resize(expected[top:top + side, left:left + side], (64, 64), interpolation=cv2.INTER_AREA)
    for path in folder, rec:
        for image in epoch(load(path, augment=False))[0]:
            assert abs(image - (square[:, :, ::-1].transpose(2, 0, 1) / 127.5 - 1)).mean() < 0.04


@cases('content, words', {
    'empty': (b'', 'empty'),
    'cut JPEG': (JPEG[:-100], 'damaged'),
    'LFS': (b'version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n', 'git lfs pull'),
    'zip': (b'PK\3\4' + bytes(99), 'unpack it'),
    'float TIFF': (encoded(NOISE.astype(np.float32), '.tif'), 'float32')})
def test_what_is_no_picture(tmp_path, capfd, content, words):
    """In a folder, in a .rec and instead of it."""
    folder = write_folder(tmp_path / 'photos', {'a.jpg': content, 'b': NOISE, 'c': NOISE})
    assert load(folder).num_data == 2
    out, err = capfd.readouterr()
    line, = (line for line in out.splitlines() if 'WARNING' in line)
    assert words in line and 'a.jpg' in line and '2 pictures packed, 1 files skipped' in out
    assert all(line.startswith(('Corrupt', 'TIFF')) for line in err.splitlines()), err  # no OpenCV's lines
    refused(lambda: load(folder / 'a.jpg'), folder / 'a.jpg', words, 'imgnet_path')
    path = write_rec(tmp_path / 'a.rec', [JPEG, JPEG, content])
    refused(lambda: load(path), path, 'record 2', words)


def test_nothing_to_read(tmp_path):
    folder = tmp_path / 'photos'
    refused(lambda: load(folder), folder, 'No such file', 'imgnet_path')
    folder.mkdir()
    refused(lambda: load(folder), folder, 'no picture')
    write_folder(folder, {'b.jpg': NOISE})
    refused(lambda: load(folder), 'batch of 2', '1 pictures a worker')
    refused(lambda: load(folder / 'b.jpg'), folder / 'b.jpg', 'a single picture')
    rec = write_rec(tmp_path / 'cut.rec', [JPEG] * 3)
    rec.write_bytes(rec.read_bytes()[:-100])
    refused(lambda: load(rec), rec, 'record 2', 'cut short')


def test_dark_pictures_and_dead_links(tmp_path, capsys):
    """Very dark pictures of 16 bits, of which perhaps only 12 are used; a link to nowhere."""
    dark, bright = (encoded(NOISE.astype(np.uint16) * factor, '.png') for factor in (16, 257))
    folder = write_folder(tmp_path / 'photos', {'dark.png': dark, 'bright.png': bright})
    (folder / 'link').symlink_to('nowhere')
    assert load(folder).num_data == 2
    dark, link = sorted(line for line in capsys.readouterr().out.splitlines() if 'WARNING' in line)
    assert 'nearly black' in dark and '1 files' in dark and 'dark.png' in dark and 'bright.png' not in dark
    assert 'not there' in link and '/link' in link


# ---------------------------------------------------------------- batches

def test_grey_batches(photos):
    """An epoch's last batch is filled up from its start."""
    batches = load(photos, batch_size=4, nc=1, ctx=(mx.cpu(1),))
    images = [next(batches).data[0] for _ in range(8)]
    assert all(batch.context == mx.cpu(1) and batch.dtype == np.float32 for batch in images)
    levels = np.concatenate([batch.asnumpy() for batch in images]).mean(axis=(1, 2, 3)) * 127.5 + 127.5
    assert np.allclose(sorted(levels[:14]), sorted(COLOURS[:14] @ [0.299, 0.587, 0.114]), atol=3)
    assert np.allclose(levels, [*levels[:14], *levels[:2]] * 2, atol=1)


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
    write_folder(folder, {'stray.jpg': NOISE})
    refused(lambda: load(folder, conditional=True), folder, 'sub-folder')


def test_crops_follow_from_seed_epoch_worker_and_iteration(tmp_path):
    path = write_rec(tmp_path / 'a.rec', [encoded(NOISE)] * 40)
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


# ---------------------------------------------------------------- a whole run

def test_a_run_on_pictures(tiny, tmp_path):
    """Stopped in the middle of an epoch and resumed: to the last bit the run that was not."""
    pictures = {f'{kind}/{i}.png': plain(COLOURS[kind], SIZES[i % 5]) for kind in (0, 4) for i in range(7)}
    folder = write_folder(tmp_path / 'photos', pictures)
    changes = dict(dataset='imagenet', imgnet_path=str(folder), batch_size=1, epochs=2, nc=3, conditional=True,
                   coverage=True)
    whole, part = (tiny(**{**changes, 'out': str(tmp_path / out)}) for out in ('whole', 'part'))
    dcgan.train(whole)
    train_and_stop(part, 7)
    assert read_state(newest(part.out))[0]['iteration'] == 10
    part.resume = 'latest'
    dcgan.train(part)
    assert state(part.out) == state(whole.out)
    assert np.ptp(cv2.imread(f'{newest(part.out)}/data.png'), axis=2).max() > 0  # in colour
    write_folder(folder, {'4/more.png': NOISE})
    assert 'trained with other images' in ended(dcgan.Settings(**{**vars(part), 'epochs': 3}))
