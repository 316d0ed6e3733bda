"""Draws the pictures of the course, from nothing but coordinates and words.

    python course/pictures.py                # writes figures/course/*.svg, in a second

The same program always writes the same files, and a test holds that they are the committed ones.

Chapter: COURSE_ROADMAP.md, 3 (the stream as a sum)
Prerequisites: embeddings.py
Next: attention.py
Source: Elhage et al. 2021 (the stream, QK and OV); Tufte 1983 (nothing that says nothing)
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from course.drawing import of_circuits, of_the_model
from utils import atomic_write, run_program

FOLDER = Path(__file__).resolve().parent.parent / "figures" / "course"
PICTURES = {
    "residual_stream": of_the_model.residual_stream,
    "qk_ov": of_the_model.qk_ov,
    "three_calls": of_the_model.three_calls,
    "block_hooks": of_the_model.block_hooks,
    "denoising_noising": of_circuits.denoising_noising,
    "path_patching": of_circuits.path_patching,
    "induction_circuit": of_circuits.induction_circuit,
}


def main():
    """Writes all pictures."""
    for name, draw in PICTURES.items():
        path = FOLDER / f"{name}.svg"
        with atomic_write(path, "w") as file:
            file.write(draw().svg())
        print(path.relative_to(FOLDER.parent.parent))


if __name__ == "__main__":
    run_program(main)
