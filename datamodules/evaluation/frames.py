"""Frames of a video: the one in the middle, or all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from lit_clip.errors import BadSample, InputError

Frames = Literal["centre", "all"]
VIDEO_SUFFIXES = frozenset({".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"})
WHOLE = (0.0, float("inf"))


def _library() -> Any:
    try:
        import av
    except ImportError as error:
        raise InputError("videos are decoded by PyAV, which is not installed; pip install av") from error
    return av


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """A container and its first video stream; what goes wrong inside is said of the file."""
    av = _library()
    try:
        if not path.is_file():
            raise BadSample(str(path), "missing video", "no such video")
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise BadSample(str(path), "not a video", "no images in it, only sound or nothing; get it again")
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1  # data workers are as many as there are cores
            yield container, stream
    except BadSample:
        raise
    except (av.FFmpegError, OSError, EOFError, ValueError) as error:
        what = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
        raise BadSample(str(path), "broken video", f"cannot read this video ({what}); get it again") from error


def times_of_frames(path: Path) -> tuple[list[int], float] | None:
    """When each frame is shown, rising, and the unit of that in seconds; nothing is decoded. None: the file is mute."""
    with _opened(path) as (container, stream):
        times = [packet.pts for packet in container.demux(stream) if packet.size and not packet.is_discard]
        unit = float(stream.time_base)
    return None if not times or None in times else (sorted(times), unit)


def _decoded(path: Path, first: int, last: int, seek: bool) -> list[Image.Image] | None:
    """Frames shown from ``first`` to ``last``, both included; None: the file's index led past the first of them."""
    with _opened(path) as (container, stream):
        if seek:
            container.seek(first, stream=stream)
        images: list[Image.Image] = []
        for frame in container.decode(stream):
            if frame.pts is None or frame.pts < first:
                continue
            if seek and not images and frame.pts > first:
                return None
            if frame.pts > last:
                break
            images.append(frame.to_image())
        return images


def _without_times(path: Path, frames: Frames, span: tuple[float, float]) -> list[Image.Image]:
    """Frames of a file that does not say when they are shown: counted, then decoded from the start."""
    with _opened(path) as (container, stream):
        rate = float(stream.average_rate or stream.guessed_rate or 25)
        count = sum(1 for _ in container.decode(stream))
    wanted = [number for number in range(count) if span[0] <= number / rate < span[1]]
    if frames == "centre":
        wanted = wanted[len(wanted) // 2 :][:1]
    if not wanted:
        return []
    with _opened(path) as (container, stream):
        decoded = enumerate(container.decode(stream))
        return [frame.to_image() for number, frame in decoded if wanted[0] <= number <= wanted[-1]]


def read_frames(path: Path, frames: Frames, span: tuple[float, float] = WHOLE) -> list[Image.Image]:
    """The frames of a video, or of a span of it, as RGB images in the order in which they are shown.

    Args:
        path: the file.
        frames: ``centre``: the one in the middle, of an even number the later of the two; ``all``.
        span: seconds from the first frame; the end is not part of it.

    Raises:
        BadSample: no such file, none with images, a broken one, or no frame in the span.
        InputError: PyAV is not installed.
    """
    shown = times_of_frames(path)
    if shown is None:
        images = _without_times(path, frames, span)
    else:
        times, unit = shown
        times = [time for time in times if span[0] <= (time - times[0]) * unit < span[1]]
        if frames == "centre":
            times = times[len(times) // 2 :][:1]
        images = _between(path, times[0], times[-1]) if times else []
    if not images:
        where = "" if span == WHOLE else f" from {span[0]:g} to {span[1]:g} s"
        raise BadSample(str(path), "no frames", f"no frame{where} can be decoded; get it again")
    return images


def _between(path: Path, first: int, last: int) -> list[Image.Image]:
    images = _decoded(path, first, last, seek=True)
    if images is None:  # the index is wrong: from the start
        images = _decoded(path, first, last, seek=False)
    return images or []
