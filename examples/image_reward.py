#!/usr/bin/env python3
"""ImageReward (Xu et al., arXiv 2304.05977; the paper's Eq. 11) as a reward command: the score of the released model,
about -2.3 to 2, higher is better.

Needs the package `image-reward` and its weights (ImageReward-v1.0, fetched by the package or given as a path):
    python3 examples/image_reward.py [WEIGHTS]
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from command_reward import serve

import ImageReward
import torch
from PIL import Image


def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = ImageReward.load(sys.argv[1] if len(sys.argv) > 1 else "ImageReward-v1.0", device=device)

    @torch.no_grad()
    def image_reward(pictures, prompts, _ids):
        images = [Image.frombytes("RGB", (width, height), rgb) for rgb, height, width in pictures]
        return [model.score(prompt["text"], image) for prompt, image in zip(prompts, images)]

    serve(image_reward)


if __name__ == "__main__":
    main()
