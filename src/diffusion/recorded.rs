//! The U-Net's work of a denoising step as a CUDA graph: recorded once per shape, then replayed with one call instead of
//! the thousand launches that it is made of. The same kernels on the same weights, so the same results.

use std::cell::RefCell;

use anyhow::{Context, Result};
use tch::{Device, Tensor};

use crate::{
    device::{
        ensure_gpu, synchronize,
        torch_cuda::{CudaGraph, SideStream},
    },
    models::{flops, unet::UNet},
};

/// Runs before recording: libraries choose algorithms and allocate work space in their first calls.
const WARM_UP: usize = 3;

/// Recordings of one U-Net, by the shapes of its inputs. Weights are read where they lie at every replay, so they may
/// change in place.
#[derive(Default)]
pub struct RecordedUNet {
    recordings: RefCell<Vec<Recording>>,
}

struct Recording {
    x_t: Tensor,
    t: Tensor,
    text: Tensor,
    /// In the graph's own memory: every replay writes it anew.
    output: Tensor,
    graph: CudaGraph,
    flops: u64,
}

impl RecordedUNet {
    /// As [`UNet::forward`], without gradients, on a GPU. What is returned holds until the next call.
    pub fn forward(&self, unet: &UNet, x_t: &Tensor, t: &Tensor, text: &Tensor) -> Result<Tensor> {
        let _no_grad = tch::no_grad_guard();
        let mut recordings = self.recordings.borrow_mut();
        let fits = |r: &Recording| r.x_t.size() == x_t.size() && r.text.size() == text.size();
        let place = match recordings.iter().position(fits) {
            Some(place) => place,
            None => {
                recordings.push(
                    Recording::make(unet, x_t, t, text).context("recording a denoising step (rollout.cuda_graph)")?,
                );
                recordings.len() - 1
            }
        };
        recordings[place].replay(x_t, t, text)
    }
}

impl Recording {
    fn make(unet: &UNet, x_t: &Tensor, t: &Tensor, text: &Tensor) -> Result<Self> {
        ensure_gpu(x_t.device(), "rollout.cuda_graph = true")?;
        let Device::Cuda(index) = x_t.device() else { unreachable!("ensure_gpu") };
        let (x_t, t, text) = (x_t.copy(), t.copy(), text.copy());
        synchronize(index)?;
        let before = flops::counted();
        // CUDA records no work of the default stream
        let side = SideStream::enter(index)?;
        for _ in 0..WARM_UP {
            let _ = unet.forward(&x_t, &t, &text);
        }
        synchronize(index)?;
        let flops = (flops::counted() - before) / WARM_UP as u64;
        let (graph, output) = CudaGraph::record(|| unet.forward(&x_t, &t, &text))?;
        drop(side);
        Ok(Recording { x_t, t, text, output, graph, flops })
    }

    fn replay(&mut self, x_t: &Tensor, t: &Tensor, text: &Tensor) -> Result<Tensor> {
        self.x_t.copy_(x_t);
        self.t.copy_(t);
        self.text.copy_(text);
        self.graph.replay()?;
        flops::add_counted(self.flops);
        Ok(self.output.shallow_clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        miniature::EMBEDDED_MODEL,
        models::{
            folder::{ModelFiles, ModelLocation},
            pipeline::Pipeline,
        },
    };
    use tch::Kind;

    #[test]
    fn on_the_cpu_it_is_one_clear_error() {
        let files = ModelFiles::read(&ModelLocation::Embedded(EMBEDDED_MODEL)).unwrap();
        let pipeline = Pipeline::from_files(files, Device::Cpu).unwrap();
        let [c, h, w] = pipeline.latent_shape();
        let x_t = Tensor::zeros([1, c, h, w], (Kind::Float, Device::Cpu));
        let text = pipeline.embed(&["a"]).unwrap();
        let recorded = RecordedUNet::default();
        let error = recorded.forward(&pipeline.unet, &x_t, &Tensor::from_slice(&[1i64]), &text).unwrap_err();
        assert!(format!("{error:#}").contains("rollout.cuda_graph = true needs a GPU"), "{error:#}");
    }
}
