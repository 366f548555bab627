"""From arrays to pictures: mosaics, curves and a film, on disk and, where there is a screen, in windows.

The windows belong to a child process that shows the files as they change. OpenCV ends a process that has no screen,
or loses it, without an exception; the child process keeps that away from the training.
"""
import glob
import math
import os
import resource
import signal
import subprocess
import sys
import time

import cv2
import numpy as np

TITLES = ('gout', 'diff', 'data', 'loss')  # the windows, in the order of their places
QUIT = ord('q')                            # the viewer's exit status after that key
FILM_BYTES = 3_000_000
_viewers = {}   # folder: the child process that shows its pictures, or None where there is no screen
_warned = set()  # the kinds of warning that have been printed


# ---------------------------------------------------------------- mosaics

def tile(X, columns=None):
    """A mosaic of images, row by row.

    `X` is float (n, 1 or 3, height, width), RGB, [-1, 1]; what is beyond is clipped, NaN is black. `columns`: images in
    a row; default: as many as make the mosaic square. The last row is padded with black.
    Returns uint8 (rows * height, columns * width, 3), BGR.
    """
    n, c, h, w = X.shape
    columns = columns or int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    mosaic = np.zeros((rows * columns, h, w, 3), np.uint8)
    pixels = np.rint((np.nan_to_num(np.clip(X, -1, 1), nan=-1) + 1) * 127.5)
    mosaic[:n] = pixels[:, ::-1].transpose(0, 2, 3, 1)
    return mosaic.reshape(rows, columns, h, w, 3).swapaxes(1, 2).reshape(rows * h, columns * w, 3)


def by_digit(X, digits):
    """(n, c, h, w) images and their (n,) digits -> as many rows of ten as n fills, digit d in column d.

    A place without an image is black; images for which a column has no place left are not shown.
    """
    rows = -(-len(X) // 10)
    table = np.full((rows, 10) + X.shape[1:], -1, X.dtype)
    for digit in range(10):
        column = X[digits == digit][:rows]
        table[:len(column), digit] = column
    return table.reshape((-1,) + X.shape[1:])


def visual(title, X, out='out', display=True, digits=None):
    """Show images as a mosaic: `tile`'s X, with `digits` (n,) a digit in each of ten columns; then `show_picture`."""
    show_picture(title, tile(X) if digits is None else tile(by_digit(X, digits), 10), out, display)


def show_picture(title, picture, out='out', display=True):
    """Write a BGR picture to `<out>/<title>.png` and show it in a window, where one can open.

    What fails is said once and does not end the run.
    """
    try:
        os.makedirs(out, exist_ok=True)
        save(os.path.join(out, f'{title}.png'), picture)
        if display and out not in _viewers:
            _viewers[out] = _start_viewer(out)
    except OSError as error:
        _warn_once('write', f'WARNING: no picture can be written or shown ({error}); the run goes on')
        return
    if display and (_viewers[out] is None or _viewers[out].poll() not in (None, QUIT)):
        _warn_once('window', f'no window can be shown here (why: python visual.py {out}); the pictures are in {out}')


def save(path, picture):
    """Write a picture as PNG, whole or not at all. Raises OSError."""
    with open(path + '.tmp', 'wb') as file:
        file.write(cv2.imencode('.png', picture)[1])
    os.replace(path + '.tmp', path)


def film(out):
    """Join the mosaics `gout-*.png` of a folder, in the order of their names, to `film.webp` of at most 3 MB.

    It has up to 25 frames, evenly chosen, and fewer where these would be too large. What fails is said once.
    """
    paths = sorted(glob.glob(os.path.join(glob.escape(out), 'gout-*.png')))
    temporary = os.path.join(out, 'film.tmp.webp')
    if not paths:
        return
    try:
        for count in (24, 12, 6, 2):  # a second of work for 25 of 512x512
            chosen = np.unique(np.linspace(0, len(paths) - 1, count + 1).astype(int))
            frames = [cv2.imread(paths[i]) for i in chosen]
            animation = cv2.Animation()
            animation.frames = [frame for frame in frames if frame.shape == frames[-1].shape]  # of this batch size
            animation.durations = [400] * (len(animation.frames) - 1) + [2500]  # milliseconds
            cv2.imwriteanimation(temporary, animation, [cv2.IMWRITE_WEBP_QUALITY, 60])
            if os.path.getsize(temporary) <= FILM_BYTES:
                os.replace(temporary, os.path.join(out, 'film.webp'))
                return
        raise OSError('its pictures are too large')
    except (OSError, AttributeError, cv2.error) as error:  # a full disk, OpenCV before 4.11, a damaged picture
        _warn_once('film', f'WARNING: {out}/film.webp cannot be written ({str(error).strip()}); the run goes on')


# ---------------------------------------------------------------- curves

LEFT, RIGHT, TOP, BOTTOM = 50, 610, 35, 435  # the axes in a picture of 640x480 pixels
COLOURS = np.array([(0, 94, 213), (178, 114, 0), (115, 158, 0)])  # BGR; colour-blind eyes can tell them apart


def plot(iterations, curves):
    """A line chart of losses, 640x480, BGR: each value in a pale colour, their moving mean in a strong one.

    `iterations` (n,): where the values were taken, ascending; n is 1 or more. `curves`: {name: (n,) values}, at most
    three; what is not finite is left out.
    """
    picture = np.full((480, 640, 3), 255, np.uint8)
    peaks = [np.percentile(v[np.isfinite(v)], 99) for v in curves.values() if np.isfinite(v).any()]
    y_limit = 1.1 * max([0.5, *peaks])  # a rare peak is cut off, for it would flatten all the rest
    x_scale, y_scale = (RIGHT - LEFT) / iterations[-1], (BOTTOM - TOP) / y_limit
    for value in _ticks(y_limit):
        y = int(BOTTOM - value * y_scale)
        cv2.line(picture, (LEFT, y), (RIGHT, y), (225, 225, 225))
        _text(picture, f'{value:,.10g}', LEFT / 2, y + 5)
    for value in _ticks(iterations[-1]):
        x = int(LEFT + value * x_scale)
        cv2.line(picture, (x, BOTTOM), (x, BOTTOM + 4), (0, 0, 0))
        _text(picture, f'{value:,.10g}', x, BOTTOM + 18)
    _text(picture, 'iterations', (LEFT + RIGHT) / 2, 472)
    # the mean of one value is the value: first the values of all curves, then above them the means of n neighbours
    for n, thickness, strength in ((1, 1, 1 / 3), (max(1, len(iterations) // 50), 2, 1)):
        for i, (name, v) in enumerate(curves.items()):
            finite = np.isfinite(v)
            y = BOTTOM - np.clip(v[finite] * y_scale, 0, BOTTOM - TOP)
            total = np.cumsum(np.pad([LEFT + iterations[finite] * x_scale, y], ((0, 0), (1, 0))), axis=1)
            means = np.rint((total[:, n:] - total[:, :-n]) / n).astype(np.int32).T
            every = 1 + len(means) // (RIGHT - LEFT)  # no more points than there are columns of pixels
            colour = (255 - (255 - COLOURS[i]) * strength).tolist()
            cv2.polylines(picture, [means[::every].reshape(-1, 1, 2)], False, colour, thickness, cv2.LINE_AA)
            if strength == 1:
                _text(picture, name, LEFT + 60 + 130 * i, TOP - 12, colour)
                for x, y in means[-1:].tolist():  # so that a single value shows, too
                    cv2.circle(picture, (x, y), 3, colour, -1, cv2.LINE_AA)
    cv2.rectangle(picture, (LEFT, TOP), (RIGHT, BOTTOM), (0, 0, 0))
    return picture


def _ticks(limit):
    """Round values from 0 to the limit, at most seven."""
    step = 10 ** np.floor(np.log10(limit))
    step *= next(factor for factor in (0.2, 0.5, 1, 2) if limit / (step * factor) <= 6)
    return np.arange(0, limit + step / 1000, step)


def _text(picture, string, x, y, colour=(0, 0, 0)):
    """Write a string whose middle is at x, as far as it stays within the picture."""
    font = cv2.FONT_HERSHEY_SIMPLEX, 0.45
    width = cv2.getTextSize(string, *font, 1)[0][0]
    cv2.putText(picture, string, (int(min(x - width / 2, 640 - width)), int(y)), *font, colour, 1, cv2.LINE_AA)


# ---------------------------------------------------------------- windows

def quit_pressed():
    """Whether q was pressed in a window."""
    return any(viewer and viewer.poll() == QUIT for viewer in _viewers.values())


def close():
    """Close the windows. The next picture opens new ones."""
    for viewer in filter(None, _viewers.values()):
        viewer.kill()
        viewer.wait()
    _viewers.clear()
    _warned.clear()


def _warn_once(kind, message):
    if kind not in _warned:
        _warned.add(kind)
        print(message, flush=True)


def _start_viewer(out):
    """A child process with the windows, or None where there is no screen; waits until the first one is open."""
    if sys.platform.startswith('linux') and not (os.environ.get('DISPLAY') or os.environ.get('WAYLAND_DISPLAY')):
        return None
    viewer = subprocess.Popen([sys.executable, __file__, out], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              start_new_session=True)  # Ctrl-C in the terminal is for the training alone
    viewer.stdout.read(1)  # a byte, or the end
    return viewer


def _view(out):
    """Show the four pictures, and each again when its file changes, until q is pressed or the training has ended."""
    signal.alarm(20)  # a screen that does not answer by then counts as none
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # OpenCV aborts where there is no screen: no core file for that
    parent = os.getppid()
    shown, due = {}, {}  # title: the time of its file; when its window gets its size and place
    while os.getppid() == parent:
        for title in TITLES:
            path = os.path.join(out, f'{title}.png')
            changed = os.stat(path).st_mtime_ns if os.path.exists(path) else None
            place = time.time() > due.get(title, math.inf)
            picture = cv2.imread(path) if changed != shown.get(title) or place else None
            if picture is None:
                continue
            shown[title] = changed
            if title not in due:
                cv2.namedWindow(title, cv2.WINDOW_NORMAL | cv2.WINDOW_KEEPRATIO | cv2.WINDOW_GUI_NORMAL)
                due[title] = time.time() + 1  # not at once: a window that is moved while it opens may stay blank
            elif cv2.getWindowProperty(title, cv2.WND_PROP_VISIBLE) == 0:
                continue  # a person has closed it: it stays closed
            elif place:
                due[title] = math.inf
                # a screen of 1920x1080 holds the mosaics side by side and the curves below; 22 pixels are a title bar
                height, width = picture.shape[:2]
                scale = min(1, 620 / width, 512 / height) if title != 'loss' else 1
                row, column = divmod(TITLES.index(title), 3)
                cv2.resizeWindow(title, int(width * scale), int(height * scale))
                cv2.moveWindow(title, 5 + column * (int(width * scale) + 10), 22 + row * 556)
            cv2.imshow(title, picture)
        if cv2.waitKey(50) & 0xff == QUIT:
            sys.exit(QUIT)
        if shown and signal.alarm(0):  # the first time: the screen has answered, tell the training
            os.write(1, b'.')
        time.sleep(0.01)  # without a window waitKey does not wait


if __name__ == '__main__':
    _view(sys.argv[1])
