#!/usr/bin/env python3
"""HPSv3 (arXiv 2508.03789), a preference of Qwen2-VL's size, as a reward command: the mean of its prediction, about −5 to 15.

Needs the package `hpsv3`, which fetches its weights itself:
    python3 examples/hpsv3_reward.py [--device cuda] [--batch 8] [--listen ADDRESS]
"""
import argparse
import math
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from command_reward import listen, serve, take_output


def reward(inferencer, batch):
    from PIL import Image

    def scores(pictures, prompts, _ids):
        found = []
        for start in range(0, len(pictures), batch):
            images = [Image.frombytes("RGB", (w, h), rgb) for rgb, h, w in pictures[start:start + batch]]
            texts = [prompt["text"] for prompt in prompts[start:start + batch]]
            # every row is a mean and the logarithm of a deviation
            means = [float(row[0]) for row in inferencer.reward(prompts=texts, image_paths=images)]
            if len(means) != len(images):
                sys.exit(f"hpsv3_reward: {len(images)} pictures were judged, it gave {len(means)} scores")
            found += [mean if math.isfinite(mean) else None for mean in means]
        return found

    return scores


def main():
    parser = argparse.ArgumentParser(description="HPSv3 as a reward of rldiff.", allow_abbrev=False)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--listen", default="", help="serve several ranks at this address")
    o = parser.parse_args()
    # loading prints
    answers = take_output()
    from hpsv3 import HPSv3RewardInferencer

    judge = reward(HPSv3RewardInferencer(device=o.device), o.batch)
    listen(judge, o.listen) if o.listen else serve(judge, answers)


if __name__ == "__main__":
    main()
