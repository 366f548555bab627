"""visual.py: what it draws, what it leaves on disk, and its windows on a real X server.

The last needs Xvfb, openbox, wmctrl, xdotool, ImageMagick's `import`, and in WINDOWS_PYTHON the path of a Python with
opencv-python (not headless): the tests' own has no windows. If they are missing, these tests are skipped.
"""
import contextlib
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
import warnings

import cv2
import numpy as np
import pytest

import visual

SHAPES = {'gout': (512, 512, 3), 'diff': (512, 512, 3), 'data': (512, 512, 3), 'loss': (480, 640, 3)}
ORANGE, BLUE, GREEN = (0, 94, 213), (178, 114, 0), (115, 158, 0)  # of plot's curves, in their order
PYTHON, HERE = sys.executable, os.path.dirname(__file__)
CODE = f'import sys; sys.path.insert(0, {os.path.dirname(visual.__file__)!r}); import os, time, test_visual, visual; '


@pytest.fixture(autouse=True)
def nothing_open(monkeypatch):
    """No display unless a test brings one; nothing said yet; no window outlives the test."""
    for name in 'DISPLAY', 'WAYLAND_DISPLAY':
        monkeypatch.delenv(name, raising=False)
    visual.close()
    yield
    visual.close()


@pytest.fixture
def windows_python(monkeypatch):
    monkeypatch.setattr(sys, 'executable', os.environ.get('WINDOWS_PYTHON') or pytest.skip('no WINDOWS_PYTHON'))


@pytest.fixture
def screen(windows_python, monkeypatch):
    """A screen of its own with a window manager, as on a desk that prefers Wayland. Yields the X server."""
    missing = [name for name in ('Xvfb', 'openbox', 'wmctrl', 'xdotool', 'import') if not shutil.which(name)]
    if missing:
        pytest.skip(f'not installed: {missing}')
    command = 'Xvfb', '-displayfd', '1', '-noreset', '-screen', '0', '1920x1080x24', '-nolisten', 'tcp'
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as server:
        monkeypatch.setenv('DISPLAY', f':{int(server.stdout.readline())}')
        monkeypatch.setenv('QT_QPA_PLATFORM', 'wayland')
        with subprocess.Popen(['openbox', '--sm-disable'], stderr=subprocess.DEVNULL):  # it ends with the server
            until(lambda: tool('wmctrl', '-m'))
            yield server
            server.kill()


def until(condition):
    """Wait for what another process does in its own time."""
    end = time.time() + 60
    while not condition():
        assert time.time() < end, 'waited in vain'
        time.sleep(0.05)


def tool(*command):
    with contextlib.suppress(subprocess.TimeoutExpired):  # `import` waits in vain for a window that has just closed
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=10).stdout


def windows():
    """{title: (id, x)} of the windows on the screen."""
    rows = [row.split() for row in (tool('wmctrl', '-lG') or b'').decode().splitlines()]
    return {row[7]: (row[0], int(row[2])) for row in rows if row[7:] and row[7] in SHAPES}


def on_screen():
    """{title: pixels} of the windows."""
    shots = {title: tool('import', '-silent', '-window', at[0], 'png24:-') for title, at in windows().items()}
    return {title: cv2.imdecode(np.frombuffer(shot, np.uint8), 1).tobytes() for title, shot in shots.items() if shot}


def on_disk(out):
    return {path.stem: cv2.imread(str(path)).tobytes() for path in out.iterdir()}


def noise(seed, *shape):
    return np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)


def show(out, seed, display=True):
    """Show what a run shows, pictures of that number. Returns their pixels."""
    pictures = {title: noise(10 * seed + i, *shape) for i, (title, shape) in enumerate(SHAPES.items())}
    for title, picture in pictures.items():
        visual.show_picture(title, picture, str(out), display)
    return {title: picture.tobytes() for title, picture in pictures.items()}


def test_tile_values():
    X = np.array([[-1, 1], [0, 0.5], [7, np.nan], [np.inf, -np.inf]]).reshape(4, 1, 1, 2)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert visual.tile(X)[..., 1].tolist() == [[0, 255, 128, 191], [255, 0, 255, 0]]
    X = np.array([1, 0, -1, -1, 1, 0]).reshape(2, 3, 1, 1)  # RGB in, BGR out
    assert visual.tile(X).tolist() == [[[0, 128, 255], [128, 255, 0]]]
    for dtype in 'float16', 'float32', 'float64':
        X = (np.arange(256) / 127.5 - 1).astype(dtype).reshape(1, 1, 16, 16)
        assert visual.tile(X)[:, :, 1].ravel().tolist() == list(range(256))


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('n, columns, rows, across', [
    (1, None, 1, 1), (2, None, 1, 2), (3, None, 2, 2), (5, None, 2, 3), (64, 10, 7, 10), (3, 5, 1, 5)])
def test_tile_places(n, columns, rows, across, channels):
    images = noise(n, n, 5, 3, channels)
    picture = visual.tile((images / 127.5 - 1).transpose(0, 3, 1, 2).astype('float32'), columns)
    assert picture.dtype == np.uint8 and picture.shape == (rows * 5, across * 3, 3)
    for i in range(rows * across):
        y, x = i // across * 5, i % across * 3
        assert (picture[y:y + 5, x:x + 3] == (images[i, :, :, ::-1] if i < n else 0)).all()


def test_a_shown_mosaic_has_the_first_256_images_by_class(tmp_path):
    X, classes = np.arange(300).reshape(300, 1, 1, 1) / 150 - 1, np.arange(300) * 7 % 10
    by_class = sorted(range(256), key=lambda i: classes[i])
    for changes, order, columns in (({}, range(256), 16), ({'columns': 10}, range(256), 10),
                                    ({'classes': classes}, by_class, 16)):
        visual.visual('gout', X, str(tmp_path), False, **changes)
        assert on_disk(tmp_path) == {'gout': visual.tile(X[list(order)], columns).tobytes()}
    assert [visual.columns_for(n) for n in (1, 2, 3, 10, 16, 47)] == [8, 8, 6, 10, 16, 16]


def test_replacing(tmp_path):
    path = tmp_path / 'file'
    path.write_text('old')
    for error in OSError, KeyboardInterrupt:
        with pytest.raises(error), visual.replacing(path) as beside, open(beside, 'w') as file:
            file.write('half')
            raise error
        assert path.read_text() == 'old' and os.listdir(str(tmp_path)) == ['file']
    with visual.replacing(path) as beside, open(beside, 'w') as file:
        file.write('new')
        assert path.read_text() == 'old' and os.path.dirname(beside) == str(tmp_path)
    assert path.read_text() == 'new' and os.listdir(str(tmp_path)) == ['file']


def test_a_full_disk(tmp_path):
    """Here a limit of the files' size. The old files stay, whole, nothing is left beside them, and it is said once."""
    pictures = show(tmp_path, 1, display=False)
    code = f'{CODE} test_visual.show(sys.argv[1], 2, False); test_visual.show(sys.argv[1], 3, False)'
    done = subprocess.run([PYTHON, '-c', code, str(tmp_path)], cwd=HERE, stdout=subprocess.PIPE,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9999, 9999)))
    assert done.stdout.startswith(b'WARNING') and done.stdout.count(b'\n') == 1 and b'too large' in done.stdout
    assert done.returncode == 0 and on_disk(tmp_path) == pictures


def test_a_further_worker_shows_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    visual.visual('gout', None, None)
    visual.show_picture('loss', None, None)
    visual.film(None)
    assert not os.listdir(str(tmp_path)) and capsys.readouterr().out == ''


def test_a_warning_that_nobody_reads():
    """It does not end the training, which notices at its own next line."""
    reader, writer = os.pipe()
    os.close(reader)
    code = f"{CODE} visual.warn_once('disk', 'full'); print('goes on', file=sys.stderr); print('a line')"
    done = subprocess.run([PYTHON, '-uc', code], cwd=HERE, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.stderr.startswith(b'goes on') and b'BrokenPipeError' in done.stderr


@pytest.mark.parametrize('variable, display', [('NONE', True), ('WAYLAND_DISPLAY', True), ('DISPLAY', False)])
def test_without_windows(variable, display, tmp_path, capsys, monkeypatch):
    """No screen; Wayland alone, for which OpenCV's wheels have no windows; or not asked for. Nothing is started."""
    monkeypatch.setenv(variable, ':77')
    monkeypatch.setattr(visual.subprocess, 'Popen', None)
    out = tmp_path / 'new' / 'out'
    show(out, 1, display)
    assert show(out, 2, display) == on_disk(out)
    said = capsys.readouterr().out
    assert said.count('\n') == display and said.startswith('no window' * display)


def said_that_there_is_no_window(out, capsys):
    """Whether one line says it, after the first pictures, since nothing waits for a window; and they are written on."""
    said = [capsys.readouterr().out]
    until(lambda: show(out, 2) and said.append(capsys.readouterr().out) or said[-1])
    written = show(out, 3) == on_disk(out)
    said.append(capsys.readouterr().out)
    return written and not said[0] and ''.join(said).startswith('no window') and ''.join(said).count('\n') == 1


@pytest.mark.parametrize('kind', ['no server', 'a server that does not answer', 'an OpenCV without windows'])
def test_no_window_opens(kind, tmp_path, monkeypatch, capsys, request):
    if 'server' in kind:
        request.getfixturevalue('windows_python')
    viewer = tmp_path / 'viewer.py'  # it is less patient
    viewer.write_text('import runpy, signal\nalarm = signal.alarm\nsignal.alarm = lambda limit: alarm(limit and 5)\n'
                      f'runpy.run_path({visual.__file__!r}, run_name="__main__")')
    monkeypatch.setattr(visual, '__file__', str(viewer))
    with socket.socket() as server:
        server.bind(('127.0.0.1', 0))
        if 'answer' in kind:
            server.listen(9)
        monkeypatch.setenv('DISPLAY', f'127.0.0.1:{server.getsockname()[1] - 6000}')  # X servers have ports from 6000
        visual.show_picture('gout', noise(1, 8, 8, 3), str(tmp_path / 'out'))
        assert said_that_there_is_no_window(tmp_path / 'out', capsys) and not visual.quit_pressed()


def test_windows(screen, tmp_path, capsys):
    out = tmp_path / 'out'
    pictures = show(out, 1)
    until(lambda: on_screen() == pictures)  # all of them, whole: none hides another or leaves the screen
    tool('xdotool', 'windowmove', windows()['data'][0], '1300', '500')
    until(lambda: abs(windows()['data'][1] - 1300) < 50)
    pictures = show(out, 2)
    until(lambda: on_screen() == pictures)
    assert abs(windows()['data'][1] - 1300) < 50  # it stays where the user has put it

    tool('wmctrl', '-ic', windows()['diff'][0])
    until(lambda: 'diff' not in windows())
    out.rename(tmp_path / 'renamed')
    pictures = show(out, 3)
    os.utime(str(out / 'gout.png'), (1, 1))  # as if the clock had been set back
    del pictures['diff']
    until(lambda: on_screen() == pictures)

    tool('xdotool', 'key', '--window', windows()['gout'][0], 'x')
    time.sleep(1)
    assert not visual.quit_pressed()
    tool('xdotool', 'key', '--window', windows()['gout'][0], 'q')
    until(visual.quit_pressed)
    show(out, 4)
    until(lambda: not windows())
    assert visual.quit_pressed() and capsys.readouterr().out == ''


def test_the_training_the_windows_or_the_screen_go_away(screen, tmp_path, capsys):
    code = f'{CODE} sys.executable = {sys.executable!r}; test_visual.show(sys.argv[1], 1); time.sleep(600)'
    with subprocess.Popen([PYTHON, '-c', code, str(tmp_path / 'killed')], cwd=HERE) as run:
        try:
            until(lambda: len(windows()) == 4)
        finally:
            run.kill()
    until(lambda: not windows())  # they do not outlive it

    show(tmp_path / 'closed', 1)
    until(lambda: len(windows()) == 4)
    until(lambda: not [tool('wmctrl', '-ic', number) for number, _ in windows().values()])
    show(tmp_path / 'closed', 2)
    time.sleep(2)
    assert not windows() and not visual.quit_pressed()  # a user who closes all of them wants no more

    pictures = show(tmp_path / 'lost', 1)
    until(lambda: on_screen() == pictures)
    screen.kill()
    assert said_that_there_is_no_window(tmp_path / 'lost', capsys)


def at(picture, colour):
    """The rows and the columns of the pixels of that colour, below the legend."""
    return np.nonzero((picture[40:] == colour).all(axis=2))


def plot(x=None, **curves):
    x = 10 * np.arange(1, 1 + len(curves['G'])) if x is None else np.array(x)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        return visual.plot(x, {name: np.array(curve, float) for name, curve in curves.items()})


@pytest.mark.parametrize('curve', [[2.5], [1, 2], [27.6] * 300, [1e-9] * 300, [0], np.random.RandomState(0).rand(5000),
                                   [np.nan], [1, np.nan, np.inf, 2]])
def test_plot_takes_any_curve(curve):
    picture = plot(G=curve, D=[np.nan] * len(curve))
    assert picture.shape == (480, 640, 3) and picture.dtype == np.uint8
    assert (at(picture, ORANGE)[0].size > 0) == np.isfinite(curve).any() and not at(picture, BLUE)[0].size


def test_plot_is_to_scale():
    levels = [at(plot(G=[1] * 99, D=[2] * 99, X=[4] * 99), colour)[0].mean() for colour in (ORANGE, BLUE, GREEN)]
    assert levels[0] > levels[1] > levels[2] and abs((levels[0] - levels[2]) - 3 * (levels[0] - levels[1])) <= 2
    noisy, even = plot(G=[0, 2] * 500), plot(G=[1] * 1000, D=[2] * 1000)
    assert abs(at(noisy, ORANGE)[0].mean() - at(even, ORANGE)[0].mean()) <= 2  # the strong line is a mean
    flat, peak = plot(G=[1] * 999), plot(G=[1] * 500 + [27.6] + [1] * 498)  # a rare one leaves the rest where it is
    assert (flat[:, :200] == peak[:, :200]).all()
    late, even = plot([10, 20, 90, 100], G=[np.nan, 1, 3, 3]), plot([25, 50, 75, 100], G=[np.nan, 1, 3, 3])
    assert at(late, ORANGE)[1].min() < at(even, ORANGE)[1].min()  # each value is at its iteration


def test_plot_labels():
    picture = plot(G=[1, 3, 2])
    for other, part in ((plot(G=[np.nan] * 3, D=[1, 3, 2]), np.s_[:35]),  # the legend
                        (plot([100, 200, 300], G=[1, 3, 2]), np.s_[437:]), (plot(G=[10, 30, 20]), np.s_[:, :48])):
        assert (picture[part] != other[part]).any()


def write_mosaics(out, *pictures):
    for i, picture in enumerate(pictures):
        visual.save(str(out / f'gout-{i:04d}.png'), picture)


def shades(out):
    return [frame[..., :3].mean() for frame in cv2.imreadanimation(str(out / 'film.webp'))[1].frames]


def test_film(tmp_path):
    visual.film(str(tmp_path))  # of nothing
    write_mosaics(tmp_path, *(np.full((64, 64, 3), shade, np.uint8) for shade in (0, 60, 120, 180)))
    visual.save(str(tmp_path / 'gout-0000-00050.png'), np.full((64, 64, 3), 240, np.uint8))  # before its epoch's end
    visual.save(str(tmp_path / 'gout-0000-00090.png'), np.zeros((64, 128, 3), np.uint8))  # of another batch size
    (tmp_path / 'gout-0002-00050.png').write_bytes(b'damaged')
    visual.film(str(tmp_path))
    assert [round(shade / 60) for shade in shades(tmp_path)] == [4, 0, 1, 2, 3]


def test_film_is_never_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(visual, 'FILM_BYTES', 100_000)
    write_mosaics(tmp_path, *(noise(i, 96, 96, 3) for i in range(60)), np.full((96, 96, 3), 200, np.uint8))
    visual.film(str(tmp_path))
    assert os.path.getsize(str(tmp_path / 'film.webp')) <= 100_000
    assert 3 <= len(shades(tmp_path)) < 25 and abs(shades(tmp_path)[-1] - 200) < 5  # the newest is last


@pytest.mark.parametrize('reason', ['No space left', 'too large', 'Animation', ''])
def test_film_that_cannot_be_written(reason, tmp_path, capsys, monkeypatch):
    write_mosaics(tmp_path, np.zeros((64, 64, 3), np.uint8))
    visual.film(str(tmp_path))
    before = (tmp_path / 'film.webp').read_bytes()
    {'No space left': lambda: os.symlink('/dev/full', str(tmp_path / 'film.webp.tmp')),
     'too large': lambda: write_mosaics(tmp_path, np.zeros((2, 16384, 3), np.uint8)),
     'Animation': lambda: monkeypatch.delattr(cv2, 'Animation'),
     '': lambda: (tmp_path / 'gout-0000.png').write_bytes(b'damaged')}[reason]()
    for _ in range(2):
        visual.film(str(tmp_path))
    said = capsys.readouterr().out
    assert said.startswith('WARNING') and said.count('\n') == 1 and 'film.webp' in said and reason in said
    assert (tmp_path / 'film.webp').read_bytes() == before and len(os.listdir(str(tmp_path))) == 2
