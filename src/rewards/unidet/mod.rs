//! UniDet (Zhou et al., arXiv 2102.13086), the detector of Eq. 13: one network for the 722 classes of COCO, Objects365,
//! Open Images and Mapillary Vistas.
//!
//! ```text
//! backbone.rs   ResNet-50 or ResNeSt-200     proposals.rs  boxes that may hold something
//! pyramid.rs    five levels of features      heads.rs      three stages that refine and name them
//! boxes.rs, roi_align.rs, layers.rs          labels.rs     objects' names to classes
//! ```
//! d(o, x_0) is the highest confidence of a class called o over all boxes, in [0, 1]: the mean of the three stages'
//! sigmoids; 0 where it is not above `threshold`. Suppression of overlapping boxes never takes a class's best one, so it
//! is left out, except with `top` = N: then only the N best boxes of a picture count, as in UniDet's own output (300).
//!
//! The paper names neither the checkpoint nor the threshold. The first published ones are taken here:
//! `Unified_learned_OCIM_R50_6x+2x` or `…_RS200_6x+2x`, whose label space holds the paper's 532 names, and 0.0001, which the
//! network's own config has and which keeps the signal of faint objects; 0.5 is what T2I-CompBench takes.

mod backbone;
pub mod boxes;
mod heads;
mod labels;
mod layers;
mod proposals;
mod pyramid;
pub mod roi_align;

use anyhow::{ensure, Context, Result};
use tch::{Device, Kind, Tensor};

use self::{
    backbone::{Backbone, BackboneSizes, Family},
    boxes::Overlapping,
    heads::{Cascade, HeadSizes},
    labels::Labels,
    proposals::ProposalNetwork,
    pyramid::Pyramid,
};
use super::{
    composition::{ensure_known, Detector},
    pil::{self, Filter},
    rgb_bytes,
    weights::{Checkpoint, Loaded},
};
use crate::{
    config::{ChannelOrder, UniDetSettings},
    models::parameters::Builder,
};

/// Pictures are padded to a multiple of this.
const DIVISOR: i64 = 32;
/// Overlap from which on a box hides a worse one of its class, with `top` only.
const NMS: f64 = 0.5;

/// What a backbone was trained on: channels in this order, minus mean, over std, on the scale 0..255.
struct Input {
    order: ChannelOrder,
    mean: [f32; 3],
    std: [f32; 3],
}

fn input_of(family: Family) -> Input {
    match family {
        Family::ResNet => Input { order: ChannelOrder::Bgr, mean: [103.530, 116.280, 123.675], std: [1.0; 3] },
        Family::ResNeSt => {
            Input { order: ChannelOrder::Rgb, mean: [123.68, 116.779, 103.939], std: [58.393, 57.12, 57.375] }
        }
    }
}

struct Network {
    backbone: Backbone,
    pyramid: Pyramid,
    proposals: ProposalNetwork,
    cascade: Cascade,
}

impl Network {
    fn new(b: &Builder, backbone: &BackboneSizes, channels: i64, head: &HeadSizes) -> Result<Network> {
        let bottom = b.sub("backbone");
        Ok(Network {
            backbone: Backbone::new(&bottom.sub("bottom_up"), backbone)?,
            pyramid: Pyramid::new(&bottom, backbone.family, backbone.outputs(), channels)?,
            proposals: ProposalNetwork::new(&b.sub("proposal_generator.rpn_head"), channels)?,
            cascade: Cascade::new(&b.sub("roi_heads"), head, channels)?,
        })
    }
}

/// Constants that checkpoints carry.
fn ignored(name: &str) -> bool {
    name == "pixel_mean"
        || name == "pixel_std"
        || name.starts_with("proposal_generator.anchor_generator.")
        || name.ends_with(".num_batches_tracked")
}

/// What is in one picture.
pub struct Detections {
    /// f32 `[n, 4]`, pixels of the picture as the network saw it.
    pub boxes: Tensor,
    /// f32 `[n, classes]` in [0, 1].
    pub confidence: Tensor,
}

impl Detections {
    /// As a detector's list: (box, class, confidence) of the `top` best that are above `threshold` and that no better one
    /// of their class overlaps by more than 0.5, the best first.
    pub fn list(&self, threshold: f64, top: usize) -> Result<Vec<(usize, i64, f32)>> {
        let classes = self.confidence.size()[1];
        let flat = self.confidence.reshape([-1]).to_device(Device::Cpu);
        let candidates = flat.gt(threshold).nonzero().view([-1]);
        let scores = flat.index_select(0, &candidates);
        let order = scores.argsort_stable(true, 0, true);
        let scores = Vec::<f32>::try_from(scores.index_select(0, &order))?;
        let places = Vec::<i64>::try_from(candidates.index_select(0, &order))?;
        let overlapping = Overlapping::new(&self.boxes, NMS)?;
        let mut kept: Vec<(usize, i64, f32)> = Vec::new();
        for (place, score) in places.into_iter().zip(scores) {
            let (row, class) = ((place / classes) as usize, place % classes);
            if kept.len() == top {
                break;
            }
            if !kept.iter().any(|&(better, other, _)| other == class && overlapping.are(better, row)) {
                kept.push((row, class, score));
            }
        }
        Ok(kept)
    }

    /// For each set of classes the highest confidence of one of them, 0 where none is above the threshold. A value that
    /// is not a number stays one and marks a bad sample.
    fn best(&self, wanted: &[Vec<i64>], settings: &UniDetSettings) -> Result<Vec<f32>> {
        if self.boxes.size()[0] == 0 {
            return Ok(vec![0.0; wanted.len()]);
        }
        let best_of_class = match settings.top {
            0 => Vec::<f32>::try_from(self.confidence.amax(0, false).to_device(Device::Cpu))?,
            top => {
                let mut best = vec![0.0; self.confidence.size()[1] as usize];
                for (_, class, score) in self.list(settings.threshold, top)? {
                    best[class as usize] = score.max(best[class as usize]);
                }
                best
            }
        };
        let above = |value: f32| if f64::from(value) <= settings.threshold { 0.0 } else { value };
        let larger = |a: f32, b: f32| if a > b || a.is_nan() { a } else { b };
        let of = |classes: &Vec<i64>| classes.iter().map(|&c| above(best_of_class[c as usize])).fold(0.0, larger);
        Ok(wanted.iter().map(of).collect())
    }
}

/// See the module.
pub struct UniDet {
    settings: UniDetSettings,
    network: Loaded<Network>,
    input: Input,
    labels: Labels,
    device: Device,
}

impl UniDet {
    /// # Errors
    /// Files that cannot be read, a checkpoint that is not UniDet's (the first few tensors are named), a label space with
    /// another number of classes.
    pub fn load(settings: &UniDetSettings, device: Device) -> Result<Self> {
        let labels = Labels::load(&settings.labels)?;
        let checkpoint = Checkpoint::read(&settings.weights)?;
        let (backbone, head) = (BackboneSizes::of(&checkpoint)?, HeadSizes::of(&checkpoint)?);
        let [channels, ..] = checkpoint.shape::<4>("backbone.fpn_output3.weight")?;
        ensure!(
            labels.classes == head.classes,
            "{} names {} classes, {} has {}",
            settings.labels,
            labels.classes,
            settings.weights,
            head.classes
        );
        let mut input = input_of(backbone.family);
        if settings.channel_order != ChannelOrder::AsTrained {
            input.order = settings.channel_order;
        }
        let network = checkpoint.build(device, ignored, |b| Network::new(b, &backbone, channels, &head))?;
        Ok(UniDet { settings: settings.clone(), network, input, labels, device })
    }

    /// Everything in one picture of `size` = \[width, height\], RGB bytes row by row.
    pub fn look(&self, rgb: &[u8], size: [usize; 2]) -> Result<Detections> {
        let _no_grad = tch::no_grad_guard();
        let [width, height] = resized(size, self.settings.short_side, self.settings.long_side);
        let resized = pil::resize(rgb, size, [width, height], Filter::Bilinear);
        let (height, width) = (height as i64, width as i64);
        let mut pixels = Tensor::from_slice(&resized).view([1, height, width, 3]).permute([0, 3, 1, 2]);
        if self.input.order == ChannelOrder::Bgr {
            pixels = pixels.flip([1]);
        }
        let row = |values: &[f32; 3]| Tensor::from_slice(values).view([1, 3, 1, 1]).to_device(self.device);
        let pixels = pixels.to_device(self.device).to_kind(Kind::Float);
        let normalised = (pixels - row(&self.input.mean)) / row(&self.input.std);
        let room = |side: i64| (DIVISOR - side % DIVISOR) % DIVISOR;
        let padded = normalised.constant_pad_nd([0, room(width), 0, room(height)]);

        let n = &self.network;
        let levels = n.pyramid.forward(&n.backbone.forward(&padded));
        let proposals = n.proposals.propose(&levels, [height, width])?;
        let (boxes, confidence) = n.cascade.forward(&levels, &proposals, [height, width]);
        Ok(Detections { boxes, confidence })
    }
}

/// Width and height whose short side is `short`, or less where the long one would exceed `long`; rounded as detectron2.
fn resized([width, height]: [usize; 2], short: usize, long: usize) -> [usize; 2] {
    let scale = short as f64 / width.min(height) as f64;
    let wanted = [width, height].map(|side| if side == width.min(height) { short as f64 } else { scale * side as f64 });
    let longest = wanted[0].max(wanted[1]);
    let shrink = if longest > long as f64 { long as f64 / longest } else { 1.0 };
    wanted.map(|side| ((side * shrink + 0.5) as usize).max(1))
}

impl Detector for UniDet {
    fn weight_bytes(&self) -> u64 {
        self.network.bytes
    }

    fn check(&self, objects: &[String]) -> Result<()> {
        ensure_known(objects, |object| self.labels.classes_of(object).is_ok())
            .with_context(|| self.settings.labels.clone())
    }

    fn detect(&mut self, images: &Tensor, wanted: &[&[String]]) -> Result<Vec<Vec<f32>>> {
        let pictures = rgb_bytes(images)?;
        let size = [pictures.width, pictures.height];
        let mut found = Vec::with_capacity(wanted.len());
        for (rgb, objects) in pictures.rgb.iter().zip(wanted) {
            let classes = objects.iter().map(|object| self.labels.classes_of(object));
            let classes = classes.collect::<Result<Vec<_>>>().context(self.settings.labels.clone())?;
            let Some(rgb) = rgb else {
                found.push(vec![f32::NAN; objects.len()]);
                continue;
            };
            found.push(self.look(rgb, size)?.best(&classes, &self.settings)?);
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_as_detectron2_has_them() {
        assert_eq!(resized([512, 512], 800, 1333), [800, 800]);
        assert_eq!(resized([640, 480], 800, 1333), [1067, 800]);
        // 480 → 800 would make 1200 → 2000, so 1333 and 533.2
        assert_eq!(resized([1200, 480], 800, 1333), [1333, 533]);
    }

    fn settings(threshold: f64, top: usize) -> UniDetSettings {
        let channel_order = ChannelOrder::AsTrained;
        UniDetSettings {
            weights: "".into(),
            labels: "".into(),
            threshold,
            top,
            channel_order,
            short_side: 1,
            long_side: 1,
        }
    }

    #[test]
    fn threshold_and_top_can_turn_a_confidence_into_nothing() {
        // boxes 0 and 1 are nearly the same, 2 is elsewhere
        let boxes =
            Tensor::from_slice(&[0f32, 0.0, 10.0, 10.0, 0.0, 0.0, 10.0, 9.0, 20.0, 20.0, 30.0, 30.0]).view([3, 4]);
        let confidence = Tensor::from_slice(&[0.9f32, 0.3, 0.8, 0.4, 0.1, 0.2]).view([3, 2]);
        let seen = Detections { boxes, confidence };
        assert_eq!(seen.list(0.15, 10).unwrap(), [(0, 0, 0.9), (1, 1, 0.4), (2, 1, 0.2)]);
        assert_eq!(seen.best(&[vec![0]], &settings(0.0, 0)).unwrap()[0], 0.9);
        assert_eq!(seen.best(&[vec![1]], &settings(0.0, 0)).unwrap()[0], 0.4);
        assert_eq!(seen.best(&[vec![1]], &settings(0.5, 0)).unwrap()[0], 0.0);
        assert_eq!(seen.best(&[vec![1, 0]], &settings(0.5, 0)).unwrap()[0], 0.9);
        assert_eq!(seen.best(&[vec![1]], &settings(0.0, 1)).unwrap()[0], 0.0, "only the best box of all counts");
        assert_eq!(seen.best(&[vec![1]], &settings(0.0, 2)).unwrap()[0], 0.4);
        let none = Detections {
            boxes: Tensor::zeros([0, 4], (Kind::Float, Device::Cpu)),
            confidence: Tensor::zeros([0, 2], (Kind::Float, Device::Cpu)),
        };
        assert_eq!(none.best(&[vec![0]], &settings(0.0, 0)).unwrap()[0], 0.0);
        let broken = Detections { confidence: &seen.confidence * f64::NAN, boxes: seen.boxes };
        assert!(broken.best(&[vec![0]], &settings(0.5, 0)).unwrap()[0].is_nan());
    }
}
