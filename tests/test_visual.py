"""visual.py: what it draws, what it leaves on disk, and its windows under a real X server.

The last needs Xvfb, openbox, wmctrl, xdotool, ImageMagick's `import`, and in WINDOWS_PYTHON the path of a Python with
opencv-python (not headless): the tests' own has no windows. Where they are missing these tests are skipped.
"""
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings

import cv2
import numpy as np
import pytest
from conftest import ROOT

import visual

TITLES = ('gout', 'diff', 'data', 'loss')
COLOURS = ((0, 94, 213), (178, 114, 0), (115, 158, 0))  # of plot's curves, in their order

# a run as visual.py sees it: at every line of its input, the pictures of that number
RUN = '''
import sys
import numpy as np
import visual
for line in sys.stdin:
    seed = int(line)
    for i, title in enumerate(('gout', 'diff', 'data')):
        visual.visual(title, np.random.RandomState(seed + i).uniform(-1.2, 1.2, (60, 1, 64, 64)), sys.argv[1])
    losses = visual.plot(np.array([10, 20]), {'G': np.array([seed, 1]), 'D': np.array([1, 2])})
    visual.show_picture('loss', losses, sys.argv[1])
    print('round', visual.quit_pressed(), flush=True)
'''


def pictures(seed):
    """What a run shows at that number."""
    drawn = [visual.tile(np.random.RandomState(seed + i).uniform(-1.2, 1.2, (60, 1, 64, 64))) for i in range(3)]
    losses = visual.plot(np.array([10, 20]), {'G': np.array([seed, 1]), 'D': np.array([1, 2])})
    return dict(zip(TITLES, [*drawn, losses]))


def step(run, seed):
    """Let it show the pictures of that number. Returns the lines it said meanwhile, and whether q was pressed."""
    run.stdin.write(f'{seed}\n')
    run.stdin.flush()
    said = []
    for line in iter(run.stdout.readline, ''):
        if line.startswith('round'):
            return said, line == 'round True\n'
        said.append(line)
    raise AssertionError(f'the run ended, status {run.wait(10)}: {said}')


def until(condition):
    """Wait for what another process does in its own time."""
    end = time.time() + 30
    while not condition():
        assert time.time() < end, 'waited in vain'
        time.sleep(0.05)


def windows_python():
    return os.environ.get('WINDOWS_PYTHON') or pytest.skip('no WINDOWS_PYTHON')


@pytest.fixture(autouse=True)
def no_screen(monkeypatch):
    """No display unless a test brings one; nothing said yet."""
    monkeypatch.delenv('DISPLAY', raising=False)
    monkeypatch.delenv('WAYLAND_DISPLAY', raising=False)
    monkeypatch.setattr(visual, '_viewers', {})
    monkeypatch.setattr(visual, '_warned', set())


@pytest.fixture
def start():
    """Start processes that outlive neither the test nor two minutes of it."""
    processes, timers = [], []

    def start(command):
        process = subprocess.Popen(command, env=dict(os.environ, PYTHONPATH=ROOT), universal_newlines=True,
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        processes.append(process)
        timers.append(threading.Timer(120, process.kill))
        timers[-1].start()
        return process

    yield start
    for process, timer in zip(processes[::-1], timers[::-1]):
        timer.cancel()
        process.kill()
        process.communicate()


@pytest.fixture
def screen(start, monkeypatch):
    """A screen of its own with a window manager, as on a desk. DISPLAY is the test's tools'. Returns the X server."""
    missing = [name for name in ('Xvfb', 'openbox', 'wmctrl', 'xdotool', 'import') if not shutil.which(name)]
    if missing:
        pytest.skip(f'not installed: {missing}')
    server = start(['Xvfb', '-displayfd', '1', '-noreset', '-screen', '0', '1920x1080x24', '-nolisten', 'tcp'])
    monkeypatch.setenv('DISPLAY', f':{int(server.stdout.readline())}')
    start(['openbox', '--sm-disable'])
    until(lambda: tool('wmctrl', '-m'))
    return server


def tool(*command):
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=30).stdout


def windows():
    """{title: (id, x)} of the windows on the screen."""
    rows = [row.split() for row in tool('wmctrl', '-lG').decode().splitlines()]
    return {row[7]: (row[0], int(row[2])) for row in rows if row[7:] and row[7] in TITLES}


def seen(title, picture):
    """Whether the screen shows exactly this picture in that window."""
    shot = tool('import', '-silent', '-window', windows()[title][0], 'png24:-')
    shot = cv2.imdecode(np.frombuffer(shot, np.uint8), cv2.IMREAD_COLOR)
    return shot.shape == picture.shape and (shot == picture).all()


def assert_on_disk(out, seed):
    for title, picture in pictures(seed).items():
        np.testing.assert_array_equal(cv2.imread(str(out / f'{title}.png')), picture)


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


@pytest.mark.parametrize('dtype', ['float16', 'float32', 'float64'])
def test_tile_round_trip(dtype):
    levels = np.arange(256)
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


def test_without_a_screen(tmp_path, capsys):
    X = np.random.RandomState(0).uniform(-1, 1, (5, 3, 8, 6))
    out = str(tmp_path / 'new' / 'out')
    for title in ('gout', 'diff', 'gout'):
        visual.visual(title, X, out)
        np.testing.assert_array_equal(cv2.imread(os.path.join(out, f'{title}.png')), visual.tile(X))
    said = capsys.readouterr().out
    assert said.startswith('no window') and out in said and said.count('\n') == 1
    assert sorted(os.listdir(out)) == ['diff.png', 'gout.png']
    assert not visual.quit_pressed()


def test_windows_not_asked_for(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv('DISPLAY', ':77')
    monkeypatch.setattr(visual.subprocess, 'Popen', None)  # it would not even try
    visual.visual('gout', np.zeros((1, 1, 2, 2)), str(tmp_path), display=False)
    assert (tmp_path / 'gout.png').exists() and capsys.readouterr().out == ''


def test_nowhere_to_write(tmp_path, capsys):
    (tmp_path / 'out').write_text('a file where the folder should be')
    for title in TITLES * 2:
        visual.visual(title, np.zeros((1, 1, 2, 2)), str(tmp_path / 'out'))
    said = capsys.readouterr().out
    assert said.startswith('WARNING') and str(tmp_path / 'out') in said and said.count('\n') == 1


def test_disk_full(tmp_path, capsys):
    path = str(tmp_path / 'gout.png')
    visual.save(path, np.full((4, 4, 3), 7, np.uint8))
    os.symlink('/dev/full', path + '.tmp')
    with pytest.raises(OSError):
        visual.save(path, np.zeros((400, 400, 3), np.uint8))
    visual.visual('gout', np.zeros((1, 1, 400, 400)), str(tmp_path))
    assert capsys.readouterr().out.startswith('WARNING')
    assert (cv2.imread(path) == 7).all()  # the old one, whole


@pytest.mark.parametrize('build, display', [
    ('windows', ':77'), ('windows', '127.0.0.1:77'), ('headless', ':77'), ('headless', 'screen')])
def test_no_window_opens(build, display, start, tmp_path, request, monkeypatch):
    """A server that is not there, and an OpenCV that cannot open windows where there is one."""
    python = windows_python() if build == 'windows' else sys.executable
    if display == 'screen':
        request.getfixturevalue('screen')
    else:
        monkeypatch.setenv('DISPLAY', display)
    run = start([python, '-c', RUN, str(tmp_path)])
    said, _ = step(run, 1)
    assert len(said) == 1 and said[0].startswith('no window') and str(tmp_path) in said[0]
    assert step(run, 2) == ([], False)
    assert_on_disk(tmp_path, 2)


def test_screen_that_does_not_answer(tmp_path):
    """The viewer gives up (here sooner) instead of keeping the training waiting."""
    code = '''if True:
        import signal, sys, time, visual
        alarm = signal.alarm
        signal.alarm = lambda seconds: alarm(seconds and 1)
        visual.cv2.waitKey = lambda _: time.sleep(60)
        visual._view(sys.argv[1])'''
    done = subprocess.run([sys.executable, '-c', code, str(tmp_path)], cwd=ROOT, timeout=30)
    assert done.returncode == -signal.SIGALRM


def test_windows(screen, start, tmp_path):
    run = start([windows_python(), '-c', RUN, str(tmp_path)])
    assert step(run, 1) == ([], False)
    until(lambda: windows().keys() == set(TITLES))
    for title, picture in pictures(1).items():  # all of it: none hides another or leaves the screen
        until(lambda: seen(title, picture))

    tool('xdotool', 'windowmove', windows()['data'][0], '1300', '500')
    until(lambda: abs(windows()['data'][1] - 1300) < 50)
    assert step(run, 2) == ([], False)
    for title, picture in pictures(2).items():  # they follow, and a moved one stays where it is
        until(lambda: seen(title, picture))
    assert abs(windows()['data'][1] - 1300) < 50

    tool('wmctrl', '-ic', windows()['diff'][0])
    until(lambda: 'diff' not in windows())
    assert step(run, 3) == ([], False)
    until(lambda: seen('gout', pictures(3)['gout']) and seen('loss', pictures(3)['loss']))
    assert 'diff' not in windows()  # closed is closed
    assert_on_disk(tmp_path, 3)

    tool('xdotool', 'key', '--window', windows()['gout'][0], 'x')
    assert step(run, 4) == ([], False)
    tool('xdotool', 'key', '--window', windows()['gout'][0], 'q')
    until(lambda: not windows())
    answers = []
    until(lambda: answers.append(step(run, 5)) or answers[-1][1])
    assert not any(said for said, _ in answers)


def test_screen_goes_away(screen, start, tmp_path):
    run = start([windows_python(), '-c', RUN, str(tmp_path)])
    assert step(run, 1) == ([], False)
    screen.kill()
    said = []
    until(lambda: said.extend(step(run, 2)[0]) or said)
    assert len(said) == 1 and said[0].startswith('no window')
    assert step(run, 3) == ([], False)
    assert_on_disk(tmp_path, 3)


def test_training_killed(screen, start, tmp_path):
    run = start([windows_python(), '-c', RUN, str(tmp_path)])
    step(run, 1)
    until(lambda: len(windows()) == 4)
    run.kill()
    until(lambda: not windows())  # the viewer does not outlive it


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


def test_plot_draws_each_value_at_its_iteration():
    """An epoch's last iterations may have no line of their own."""
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
    shades = [np.full((64, 64, 3), shade, np.uint8) for shade in (0, 60, 120, 180)]
    write_mosaics(tmp_path, shades)
    visual.save(str(tmp_path / 'gout-0000-00050.png'), np.full((64, 64, 3), 240, np.uint8))  # before its epoch's end
    visual.film(str(tmp_path))
    assert [round(frame[..., :3].mean() / 60) for frame in frames(tmp_path)] == [4, 0, 1, 2, 3]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ['.png'] * 5 + ['.webp']


def test_film_is_never_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(visual, 'FILM_BYTES', 100_000)
    pictures = [np.random.RandomState(i).randint(0, 256, (96, 96, 3)).astype(np.uint8) for i in range(60)]
    write_mosaics(tmp_path, [*pictures, np.full((96, 96, 3), 200, np.uint8)])
    visual.film(str(tmp_path))
    assert os.path.getsize(tmp_path / 'film.webp') <= 100_000
    assert 3 <= len(frames(tmp_path)) < 50 and abs(frames(tmp_path)[-1][..., :3].mean() - 200) < 5  # the newest is last


def test_film_that_cannot_be_written(tmp_path, capsys):
    write_mosaics(tmp_path, [np.zeros((64, 64, 3), np.uint8)])
    visual.film(str(tmp_path))
    before = (tmp_path / 'film.webp').read_bytes()
    (tmp_path / 'gout-0001.png').write_bytes(b'damaged')
    for _ in range(2):
        visual.film(str(tmp_path))
    said = capsys.readouterr().out
    assert said.startswith('WARNING') and said.count('\n') == 1 and 'film.webp' in said
    assert (tmp_path / 'film.webp').read_bytes() == before
