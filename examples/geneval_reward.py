#!/usr/bin/env python3
"""GenEval (arXiv 2310.11513) as a reward command, from a server of the field's kind (yifan123/reward-server), which finds objects,
colours and positions in the pictures. Needs Pillow, since these servers take JPEG alone.

    python3 examples/geneval_reward.py --url http://127.0.0.1:18085 --metadata evaluation_metadata.jsonl [--strict]

The metadata are GenEval's, one JSON object per line with `prompt`, `tag` and `include`; a prompt without metadata has no score.
The reward is the server's mean of parts (it may be negative: three benches for one give −1), with --strict its 0 or 1. Answers are
pickles, of which numbers, texts, lists and dicts are read and nothing else: a foreign object is refused, never built.

`score` and `official` below are the rules themselves, for whoever has detections.
"""
import argparse
import io
import json
import math
import os
import pickle
import sys
import urllib.error
import urllib.request

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from command_reward import listen, serve

MAX_ANSWER = 64 << 20
# Of the sizes of both boxes, what two centres must be apart by
MARGIN = 0.1


def relations(box, other):
    """Where `box` lies as seen from `other`; boxes are [left, top, right, bottom] with y downwards."""
    centers = [[(b[0] + b[2]) / 2, (b[1] + b[3]) / 2] for b in (box, other)]
    offset = [a - b for a, b in zip(*centers)]
    length = math.hypot(*offset)
    if length == 0:
        return set()
    sizes = [box[2] - box[0] + other[2] - other[0], box[3] - box[1] + other[3] - other[1]]
    x, y = (math.copysign(max(abs(o) - MARGIN * s, 0.0), o) / length for o, s in zip(offset, sizes))
    named = [("left of", x < -0.5), ("right of", x > 0.5), ("above", y < -0.5), ("below", y > 0.5)]
    return {name for name, holds in named if holds}


def placed(position, found, groups):
    """Whether every pair stands as asked; None where the other group was not found."""
    relation, group = position
    others = groups[group]
    return None if others is None else all(relation in relations(a["box"], b["box"]) for a in found for b in others)


def right_colors(found, color):
    return sum(one.get("color") == color for one in found)


def official(metadata, detections):
    """GenEval's own 0 or 1. `detections`: for every class what was found above the threshold, best first."""
    good, groups = True, []
    for wanted in metadata.get("include", []):
        count = wanted["count"]
        found = detections.get(wanted["class"], [])[:count]
        matched = len(found) >= count
        if matched and "color" in wanted:
            matched = right_colors(found, wanted["color"]) >= count
        if matched and "position" in wanted:
            matched = placed(wanted["position"], found, groups) is True
        groups.append(found if matched else None)
        good = good and matched
    for unwanted in metadata.get("exclude", []):
        good = good and len(detections.get(unwanted["class"], [])) < unwanted["count"]
    return float(good)


def score(metadata, detections):
    """The servers' training reward and its strict form: exact counts, `exclude` is not looked at."""
    parts, good, groups = [], True, []
    for wanted in metadata.get("include", []):
        count, found = wanted["count"], detections.get(wanted["class"], [])
        parts.append(1 - abs(count - len(found)) / count)
        matched = len(found) == count
        if not matched and ("color" in wanted or "position" in wanted):
            parts.append(0.0)
        elif matched:
            if "color" in wanted:
                right = right_colors(found, wanted["color"])
                parts.append(1 - abs(count - right) / count)
                matched = right == count
            if matched and "position" in wanted:
                stands = placed(wanted["position"], found, groups)
                # a position that is wrong counts as 0 and 1 there
                parts += {True: [1.0], False: [0.0, 1.0], None: [0.0]}[stands]
                matched = stands is True
        groups.append(found if matched else None)
        good = good and matched
    return sum(parts) / len(parts), float(good)


class Plain(pickle.Unpickler):
    """Reads what pickle builds without any class."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"the answer holds a {module}.{name}, which is not built")


def plain(data):
    try:
        return Plain(io.BytesIO(data)).load()
    except pickle.UnpicklingError:
        raise
    except Exception as e:
        raise pickle.UnpicklingError(f"it is no pickle: {type(e).__name__}: {e}") from None


def jpeg(rgb, height, width):
    from PIL import Image

    out = io.BytesIO()
    Image.frombytes("RGB", (width, height), rgb).save(out, "JPEG")
    return out.getvalue()


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):
        return None


class GenEval:
    def __init__(self, o):
        self.o = o
        self.open = urllib.request.build_opener(urllib.request.ProxyHandler({}), NoRedirect).open
        with open(o.metadata, encoding="utf-8") as file:
            rows = [json.loads(line) for line in file if line.strip()]
        self.metadata = {row["prompt"]: row for row in rows}

    def __call__(self, pictures, prompts, _ids):
        known = [i for i, prompt in enumerate(prompts) if prompt["text"] in self.metadata]
        scores = [None] * len(pictures)
        for start in range(0, len(known), self.o.batch):
            batch = known[start:start + self.o.batch]
            rows = [self.metadata[prompts[i]["text"]] for i in batch]
            found = self.ask([jpeg(*pictures[i]) for i in batch], rows)
            for i, value in zip(batch, found):
                scores[i] = value
        return scores

    def ask(self, images, rows):
        body = pickle.dumps({"images": images, "meta_datas": rows, "only_strict": self.o.strict}, protocol=4)
        problem = ""
        for _ in range(self.o.attempts):
            try:
                with self.open(self.o.url, body, timeout=self.o.timeout) as answer:
                    data = answer.read(MAX_ANSWER + 1)
                answer = plain(data)
                found = answer["strict_rewards" if self.o.strict else "scores"]
                if isinstance(found, list) and len(found) == len(images) and all(map(number, found)):
                    return [float(value) for value in found]
                problem = f"{len(images)} numbers were asked for, it gave {str(found)[:100]}"
            except (OSError, pickle.UnpicklingError, KeyError, TypeError, ValueError) as e:
                problem = f"{type(e).__name__}: {e}"
        sys.exit(f"geneval_reward: {self.o.url}: {' '.join(problem.split())}")


def number(value):
    return isinstance(value, (int, float)) and math.isfinite(value)


def main():
    parser = argparse.ArgumentParser(description="GenEval's server as a reward of rldiff.", allow_abbrev=False)
    parser.add_argument("--url", default="http://127.0.0.1:18085")
    parser.add_argument("--metadata", required=True)
    parser.add_argument("--strict", action="store_true")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--timeout", type=float, default=120.0)
    parser.add_argument("--attempts", type=int, default=4)
    parser.add_argument("--listen", default="", help="serve several ranks at this address")
    o = parser.parse_args()
    try:
        reward = GenEval(o)
    except (OSError, ValueError, KeyError, TypeError) as e:
        sys.exit(f"geneval_reward: {o.metadata}: {type(e).__name__}: {e}")
    listen(reward, o.listen) if o.listen else serve(reward)


if __name__ == "__main__":
    main()
