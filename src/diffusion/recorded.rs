//! The U-Net's work of a denoising step as a CUDA graph: recorded once per network and shape, then replayed with one call
//! instead of the thousand launches that it is made of. The same kernels on the same weights, so the same results.

use std::cell::{Cell, RefCell};

use anyhow::{ensure, Context, Result};
use tch::{Device, Tensor};

use crate::{
    device::{
        ensure_gpu, synchronize,
        torch_cuda::{empty_cache, CudaGraph, GraphPool, SideStream},
    },
    models::{flops, unet::UNet},
};

/// Runs before recording: libraries choose algorithms and allocate work space in their first calls.
const WARM_UP: usize = 3;

/// What records and replays.
trait Recorder {
    /// Records `work`, which makes one tensor, and that tensor: every replay writes it anew, and it holds until the next
    /// replay of any recording.
    fn record(&self, device: Device, work: &dyn Fn() -> Tensor) -> Result<(Box<dyn Replay>, Tensor)>;
}

trait Replay {
    fn replay(&self) -> Result<()>;
}

impl Replay for CudaGraph {
    fn replay(&self) -> Result<()> {
        CudaGraph::replay(self)
    }
}

/// CUDA graphs whose memory is one pool: each takes as much as a pass works with, and one of them works at a time.
#[derive(Default)]
struct Graphs {
    pool: Cell<Option<GraphPool>>,
}

impl Recorder for Graphs {
    fn record(&self, device: Device, work: &dyn Fn() -> Tensor) -> Result<(Box<dyn Replay>, Tensor)> {
        ensure_gpu(device, "rollout.cuda_graph = true")?;
        let Device::Cuda(index) = device else { unreachable!("ensure_gpu") };
        synchronize(index)?;
        let pool = match self.pool.get() {
            Some(pool) => pool,
            None => GraphPool::new()?,
        };
        self.pool.set(Some(pool));
        // CUDA records no work of the default stream
        let side = SideStream::enter(index)?;
        for _ in 0..WARM_UP {
            drop(work());
        }
        synchronize(index)?;
        // what the warm-up worked with belongs to a stream on which nothing runs again
        empty_cache()?;
        let (graph, output) = CudaGraph::record(pool, work)?;
        drop(side);
        Ok((Box::new(graph), output))
    }
}

/// Recordings of U-Nets, by network and the shapes of its inputs. Weights are read where they lie at every replay, so they
/// may change in place.
pub struct RecordedUNet {
    recorder: Box<dyn Recorder>,
    recordings: RefCell<Vec<Recording>>,
}

impl Default for RecordedUNet {
    fn default() -> Self {
        RecordedUNet { recorder: Box::<Graphs>::default(), recordings: RefCell::default() }
    }
}

struct Recording {
    /// [`UNet::id`], and where its weights lay.
    unet: u64,
    weights: Vec<usize>,
    x_t: Tensor,
    t: Tensor,
    text: Tensor,
    /// In the pool of the recordings: every replay writes it anew.
    output: Tensor,
    recorded: Box<dyn Replay>,
    flops: u64,
}

impl RecordedUNet {
    /// As [`UNet::forward`], without gradients, on a GPU. What is returned holds until the next call.
    ///
    /// # Errors
    /// There is no GPU, or it has no memory for the recording; the network's weights have moved since it was recorded.
    pub fn forward(&self, unet: &UNet, x_t: &Tensor, t: &Tensor, text: &Tensor) -> Result<Tensor> {
        let _no_grad = tch::no_grad_guard();
        let mut recordings = self.recordings.borrow_mut();
        let fits = |r: &Recording| {
            r.unet == unet.id() && [&r.x_t, &r.t, &r.text].iter().zip([x_t, t, text]).all(|(a, b)| is_like(a, b))
        };
        let place = match recordings.iter().position(fits) {
            Some(place) => place,
            None => {
                let made = self.record(unet, x_t, t, text);
                recordings.push(made.context("recording a denoising step (rollout.cuda_graph)")?);
                recordings.len() - 1
            }
        };
        recordings[place].replay(unet, x_t, t, text)
    }

    fn record(&self, unet: &UNet, x_t: &Tensor, t: &Tensor, text: &Tensor) -> Result<Recording> {
        let (x_t, t, text) = (x_t.copy(), t.copy(), text.copy());
        // operations of one pass; none of these is work of the run
        let operations = Cell::new(0);
        let pass = || {
            let (output, made) = flops::apart(|| unet.forward(&x_t, &t, &text));
            operations.set(made);
            output
        };
        let (recorded, output) = self.recorder.record(x_t.device(), &pass)?;
        let (weights, flops) = (unet.weight_addresses(), operations.get());
        Ok(Recording { unet: unet.id(), weights, x_t, t, text, output, recorded, flops })
    }
}

fn is_like(a: &Tensor, b: &Tensor) -> bool {
    (a.size(), a.kind(), a.device()) == (b.size(), b.kind(), b.device())
}

impl Recording {
    fn replay(&mut self, unet: &UNet, x_t: &Tensor, t: &Tensor, text: &Tensor) -> Result<Tensor> {
        ensure!(
            self.weights == unet.weight_addresses(),
            "the weights of a recorded U-Net lie elsewhere than when it was recorded: the replay would read what was there"
        );
        self.x_t.copy_(x_t);
        self.t.copy_(t);
        self.text.copy_(text);
        self.recorded.replay()?;
        flops::add_counted(self.flops);
        Ok(self.output.shallow_clone())
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use super::*;
    use crate::{
        miniature::EMBEDDED_MODEL,
        models::{
            flat_parameters::FlatParameters,
            folder::{ModelFiles, ModelLocation},
            pipeline::Pipeline,
        },
    };
    use tch::Kind;

    fn pipeline() -> Pipeline {
        let files = ModelFiles::read(&ModelLocation::Embedded(EMBEDDED_MODEL)).unwrap();
        Pipeline::from_files(files, Device::Cpu).unwrap()
    }

    fn inputs(pipeline: &Pipeline, rows: i64) -> (Tensor, Tensor, Tensor) {
        let [c, h, w] = pipeline.latent_shape();
        let options = (Kind::Float, Device::Cpu);
        let x_t = (Tensor::arange(rows * c * h * w, options) * 0.37).sin().view([rows, c, h, w]);
        let text = pipeline.embed(&["a"]).unwrap().expand([rows, -1, -1], false);
        (x_t, Tensor::full([rows], 501, (Kind::Int64, Device::Cpu)), text)
    }

    #[test]
    fn on_the_cpu_it_is_one_clear_error() {
        let pipeline = pipeline();
        let (x_t, t, text) = inputs(&pipeline, 1);
        let error = RecordedUNet::default().forward(&pipeline.unet, &x_t, &t, &text).unwrap_err();
        assert!(format!("{error:#}").contains("rollout.cuda_graph = true needs a GPU"), "{error:#}");
    }

    /// As [`Graphs`] on the CPU: the work runs as often as it does there; a replay leaves the output as it was recorded.
    #[derive(Default)]
    struct Double {
        recorded: Rc<RefCell<Vec<usize>>>,
    }

    struct Replayed(usize, Rc<RefCell<Vec<usize>>>);

    impl Recorder for Double {
        fn record(&self, _: Device, work: &dyn Fn() -> Tensor) -> Result<(Box<dyn Replay>, Tensor)> {
            (0..WARM_UP).for_each(|_| drop(work()));
            let mut replays = self.recorded.borrow_mut();
            replays.push(0);
            Ok((Box::new(Replayed(replays.len() - 1, self.recorded.clone())), work()))
        }
    }

    impl Replay for Replayed {
        fn replay(&self) -> Result<()> {
            self.1.borrow_mut()[self.0] += 1;
            Ok(())
        }
    }

    fn doubled() -> (RecordedUNet, Rc<RefCell<Vec<usize>>>) {
        let double = Double::default();
        let replays = double.recorded.clone();
        (RecordedUNet { recorder: Box::new(double), recordings: RefCell::default() }, replays)
    }

    #[test]
    fn a_network_is_never_answered_with_the_recording_of_another() {
        let (one, other) = (pipeline(), pipeline());
        tch::no_grad(|| {
            for p in &other.unet_parameters.entries {
                let _ = p.tensor.shallow_clone().g_mul_scalar_(1.01);
            }
        });
        let (recorded, replays) = doubled();
        for rows in [1, 2, 1] {
            let (x_t, t, text) = inputs(&one, rows);
            for unet in [&one.unet, &other.unet] {
                let plain = tch::no_grad(|| unet.forward(&x_t, &t, &text));
                assert_eq!(recorded.forward(unet, &x_t, &t, &text).unwrap(), plain, "{rows} rows");
            }
        }
        assert_eq!(*replays.borrow(), [2, 2, 1, 1]);
    }

    #[test]
    fn weights_that_moved_are_an_error_and_those_that_changed_in_place_none() {
        let pipeline = pipeline();
        let (x_t, t, text) = inputs(&pipeline, 1);
        let (recorded, _) = doubled();
        let forward = || recorded.forward(&pipeline.unet, &x_t, &t, &text).map(drop);
        forward().unwrap();
        tch::no_grad(|| drop(pipeline.unet_parameters.entries[0].tensor.shallow_clone().g_mul_scalar_(2.0)));
        forward().unwrap();
        // gives the weights another place
        let _flat = FlatParameters::new(&[pipeline.trainable()]).unwrap();
        let error = forward().unwrap_err().to_string();
        assert!(error.contains("lie elsewhere than when it was recorded"), "{error}");
    }

    #[test]
    fn warm_up_and_recording_are_no_operations_of_the_run() {
        let pipeline = pipeline();
        let (x_t, t, text) = inputs(&pipeline, 1);
        let (_, once) = flops::apart(|| tch::no_grad(|| pipeline.unet.forward(&x_t, &t, &text)));
        let (recorded, _) = doubled();
        let (_, operations) =
            flops::apart(|| (0..3).for_each(|_| drop(recorded.forward(&pipeline.unet, &x_t, &t, &text))));
        assert!(once > 0);
        assert_eq!(operations, 3 * once);
    }
}
