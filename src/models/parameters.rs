//! Named parameters of a network: where they come from while it is built, and the flat buffer they are trained in.

use std::{cell::RefCell, collections::BTreeMap, rc::Rc, sync::Mutex};

use anyhow::{bail, ensure, Result};
use tch::{Device, Kind, Tensor};

use super::{
    layers::channels_last,
    lora::{LoraPair, LoraSettings},
};
use crate::kernels::FlatBuffer;
use crate::random::{Coordinates, Purpose, Stream};

/// How a parameter is drawn when no checkpoint gives it.
#[derive(Clone, Copy, Debug)]
pub enum Init {
    Zeros,
    Ones,
    /// N(0, std²).
    Normal(f64),
    /// U(−bound, bound).
    Uniform(f64),
}

/// Where the parameters of a network come from.
pub enum Source {
    /// Tensors of a checkpoint by name; every parameter must be there with its shape.
    Tensors(BTreeMap<String, Tensor>),
    /// Random initial weights, a function of the seed and the parameter's name.
    Seeded(u64),
    /// Shapes only: every parameter is one zero, seen as often as its shape asks. A network of them takes no memory and
    /// costs as many operations as any other; what it computes means nothing.
    ShapesOnly,
}

/// The parameters of one network in the order in which it was built.
#[derive(Default)]
pub struct Parameters {
    pub entries: Vec<Parameter>,
}

pub struct Parameter {
    pub name: String,
    pub shape: Vec<i64>,
    /// Shares its tensor with the layer that uses it.
    pub tensor: Tensor,
}

impl Parameters {
    /// Number of scalars.
    pub fn count(&self) -> u64 {
        self.entries.iter().map(|p| p.shape.iter().product::<i64>() as u64).sum()
    }

    pub fn freeze(&self) {
        for p in &self.entries {
            let _ = p.tensor.shallow_clone().set_requires_grad(false);
        }
    }
}

struct State {
    source: Source,
    kind: Kind,
    device: Device,
    parameters: Parameters,
    lora: Option<Lora>,
}

/// Adapters on the way.
struct Lora {
    settings: LoraSettings,
    source: Source,
    parameters: Parameters,
}

/// Hands out parameters by path while a network is built, and remembers them.
#[derive(Clone)]
pub struct Builder {
    state: Rc<RefCell<State>>,
    prefix: String,
}

impl Builder {
    /// `kind` is the type the network computes in; `device` where it lies.
    pub fn new(source: Source, kind: Kind, device: Device) -> Self {
        let state = State { source, kind, device, parameters: Parameters::default(), lora: None };
        Builder { state: Rc::new(RefCell::new(state)), prefix: String::new() }
    }

    /// Layers that `settings` cover get low-rank adapters, whose values come from `source`; call before building.
    pub fn with_lora(self, settings: LoraSettings, source: Source) -> Self {
        self.state.borrow_mut().lora = Some(Lora { settings, source, parameters: Parameters::default() });
        self
    }

    /// The adapter of the layer being built, where it gets one; always f32.
    pub fn lora(&self, inputs: i64, outputs: i64) -> Result<Option<LoraPair>> {
        let layer = self.prefix.trim_end_matches('.');
        let mut guard = self.state.borrow_mut();
        let device = guard.device;
        let Some(lora) = guard.lora.as_mut().filter(|lora| lora.settings.covers(layer)) else { return Ok(None) };
        let rank = lora.settings.rank;
        let mut factor = |name: &str, shape: [i64; 2], init| -> Result<Tensor> {
            let full = format!("{layer}.{name}.weight");
            let tensor = take(&mut lora.source, &full, &shape, init, Kind::Float, device)?;
            let entry = Parameter { name: full, shape: shape.to_vec(), tensor: tensor.shallow_clone() };
            lora.parameters.entries.push(entry);
            Ok(tensor)
        };
        let a = factor("lora_A", [rank, inputs], Init::Uniform((inputs as f64).powf(-0.5)))?;
        let b = factor("lora_B", [outputs, rank], Init::Zeros)?;
        Ok(Some(LoraPair { a, b, scale: lora.settings.scale() }))
    }

    /// The adapters that were built.
    pub fn finish_lora(&self) -> Option<(LoraSettings, Parameters)> {
        self.state.borrow_mut().lora.take().map(|lora| (lora.settings, lora.parameters))
    }

    /// What `make` builds, with the parameters (adapters included) that it took.
    pub fn with_parameters<T>(&self, make: impl FnOnce() -> Result<T>) -> Result<(T, Vec<Tensor>)> {
        let counts = |state: &State| {
            let adapters = state.lora.as_ref().map_or(0, |lora| lora.parameters.entries.len());
            (state.parameters.entries.len(), adapters)
        };
        let before = counts(&self.state.borrow());
        let made = make()?;
        let state = self.state.borrow();
        let adapters = state.lora.as_ref().map_or(&[][..], |lora| &lora.parameters.entries[before.1..]);
        let taken = state.parameters.entries[before.0..].iter().chain(adapters);
        Ok((made, taken.map(|p| p.tensor.shallow_clone()).collect()))
    }

    /// The builder of a part: names below it get `name.` in front.
    pub fn sub(&self, name: impl std::fmt::Display) -> Builder {
        Builder { state: self.state.clone(), prefix: format!("{}{name}.", self.prefix) }
    }

    /// The parameter `name` of shape `shape`.
    ///
    /// # Errors
    /// It is missing from the checkpoint, or has another shape there.
    pub fn parameter(&self, name: &str, shape: &[i64], init: Init) -> Result<Tensor> {
        let full = format!("{}{name}", self.prefix);
        let mut guard = self.state.borrow_mut();
        let state = &mut *guard;
        let tensor = take(&mut state.source, &full, shape, init, state.kind, state.device)?;
        state.parameters.entries.push(Parameter { name: full, shape: shape.to_vec(), tensor: tensor.shallow_clone() });
        Ok(tensor)
    }

    /// Ends the building: the parameters, and the names in the checkpoint that nothing asked for.
    pub fn finish(self) -> (Parameters, Vec<String>) {
        let mut state = self.state.borrow_mut();
        let unused = match &state.source {
            Source::Tensors(rest) => rest.keys().cloned().collect(),
            _ => Vec::new(),
        };
        (std::mem::take(&mut state.parameters), unused)
    }
}

fn take(source: &mut Source, name: &str, shape: &[i64], init: Init, kind: Kind, device: Device) -> Result<Tensor> {
    Ok(match source {
        Source::Tensors(tensors) => {
            let Some(t) = tensors.remove(name) else { bail!("tensor {name} is missing") };
            ensure!(t.size() == shape, "tensor {name} has shape {:?}, the config asks for {shape:?}", t.size());
            ensure!(t.is_floating_point(), "tensor {name} has type {:?}, expected floating-point numbers", t.kind());
            placed(&t, kind, device)
        }
        Source::Seeded(seed) => placed(&draw(*seed, name, shape, init), kind, device),
        Source::ShapesOnly => Tensor::zeros(vec![1; shape.len()], (kind, device)).expand(shape, false),
    })
}

/// On a GPU the kernels of convolutions are channels-last, as their activations are: libraries would convert them in
/// every call.
fn placed(values: &Tensor, kind: Kind, device: Device) -> Tensor {
    let placed = values.to_device(device).to_kind(kind);
    match (device, placed.dim()) {
        (Device::Cpu, _) | (_, 0..=3) => placed,
        _ => channels_last(&placed),
    }
}

/// Initial values: a stream of its own for every parameter, told apart by a hash of the name (FNV-1a).
fn draw(seed: u64, name: &str, shape: &[i64], init: Init) -> Tensor {
    let name_hash =
        name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    let at = Coordinates {
        iteration: (name_hash >> 32) as u32,
        sample: name_hash as u32,
        ..Coordinates::new(seed, Purpose::WeightInit)
    };
    let options = (Kind::Float, Device::Cpu);
    let count = shape.iter().product::<i64>() as usize;
    match init {
        Init::Zeros => Tensor::zeros(shape, options),
        Init::Ones => Tensor::ones(shape, options),
        Init::Normal(std) => drawn(at, count, |stream, out| stream.fill_normal(out)).view(shape) * std,
        Init::Uniform(bound) => {
            let fill = |stream: &mut Stream, out: &mut [f32]| {
                out.iter_mut().for_each(|value| *value = stream.between(-bound, bound) as f32);
            };
            drawn(at, count, fill).view(shape)
        }
    }
}

/// `count` numbers of a stream, one word each, by as many threads as libtorch uses.
fn drawn(at: Coordinates, count: usize, fill: impl Fn(&mut Stream, &mut [f32]) + Sync) -> Tensor {
    /// Numbers of a thread's piece; whole blocks of four words.
    const PIECE: usize = 1 << 16;
    let mut values = vec![0f32; count];
    let pieces = Mutex::new(values.chunks_mut(PIECE).enumerate());
    let work = || loop {
        let piece = pieces.lock().expect("a panic ends the process").next();
        let Some((i, out)) = piece else { break };
        fill(&mut at.stream().from_block((i * PIECE / 4) as u32), out);
    };
    std::thread::scope(|scope| {
        let helpers = count.div_ceil(PIECE).min(tch::get_num_threads().max(1) as usize).saturating_sub(1);
        (0..helpers).for_each(|_| drop(scope.spawn(work)));
        work();
    });
    Tensor::from_slice(&values)
}

/// Every parameter starts at a multiple of this many scalars (64 bytes of f32), so that the kernels of the CPU
/// libraries see the same alignment as in a tensor of its own.
const ALIGN: usize = 16;

/// One entry of the flat buffer's table.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct LayoutEntry {
    pub name: String,
    pub shape: Vec<i64>,
    /// First scalar in the flat buffer.
    pub offset: usize,
}

impl LayoutEntry {
    /// Its scalars in the flat buffer.
    pub fn range(&self) -> std::ops::Range<usize> {
        self.offset..self.offset + self.shape.iter().product::<i64>() as usize
    }
}

/// The trainable parameters of a network as one flat f32 buffer. A network that computes in f32 has views of the
/// buffer as its tensors; one that computes in bf16 has rounded copies, which [`FlatParameters::publish`] renews. Gaps
/// between parameters hold zeros.
pub struct FlatParameters {
    flat: FlatBuffer,
    pub layout: Vec<LayoutEntry>,
    leaves: Vec<Tensor>,
    /// Some leaves are rounded copies.
    rounded: bool,
}

impl FlatParameters {
    /// Moves the parameters of one or more networks into one buffer and makes them leaves that require a gradient.
    /// f32 or bf16, all on one device: the buffer lies there too.
    pub fn new(networks: &[&Parameters]) -> Result<Self> {
        let entries: Vec<&Parameter> = networks.iter().flat_map(|n| &n.entries).collect();
        let device = entries.first().map_or(Device::Cpu, |p| p.tensor.device());
        let mut layout = Vec::new();
        let mut end = 0usize;
        for p in &entries {
            ensure!(
                matches!(p.tensor.kind(), Kind::Float | Kind::BFloat16),
                "parameter {} is {:?}, training wants f32 or bf16",
                p.name,
                p.tensor.kind()
            );
            ensure!(p.tensor.device() == device, "parameter {} is not on {device:?}", p.name);
            layout.push(LayoutEntry { name: p.name.clone(), shape: p.shape.clone(), offset: end });
            let count = p.shape.iter().product::<i64>() as usize;
            end = (end + count).next_multiple_of(ALIGN);
        }
        let flat = FlatBuffer::zeros(end, device);
        let (mut leaves, mut rounded) = (Vec::new(), false);
        for (entry, p) in layout.iter().zip(&entries) {
            let mut view = flat.part(entry.range()).view(entry.shape.as_slice()).detach();
            tch::no_grad(|| view.copy_(&p.tensor));
            let mut leaf = p.tensor.shallow_clone();
            if leaf.kind() == Kind::Float {
                leaf.set_data(&view);
            } else {
                rounded = true;
            }
            leaves.push(leaf.set_requires_grad(true));
        }
        Ok(FlatParameters { flat, layout, leaves, rounded })
    }

    /// Scalars in the buffer, the gaps included.
    pub fn len(&self) -> usize {
        self.flat.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The network's tensors, leaves of the autograd graph, in layout order.
    pub fn leaves(&self) -> &[Tensor] {
        &self.leaves
    }

    /// Makes a bf16 network see what was written to the buffer; an f32 network sees it anyway.
    pub fn publish(&self) {
        if !self.rounded {
            return;
        }
        tch::no_grad(|| {
            for (entry, leaf) in self.layout.iter().zip(&self.leaves) {
                let value = self.flat.part(entry.range()).view(entry.shape.as_slice());
                leaf.shallow_clone().copy_(&value);
            }
        });
    }

    pub fn device(&self) -> Device {
        self.flat.device()
    }

    pub fn buffer(&self) -> &FlatBuffer {
        &self.flat
    }

    /// The buffer to write to; call [`FlatParameters::publish`] afterwards. Autograd does not notice a change, so no
    /// graph may be alive across a write.
    pub fn buffer_mut(&mut self) -> &mut FlatBuffer {
        &mut self.flat
    }

    /// Copies the gradient of leaf `index` into its place in `out`, a buffer like this one.
    pub fn put_gradient(layout: &LayoutEntry, gradient: &Tensor, out: &FlatBuffer) {
        tch::no_grad(|| out.part(layout.range()).view(layout.shape.as_slice()).copy_(gradient));
    }

    /// Every parameter as a tensor of its own with the values of `flat` (weights or an average of them).
    pub fn unflatten(&self, flat: &[f32]) -> BTreeMap<String, Tensor> {
        let tensor_of = |entry: &LayoutEntry| Tensor::from_slice(&flat[entry.range()]).view(entry.shape.as_slice());
        self.layout.iter().map(|entry| (entry.name.clone(), tensor_of(entry))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gradients_in(flat: &FlatParameters, gradients: &[Tensor]) -> Vec<f32> {
        let out = FlatBuffer::zeros(flat.len(), Device::Cpu);
        let entries = flat.layout.iter().zip(gradients);
        entries.for_each(|(entry, gradient)| FlatParameters::put_gradient(entry, gradient, &out));
        out.host().into_owned()
    }

    #[test]
    fn the_flat_buffer_is_the_network() {
        let builder = Builder::new(Source::Seeded(1), Kind::Float, Device::Cpu);
        let w = builder.sub("a").parameter("weight", &[3, 5], Init::Uniform(1.0)).unwrap();
        let b = builder.parameter("bias", &[3], Init::Ones).unwrap();
        let before = w.copy();
        let (parameters, _) = builder.finish();
        let mut flat = FlatParameters::new(&[&parameters]).unwrap();
        assert_eq!(w, before);
        assert_eq!(flat.layout[1].offset, 16);
        flat.buffer_mut().slice_mut()[16..19].copy_from_slice(&[1.0, 2.0, 3.0]);
        assert_eq!(Vec::<f32>::try_from(&b).unwrap(), [1.0, 2.0, 3.0]);

        let loss = (w.sum(Kind::Float) * 2.0) + (&b * &b).sum(Kind::Float);
        let gradients = Tensor::run_backward(&[loss], flat.leaves(), false, false);
        let out = gradients_in(&flat, &gradients);
        assert_eq!(out[..15], [2.0; 15]);
        assert_eq!(out[16..19], [2.0, 4.0, 6.0]);
        assert_eq!(flat.unflatten(&flat.buffer().host())["a.weight"], before);
    }

    #[test]
    fn a_bf16_network_follows_its_f32_buffer() {
        let builder = Builder::new(Source::Seeded(1), Kind::BFloat16, Device::Cpu);
        let w = builder.parameter("weight", &[2], Init::Ones).unwrap();
        let (parameters, _) = builder.finish();
        let mut flat = FlatParameters::new(&[&parameters]).unwrap();
        flat.buffer_mut().slice_mut()[..2].copy_from_slice(&[1.001, 3.0]);
        flat.publish();
        // 1.001 rounds to 1 in bf16, and the buffer keeps it
        assert_eq!(Vec::<f32>::try_from(w.to_kind(Kind::Float)).unwrap(), [1.0, 3.0]);
        assert_eq!(flat.buffer().slice()[..2], [1.001, 3.0]);
        let loss = (&w * &w).sum(Kind::Float);
        let out = gradients_in(&flat, &Tensor::run_backward(&[loss], flat.leaves(), false, false));
        assert_eq!(out[..2], [2.0, 6.0]);
    }

    #[test]
    fn threads_draw_the_numbers_of_one_stream() {
        let at = Coordinates::new(3, Purpose::WeightInit);
        let count = 3 * (1 << 16) + 7;
        let mut expected = vec![0f32; count];
        at.stream().fill_normal(&mut expected);
        let normal = drawn(at, count, |stream, out| stream.fill_normal(out));
        assert_eq!(Vec::<f32>::try_from(&normal).unwrap(), expected);
        let mut stream = at.stream();
        let expected: Vec<f32> = (0..count).map(|_| stream.uniform() as f32).collect();
        let uniform = drawn(at, count, |stream, out| out.iter_mut().for_each(|v| *v = stream.uniform() as f32));
        assert_eq!(Vec::<f32>::try_from(&uniform).unwrap(), expected);
    }

    #[test]
    fn missing_and_misshapen_tensors_are_named() {
        let tensors = BTreeMap::from([("a.weight".to_string(), Tensor::zeros([2], (Kind::Float, Device::Cpu)))]);
        let builder = Builder::new(Source::Tensors(tensors), Kind::Float, Device::Cpu);
        let e = builder.parameter("b", &[1], Init::Zeros).unwrap_err().to_string();
        assert!(e.contains("tensor b is missing"), "{e}");
        let e = builder.sub("a").parameter("weight", &[3], Init::Zeros).unwrap_err().to_string();
        assert!(e.contains("a.weight") && e.contains("[2]") && e.contains("[3]"), "{e}");
    }
}
