"""Prints the pictures of TensorBoard's event files by tag with their steps, and the steps of one scalar.

    read_tensorboard.py FOLDER"""

import sys

try:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
except ImportError as error:
    print(f"ABSENT {error}")
    sys.exit(3)

events = EventAccumulator(sys.argv[1], size_guidance={"scalars": 0, "images": 0})
events.Reload()
for tag in events.Tags()["images"]:
    print(tag, [image.step for image in events.Images(tag)])
print([scalar.step for scalar in events.Scalars("parity/diversity")])
