"""The procedural videos: reproducible, smooth, one motion for each class."""

import numpy as np
import pytest

from data.demo import MOTIONS, DemoVideos


def test_a_frame_depends_on_seed_index_and_time_alone():
    demo, again = DemoVideos(16, 8, 32, seed=3), DemoVideos(16, 8, 32, seed=3)
    again.frames(5, [9])
    assert np.array_equal(demo.frames(11, [7, 2])[1], again.frames(11, [2])[0])
    assert not np.array_equal(demo.frames(11, [2]), DemoVideos(16, 8, 32, seed=4).frames(11, [2]))
    assert not np.array_equal(demo.frames(3, [2]), demo.frames(11, [2]))  # same class, other video


def test_frames_have_the_asked_shape_and_classes_alternate():
    demo = DemoVideos(9, 4, 48)
    assert demo.frames(8, range(5)).shape == (5, 48, 48, 3)
    assert demo.frames(8, [0], 20).shape == (1, 20, 20, 3)
    assert [demo.label(n) for n in range(6)] == [0, 1, 2, 3, 0, 1]
    assert demo.class_names == ["right", "left", "up", "down"]


def _flow(frames: np.ndarray) -> tuple[float, float]:
    """Mean motion in pixels per frame, to the right and down, of a textured scene by least squares."""
    x = frames.astype(float).mean(-1)
    dx = (np.roll(x, -1, 2) - np.roll(x, 1, 2))[:-1, 2:-2, 2:-2] / 2
    dy = (np.roll(x, -1, 1) - np.roll(x, 1, 1))[:-1, 2:-2, 2:-2] / 2
    dt = np.diff(x, axis=0)[:, 2:-2, 2:-2]
    a = np.array([[(dx * dx).sum(), (dx * dy).sum()], [(dx * dy).sum(), (dy * dy).sum()]])
    return tuple(-np.linalg.solve(a, [(dx * dt).sum(), (dy * dt).sum()]))


@pytest.mark.parametrize(
    ("motion", "sign"), [("right", (1, 0)), ("left", (-1, 0)), ("up", (0, -1)), ("down", (0, 1))]
)
def test_shapes_move_the_way_their_class_says(motion, sign):
    demo = DemoVideos(8, 4, 64)
    flow = np.mean(
        [_flow(demo.frames(n, range(8))) for n in (MOTIONS.index(motion), MOTIONS.index(motion) + 4)], 0
    )
    along, across = (flow[0], flow[1]) if sign[0] else (flow[1], flow[0])
    assert 0.8 < along * sum(sign) < 3  # 2 pixels a frame at 64; least squares sees a little less
    assert abs(across) < 0.4


def test_every_motion_moves_smoothly():
    demo = DemoVideos(8, 8, 64)
    for n in range(8):
        x = demo.frames(n, range(64)).astype(float)
        steps = np.abs(np.diff(x, axis=0)).mean((1, 2, 3))
        assert steps.min() > 0.3, demo.class_names[n]
        assert steps.max() < 20, demo.class_names[n]
        assert steps.max() < 3 * np.median(steps), demo.class_names[n]  # nothing jumps


@pytest.mark.parametrize(("motion", "sign"), [("clockwise", 1), ("counterclockwise", -1)])
def test_turning_classes_turn_their_way(motion, sign):
    x = DemoVideos(8, 8, 64).frames(MOTIONS.index(motion), range(9))
    left, right = _flow(x[:, :, :32]), _flow(x[:, :, 32:])
    assert sign * (right[1] - left[1]) > 0.8  # clockwise: down on the right, up on the left


@pytest.mark.parametrize(("motion", "sign"), [("outward", 1), ("inward", -1)])
def test_radial_classes_leave_or_approach_the_centre(motion, sign):
    demo = DemoVideos(24, 8, 64)
    spread = []
    for n in range(MOTIONS.index(motion), 24, 8):
        x = demo.frames(n, range(9))
        top, bottom, left, right = (_flow(h) for h in (x[:, :32], x[:, 32:], x[:, :, :32], x[:, :, 32:]))
        spread.append(bottom[1] - top[1] + right[0] - left[0])
    assert sign * np.median(spread) > 0.5


def test_wrong_requests_say_what_exists():
    with pytest.raises(ValueError, match="1 to 8 motions"):
        DemoVideos(4, 9)
    with pytest.raises(ValueError, match=r"0\.\.3"):
        DemoVideos(4).frames(4, [0])
    with pytest.raises(ValueError, match=r"frames 0\.\.63"):
        DemoVideos(4).frames(0, [64])


def test_soft_edges_blur_the_shapes_and_leave_the_rest():
    sharp, soft = (DemoVideos(1, size=32, edge=edge).frames(0, [0])[0].astype(int) for edge in (0.08, 0.25))
    steps = [np.abs(np.diff(picture, axis=1)).max() for picture in (sharp, soft)]
    assert steps[1] < 0.7 * steps[0]
    assert (sharp == soft).mean() > 0.1
    with pytest.raises(ValueError, match="edge=0"):
        DemoVideos(1, edge=0)
