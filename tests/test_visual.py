"""visual.py: what it draws, what it leaves on disk, and its windows on a real X server.

The last are skipped unless WINDOWS_PYTHON is the path of a Python with opencv-python (not headless): the tests' own has
no windows. They also need Xvfb, openbox, wmctrl, xdotool and ImageMagick's `import`.
"""
import os
import pathlib
import socket
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
from conftest import contents, room

import visual

SHAPES = {'gout': (512, 512, 3), 'diff': (512, 512, 3), 'data': (512, 512, 3), 'loss': (480, 640, 3)}
ORANGE, BLUE, GREEN = (0, 94, 213), (178, 114, 0), (115, 158, 0)  # of plot's curves, in their order


@pytest.fixture(autouse=True)
def nothing_open(monkeypatch):
    """No display unless a test brings one; nothing said yet; no window outlives the test."""
    for name in 'DISPLAY', 'WAYLAND_DISPLAY':
        monkeypatch.delenv(name, raising=False)
    yield
    visual.close()


@pytest.fixture
def windows_python(monkeypatch):
    monkeypatch.setattr(sys, 'executable', os.environ.get('WINDOWS_PYTHON') or pytest.skip('no WINDOWS_PYTHON'))


@pytest.fixture
def screen(windows_python, monkeypatch):
    """A screen of its own with a window manager, as on a desk that prefers Wayland. Yields the X server."""
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
    """What a program prints; None if it fails, as most do if a window closes meanwhile."""
    try:
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, timeout=10)
    except subprocess.SubprocessError:
        return None


def windows():
    """{title: (id, x)} of the windows on the screen."""
    listing = tool('wmctrl', '-lG')
    if listing is None:
        return windows()
    rows = [row.split() for row in listing.decode().splitlines()]
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


@pytest.mark.filterwarnings('error')
def test_tile_values():
    X = np.array([[-1, 1], [0, 0.5], [7, np.nan], [np.inf, -np.inf]]).reshape(4, 1, 1, 2)
    assert visual.tile(X)[..., 1].tolist() == [[0, 255, 128, 191], [255, 0, 255, 0]]


@pytest.mark.parametrize('n, columns, channels, rows, across', [
    (1, None, 1, 1, 1), (5, None, 3, 2, 3), (3, 5, 3, 1, 5)])
def test_tile_places(n, columns, channels, rows, across):
    images = noise(n, n, 5, 3, channels)
    picture = visual.tile((images / 127.5 - 1).transpose(0, 3, 1, 2).astype('float32'), columns)
    assert picture.dtype == np.uint8 and picture.shape == (rows * 5, across * 3, 3)
    for i in range(rows * across):
        y, x = i // across * 5, i % across * 3
        assert (picture[y:y + 5, x:x + 3] == (images[i, :, :, ::-1] if i < n else 0)).all()  # RGB in, BGR out


def test_a_shown_mosaic_has_the_first_256_images_by_class(tmp_path):
    X, classes = np.arange(300).reshape(300, 1, 1, 1) / 150 - 1, np.arange(300) * 7 % 10
    visual.visual('gout', X, str(tmp_path), False, columns=10)
    assert on_disk(tmp_path) == {'gout': visual.tile(X[:256], 10).tobytes()}
    visual.visual('gout', X, str(tmp_path), False, classes)
    by_class = sorted(range(256), key=lambda i: classes[i])
    assert on_disk(tmp_path) == {'gout': visual.tile(X[by_class], 16).tobytes()}
    assert [visual.columns_for(n) for n in (1, 3, 10, 47)] == [8, 6, 10, 16]


def test_a_full_disk(tmp_path, capsys):
    """Here a limit of the files' size. The old files stay, whole, nothing is left beside them, and it is said once."""
    visual.save(str(tmp_path / 'gout-0000.png'), noise(1, 64, 64, 3))
    visual.film(str(tmp_path))
    show(tmp_path, 1, display=False)
    before = contents(tmp_path)
    room(1000)
    try:
        for seed in 2, 3:
            show(tmp_path, seed, display=False)
            visual.film(str(tmp_path))
    finally:
        room()
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and all(line.startswith('WARNING') and 'too large' in line for line in said)
    assert contents(tmp_path) == before


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


def check_that_it_is_said_once(out, capsys):
    """One line says that there is no window, after the first pictures, for nothing waits; and they are written on."""
    assert capsys.readouterr().out == ''
    said = []

    def says():
        show(out, 2)
        said.append(capsys.readouterr().out)
        return said[-1]

    until(says)
    assert show(out, 3) == on_disk(out) and not visual.quit_pressed()
    assert said[-1].startswith('no window') and said[-1].count('\n') == 1 and capsys.readouterr().out == ''


@pytest.mark.parametrize('kind', ['no server', 'a server that does not answer', 'an OpenCV without windows'])
def test_no_window_opens(kind, tmp_path, monkeypatch, capsys, request):
    if 'server' in kind:
        request.getfixturevalue('windows_python')
    viewer = tmp_path / 'viewer.py'
    viewer.write_text(pathlib.Path(visual.__file__).read_text().replace('alarm(20)', 'alarm(1)'))
    monkeypatch.setattr(visual, '__file__', str(viewer))
    with socket.socket() as server:
        server.bind(('127.0.0.1', 0))
        if 'answer' in kind:
            server.listen(9)
        monkeypatch.setenv('DISPLAY', f'127.0.0.1:{server.getsockname()[1] - 6000}')  # X servers have ports from 6000
        visual.show_picture('gout', noise(1, 8, 8, 3), str(tmp_path / 'out'))
        check_that_it_is_said_once(tmp_path / 'out', capsys)


def test_windows(screen, tmp_path, capsys):
    pictures = show(tmp_path, 1)
    until(lambda: on_screen() == pictures)  # all of them, whole: none hides another or leaves the screen
    tool('xdotool', 'windowmove', windows()['data'][0], '1300', '500')
    until(lambda: abs(windows()['data'][1] - 1300) < 50)
    pictures = show(tmp_path, 2)
    until(lambda: on_screen() == pictures)
    assert abs(windows()['data'][1] - 1300) < 50  # it stays where the user has put it

    tool('wmctrl', '-ic', windows()['diff'][0])
    until(lambda: 'diff' not in windows())
    pictures = show(tmp_path, 3)
    del pictures['diff']
    until(lambda: on_screen() == pictures)
    assert not visual.quit_pressed()
    tool('xdotool', 'key', '--window', windows()['gout'][0], 'q')
    until(visual.quit_pressed)
    show(tmp_path, 4)
    until(lambda: not windows())
    assert visual.quit_pressed() and capsys.readouterr().out == ''


def test_all_windows_are_closed(screen, tmp_path):
    """A user who does this wants no more."""
    pictures = show(tmp_path, 1)
    until(lambda: on_screen() == pictures)  # while the last one opens, `visual` may close it and open it once more
    for number, _ in windows().values():
        tool('wmctrl', '-ic', number)
    until(lambda: not windows())
    show(tmp_path, 2)
    time.sleep(2)
    assert not windows() and not visual.quit_pressed()


def test_the_training_is_killed(screen, tmp_path):
    """Its windows do not outlive it."""
    code = f"""if True:
        import time, visual
        visual.visual('gout', visual.np.zeros((1, 1, 9, 9)), {str(tmp_path)!r})
        time.sleep(99)"""
    with subprocess.Popen([sys.executable, '-c', code], cwd=os.path.dirname(visual.__file__)) as run:
        until(windows)
        run.kill()
    until(lambda: not windows())


def test_the_screen_goes_away(screen, tmp_path, capsys):
    pictures = show(tmp_path, 1)
    until(lambda: on_screen() == pictures)
    screen.kill()
    check_that_it_is_said_once(tmp_path, capsys)


def plot(x=None, **curves):
    x = 10 * np.arange(1, 1 + len(curves['G'])) if x is None else np.array(x)
    return visual.plot(x, {name: np.array(curve, float) for name, curve in curves.items()})


def at(picture, colour):
    """The rows and the columns of the pixels of that colour, below the legend."""
    return np.nonzero((picture[40:] == colour).all(axis=2))


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('curve', [[2.5], [0], np.random.RandomState(0).rand(5000), [np.nan], [1, np.nan, np.inf, 2]])
def test_plot_takes_any_curve(curve):
    picture = plot(G=curve, D=[np.nan] * len(curve))
    assert picture.shape == (480, 640, 3) and picture.dtype == np.uint8
    assert (at(picture, ORANGE)[0].size > 0) == np.isfinite(curve).any() and not at(picture, BLUE)[0].size


def test_plot_is_to_scale():
    levels = [at(plot(G=[1] * 99, D=[2] * 99, X=[4] * 99), colour)[0].mean() for colour in (ORANGE, BLUE, GREEN)]
    assert levels[0] > levels[1] > levels[2] and abs((levels[0] - levels[2]) - 3 * (levels[0] - levels[1])) <= 2
    flat, peak = plot(G=[1] * 999), plot(G=[1] * 500 + [27.6] + [1] * 498)  # a rare one leaves the rest where it is
    assert (flat[:, :200] == peak[:, :200]).all()
    late, even = plot([10, 20, 90, 100], G=[np.nan, 1, 3, 3]), plot([25, 50, 75, 100], G=[np.nan, 1, 3, 3])
    assert at(late, ORANGE)[1].min() < at(even, ORANGE)[1].min()  # each value is at its iteration


def test_film(tmp_path, monkeypatch, capsys):
    """It has the mosaics in their order up to the newest, of which it leaves out as many as it must."""
    monkeypatch.setattr(visual, 'FILM_BYTES', 50_000)
    visual.save(str(tmp_path / 'gout-0000.png'), np.zeros((96, 48, 3), np.uint8))  # of another batch size
    for i in range(1, 61):
        visual.save(str(tmp_path / f'gout-{i:04d}.png'), noise(i, 96, 96, 3) // 2 + np.uint8(2 * i))
    visual.film(str(tmp_path))
    assert os.path.getsize(str(tmp_path / 'film.webp')) <= 50_000
    shades = [frame[..., :3].mean() for frame in cv2.imreadanimation(str(tmp_path / 'film.webp'))[1].frames]
    assert shades == sorted(shades) and 3 <= len(shades) < 25 and abs(shades[-1] - 183) < 5

    visual.save(str(tmp_path / 'gout-0061.png'), np.zeros((2, 16384, 3), np.uint8))  # WebP has no such width
    visual.film(str(tmp_path))
    said = capsys.readouterr().out
    assert said.startswith('WARNING') and said.count('\n') == 1 and 'film.webp' in said and 'too large' in said
