#!/usr/bin/env python3
"""A reward for rldiff in Python: put your own function in place of `brightness`.

    reward = { name = "command", command = ["python3", "examples/command_reward.py"], timeout_seconds = 60.0,
               start_timeout_seconds = 600.0, restarts = 3 }

rldiff starts one of these per rank. The protocol is described in src/rewards/command.rs.
"""
import json
import math
import os
import sys


def brightness(pictures, prompts, ids):
    """One number per picture; None or NaN where there is none. pictures[i] is (rgb, height, width) with the RGB bytes
    row by row, prompts[i] is {"text": …, "objects": […]}, ids[i] names the sample."""
    return [sum(rgb) / (255 * len(rgb)) for rgb, _height, _width in pictures]


def serve(reward):
    """Answers rldiff with what `reward` says, until it closes our input."""
    # standard output belongs to the protocol: what anything prints goes to standard error
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    requests = os.fdopen(os.dup(0), "rb")

    def answer(value):
        answers.write(json.dumps(value, allow_nan=False) + "\n")
        answers.flush()

    answer({"rldiff_reward": 1})
    for line in requests:
        header = json.loads(line)
        height, width = header["height"], header["width"]
        size = height * width * 3
        pictures = [(read(requests, size), height, width) for _ in range(header["count"])]
        scores = [None if s is None else float(s) for s in reward(pictures, header["prompts"], header["ids"])]
        scores = [None if s is None or not math.isfinite(s) else s for s in scores]
        answer({"batch": header["batch"], "scores": scores})


def read(stream, size):
    data = stream.read(size)
    if len(data) != size:
        sys.exit("rldiff ended within a batch")
    return data


if __name__ == "__main__":
    # load models here, before the first answer: `start_timeout_seconds` is for that
    serve(brightness)
