#!/usr/bin/env python3
"""How well a picture shows the text that its prompt puts in quotation marks: the field's rule (flow_grpo's), 0 to 1, as a reward
command. Needs the package `paddleocr` (2.9), or a reader of your own:

    python3 examples/ocr_reward.py [--reader MODULE:FUNCTION] [--listen ADDRESS]

FUNCTION takes (rgb, height, width) and gives the texts that it reads, as a list of (text, confidence).

The target is what stands between the prompt's first two straight quotation marks. Target and reading lose their blanks and
capitals; a reading that holds the target has 1, others 1 − distance / length of the target, never below 0. A prompt without a
target and a picture that cannot be read have no score.
"""
import argparse
import importlib
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from command_reward import listen, serve, take_output


def target_of(prompt):
    """What the picture should show, or None."""
    parts = prompt.split('"')
    return (parts[1] if len(parts) > 1 else "").replace(" ", "").lower() or None


def distance(a, b):
    """Levenshtein's: characters to put in, take out or change."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def ocr_score(prompt, recognised):
    target = target_of(prompt)
    if target is None:
        return None
    text = recognised.replace(" ", "").lower()
    # a reading much longer than the target is at least as far away as the difference, so it need not be compared
    if target in text:
        return 1.0
    far = abs(len(text) - len(target)) >= len(target)
    return 1.0 - (len(target) if far else min(distance(text, target), len(target))) / len(target)


def paddle():
    """PaddleOCR as a reader."""
    import numpy
    from paddleocr import PaddleOCR

    ocr = PaddleOCR(use_angle_cls=False, lang="en", use_gpu=False, show_log=False)

    def read(rgb, height, width):
        pixels = numpy.frombuffer(rgb, numpy.uint8).reshape(height, width, 3)
        lines = ocr.ocr(numpy.ascontiguousarray(pixels[..., ::-1]), cls=False)[0] or []
        return [(line[1][0], line[1][1]) for line in lines]

    return read


def reward(read):
    def scores(pictures, prompts, ids):
        found = []
        for (rgb, height, width), prompt, name in zip(pictures, prompts, ids):
            if target_of(prompt["text"]) is None:
                print(f"ocr_reward: {name}: its prompt has no text in quotation marks", file=sys.stderr, flush=True)
                found.append(None)
                continue
            try:
                texts = read(rgb, height, width)
            except Exception as e:
                print(f"ocr_reward: {name}: not read: {type(e).__name__}: {e}", file=sys.stderr, flush=True)
                found.append(None)
                continue
            found.append(ocr_score(prompt["text"], "".join(text for text, confidence in texts if confidence > 0)))
        return found

    return scores


def main():
    parser = argparse.ArgumentParser(description="Text in pictures as a reward of rldiff.", allow_abbrev=False)
    parser.add_argument("--reader", default="", help="MODULE:FUNCTION in place of PaddleOCR")
    parser.add_argument("--listen", default="", help="serve several ranks at this address")
    o = parser.parse_args()
    # loading prints
    answers = take_output()
    if o.reader:
        module, _, function = o.reader.partition(":")
        sys.path.insert(0, os.getcwd())
        read = getattr(importlib.import_module(module), function)
    else:
        read = paddle()
    listen(reward(read), o.listen) if o.listen else serve(reward(read), answers)


if __name__ == "__main__":
    main()
