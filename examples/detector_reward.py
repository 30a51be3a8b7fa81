#!/usr/bin/env python3
"""Object composition (the paper's Eq. 13) as a reward command: the mean over the prompt's objects of the highest
confidence with which the object is detected, 0 to 1. The detector is OWLv2 (Minderer et al., arXiv 2306.09683), which takes
any object's name; the paper uses UniDet.

Needs the package `transformers` and a checkpoint folder or name:
    python3 examples/detector_reward.py [google/owlv2-base-patch16-ensemble]
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from command_reward import serve

import torch
from PIL import Image
from transformers import Owlv2ForObjectDetection, Owlv2Processor

BATCH = 8


def main():
    name = sys.argv[1] if len(sys.argv) > 1 else "google/owlv2-base-patch16-ensemble"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor = Owlv2Processor.from_pretrained(name)
    model = Owlv2ForObjectDetection.from_pretrained(name).to(device).eval()

    @torch.no_grad()
    def detections(pictures, prompts, _ids):
        scores = []
        for start in range(0, len(pictures), BATCH):
            batch = pictures[start:start + BATCH]
            images = [Image.frombytes("RGB", (width, height), rgb) for rgb, height, width in batch]
            names = [[f"a photo of a {o}" for o in prompt["objects"]] for prompt in prompts[start:start + BATCH]]
            inputs = processor(text=names, images=images, return_tensors="pt").to(device)
            # [pictures, boxes, objects]: the highest score of each object over all boxes
            best = model(**inputs).logits.sigmoid().amax(dim=1)
            scores += [row[:len(objects)].mean().item() if objects else None for row, objects in zip(best, names)]
        return scores

    serve(detections)


if __name__ == "__main__":
    main()
