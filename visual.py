"""From arrays to pictures: mosaics and curves, as PNG files and, where there is a screen, in windows.

The windows belong to a child process that shows the files as they change. OpenCV ends a process that has no screen,
or loses it, without an exception; this way that is never the one that trains.
"""
import atexit
import os
import resource
import signal
import subprocess
import sys
import time

import cv2
import numpy as np

QUIT = ord('q')  # the viewer's exit status after that key
_state = {}      # 'viewer': the child process; 'said': what has been printed once


def tile(X, columns=None):
    """A mosaic of images, row by row.

    Parameters
    ----------
    X : float array, (n, 1 or 3, height, width), RGB, [-1, 1]; what is beyond is clipped, NaN is black
    columns : int
        Images in a row; default: as many as make the mosaic square. The last row is padded with black.

    Returns
    -------
    uint8 array, (rows * height, columns * width, 3), BGR
    """
    n, c, h, w = X.shape
    columns = columns or int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    mosaic = np.zeros((rows * columns, h, w, 3), np.uint8)
    pixels = np.rint((np.nan_to_num(np.clip(X, -1, 1), nan=-1) + 1) * 127.5)
    mosaic[:n] = pixels[:, ::-1].transpose(0, 2, 3, 1)
    return mosaic.reshape(rows, columns, h, w, 3).swapaxes(1, 2).reshape(rows * h, columns * w, 3)


def visual(title, X, out='out', display=True, columns=None):
    """Show images as a mosaic: `tile`'s parameters, `show`'s effect."""
    show(title, tile(X, columns), out, display)


def show(title, picture, out='out', display=True):
    """Write a BGR picture to `<out>/<title>.png` and, where a window can open, have it shown in one."""
    try:
        os.makedirs(out, exist_ok=True)
        save(os.path.join(out, f'{title}.png'), picture)
    except OSError as error:
        _say(f'WARNING: no picture can be written ({error}); the run goes on')
        return
    if display:
        if 'viewer' not in _state:
            _state['viewer'] = _start_viewer(out)
        if _state['viewer'] is None or _state['viewer'].poll() not in (None, QUIT):
            _say(f'no window can be shown here (python visual.py {out} says why); the pictures are in {out}')


def save(path, picture):
    """Write a picture as PNG, whole or not at all. Raises OSError."""
    with open(path + '.tmp', 'wb') as file:
        file.write(cv2.imencode('.png', picture)[1])
    os.replace(path + '.tmp', path)


def quit_pressed():
    """Whether q was pressed in a window."""
    viewer = _state.get('viewer')
    return viewer is not None and viewer.poll() == QUIT


def plot(iterations, curves):
    """A line chart of losses, 640x480, BGR.

    Parameters
    ----------
    iterations : (n,) where the values were taken, ascending; n is 1 or more
    curves : {name: (n,) values}; at most three curves
    """
    left, right, top, bottom = 50, 610, 35, 435  # of the axes, in a picture of 640x480
    colours = np.array([(0, 94, 213), (178, 114, 0), (115, 158, 0)])  # told apart by colour-blind eyes too
    picture = np.full((480, 640, 3), 255, np.uint8)
    peaks = [np.percentile(v[np.isfinite(v)], 99) for v in curves.values() if np.isfinite(v).any()]
    y_limit = 1.1 * max([0.5, *peaks])  # a rare peak is cut off: it would flatten all the rest
    x_limit = iterations[-1]

    def x_of(iteration):
        return left + iteration / x_limit * (right - left)

    def y_of(value):
        return bottom - np.clip(value / y_limit, 0, 1) * (bottom - top)

    def text(string, x, y, colour=(0, 0, 0)):
        font = cv2.FONT_HERSHEY_SIMPLEX, 0.45
        width = cv2.getTextSize(string, *font, 1)[0][0]
        cv2.putText(picture, string, (int(min(x - width / 2, 640 - width)), int(y)), *font, colour, 1, cv2.LINE_AA)

    def ticks(limit):
        step = 10 ** np.floor(np.log10(limit))
        step *= next(f for f in (0.2, 0.5, 1, 2) if limit / (step * f) <= 6)
        return np.arange(0, limit + step / 1000, step)

    for value in ticks(y_limit):
        cv2.line(picture, (left, int(y_of(value))), (right, int(y_of(value))), (225, 225, 225))
        text(f'{value:,.10g}', left / 2, y_of(value) + 5)
    for value in ticks(x_limit):
        cv2.line(picture, (int(x_of(value)), bottom), (int(x_of(value)), bottom + 4), (0, 0, 0))
        text(f'{value:,.10g}', x_of(value), bottom + 18)
    text('iterations', (left + right) / 2, 472)
    for mean in (False, True):  # the values in pale, then on top what they do on average
        for i, (name, v) in enumerate(curves.items()):
            points = np.stack([x_of(iterations), y_of(v)])[:, np.isfinite(v)]
            n = max(1, len(v) // 50) if mean else 1
            points = [np.convolve(p, np.full(n, 1 / n), 'valid') for p in points if len(p) >= n]
            points = np.int32(np.rint(points)).T.reshape(-1, 1, 2)
            colour = (colours[i] if mean else 255 - (255 - colours[i]) // 3).tolist()
            cv2.polylines(picture, [points], False, colour, 1 + mean, cv2.LINE_AA)
            if mean:
                text(f'entropy of {name}', left + 60 + 130 * i, top - 12, colour)
                for point in points[-1:, 0].tolist():
                    cv2.circle(picture, point, 3, colour, -1, cv2.LINE_AA)  # even one value shows
    cv2.rectangle(picture, (left, top), (right, bottom), (0, 0, 0))
    return picture


def _say(message):
    if message[:20] not in _state.setdefault('said', set()):
        _state['said'].add(message[:20])
        print(message, flush=True)


def _start_viewer(out):
    """A child process with the windows, or None; waits until the first one is open."""
    if sys.platform.startswith('linux') and not (os.environ.get('DISPLAY') or os.environ.get('WAYLAND_DISPLAY')):
        return None
    try:  # a session of its own: Ctrl-C in the terminal is for the training
        viewer = subprocess.Popen([sys.executable, __file__, out], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                  start_new_session=True)
    except OSError:
        return None
    atexit.register(viewer.kill)
    viewer.stdout.read(1)  # a byte, or the end
    return viewer


def _view(out):
    """Show the four pictures, and each again when its file changes, until q is pressed or the training has ended."""
    signal.alarm(20)  # a screen that does not answer by then is none
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # where there is none OpenCV aborts; that is no crash to keep
    parent, shown, opened = os.getppid(), {}, {}
    while os.getppid() == parent:
        for i, title in enumerate(('gout', 'diff', 'data', 'loss')):
            path = os.path.join(out, f'{title}.png')
            version = os.path.exists(path) and (os.stat(path).st_mtime_ns, time.time() > opened.get(title, np.inf) + 1)
            picture = cv2.imread(path) if version and version != shown.get(title) else None
            if picture is None:
                continue
            before, shown[title] = shown.get(title), version
            if before is None:
                cv2.namedWindow(title, cv2.WINDOW_NORMAL | cv2.WINDOW_KEEPRATIO | cv2.WINDOW_GUI_NORMAL)
                opened[title] = time.time()
            elif cv2.getWindowProperty(title, cv2.WND_PROP_VISIBLE) == 0:
                continue  # closed by a person: it stays away
            elif version[1] > before[1]:  # a second later: one moved while it opens may stay blank
                height, width = picture.shape[:2]  # 1920x1080 holds three mosaics side by side, the curves below them
                scale = min(1, 620 / width, 512 / height) if title != 'loss' else 1
                height, width = int(height * scale), int(width * scale)
                cv2.resizeWindow(title, width, height)
                cv2.moveWindow(title, 5 + i % 3 * (width + 10), 22 + i // 3 * 556)  # 22: room for the title bar
            cv2.imshow(title, picture)
        if cv2.waitKey(50) & 0xff == QUIT:
            sys.exit(QUIT)
        if shown and signal.alarm(0):
            os.write(1, b'.')
        time.sleep(0.01)  # without a window waitKey does not wait


if __name__ == '__main__':
    _view(sys.argv[1])
