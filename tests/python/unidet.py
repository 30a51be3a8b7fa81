"""UniDet once more, on torch and torchvision's operators: what rldiff's own network is compared with.

    python unidet.py detect FOLDER ORDER SHORT LONG TOP      python unidet.py operators FOLDER

`detect` reads `unidet.safetensors` (detectron2's names) and `pictures.safetensors` in FOLDER and prints one JSON line:
per picture the highest confidence of every class, and the TOP detections (box, class, confidence) above 0.0001. It also
writes `unidet.pth` as detectron2 saves it. `operators` prints torchvision's ROIAlign and NMS of `operators.safetensors`.
Needs torch, torchvision, safetensors, pillow.
"""

import json
import math
import os
import sys

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torchvision.ops import batched_nms, clip_boxes_to_image, nms, roi_align

IMAGENET = {"bgr": ([103.530, 116.280, 123.675], [1.0, 1.0, 1.0]), "rgb": ([123.68, 116.779, 103.939], [58.393, 57.12, 57.375])}


class UniDet:
    def __init__(self, tensors):
        self.t = tensors
        self.split = "backbone.bottom_up.stem.conv1_1.weight" in tensors

    def norm(self, x, name):
        p = [self.t[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        scale = p[2] / torch.sqrt(p[1] + 1e-5)
        return x * scale[None, :, None, None] + (p[3] - p[0] * scale)[None, :, None, None]

    def conv(self, x, name, stride=1, groups=1):
        w = self.t[f"{name}.weight"]
        x = F.conv2d(x, w, self.t.get(f"{name}.bias"), stride, w.shape[2] // 2, groups=groups)
        return self.norm(x, f"{name}.norm") if f"{name}.norm.weight" in self.t else x

    def split_attention(self, x, name):
        w = self.t[f"{name}.conv.weight"]
        x = F.relu(self.norm(F.conv2d(x, w, None, 1, 1, groups=2), f"{name}.bn0"))
        first, second = x.chunk(2, dim=1)
        gap = F.adaptive_avg_pool2d(first + second, 1)
        gap = F.relu(self.norm(self.conv(gap, f"{name}.fc1"), f"{name}.bn1"))
        a, b = self.conv(gap, f"{name}.fc2").chunk(2, dim=1)
        weight = torch.softmax(torch.stack([a, b]), dim=0)
        return weight[0] * first + weight[1] * second

    def block(self, x, name, stride):
        if self.split:
            y = F.relu(self.conv(x, f"{name}.conv1"))
            y = self.split_attention(y, f"{name}.conv2")
            short = x
            if stride > 1:
                y = F.avg_pool2d(y, 3, stride, padding=1)
                short = F.avg_pool2d(x, stride, stride, ceil_mode=True, count_include_pad=False)
        else:
            y = F.relu(self.conv(x, f"{name}.conv1", stride))
            y = F.relu(self.conv(y, f"{name}.conv2"))
            short = x
        y = self.conv(y, f"{name}.conv3")
        if f"{name}.shortcut.weight" in self.t:
            short = self.conv(short, f"{name}.shortcut", 1 if self.split else stride)
        return F.relu(y + short)

    def features(self, x):
        b = "backbone.bottom_up"
        if self.split:
            for i, stride in ((1, 2), (2, 1), (3, 1)):
                x = F.relu(self.conv(x, f"{b}.stem.conv1_{i}", stride))
        else:
            x = F.relu(self.conv(x, f"{b}.stem.conv1", 2))
        x = F.max_pool2d(x, 3, 2, 1)
        res = {}
        for stage in range(2, 6):
            number = 0
            while f"{b}.res{stage}.{number}.conv1.weight" in self.t:
                x = self.block(x, f"{b}.res{stage}.{number}", 2 if stage > 2 and number == 0 else 1)
                number += 1
            res[stage] = x
        inner = self.conv(res[5], "backbone.fpn_lateral5")
        p5 = self.conv(inner, "backbone.fpn_output5")
        out = [p5]
        for level in (4, 3):
            inner = self.conv(res[level], f"backbone.fpn_lateral{level}") + F.interpolate(inner, scale_factor=2, mode="nearest")
            out.insert(0, self.conv(inner, f"backbone.fpn_output{level}"))
        p6 = self.conv(p5, "backbone.top_block.p6", 2)
        return out + [p6, self.conv(F.relu(p6), "backbone.top_block.p7", 2)]

    @staticmethod
    def decode(boxes, deltas, weights):
        w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
        x, y = boxes[:, 0] + 0.5 * w, boxes[:, 1] + 0.5 * h
        d = [deltas[:, i] / weights[i] for i in range(4)]
        limit = math.log(1000 / 16)
        cx, cy = d[0] * w + x, d[1] * h + y
        w, h = torch.exp(d[2].clamp(max=limit)) * w, torch.exp(d[3].clamp(max=limit)) * h
        return torch.stack([cx - 0.5 * w, cy - 0.5 * h, cx + 0.5 * w, cy + 0.5 * h], dim=1)

    def proposals(self, levels, size):
        rpn, boxes, scores, ids = "proposal_generator.rpn_head", [], [], []
        for level, x in enumerate(levels):
            hidden = F.relu(self.conv(x, f"{rpn}.conv"))
            logits = self.conv(hidden, f"{rpn}.objectness_logits")[0].permute(1, 2, 0)
            deltas = self.conv(hidden, f"{rpn}.anchor_deltas")[0].permute(1, 2, 0)
            rows, columns, _ = logits.shape
            stride = 8 * 2**level
            cell = []
            for octave in range(3):
                for ratio in (0.5, 1.0, 2.0):
                    area = (32 * 2**level * 2 ** (octave / 3)) ** 2
                    w = math.sqrt(area / ratio)
                    cell.append([-w / 2, -ratio * w / 2, w / 2, ratio * w / 2])
            cell = torch.tensor(cell)
            anchors = torch.stack([cell + torch.tensor([c, r, c, r]) * stride for r in range(rows) for c in range(columns)])
            logits, deltas = logits.reshape(-1), deltas.reshape(-1, 4)
            found = self.decode(anchors.reshape(-1, 4), deltas, (1, 1, 1, 1))
            best = logits.sort(descending=True, stable=True).indices[:1000]
            boxes.append(found[best]), scores.append(logits[best]), ids.append(torch.full_like(best, level))
        boxes, scores, ids = torch.cat(boxes), torch.cat(scores), torch.cat(ids)
        boxes = clip_boxes_to_image(boxes, size)
        some = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        boxes, scores, ids = boxes[some], scores[some], ids[some]
        return boxes[batched_nms(boxes, scores, ids, 0.7)[:1000]]

    def detect(self, pixels, size):
        levels = self.features(pixels)
        boxes = self.proposals(levels, size)
        total = 0
        for stage, scale in enumerate((1, 2, 3)):
            area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
            level = torch.floor(4 + torch.log2(area.sqrt() / 224 + 1e-8)).clamp(3, 5)
            pooled = torch.zeros(len(boxes), levels[0].shape[1], 7, 7)
            for i in range(3):
                mine = level == i + 3
                pooled[mine] = roi_align(levels[i], [boxes[mine]], 7, 1 / (8 * 2**i), 0, aligned=True)
            x, head = pooled, f"roi_heads.box_head.{stage}"
            i = 1
            while f"{head}.conv{i}.weight" in self.t:
                x, i = F.relu(self.conv(x, f"{head}.conv{i}")), i + 1
            x, i = x.flatten(1), 1
            while f"{head}.fc{i}.weight" in self.t:
                x, i = F.relu(F.linear(x, self.t[f"{head}.fc{i}.weight"], self.t[f"{head}.fc{i}.bias"])), i + 1
            predictor = f"roi_heads.box_predictor.{stage}"
            scores = F.linear(x, self.t[f"{predictor}.cls_score.weight"], self.t[f"{predictor}.cls_score.bias"])
            deltas = F.linear(x, self.t[f"{predictor}.bbox_pred.weight"], self.t[f"{predictor}.bbox_pred.bias"])
            total = total + torch.sigmoid(scores)[:, :-1]
            weights = [w * scale for w in (10, 10, 5, 5)]
            boxes = clip_boxes_to_image(self.decode(boxes, deltas, weights), size)
        return boxes, total / 3


def sized(picture, short, long):
    w, h = picture.size
    scale = short / min(w, h)
    new = [short if w <= h else scale * w, short if h <= w else scale * h]
    if max(new) > long:
        new = [side * long / max(new) for side in new]
    return picture.resize([int(side + 0.5) for side in new], Image.Resampling.BILINEAR)


def detect(folder, order, short, long, top):
    tensors = load_file(os.path.join(folder, "unidet.safetensors"))
    torch.save({"model": tensors, "iteration": 9, "trainer": None}, os.path.join(folder, "unidet.pth"))
    network = UniDet(tensors)
    mean, std = (torch.tensor(v)[:, None, None] for v in IMAGENET["rgb" if network.split else "bgr"])
    pictures = load_file(os.path.join(folder, "pictures.safetensors"))["pictures"]
    results = []
    for row in (pictures * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy():
        picture = sized(Image.fromarray(row), short, long)
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(picture.height, picture.width, 3)
        pixels = pixels.permute(2, 0, 1).float()
        pixels = ((pixels.flip(0) if order == "bgr" else pixels) - mean) / std
        h, w = pixels.shape[1:]
        boxes, scores = network.detect(F.pad(pixels, (0, -w % 32, 0, -h % 32))[None], (h, w))
        rows, classes = (scores > 0.0001).nonzero(as_tuple=True)
        flat = scores[rows, classes]
        kept = batched_nms(boxes[rows], flat, classes, 0.5)[:top]
        listed = [[boxes[rows[k]].tolist(), int(classes[k]), float(flat[k])] for k in kept]
        results.append({"boxes": len(boxes), "best": scores.amax(0).tolist(), "list": listed})
    return results


def operators(folder):
    given = load_file(os.path.join(folder, "operators.safetensors"))
    features, boxes, scores = given["features"], given["boxes"], given["scores"]
    return {"pooled": roi_align(features[None], [boxes], 7, 0.125, 0, aligned=True).flatten().tolist(),
            "kept": [nms(boxes, scores, threshold).tolist() for threshold in (0.1, 0.5, 0.7)]}


@torch.no_grad()
def main():
    torch.set_num_threads(1)
    kind, folder = sys.argv[1:3]
    if kind == "operators":
        print(json.dumps(operators(folder)))
    else:
        print(json.dumps({"pictures": detect(folder, sys.argv[3], *map(int, sys.argv[4:7]))}))


main()
