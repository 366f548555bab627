"""visual.py: what it draws, what it leaves on disk, and its windows under a real X server.

The last needs Xvfb, openbox, wmctrl, xdotool, ImageMagick's `import`, and in WINDOWS_PYTHON the path of a Python with
opencv-python (not headless): the tests' own has no windows. Where they are missing these tests are skipped.
"""
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings

import cv2
import numpy as np
import pytest
from conftest import ROOT

import visual

TITLES = ('gout', 'diff', 'data', 'loss')
COLOURS = ((0, 94, 213), (178, 114, 0), (115, 158, 0))  # of plot's curves, in their order


@pytest.fixture(autouse=True)
def no_screen(monkeypatch):
    """No display unless a test brings one; nothing said yet; no window outlives the test."""
    monkeypatch.delenv('DISPLAY', raising=False)
    monkeypatch.delenv('WAYLAND_DISPLAY', raising=False)
    monkeypatch.setattr(visual, '_viewers', {})
    monkeypatch.setattr(visual, '_warned', set())
    yield
    visual.close()


@pytest.fixture
def start():
    """Start processes that do not outlive the test."""
    processes = []

    def start(*command):
        processes.append(subprocess.Popen(command, env=dict(os.environ, PYTHONPATH=ROOT), universal_newlines=True,
                                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL))
        return processes[-1]

    yield start
    for process in processes[::-1]:
        process.kill()
        process.communicate()


@pytest.fixture
def screen(start, monkeypatch):
    """A screen of its own with a window manager, as on a desk that prefers Wayland. Returns the X server."""
    missing = [name for name in ('Xvfb', 'openbox', 'wmctrl', 'xdotool', 'import') if not shutil.which(name)]
    if missing:
        pytest.skip(f'not installed: {missing}')
    server = start('Xvfb', '-displayfd', '1', '-noreset', '-screen', '0', '1920x1080x24', '-nolisten', 'tcp')
    monkeypatch.setenv('DISPLAY', f':{int(server.stdout.readline())}')
    monkeypatch.setenv('QT_QPA_PLATFORM', 'wayland')
    start('openbox', '--sm-disable')
    until(lambda: tool('wmctrl', '-m'))
    return server


@pytest.fixture
def windows_python(monkeypatch):
    """The viewer gets a Python whose OpenCV can open windows."""
    path = os.environ.get('WINDOWS_PYTHON') or pytest.skip('no WINDOWS_PYTHON')
    monkeypatch.setattr(sys, 'executable', path)
    return path


def show(out, seed, display=True):
    """Show what a run shows, pictures of that number. Returns them."""
    random = np.random.RandomState(seed)
    pictures = {'loss': visual.plot(np.array([10, 20]), {'G': random.rand(2), 'D': random.rand(2)})}
    visual.show_picture('loss', pictures['loss'], str(out), display)
    for title in TITLES[:3]:
        X = random.uniform(-1.2, 1.2, (60, 1, 64, 64))
        visual.visual(title, X, str(out), display)
        pictures[title] = visual.tile(X)
    return pictures


def until(condition):
    """Wait for what another process does in its own time."""
    end = time.time() + 30
    while not condition():
        assert time.time() < end, 'waited in vain'
        time.sleep(0.05)


def tool(*command, timeout=30):
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=timeout).stdout


def windows():
    """{title: (id, x)} of the windows on the screen."""
    rows = [row.split() for row in tool('wmctrl', '-lG').decode().splitlines()]
    return {row[7]: (row[0], int(row[2])) for row in rows if row[7:] and row[7] in TITLES}


def seen(title, picture):
    """Whether the screen shows exactly this picture in that window."""
    content = b''
    with contextlib.suppress(KeyError, subprocess.TimeoutExpired):  # the viewer may just be opening it anew
        content = tool('import', '-silent', '-window', windows()[title][0], 'png24:-', timeout=5)
    if not content:
        return False
    shot = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    return shot.shape == picture.shape and (shot == picture).all()


def on_disk(out, title='gout'):
    return cv2.imread(os.path.join(str(out), f'{title}.png'))


# ---------------------------------------------------------------- mosaics

def test_tile_values():
    X = np.array([[-1, 1], [0, 0.5], [7, np.nan]]).reshape(3, 1, 1, 2)
    for channel in np.moveaxis(visual.tile(X), 2, 0):
        np.testing.assert_array_equal(channel, [[0, 255, 128, 191], [255, 0, 0, 0]])
    X = np.array([1, 0, -1, -1, 1, 0]).reshape(2, 3, 1, 1)  # RGB in, BGR out
    np.testing.assert_array_equal(visual.tile(X), [[[0, 128, 255], [128, 255, 0]]])
    X = np.array([np.inf, -np.inf, np.nan, 3e38], 'float32').reshape(1, 1, 2, 2)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert visual.tile(X)[..., 0].tolist() == [[255, 0], [0, 255]]
    assert np.isinf(X[0, 0, 0]).all() and np.isnan(X[0, 0, 1, 0])  # its input is as it was
    levels = np.arange(256)
    for dtype in ('float16', 'float32', 'float64'):
        X = (levels / 127.5 - 1).astype(dtype).reshape(1, 1, 16, 16)
        np.testing.assert_array_equal(visual.tile(X)[:, :, 1].ravel(), levels)


@pytest.mark.parametrize('n, columns, rows, across', [
    (1, None, 1, 1), (2, None, 1, 2), (3, None, 2, 2), (5, None, 2, 3), (64, None, 8, 8), (64, 10, 7, 10), (5, 1, 5, 1),
    (3, 5, 1, 5)])
@pytest.mark.parametrize('channels', [1, 3])
def test_tile_places(n, columns, rows, across, channels):
    images = np.random.RandomState(n).randint(0, 256, (n, 5, 3, channels))
    picture = visual.tile((images / 127.5 - 1).transpose(0, 3, 1, 2).astype('float32'), columns)
    assert picture.dtype == np.uint8 and picture.shape == (rows * 5, across * 3, 3)
    for i in range(rows * across):
        y, x = i // across * 5, i % across * 3
        np.testing.assert_array_equal(picture[y:y + 5, x:x + 3], images[i, :, :, ::-1] + np.zeros(3, int)
                                      if i < n else np.zeros((5, 3, 3)))


def test_a_class_a_column():
    X = np.arange(1, 6, dtype=np.float32).reshape(5, 1, 1, 1)
    for classes, arguments, rows in (
            ([3, 3, 0, 9, 3], (10,), [[3, -1, -1, 1, -1, -1, -1, -1, -1, 4]]),
            ([1, 1, 0, 1, 1], (5, 3), [[3, 1, -1, -1, -1], [-1, 2, -1, -1, -1], [-1, 4, -1, -1, -1]]),  # no place for 5
            ([1, 1, 0, 1, 1], (2,), [[3, 1, -1, 2, -1, 4, -1, 5]])):  # few classes have several columns each
        table = visual.by_class(X, np.array(classes), *arguments)
        assert table.dtype == X.dtype and table.reshape(len(rows), -1).tolist() == rows
    table = visual.by_class(np.arange(94.).reshape(94, 1, 1, 1), np.arange(94) % 47, 47)
    table = table.reshape(3, 2, 16)  # blocks, rows, columns
    for k in range(48):
        assert table[k // 16, :, k % 16].tolist() == ([k, k + 47] if k < 47 else [-1, -1])


@pytest.mark.parametrize('n, num_classes, rows, columns, shown', [
    (64, 0, 8, 8, 64), (1024, 0, 16, 16, 256), (64, 2, 8, 8, 64), (1024, 2, 32, 8, 256), (1024, 1, 32, 8, 256),
    (64, 10, 7, 10, 64), (1024, 10, 25, 10, 250), (1024, 47, 15, 16, 235), (300, 256, 16, 16, 256),
    (2000, 1000, 16, 16, 256)])
def test_a_shown_mosaic_has_at_most_256_images(n, num_classes, rows, columns, shown, tmp_path):
    classes = np.arange(n) % num_classes if num_classes else None
    visual.visual('gout', np.ones((n, 1, 2, 2)), str(tmp_path), False, classes, num_classes)
    picture = on_disk(tmp_path)
    assert picture.shape == (rows * 2, columns * 2, 3) and (picture == 255).sum() == shown * 12


# ---------------------------------------------------------------- pictures on disk

@pytest.mark.parametrize('variable, display', [('NONE', True), ('WAYLAND_DISPLAY', True), ('DISPLAY', False)])
def test_without_windows(variable, display, tmp_path, capsys, monkeypatch):
    """No screen; Wayland alone, for which OpenCV's wheels have no windows; or not asked for. Nothing is started."""
    monkeypatch.setenv(variable, ':77')
    monkeypatch.setattr(visual.subprocess, 'Popen', None)
    out = tmp_path / 'new' / 'out'
    show(out, 1, display)
    for title, picture in show(out, 2, display).items():
        np.testing.assert_array_equal(on_disk(out, title), picture)
    said = capsys.readouterr().out
    assert said.count('\n') == display and (said.startswith('no window') and str(out) in said or not display)
    assert sorted(os.listdir(str(out))) == sorted(f'{title}.png' for title in TITLES)
    assert not visual.quit_pressed()


def test_nowhere_to_write(tmp_path, capsys):
    """For a while: then pictures are written again. On a full disk the old ones stay, whole."""
    out = tmp_path / 'out'
    out.write_text('a file where the folder should be')
    show(out, 1)
    said = capsys.readouterr().out
    assert said.startswith('WARNING') and str(out) in said and said.count('\n') == 1
    out.unlink()
    picture = show(out, 2)['gout']
    np.testing.assert_array_equal(on_disk(out), picture)
    (out / 'gout.png.tmp').symlink_to('/dev/full')
    data = show(out, 3)['data']
    np.testing.assert_array_equal(on_disk(out), picture)
    np.testing.assert_array_equal(on_disk(out, 'data'), data)


# ---------------------------------------------------------------- windows

@pytest.mark.parametrize('has', ['windows_python', 'screen'])
def test_no_window_opens(has, tmp_path, request, monkeypatch, capsys):
    """A server that is not there, and an OpenCV that cannot open windows where there is one."""
    monkeypatch.setenv('DISPLAY', ':77')
    request.getfixturevalue(has)
    for seed in (1, 2):
        show(tmp_path, seed)
    said = capsys.readouterr().out
    assert said.startswith('no window') and str(tmp_path) in said and said.count('\n') == 1
    assert not visual.quit_pressed()


def test_screen_that_does_not_answer(tmp_path):
    """The viewer gives up (here sooner) instead of keeping the training waiting."""
    code = '''if True:
        import signal, sys, time, visual
        signal.alarm = lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds and 0.1)
        visual.cv2.waitKey = lambda _: time.sleep(60)
        visual._view(sys.argv[1])'''
    done = subprocess.run([sys.executable, '-c', code, str(tmp_path)], cwd=ROOT, timeout=30)
    assert done.returncode == -signal.SIGALRM


def test_windows(screen, windows_python, tmp_path, capsys):
    out = tmp_path / 'out'
    pictures = show(out, 1)
    until(lambda: windows().keys() == set(TITLES))
    for title, picture in pictures.items():  # all of it: none hides another or leaves the screen
        until(lambda: seen(title, picture))

    tool('xdotool', 'windowmove', windows()['data'][0], '1300', '500')
    until(lambda: abs(windows()['data'][1] - 1300) < 50)
    for title, picture in show(out, 2).items():  # they follow, and a moved one stays where it is
        until(lambda: seen(title, picture))
    assert abs(windows()['data'][1] - 1300) < 50

    tool('wmctrl', '-ic', windows()['diff'][0])
    until(lambda: 'diff' not in windows())
    out.rename(tmp_path / 'renamed')
    picture = show(out, 3)['gout']
    until(lambda: seen('gout', picture))
    assert 'diff' not in windows()  # closed is closed
    visual.save(str(tmp_path / 'early.png'), picture[::-1])
    os.utime(str(tmp_path / 'early.png'), (1, 1))
    (tmp_path / 'early.png').rename(out / 'gout.png')  # written after the clock has been set back
    until(lambda: seen('gout', picture[::-1]))

    tool('xdotool', 'key', '--window', windows()['gout'][0], 'x')
    time.sleep(0.2)
    assert not visual.quit_pressed()
    tool('xdotool', 'key', '--window', windows()['gout'][0], 'q')
    until(visual.quit_pressed)
    show(out, 4)
    assert not windows() and capsys.readouterr().out == ''


def test_a_window_whose_opening_qt_has_missed(screen, windows_python, start, tmp_path):
    """It happens where the CPU is busy, and is pretended here. The window opens anew."""
    code = '''if True:
        import sys, visual
        answers, ask = [(50, 0, 300, 300)], visual.cv2.getWindowImageRect
        visual.cv2.getWindowImageRect = lambda title: answers.pop() if answers else ask(title)
        visual._view(sys.argv[1])'''
    pictures = show(tmp_path, 1, display=False)
    start(windows_python, '-c', code, str(tmp_path))
    until(lambda: windows().keys() == set(TITLES))
    first = {number for number, _ in windows().values()}
    until(lambda: windows().keys() == set(TITLES) and {number for number, _ in windows().values()} != first)
    for title, picture in pictures.items():
        until(lambda: seen(title, picture))


def test_the_training_the_windows_or_the_screen_go_away(screen, windows_python, start, tmp_path, capsys):
    code = '''if True:
        import sys, time, numpy, visual
        visual.visual('gout', numpy.zeros((4, 1, 64, 64)), sys.argv[1])
        print('shown', flush=True)
        time.sleep(60)'''
    run = start(windows_python, '-c', code, str(tmp_path / 'killed'))
    assert run.stdout.readline() == 'shown\n' and windows().keys() == {'gout'}
    run.kill()
    until(lambda: not windows())  # the viewer does not outlive it

    show(tmp_path / 'closed', 1)
    until(lambda: len(windows()) == 4)
    viewer = visual._viewers[str(tmp_path / 'closed')]

    def closed():
        for number, _ in windows().values():
            tool('wmctrl', '-ic', number)
        return viewer.poll() is not None

    until(closed)  # a person who closes all of them wants no more
    show(tmp_path / 'closed', 2)
    assert not windows() and not visual.quit_pressed()

    show(tmp_path, 1)
    assert windows() and capsys.readouterr().out == ''
    screen.kill()
    visual._viewers[str(tmp_path)].wait(30)
    show(tmp_path, 2)
    picture = show(tmp_path, 3)['gout']
    said = capsys.readouterr().out
    assert said.startswith('no window') and said.count('\n') == 1
    np.testing.assert_array_equal(on_disk(tmp_path), picture)


# ---------------------------------------------------------------- curves

def where(picture, colour):
    """The middle row of that colour below the legend; None if there is none."""
    rows = np.nonzero((picture[40:] == colour).all(axis=2).any(axis=1))[0]
    return 40 + (rows[0] + rows[-1]) / 2 if len(rows) else None


def plot(every=10, **curves):
    """`visual.plot` of lists, of a value every so many iterations."""
    curves = {name: np.array(curve, float) for name, curve in curves.items()}
    return visual.plot(every * np.arange(1, 1 + max(map(len, curves.values()))), curves)


@pytest.mark.parametrize('curve', [
    [2.5], [1, 2], [27.6] * 300, [1e-9] * 300, [0.0], list(np.random.RandomState(0).rand(5000)),
    [float('nan')], [1, float('nan'), float('inf'), 2]])
def test_plot_takes_any_curve(curve):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        picture = plot(G=curve, D=[float('nan')] * len(curve))
    assert picture.shape == (480, 640, 3) and picture.dtype == np.uint8
    assert (where(picture, COLOURS[0]) is not None) == bool(np.isfinite(curve).any())
    assert where(picture, COLOURS[1]) is None


def test_plot_is_to_scale():
    rows = [where(plot(G=[1] * 99, D=[2] * 99, X=[4] * 99), colour) for colour in COLOURS]
    assert rows[0] > rows[1] > rows[2] and abs((rows[0] - rows[2]) - 3 * (rows[0] - rows[1])) <= 2
    flat = plot(G=[1] * 999)
    peak = plot(G=[1] * 500 + [27.6] + [1] * 498)  # a rare one leaves the rest where it is
    np.testing.assert_array_equal(peak[:, :200], flat[:, :200])
    np.testing.assert_array_equal(peak[:35], flat[:35])
    # an epoch's last iterations may have no line of their own: each value is at its iteration
    wide, even = (visual.plot(np.array(x), {'G': np.array([1., 1, 3, 3])})
                  for x in ([10, 20, 90, 100], [25, 50, 75, 100]))
    rise = [np.nonzero((picture == COLOURS[0]).all(axis=2)[100:400].any(axis=0))[0] for picture in (wide, even)]
    assert (wide != even).any() and rise[0].min() < rise[1].min()


def test_plot_labels():
    values = np.array([1, 3, 2])
    picture = plot(G=values)
    for other, rows, columns in ((plot(D=values), slice(0, 35), slice(0, 640)),  # legend
                                 (plot(100, G=values), slice(437, 480), slice(0, 640)),  # iterations
                                 (plot(G=values * 10), slice(0, 480), slice(0, 48))):  # entropy
        assert (picture[rows, columns] != other[rows, columns]).any()
        np.testing.assert_array_equal(picture[40:430, 60:600], other[40:430, 60:600])


def test_plot_draws_no_more_points_than_columns(monkeypatch):
    """And the strong line is the mean of neighbours."""
    lines, polylines = [], cv2.polylines
    monkeypatch.setattr(cv2, 'polylines', lambda picture, points, *args: lines.append(points[0]) or
                        polylines(picture, points, *args))
    plot(G=np.random.RandomState(0).rand(9380))
    assert len(lines) == 2 and all(300 < len(points) <= 560 for points in lines)
    lines.clear()
    values = np.random.RandomState(0).rand(100)
    plot(G=values)
    rows = 435 - np.clip(values / (1.1 * np.percentile(values, 99)) * 400, 0, 400)
    assert np.abs(lines[1][:, 0, 1] - np.convolve(rows, np.full(2, 0.5), 'valid')).max() <= 0.5


# ---------------------------------------------------------------- the film

def write_mosaics(out, pictures):
    for i, picture in enumerate(pictures):
        visual.save(str(out / f'gout-{i:04d}.png'), picture)


def frames(out):
    return cv2.imreadanimation(str(out / 'film.webp'))[1].frames


def test_film(tmp_path):
    visual.film(str(tmp_path))  # of nothing
    shades = [np.full((64, 64, 3), shade, np.uint8) for shade in (0, 60, 120, 180)]
    write_mosaics(tmp_path, shades)
    visual.save(str(tmp_path / 'gout-0000-00050.png'), np.full((64, 64, 3), 240, np.uint8))  # before its epoch's end
    visual.save(str(tmp_path / 'gout-0000-00090.png'), np.zeros((64, 128, 3), np.uint8))  # of another batch size
    (tmp_path / 'gout-0002-00050.png').write_bytes(b'damaged')
    visual.film(str(tmp_path))
    assert [round(frame[..., :3].mean() / 60) for frame in frames(tmp_path)] == [4, 0, 1, 2, 3]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ['.png'] * 7 + ['.webp']


def test_film_is_never_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(visual, 'FILM_BYTES', 100_000)
    pictures = [np.random.RandomState(i).randint(0, 256, (96, 96, 3)).astype(np.uint8) for i in range(60)]
    write_mosaics(tmp_path, [*pictures, np.full((96, 96, 3), 200, np.uint8)])
    visual.film(str(tmp_path))
    assert os.path.getsize(str(tmp_path / 'film.webp')) <= 100_000
    assert 3 <= len(frames(tmp_path)) < 25 and abs(frames(tmp_path)[-1][..., :3].mean() - 200) < 5  # the newest is last


def test_film_that_cannot_be_written(tmp_path, capsys):
    write_mosaics(tmp_path, [np.zeros((64, 64, 3), np.uint8)])
    visual.film(str(tmp_path))
    before = (tmp_path / 'film.webp').read_bytes()
    for reason, broken in (('No space left', lambda: os.symlink('/dev/full', str(tmp_path / 'film.webp.tmp'))),
                           ('too large', lambda: write_mosaics(tmp_path, [np.zeros((2, 16384, 3), np.uint8)])),
                           ('', lambda: (tmp_path / 'gout-0000.png').write_bytes(b'damaged'))):
        broken()
        visual._warned.clear()
        for _ in range(2):
            visual.film(str(tmp_path))
        said = capsys.readouterr().out
        assert said.startswith('WARNING') and said.count('\n') == 1 and 'film.webp' in said and reason in said
        assert (tmp_path / 'film.webp').read_bytes() == before
