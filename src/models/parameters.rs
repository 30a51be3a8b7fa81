//! Named parameters of a network, and where they come from while it is built.

use std::{cell::RefCell, collections::BTreeMap, rc::Rc, sync::Mutex};

use anyhow::{bail, ensure, Result};
use tch::{Device, Kind, Tensor};

use super::{
    layers::channels_last,
    lora::{LoraPair, LoraSettings},
};
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
    /// What the source gave, on the host, where `tensor` is a rounding of it.
    given: RefCell<Option<Tensor>>,
}

impl Parameter {
    pub fn new(name: impl Into<String>, tensor: &Tensor) -> Self {
        let (shape, tensor) = (tensor.size(), tensor.shallow_clone());
        Parameter { name: name.into(), shape, tensor, given: RefCell::new(None) }
    }

    /// Its values as the source gave them, without the rounding of the network's number type: what training starts from
    /// and what a file of the model holds. Without a gradient.
    pub fn exact(&self) -> Tensor {
        self.given.borrow().as_ref().unwrap_or(&self.tensor).detach()
    }

    /// Lets go of what the source gave: from now on [`Parameter::exact`] is the network's own tensor.
    pub fn forget_given(&self) {
        self.given.take();
    }
}

impl Parameters {
    /// Number of scalars.
    pub fn count(&self) -> u64 {
        self.entries.iter().map(|p| p.shape.iter().product::<i64>() as u64).sum()
    }

    /// [`Parameter::exact`] by name.
    pub fn exact(&self) -> BTreeMap<String, Tensor> {
        self.entries.iter().map(|p| (p.name.clone(), p.exact())).collect()
    }

    /// [`Parameter::forget_given`] of all.
    pub fn forget_given(&self) {
        self.entries.iter().for_each(Parameter::forget_given);
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
            let taken = take(&mut lora.source, full, &shape, init, Kind::Float, device)?;
            let tensor = taken.tensor.shallow_clone();
            lora.parameters.entries.push(taken);
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
        let taken = take(&mut state.source, full, shape, init, state.kind, state.device)?;
        let tensor = taken.tensor.shallow_clone();
        state.parameters.entries.push(taken);
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

fn take(source: &mut Source, name: String, shape: &[i64], init: Init, kind: Kind, device: Device) -> Result<Parameter> {
    let given = match source {
        Source::Tensors(tensors) => {
            let Some(t) = tensors.remove(&name) else { bail!("tensor {name} is missing") };
            ensure!(t.size() == shape, "tensor {name} has shape {:?}, the config asks for {shape:?}", t.size());
            ensure!(t.is_floating_point(), "tensor {name} has type {:?}, expected floating-point numbers", t.kind());
            t
        }
        Source::Seeded(seed) => draw(*seed, &name, shape, init),
        Source::ShapesOnly => {
            let zero = Tensor::zeros(vec![1; shape.len()], (kind, device)).expand(shape, false);
            return Ok(Parameter::new(name, &zero));
        }
    };
    let taken = Parameter::new(name, &placed(&given, kind, device));
    if kind != Kind::Float && given.kind() != kind {
        taken.given.replace(Some(given));
    }
    Ok(taken)
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
        // where there cannot be another thread, this one does it all
        (0..helpers).for_each(|_| drop(std::thread::Builder::new().spawn_scoped(scope, work)));
        work();
    });
    Tensor::from_slice(&values)
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn a_rounded_parameter_keeps_what_its_source_gave() {
        let given = Tensor::from_slice(&[0.1f32, -0.0, 1.0 + 1.0 / 512.0, 65504.0]);
        for stored in [Kind::Float, Kind::Half, Kind::BFloat16] {
            for kind in [Kind::Float, Kind::BFloat16] {
                let file = BTreeMap::from([("w".to_string(), given.to_kind(stored))]);
                let builder = Builder::new(Source::Tensors(file), kind, Device::Cpu);
                let tensor = builder.parameter("w", &[4], Init::Zeros).unwrap();
                assert_eq!(tensor.kind(), kind);
                let (parameters, _) = builder.finish();
                let parameter = &parameters.entries[0];
                let bits = |t: &Tensor| t.to_kind(Kind::Float).view_dtype(Kind::Int);
                assert_eq!(bits(&parameter.exact()), bits(&given.to_kind(stored)), "{stored:?} in {kind:?}");
                parameters.forget_given();
                assert_eq!(bits(&parameter.exact()), bits(&tensor));
            }
        }
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
