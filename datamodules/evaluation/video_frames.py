"""Decode the frames of a video: the middle frame, or all frames."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from lit_clip.errors import BadSample
from lit_clip.tools.reading import reason
from .annotation_files import import_optional

Frames = Literal["centre", "all"]
VIDEO_SUFFIXES = frozenset({".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"})
CONTAINERS = {  # no lists of other files or addresses, such as HLS, by any file name
    "format_whitelist": "avi,flv,matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,mpeg,mpegvideo,mpegts,m4v,asf,ogg,h264,hevc",
    "protocol_whitelist": "file",
}
WHOLE = (0.0, float("inf"))  # seconds


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """Open a container and its first video stream; errors inside the block name the file."""
    av = import_optional("av", "av", path)
    try:
        if not path.is_file():
            raise BadSample(str(path), "missing video", "no such video")
        with av.open(str(path), container_options=CONTAINERS) as container:
            if not container.streams.video:
                raise BadSample(str(path), "not a video", "no video stream in it; get it again")
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1  # data workers already use every core
            yield container, stream
    except BadSample:
        raise
    except Exception as error:  # for a broken video anything
        raise BadSample(str(path), "broken video", f"cannot read this video ({reason(error)}); get it again") from error


def times_of_frames(path: Path) -> tuple[list[int], float] | None:
    """Return the frames' ascending timestamps and their unit in seconds, without decoding; None without timestamps."""
    with _opened(path) as (container, stream):
        times = [packet.pts for packet in container.demux(stream) if packet.size and not packet.is_discard]
        unit = float(stream.time_base)
    return None if not times or None in times else (sorted(times), unit)


def _decoded(path: Path, first: int, last: int, seek: bool) -> list[Image.Image] | None:
    """Decode the frames from timestamp ``first`` to ``last``, inclusive; None if seeking went past ``first``."""
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
    """Decode frames of a file without timestamps: count all frames, then decode again from the start."""
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
    """Decode the frames of a video, or of a span of it, as RGB images in display order.

    Args:
        path: the file.
        frames: ``centre``: the middle frame, of an even number the later of the two; ``all``: every frame.
        span: seconds from the first frame; the end is excluded; :class:`BadSample` if it contains no frame.
    """
    timestamps = times_of_frames(path)
    if timestamps is None:
        images = _without_times(path, frames, span)
    else:
        times, unit = timestamps
        times = [time for time in times if span[0] <= (time - times[0]) * unit < span[1]]
        if frames == "centre":
            times = times[len(times) // 2 :][:1]
        images = _decoded(path, times[0], times[-1], seek=True) if times else []
        if images is None:  # the file's index is wrong: decode from the start
            images = _decoded(path, times[0], times[-1], seek=False)
    if not images:
        where = "" if span == WHOLE else f" from {span[0]:g} to {span[1]:g} s"
        raise BadSample(str(path), "no frames", f"no frame{where} can be decoded; get it again")
    return images
