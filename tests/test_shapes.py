"""The built-in scenes: a function of their index, with labels and maps that fit them."""
import numpy as np

import shapes
from shapes import Shapes


def test_scenes_are_a_function_of_their_index():
    image, label, classes = shapes.render_scene("train", 3)
    shapes.render_scene.cache_clear()
    again = shapes.render_scene("train", 3)
    assert (image == again[0]).all() and label == again[1] and (classes == again[2]).all()
    for other in (shapes.render_scene("train", 4), shapes.render_scene("val", 3)):
        assert (image != other[0]).any()


def test_scenes_have_labels_and_maps():
    labelled, mapped = Shapes("val"), Shapes("val", maps=True)
    assert labelled.classes == list(shapes.SHAPES) and mapped.classes == ["background", *shapes.SHAPES]
    for index in range(300):
        (image, label), (_, classes) = labelled[index], mapped[index]
        assert image.mode == "RGB" and image.size == classes.shape == (64, 64)
        assert classes.max() <= len(shapes.SHAPES)
        assert (classes == label + 1).mean() > 0.02                    # the main object can be seen
    assert set(labelled.targets) == set(range(len(shapes.SHAPES))) and len(shapes.SHAPES) >= 8


def test_class_maps_lie_on_the_objects():
    """The colours within a class vary less than those under the same map shifted by eight pixels."""
    def error(shift):
        total = 0
        for index in range(40):
            image, _, classes = shapes.render_scene("val", index)
            moved = np.roll(classes, shift, (0, 1))
            total += sum(image[moved == c].std(0).sum() * (moved == c).sum() for c in np.unique(moved) if c)
        return total
    assert error((0, 0)) < 0.6 * error((8, 8))
